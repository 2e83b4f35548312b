"""A model as its sizes: from config.json alone, from a checkpoint's headers, or from a packed
directory. No weight is read.

Sizes come from the same rules and layouts that the loader uses (`stores_of`), so they are exact.
A config.json does not say how quantised tensors are laid out; the layout of the published
checkpoints is assumed then (`published_names`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.models.checkpoint import Checkpoint, read_model_config
from moeserve.models.families import FAMILIES
from moeserve.models.family import Family
from moeserve.models.packed_model import PackedForms, PackedModel, is_packed
from moeserve.models.packed_targets import rules_by_store, stores_of, tied_head_rules
from moeserve.models.read_weights import DTYPES, choose_dtype
from moeserve.models.spec import AttentionSpec, MlaSpec, ModelSpec, MoeFfnSpec, Quantization
from moeserve.models.stores import Store
from moeserve.models.targets import EMBEDDING, HEAD
from moeserve.models.weight_formats import ChooseForm, weight_formats
from moeserve.models.weight_map import Use, WeightRule
from moeserve.planner.shapes import AttentionShape, ExpertsShape, LayerShape, Matrix, ModelShape

#: what a family's published checkpoints call the codes and scales of a tensor
CODE_SUFFIXES: Mapping[Quantization, tuple[str, ...]] = {
    Quantization.NONE: (),
    Quantization.FP8_BLOCKS: ("_scale_inv",),
    Quantization.MXFP4: ("_blocks", "_scales"),
}
CODED_USES = (Use.PRODUCT, Use.GATE_UP, Use.DOWN)


@dataclass(frozen=True)
class _Source:
    """A model as far as its files say: config.json, and the weights' names and forms if any."""

    path: Path
    spec: ModelSpec
    dtype: torch.dtype
    rules: Sequence[WeightRule]
    choose: ChooseForm | None  # None: plain tensors
    packed: bool = False


def read_shape(config: ModelConfig, path: Path, native: bool = True) -> ModelShape:
    """The sizes of the model at `path`: a config.json, a checkpoint or a packed directory.

    native: whether the native kernels may be used, as on every CPU that they run on: weights are
    packed for them, except float16 ones that nobody rounds.

    Raises ModelError for an unknown family, a field that is not implemented or broken files;
    ConfigError for settings that the model cannot have.
    """
    _check_native(config, native)
    raw, _ = read_model_config(path, FAMILIES)
    family = FAMILIES[raw["model_type"]]
    spec = family.spec(raw, str(path if path.is_file() else path / "config.json"))
    _check_context(config, spec)
    if path.is_dir() and is_packed(path):
        if config.quantize != "none":
            raise ConfigError(
                f"quantize: {config.quantize}: {config.model} is packed already",
                field="quantize",
                hint="leave it out, or plan for the checkpoint itself",
            )
        if not native:
            raise ConfigError(
                f"device: {config.device}: {config.model} is packed, for the native CPU backend",
                field="device",
                hint="leave out --device and --cpu-backend, or plan for the checkpoint itself",
            )
        with closing(PackedModel(path)) as packed:
            return _shape(config, _packed_source(packed, spec, family, config))
    if path.is_dir() and any(path.glob("*.safetensors*")):
        with closing(Checkpoint.open(path)) as checkpoint:
            dtype = choose_dtype(config.dtype, raw, checkpoint)[0]
            names = checkpoint.names()
    else:
        return _from_config(config, path, spec, family, _stated_dtype(config, raw), native)
    rules = family.weight_rules(spec, names, dtype)
    choose = _formats(config, dtype, native)
    return _shape(config, _Source(path, spec, dtype, rules, choose))


