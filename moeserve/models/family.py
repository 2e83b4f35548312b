"""What a family file declares: how its config.json is read and what its checkpoints call things."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeserve.models.config_reader import ConfigReader
from moeserve.models.sources import DEFAULT_NAMES, FfnNames
from moeserve.models.spec import ModelSpec
from moeserve.models.weight_map import WeightRule
from moeserve.models.weight_rules import ExpertRules, model_rules, separate_or_packed


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face transformers.

    read: a whole config.json, every field of it; raises ModelError.
    ffn_names: from the names in a checkpoint, for a family whose layouts use different ones.
    """

    model_type: str
    read: Callable[[ConfigReader], ModelSpec]
    ffn_names: FfnNames | Callable[[Collection[str]], FfnNames] = DEFAULT_NAMES
    expert_rules: ExpertRules = separate_or_packed

    def spec(self, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """Raises ModelError that names a field which is missing, wrong or not implemented."""
        return self.read(ConfigReader(config, where))

    def weight_rules(
        self, spec: ModelSpec, names: Collection[str], dtype: torch.dtype
    ) -> list[WeightRule]:
        """How the tensors of a checkpoint with those names fill the model."""
        ffn_names = (
            self.ffn_names if isinstance(self.ffn_names, FfnNames) else self.ffn_names(names)
        )
        return model_rules(spec, names, dtype, ffn_names, self.expert_rules)

    @staticmethod
    def ignored_names(spec: ModelSpec) -> tuple[str, ...]:
        """Patterns of tensors that may be there and are not used."""
        first = spec.num_layers
        extra = range(first, first + spec.num_prediction_layers)
        # Old checkpoints carry the rotary frequencies that config.json already says.
        frequencies = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
        return (frequencies, *(rf"model\.layers\.{layer}\..*" for layer in extra))

    @staticmethod
    def tied_names(spec: ModelSpec) -> dict[str, str]:
        """Names that stand for another tensor."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if spec.tie_word_embeddings else {}
