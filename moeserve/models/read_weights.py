"""A model's weights from its directory: of a checkpoint, or packed before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.family import Family
from moeserve.models.group_choice import choose_groups
from moeserve.models.loader import load_weights
from moeserve.models.packed_model import PackedForms, PackedModel
from moeserve.models.packed_targets import PackedTargets, tied_head_rules
from moeserve.models.spec import ModelSpec
from moeserve.models.stores import Memory
from moeserve.models.targets import Targets, TensorTargets, Weight
from moeserve.models.weight_formats import (
    ChooseForm,
    describe_forms,
    describe_quantization,
    weight_formats,
)
from moeserve.models.weight_map import WeightRule

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class FoundModel:
    """A model's directory and its config.json, raw and understood."""

    path: Path
    raw: Mapping[str, Any]
    family: Family
    spec: ModelSpec
    notes: dict[str, str]


@dataclass(frozen=True)
class ReadWeights:
    """Weights by target name, and notes about them."""

    weights: dict[str, Weight]
    num_parameters: int
    notes: dict[str, str]


def read_checkpoint(
    checkpoint: Checkpoint,
    found: FoundModel,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    native: NativeRuntime | None,
    memory: Memory,
    progress: Progress | None,
) -> ReadWeights:
    """native: None for weights as plain tensors; else they are packed into `memory`.

    Raises ModelError; ConfigError for `quantize` without `native`.
    """
    family, spec = found.family, found.spec
    rules = family.weight_rules(spec, checkpoint.names(), dtype)
    choose: ChooseForm | None = None
    targets: Targets = TensorTargets(dtype, device, spec.tie_word_embeddings)
    notes = {"weights": f"{name_of(dtype)} tensors"}
    if native is not None:
        choose = formats = weight_formats(config, dtype)
        if config.quantize == "int4" and config.quantize_group == "auto":
            groups = choose_groups(checkpoint, rules, formats, progress)
            choose = replace(formats, groups=groups)
        targets = PackedTargets(spec, native, choose, dtype, memory)
        notes["weights"] = f"packed; {describe_forms([*rules, *tied_head_rules(spec)], choose)}"
    elif config.quantize != "none":
        raise ConfigError(
            f"quantize: {config.quantize} needs the native CPU backend",
            field="quantize",
            hint="leave out --quantize, or use --cpu-backend native on --device cpu",
        )
    quantization = describe_quantization(spec, rules, choose, dtype)
    if quantization is not None:
        notes["quantization"] = quantization
    weights = load_weights(
        checkpoint,
        rules,
        ignore=family.ignored_names(spec),
        tied=family.tied_names(spec),
        dtype=dtype,
        device=device,
        targets=targets,
        check_weights=config.check_weights,
        progress=progress,
    )
    return ReadWeights(weights, _num_parameters(rules), notes)


def check_packed_settings(config: ModelConfig, device: torch.device) -> None:
    """Refuses, before anything is read, what a packed directory cannot do. Raises ConfigError."""
    fix = "leave it out, or serve the checkpoint itself"
    if device.type != "cpu":
        raise ConfigError(
            f"device: {device}: packed weights are for the CPU's kernels", field="device", hint=fix
        )
    if config.quantize != "none":
        raise ConfigError(
            f"quantize: {config.quantize}: {config.model} is packed already",
            field="quantize",
            hint=fix,
        )
    if config.check_weights:
        raise ConfigError(
            "check_weights: weights are checked when they are packed",
            field="check_weights",
            hint="run `moeserve pack --check-weights`",
        )


def read_packed(
    packed: PackedModel,
    memory: Memory,
    found: FoundModel,
    config: ModelConfig,
    native: NativeRuntime | None,
) -> ReadWeights:
    """memory: `packed` itself, or what takes only a part of it.

    Raises ModelError for a directory that is broken, ConfigError for settings it cannot have."""
    stated = packed.manifest.dtype
    if config.dtype not in ("auto", stated):
        raise ConfigError(
            f"dtype: {config.dtype}: {config.model} was packed to compute in {stated}",
            field="dtype",
            hint="leave it out, or pack the model again",
        )
    if native is None:
        raise ConfigError(
            "cpu_backend: packed weights are for the native backend",
            field="cpu_backend",
            hint="choose --cpu-backend native, or serve the checkpoint itself",
        )
    spec, dtype = found.spec, DTYPES[stated]
    integers = config.quantize_activations
    choose = PackedForms(packed, None if integers is None else not integers)
    # No names of a checkpoint: the targets of a family do not depend on them, only their parts do.
    rules = found.family.weight_rules(spec, (), dtype)
    targets = PackedTargets(spec, native, choose, dtype, memory)
    weights = targets.finish(targets.make(rules))
    notes = {
        "dtype": f"{stated}, as it was packed",
        "weights": f"mapped; {describe_forms([*rules, *tied_head_rules(spec)], choose)}",
    }
    return ReadWeights(weights, _num_parameters(rules), notes)


def _num_parameters(rules: Sequence[WeightRule]) -> int:
    return sum(torch.Size(rule.shape).numel() for rule in rules)


def choose_dtype(
    wanted: str, raw: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[torch.dtype, str]:
    """The compute dtype and why: asked for, else config.json's, else the checkpoint's."""
    if wanted != "auto":
        return DTYPES[wanted], f"{wanted}, asked for"
    stated = raw.get("dtype") or raw.get("torch_dtype")
    if stated is not None:
        if not isinstance(stated, str) or stated not in DTYPES:
            raise ModelError(
                f"config.json: dtype: {stated!r} is not one of {', '.join(DTYPES)}",
                field="dtype",
                hint="choose one of them with --dtype",
            )
        return DTYPES[stated], f"{stated}, from config.json"
    embedding = "model.embed_tokens.weight"
    if embedding in checkpoint and checkpoint.dtype(embedding) in DTYPES.values():
        dtype = checkpoint.dtype(embedding)
        return dtype, f"{name_of(dtype)}, as the checkpoint stores {embedding}"
    raise ModelError("config.json: dtype: missing", field="dtype", hint="choose one with --dtype")


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")
