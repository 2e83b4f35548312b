"""From a model's name to a model that runs: find, read config.json, load, build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moeserve.config import ExpertConfig, ModelConfig, read_environment
from moeserve.core import ConfigError, ModelError
from moeserve.experts.layer import ExpertRuntime, build_expert_runtime
from moeserve.models import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    llama,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moeserve.models.builder import build_transformer
from moeserve.models.checkpoint import Checkpoint, read_generation_config, read_model_config
from moeserve.models.family import Family
from moeserve.models.hub import resolve_model
from moeserve.models.loader import load_weights
from moeserve.models.spec import ModelSpec
from moeserve.models.targets import HeapMemory, PackedTargets, Targets, TensorTargets
from moeserve.models.transformer import Transformer
from moeserve.models.weight_formats import (
    ChooseForm,
    describe_forms,
    describe_quantization,
    weight_formats,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        module.FAMILY.model_type: module.FAMILY
        for module in (
            deepseek_v2,
            deepseek_v3,
            glm4_moe,
            gpt_oss,
            llama,
            mixtral,
            olmoe,
            qwen2_moe,
            qwen3,
            qwen3_moe,
        )
    }
)
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what its files said about using it.

    context_tokens: the longest sequence it may be given. notes: what was chosen, and why.
    """

    model: Transformer
    spec: ModelSpec
    path: Path
    eos_token_ids: tuple[int, ...]
    context_tokens: int
    num_parameters: int
    dtype: torch.dtype
    device: torch.device
    notes: dict[str, str]
    runtime: ExpertRuntime

    def close(self) -> None:
        """Ends the threads that compute experts."""
        self.runtime.close()


def load_model(
    config: ModelConfig, expert_config: ExpertConfig, progress: Progress | None = None
) -> LoadedModel:
    """Finds, checks and loads a model. progress: called with a stage and its fraction, 0 to 1.

    Raises ModelError for a model that cannot be served, ConfigError for settings that do not fit.
    """
    path = resolve_model(config, read_environment())
    raw, notes = read_model_config(path, FAMILIES)
    family = FAMILIES[raw["model_type"]]
    spec = family.spec(raw, str(path / "config.json"))
    context_tokens = _context_tokens(config, spec)
    device = _device(config.device)
    experts = {i: ffn.experts for i, ffn in spec.moe_layers.items()}
    with Checkpoint.open(path) as checkpoint:
        dtype, notes["dtype"] = _dtype(config.dtype, raw, checkpoint)
        quantized = config.quantize != "none"
        runtime = build_expert_runtime(expert_config, experts, device, dtype, quantized)
        names = checkpoint.names()
        rules = family.weight_rules(spec, names, dtype)
        choose = _choose_form(config, dtype, runtime)
        targets: Targets = TensorTargets(dtype, device, spec.tie_word_embeddings)
        notes["weights"] = f"{_name(dtype)} tensors"
        if choose is not None and runtime.native is not None:
            targets = PackedTargets(spec, runtime.native, choose, dtype, HeapMemory())
            notes["weights"] = f"packed; {describe_forms(rules, choose)}"
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
    eos_token_ids = _eos_token_ids(raw, read_generation_config(path), spec, notes)
    model = build_transformer(spec, weights, runtime)
    return LoadedModel(
        model=model,
        spec=spec,
        path=path,
        eos_token_ids=eos_token_ids,
        context_tokens=context_tokens,
        num_parameters=sum(torch.Size(rule.shape).numel() for rule in rules),
        dtype=dtype,
        device=device,
        notes={**notes, **runtime.notes},
        runtime=runtime,
    )


def _choose_form(
    config: ModelConfig, dtype: torch.dtype, runtime: ExpertRuntime
) -> ChooseForm | None:
    """How weights are packed; None where they are plain tensors."""
    if runtime.native is not None:
        return weight_formats(config, dtype)
    if config.quantize != "none":
        raise ConfigError(
            f"quantize: {config.quantize} needs the native CPU backend",
            field="quantize",
            hint="leave out --quantize, or use --cpu-backend native on --device cpu",
        )
    return None


def _context_tokens(config: ModelConfig, spec: ModelSpec) -> int:
    wanted, most = config.context_tokens, spec.context_tokens
    if wanted is not None and wanted > most:
        raise ConfigError(
            f"context_tokens: {wanted} is above what the model was made for ({most})",
            field="context_tokens",
        )
    return wanted or most


def _device(name: str) -> torch.device:
    """The device, tried out. Raises ConfigError where it is not there."""
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # torch raises either, depending on the build
        raise ConfigError(
            f"device: {name!r} cannot be used: {error}",
            field="device",
            hint="install a torch with support for it, or choose another device",
        ) from error


def _dtype(wanted: str, raw: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[torch.dtype, str]:
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
        return dtype, f"{_name(dtype)}, as the checkpoint stores {embedding}"
    raise ModelError("config.json: dtype: missing", field="dtype", hint="choose one with --dtype")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eos_token_ids(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    spec: ModelSpec,
    notes: dict[str, str],
) -> tuple[int, ...]:
    """End-of-sequence ids, from generation_config.json where it names any, else config.json."""
    found = generation.get("eos_token_id")
    if found is None:
        found = raw.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ModelError(f"eos_token_id: {found!r}: expected token ids", field="eos_token_id")
    outside = [each for each in ids if not 0 <= each < spec.vocab_size]
    if outside:
        notes["eos_token_id"] = f"ignored {outside}, outside the vocabulary of {spec.vocab_size}"
    return tuple(each for each in ids if each not in outside)