def _from_config(
    config: ModelConfig,
    path: Path,
    spec: ModelSpec,
    family: Family,
    dtype: torch.dtype,
    native: bool,
) -> ModelShape:
    """Without any weights: one layer of each kind is looked at, and the others are like it. (The
    tensors of 58 layers of 256 experts take seconds to be named.)"""
    kinds = {layer: place for place, layer in enumerate(dict.fromkeys(spec.layers))}
    few = replace(spec, layers=tuple(kinds))
    rules = family.weight_rules(few, published_names(family, few, dtype), dtype)
    choose = _formats(config, dtype, native)
    found = _shape(config, _Source(path, few, dtype, rules, choose))
    places = [kinds[layer] for layer in spec.layers]
    layers = tuple(replace(found.layers[place], index=index) for index, place in enumerate(places))
    sizes: Counter[int] = Counter()
    rest = 0
    for rule in rules:
        place, size = place_of(rule.target), torch.Size(rule.shape).numel()
        if place is None:
            rest += size
        else:
            sizes[place] += size
    num_parameters = rest + sum(sizes[place] for place in places)
    return replace(found, layers=layers, num_parameters=num_parameters)


def place_of(target: str) -> int | None:
    """The layer that a target belongs to: of `layers.3.qkv.weight` it is 3."""
    kind, _, rest = target.partition(".")
    return int(rest.split(".")[0]) if kind == "layers" else None


def published_names(family: Family, spec: ModelSpec, dtype: torch.dtype) -> list[str]:
    """The names of a published checkpoint's tensors, as far as rules look at them."""
    rules = family.weight_rules(spec, (), dtype)
    names = {name for rule in rules for part in rule.parts for name in part.names}
    suffixes = CODE_SUFFIXES[spec.quantization]
    coded = {
        f"{name}{suffix}"
        for rule in rules
        if rule.use in CODED_USES
        for part in rule.parts
        for name in part.names
        for suffix in suffixes
    }
    return sorted(names | coded)


def _check_native(config: ModelConfig, native: bool) -> None:
    if config.quantize != "none" and not native:
        raise ConfigError(
            f"quantize: {config.quantize} needs the native CPU backend",
            field="quantize",
            hint="leave out --quantize, or plan for --device cpu or emulated",
        )


def _formats(config: ModelConfig, dtype: torch.dtype, native: bool) -> ChooseForm | None:
    """None where weights are tensors. On the CPU torch multiplies float16 ones, which the kernels
    do not keep; an emulated device has no other kernels, and they are refused."""
    plain = dtype is torch.float16 and config.quantize == "none" and config.device == "cpu"
    return weight_formats(config, dtype) if native and not plain else None


def _check_context(config: ModelConfig, spec: ModelSpec) -> None:
    wanted = config.context_tokens
    if wanted is not None and wanted > spec.context_tokens:
        raise ConfigError(
            f"context_tokens: {wanted} is above what the model was made for"
            f" ({spec.context_tokens})",
            field="context_tokens",
        )


def _stated_dtype(config: ModelConfig, raw: Mapping[str, Any]) -> torch.dtype:
    """As asked, else as config.json says, else bfloat16: what models are published in."""
    stated = config.dtype
    if stated == "auto":
        stated = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if not isinstance(stated, str) or stated not in DTYPES:
        raise ModelError(
            f"config.json: dtype: {stated!r} is not one of {', '.join(DTYPES)}",
            field="dtype",
            hint="choose one of them with --dtype",
        )
    return DTYPES[stated]


def _packed_source(
    packed: PackedModel, spec: ModelSpec, family: Family, config: ModelConfig
) -> _Source:
    manifest = packed.manifest
    dtype = DTYPES[manifest.dtype]
    if config.dtype not in ("auto", manifest.dtype):
        raise ConfigError(
            f"dtype: {config.dtype}: {config.model} was packed to compute in {manifest.dtype}",
            field="dtype",
            hint="leave it out, or pack the model again",
        )
    integers = config.quantize_activations
    choose = PackedForms(packed, None if integers is None else not integers)
    rules = family.weight_rules(spec, (), dtype)
    return _Source(packed.path, spec, dtype, rules, choose, packed=True)


