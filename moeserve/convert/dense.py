"""The dense checkpoint: whether it can be converted, and its layers, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.config import ModelConfig
from moeserve.core import ModelError
from moeserve.environment import read_environment
from moeserve.models.checkpoint import Checkpoint, read_json
from moeserve.models.families import FAMILIES
from moeserve.models.family import Family
from moeserve.models.hub import resolve_model
from moeserve.models.loader import check_names, load_weights
from moeserve.models.packed_model import is_packed
from moeserve.models.registry import find_model
from moeserve.models.spec import AttentionSpec, DenseFfnSpec, ModelSpec, Quantization
from moeserve.models.targets import Weight
from moeserve.models.weight_map import WeightRule

#: what can be converted
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "W_pack")
EMBEDDING = "model.embed_tokens.weight"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class DenseModel:
    """A dense model on disk; nothing of it is in memory but what a method returns."""

    path: Path
    name: str
    raw: Mapping[str, Any]
    family: Family
    spec: ModelSpec
    checkpoint: Checkpoint
    rules: tuple[WeightRule, ...]

    @property
    def attention(self) -> AttentionSpec:
        """Of the first layer; all are alike but for their windows."""
        attention = self.spec.layers[0].attention
        assert isinstance(attention, AttentionSpec), "dense families have grouped attention"
        return attention

    @property
    def ffn(self) -> DenseFfnSpec:
        ffn = self.spec.layers[0].ffn
        assert isinstance(ffn, DenseFfnSpec), "checked when it was opened"
        return ffn

    @property
    def context_tokens(self) -> int:
        """Up to the shortest sliding window: within it, no token is out of a query's sight."""
        attentions = [layer.attention for layer in self.spec.layers]
        windows = [a.window for a in attentions if isinstance(a, AttentionSpec) and a.window]
        return min([self.spec.context_tokens, *windows])

    def layer(self, index: int) -> dict[str, Weight]:
        """The weights of a layer in float32, by the names the builder gives them."""
        prefix = f"layers.{index}."
        rules = [rule for rule in self.rules if rule.target.startswith(prefix)]
        loaded = self._load(rules)
        return {name.removeprefix(prefix): weight for name, weight in loaded.items()}

    def end(self, target: str) -> Tensor:
        """ "norm", in float32."""
        (rule,) = [rule for rule in self.rules if rule.target == target]
        weight = self._load([rule])[target]
        assert isinstance(weight, Tensor)
        return weight

    def _load(self, rules: list[WeightRule]) -> dict[str, Weight]:
        return load_weights(self.checkpoint, rules, ignore=(".*",), dtype=torch.float32, device=CPU)

    @property
    def head_name(self) -> str:
        """The tensor from hidden states to logits."""
        tied = self.spec.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else "lm_head.weight"


@contextmanager
def open_dense(config: ModelConfig) -> Iterator[DenseModel]:
    """Raises ModelError for a model that is not there, not dense, damaged, or cannot be cut up."""
    path = resolve_model(config, read_environment())
    _check_type(path)
    found = find_model(replace(config, model=str(path), revision=None))
    spec = found.spec
    if is_packed(found.path):
        raise ModelError(
            f"{found.path}: packed weights", hint="convert the checkpoint it was packed from"
        )
    if spec.moe_layers:
        raise ModelError(
            f"{found.path}: {spec.model_type} is a Mixture-of-Experts already",
            field="model_type",
            hint="serve it as it is",
        )
    _check_spec(found.path, spec)
    checkpoint = Checkpoint.open(found.path)
    try:
        rules = found.family.weight_rules(spec, checkpoint.names(), torch.float32)
        _check_fused(checkpoint)
        ignored, tied = found.family.ignored_names(spec), found.family.tied_names(spec)
        check_names(checkpoint, rules, ignored, tied, torch.float32)
        norm = [rule for rule in rules if rule.target == "norm"]
        load_weights(  # compares copies of tied weights
            checkpoint, norm, ignore=(".*",), tied=tied, dtype=torch.float32, device=CPU
        )
        yield DenseModel(
            found.path,
            _name(config, found.path),
            found.raw,
            found.family,
            spec,
            checkpoint,
            tuple(rules),
        )
    finally:
        checkpoint.close()


def _check_type(path: Path) -> None:
    """Refuses what is neither one of the dense families nor a Mixture-of-Experts that moeserve
    knows: that it is one already says the families' own config."""
    model_type = read_json(path / "config.json").get("model_type")
    if model_type not in (*DENSE_FAMILIES, *FAMILIES):
        raise ModelError(
            f"{path}: cannot be converted: model_type: {model_type!r:.80}; allowed: "
            f"{', '.join(DENSE_FAMILIES)}",
            field="model_type",
            hint="attention, norms and FFNs of other families are not what is written",
        )


def _name(config: ModelConfig, path: Path) -> str:
    """The hub id, or the directory's name, be it given as `.`"""
    local = path == Path(config.model).expanduser()
    return Path(os.path.abspath(path)).name if local else config.model


def _check_spec(path: Path, spec: ModelSpec) -> None:
    """Refuses what glm4_moe cannot express."""
    problem = None
    if spec.quantization is not Quantization.NONE:
        problem = f"quantised weights ({spec.quantization.value}); neurons need plain ones"
    alike = {replace(_attention(path, layer.attention), window=None) for layer in spec.layers}
    if len(alike) != 1 or len({layer.ffn for layer in spec.layers}) != 1:
        problem = "layers that differ"
    first = next(iter(alike))
    if first.output_bias:
        problem = "attention_bias with a bias after attention, which glm4_moe has not"
    ffn = spec.layers[0].ffn
    if isinstance(ffn, DenseFfnSpec) and ffn.bias:
        problem = "mlp_bias: glm4_moe's experts have no biases"
    if problem is not None:
        raise ModelError(f"{path}: cannot be converted: {problem}")


def _attention(path: Path, attention: object) -> AttentionSpec:
    if not isinstance(attention, AttentionSpec):
        raise ModelError(f"{path}: cannot be converted: latent attention")
    return attention


def _check_fused(checkpoint: Checkpoint) -> None:
    fused = [name for name in checkpoint.names() if any(part in name for part in FUSED)]
    if fused:
        raise ModelError(
            f"{checkpoint.path}: fused projections, such as {fused[0]}",
            hint="load and save it with transformers, which takes them apart",
        )
