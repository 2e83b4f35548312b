"""The gates of the layers to come on the hidden state of this one.

Between two layers the residual stream changes little, so what the next gates say of it now is
close to what they will say (Fate, arXiv:2502.12224). The chances behind the scores are learned
while serving: what a score is worth differs by layer and distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Routing
from moeserve.predictors.base import NOTHING, Chances, Prediction, Predictor, any_row
from moeserve.predictors.calibration import (
    OUT_OF_REACH,
    Bins,
    Calibration,
    Scores,
    bins_of,
    spread_of,
)
from moeserve.predictors.gates import (
    LayerGate,
    MakeProduct,
    RowProduct,
    check_gates,
    moved_weight,
    plain_product,
)
from moeserve.predictors.layers import LayerRing

#: of that many steps one is compared with what was really chosen
CALIBRATE_EVERY = 8


class View:
    """What one layer sees of the next ones: one product for all of them."""

    def __init__(
        self,
        targets: tuple[LayerGate, ...],
        product: RowProduct,
        calibrations: tuple[Calibration, ...],
    ) -> None:
        """product: [T, H] to [T, D * E], the logits of D targets."""
        self.targets = targets
        self.calibrations = calibrations
        self._product = product
        self._plain = all(target.ranking is None for target in targets)
        self._top_k = targets[0].top_k
        self._units: Scores | None = None  # [D, 1, 1], of the first scores that were seen

    def bins(self, x: Tensor) -> Bins:
        """[T, H] to [D, T, E]: the bins that the targets' scores fall in."""
        scores = self._scores(x)
        if self._units is None:
            units = [spread_of(each) for each in scores]
            self._units = np.array(units, np.float32)[:, None, None]
        return bins_of(scores, self._top_k, self._units)

    def _scores(self, x: Tensor) -> Scores:
        """[T, H] to [D, T, E] that the targets' routers would rank by."""
        logits = self._product(x)
        if not self._plain:
            each = zip(
                self.targets, logits.unflatten(1, (len(self.targets), -1)).unbind(1), strict=True
            )
            ranked = [t.ranking(part) if t.ranking else part for t, part in each]
            logits = torch.cat([part.float() for part in ranked], dim=1)
            logits = logits.clamp_(min=float(OUT_OF_REACH))
        scores: Scores = logits.float().cpu().numpy()
        by_target: Scores = scores.reshape(len(x), len(self.targets), -1).swapaxes(0, 1)
        return by_target


class GatePredictor(Predictor):
    """What gate predictors share: scores by one product, chances by calibration, rows combined."""

    def __init__(self, views: Mapping[int, View]) -> None:
        """views: by the layer they look from; layers without one predict nothing."""
        self._views = views
        self._step = 0
        self._layer = -1
        self._seen: dict[tuple[int, int], Bins] = {}  # [T, E] by (from, of), to compare with

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._seen.clear()  # of layers that did not run, or of which nobody asked

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class; says nothing of the next token's layers."""
        if layer <= self._layer:
            self._step += 1
            self._seen.clear()
        self._layer = layer
        if self._seen:
            self._compare(layer, routing)
        view = self._views.get(layer)
        if view is None or len(x) == 0:
            return NOTHING
        bins = view.bins(x)
        if self._step % CALIBRATE_EVERY == 0:
            for target, seen in zip(view.targets, bins, strict=True):
                self._seen[layer, target.layer] = seen
        found = {}
        for target, calibration, seen in zip(view.targets, view.calibrations, bins, strict=True):
            found[target.layer] = torch.from_numpy(any_row(calibration.chances(seen)))
        return Prediction(found)

    def row_chances(self, layer: int, x: Tensor) -> dict[int, Chances]:
        """By layer ahead, [T, E]: P(chosen) of every row for itself. For evaluation."""
        view = self._views.get(layer)
        if view is None:
            return {}
        bins = view.bins(x)
        each = zip(view.targets, view.calibrations, bins, strict=True)
        return {target.layer: calibration.chances(seen) for target, calibration, seen in each}

    def _compare(self, layer: int, routing: Routing) -> None:
        ids: NDArray[np.int64] = routing.ids.cpu().numpy()
        for behind in self._views:
            seen = self._seen.pop((behind, layer), None)
            if seen is not None and len(seen) == len(ids):
                view = self._views[behind]
                place = next(i for i, gate in enumerate(view.targets) if gate.layer == layer)
                view.calibrations[place].add(seen, ids)


class GateLookahead(GatePredictor):
    """The next layers' norms and gates, as they are, on the current hidden state."""

    name = "gate_lookahead"

    def __init__(
        self, gates: Sequence[LayerGate], depth: int, make_product: MakeProduct = plain_product
    ) -> None:
        """gates: of all MoE layers. depth: layers to look ahead. make_product: how the product with
        the gates is computed. Raises ModelError where the layers differ too much, ConfigError for
        a depth below 1."""
        check_gates(gates)
        ring = LayerRing({gate.layer: gate.num_experts for gate in gates}, depth)
        of = {gate.layer: gate for gate in gates}
        views = {
            layer: lookahead_view(of[layer], [of[n] for n in ring.ahead(layer)], make_product)
            for layer in ring.layers
            if ring.ahead(layer)
        }
        super().__init__(views)


def lookahead_view(
    source: LayerGate, targets: Sequence[LayerGate], make_product: MakeProduct
) -> View:
    """What `source` sees of the layers after it through their own gates."""
    calibrations = tuple(Calibration.guessed() for _ in targets)
    return View(tuple(targets), make_product(*gates_ahead(source, targets)), calibrations)


def gates_ahead(source: LayerGate, targets: Sequence[LayerGate]) -> tuple[Tensor, Tensor | None]:
    """The targets' gates one after the other, for inputs normed for the source: weights [D * E, H]
    and biases [D * E], None where none has any."""
    weight = torch.cat([moved_weight(source, target) for target in targets])
    if all(target.bias is None for target in targets):
        return weight, None
    none = torch.zeros(targets[0].num_experts)
    return weight, torch.cat([none if t.bias is None else t.bias.float() for t in targets])