def _shape(config: ModelConfig, source: _Source) -> ModelShape:
    spec, dtype = source.spec, source.dtype
    if source.choose is not None:
        by_store = rules_by_store(spec, source.rules)
        stores = {s.name: s for s in stores_of(spec, source.rules, source.choose, dtype)}
    else:
        by_store = {rule.target: [rule] for rule in source.rules}
        stores = {r.target: Store(r.target, r.shape, r.dtype or dtype) for r in source.rules}
        for rule in tied_head_rules(spec):
            by_store[rule.target], stores[rule.target] = [rule], Store(HEAD, (0,), dtype)
    pieces = {name: _Piece(stores[name], by_store[name]) for name in stores}
    ends = {name: piece for name, piece in pieces.items() if not name.startswith("layers.")}
    head, embedding = ends.pop(HEAD), ends.pop(EMBEDDING)
    return ModelShape(
        name=config.name if config.name != "config.json" else source.path.parent.name,
        path=source.path,
        model_type=spec.model_type,
        dtype=str(dtype).removeprefix("torch."),
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        context_tokens=config.context_tokens or spec.context_tokens,
        num_parameters=sum(torch.Size(rule.shape).numel() for rule in source.rules),
        embedding_bytes=embedding.num_bytes,
        other_bytes=sum(piece.num_bytes for piece in ends.values()),
        head=head.matrix(HEAD),
        layers=tuple(_layer(spec, index, pieces) for index in range(spec.num_layers)),
        native=source.choose is not None,
        packed=source.packed,
    )


@dataclass(frozen=True)
class _Piece:
    """One stored weight and the rules that fill it."""

    store: Store
    rules: Sequence[WeightRule]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.store.shape).numel() * self.store.dtype.itemsize

    @property
    def is_matrix(self) -> bool:
        """Whether rows are multiplied with it."""
        return bool(self.store.forms) or self.rules[0].use.is_matrix or self.is_per_head

    @property
    def is_per_head(self) -> bool:
        """The ups of latent attention: torch multiplies with them, head by head."""
        return self.rules[0].use is Use.PER_HEAD

    @property
    def form(self) -> str:
        if self.store.forms:
            return self.store.forms[0].describe()
        return str(self.store.dtype).removeprefix("torch.")

    def matrix(self, name: str) -> Matrix:
        """As one product: the rows of all its matrices, over the inputs of the first."""
        weights = [rule for rule in self.rules if len(rule.shape) >= 2]
        numbers = sum(torch.Size(rule.shape).numel() for rule in weights)
        cols = weights[0].shape[-1]
        return Matrix(
            name,
            numbers // cols,
            cols,
            self.form,
            self.num_bytes,
            packed=bool(self.store.forms),
            per_head=self.is_per_head,
            ffn=len(self.store.forms) > 1,
        )


def _layer(spec: ModelSpec, index: int, pieces: Mapping[str, _Piece]) -> LayerShape:
    prefix = f"layers.{index}."
    own = {n.removeprefix(prefix): p for n, p in pieces.items() if n.startswith(prefix)}
    routed = {name: piece for name, piece in own.items() if name.split(".")[0] == "experts"}
    rest = {name: piece for name, piece in own.items() if name not in routed}
    layer = spec.layers[index]
    experts = None
    if isinstance(layer.ffn, MoeFfnSpec):
        shape = layer.ffn.experts
        num_bytes = sum(piece.num_bytes for piece in routed.values())
        experts = ExpertsShape(
            spec=shape,
            top_k=layer.ffn.router.top_k,
            form=next(iter(routed.values())).form,
            record_bytes=num_bytes // shape.num_experts,
        )
    return LayerShape(
        index=index,
        attention=_attention(layer.attention),
        products=tuple(piece.matrix(name) for name, piece in rest.items() if piece.is_matrix),
        other_bytes=sum(piece.num_bytes for piece in rest.values() if not piece.is_matrix),
        experts=experts,
    )


def _attention(spec: AttentionSpec | MlaSpec) -> AttentionShape:
    heads, width = spec.kv_shape
    if isinstance(spec, MlaSpec):
        scores, value, window = width, spec.kv_lora_rank, None
    else:
        scores, value, window = spec.head_dim, spec.head_dim, spec.window
    return AttentionShape(
        num_heads=spec.num_heads,
        score_width=scores,
        value_width=value,
        kv_heads=heads,
        kv_width=width,
        window=window,
    )
