"""How often each expert of a layer was chosen of late, whatever the token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from moeserve.core import Routing
from moeserve.predictors.base import NOTHING, Chances, Prediction, Predictor
from moeserve.predictors.layers import LayerRing
from moeserve.predictors.looking_on import LookingOn

if TYPE_CHECKING:
    from torch import Tensor

#: tokens after which a choice counts half
HALF_LIFE_TOKENS = 256
#: tokens' worth of belief, at the start, that all experts are alike
PRIOR_TOKENS = 4.0


class Frequency:
    """Decayed shares of the tokens that chose each expert of one layer."""

    def __init__(self, num_experts: int, half_life_tokens: float = HALF_LIFE_TOKENS) -> None:
        self._decay = 0.5 ** (1 / half_life_tokens)
        self._counts = np.zeros(num_experts)
        self._tokens = 0.0

    def add(self, ids: np.ndarray) -> None:
        """ids: [T, K] of the tokens of one step, which are taken as one moment."""
        num_tokens, top_k = ids.shape
        if self._tokens == 0.0:
            self._counts += PRIOR_TOKENS * top_k / len(self._counts)
            self._tokens = PRIOR_TOKENS
        faded = self._decay**num_tokens
        self._counts *= faded
        self._counts += np.bincount(ids.ravel(), minlength=len(self._counts))
        self._tokens = self._tokens * faded + num_tokens

    def shares(self) -> Chances | None:
        """[E]: P(a token chooses the expert); None before the first token."""
        if self._tokens == 0.0:
            return None
        return np.minimum(self._counts / self._tokens, 1.0).astype(np.float32)


class FrequencyPredictor(Predictor):
    """P(wanted) of the next layers from their own past alone."""

    name = "frequency"
    reads_rows = False

    def __init__(
        self,
        num_experts: Mapping[int, int],
        depth: int,
        half_life_tokens: float = HALF_LIFE_TOKENS,
    ) -> None:
        """num_experts: by the MoE layer's index in the model. depth: layers to look ahead."""
        self._ring = LayerRing(num_experts, depth)
        self._of = {
            layer: Frequency(count, half_life_tokens)
            for layer, count in self._ring.num_experts.items()
        }
        self._looking_on = LookingOn()

    def look_on(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        if self._looking_on.looks(layer) and len(routing.ids):
            self._of[layer].add(routing.ids.cpu().numpy())
        return NOTHING

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class. The layers after the last one are those of the next token."""
        ids = routing.ids.cpu().numpy()
        if len(ids) == 0:
            return Prediction()
        self._of[layer].add(ids)
        found = {}
        for ahead in self._ring.ahead_around(layer):
            shares = self._of[ahead].shares()
            if shares is not None:
                found[ahead] = torch.from_numpy(1 - (1 - shares) ** len(ids))
        return Prediction(found)
