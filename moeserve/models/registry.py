"""From a model's name to a model that runs: find, read config.json, load, build."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moeserve.config import ExpertConfig, ModelConfig, check_device
from moeserve.core import ConfigError, ModelError
from moeserve.environment import read_environment
from moeserve.experts.build_runtime import build_expert_runtime
from moeserve.experts.predictor_choice import choose_predictor
from moeserve.experts.runtime import ExpertRuntime
from moeserve.models.builder import (
    build_transformer,
    expert_gates,
    rest_bytes,
    routed_experts,
    shared_bytes,
)
from moeserve.models.checkpoint import Checkpoint, read_generation_config, read_model_config
from moeserve.models.device_weights import on_device
from moeserve.models.families import FAMILIES
from moeserve.models.hub import resolve_model
from moeserve.models.packed_model import (
    PackedModel,
    config_sha256,
    is_packed,
    mapped_advice,
    worker_identity,
)
from moeserve.models.read_weights import (
    DTYPES,
    FoundModel,
    check_packed_settings,
    choose_dtype,
    read_checkpoint,
    read_packed,
)
from moeserve.models.resident_part import ResidentPart
from moeserve.models.safetensors_file import MappedFile
from moeserve.models.spec import ModelSpec
from moeserve.models.stores import HeapMemory
from moeserve.models.targets import HEAD
from moeserve.models.transformer import Transformer

Progress = Callable[[str, float], None]
CheckDirectory = Callable[[Path], object]
#: what torch calls devices that have another name here
TORCH_NAMES: Mapping[str, str] = MappingProxyType({"emulated": "cpu", "dry-run": "cpu"})


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what its files said about using it.

    context_tokens: the longest sequence it may be given. notes: what was chosen, and why.
    resident_bytes: weights that every token needs, where experts' memory is limited.
    mapped: the files that weights are used from where they lie in the page cache.
    kv_elsewhere: kv and the weights of every token are on a device, and none of a limit's business.
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
    resident_bytes: int = 0
    mapped: tuple[MappedFile, ...] = ()
    kv_elsewhere: bool = False

    def check_files(self) -> None:
        """Raises ModelError if a file that weights are mapped from was written to meanwhile."""
        for mapped in self.mapped:
            mapped.file.check_unchanged()

    def close(self) -> None:
        """Ends the threads that compute experts."""
        self.runtime.close()


def find_model(config: ModelConfig) -> FoundModel:
    """Where a model is, and what its config.json says. Raises ModelError, ConfigError."""
    path = resolve_model(config, read_environment())
    raw, notes = read_model_config(path, FAMILIES)
    family = FAMILIES[raw["model_type"]]
    return FoundModel(path, raw, family, family.spec(raw, str(path / "config.json")), notes)


def load_model(
    config: ModelConfig,
    expert_config: ExpertConfig,
    progress: Progress | None = None,
    check: CheckDirectory | None = None,
) -> LoadedModel:
    """Finds, checks and loads a model. progress: called with a stage and its fraction, 0 to 1.
    check: of what else the model's directory must have, before weights are read.

    Raises ModelError for a model that cannot be served, ConfigError for settings that do not fit.
    """
    check_device(config, expert_config)
    found = find_model(config)
    if check is not None:
        check(found.path)
    spec = found.spec
    expert_config, why = choose_predictor(expert_config, found.path)
    if why is not None:
        found.notes["predictor_choice"] = why
    context_tokens = _context_tokens(config, spec)
    device = _device(TORCH_NAMES.get(config.device, config.device))
    beside = expert_config.has_device_slots  # some experts have copies there, all are for the CPU
    place = torch.device("cpu") if beside else device  # where weights are read to
    if beside:
        expert_config = replace(expert_config, cpu_backend="native")
    experts = {i: ffn.experts for i, ffn in spec.moe_layers.items()}
    if beside and not experts:
        raise ConfigError(
            f"device_slots: {config.model} has no experts that could stand in slots",
            field="device_slots",
            hint="leave out --device-slots and --device-memory",
        )
    resident_bytes = 0
    mapped: tuple[MappedFile, ...] = ()
    if expert_config.workers:
        _check_workers(config, expert_config.emulate_cpu, is_packed(found.path))
    if is_packed(found.path):
        check_packed_settings(config, place)
        tiered = expert_config.is_tiered
        if tiered and not experts:
            raise ConfigError(
                f"host_memory: {config.model} has no experts that could stay on disk",
                field="host_memory_bytes",
                hint="leave it out",
            )
        advice = mmap.MADV_SEQUENTIAL if tiered else mapped_advice()
        with closing(PackedModel(found.path, advice)) as packed:
            dtype = DTYPES[packed.manifest.dtype]
            memory: PackedModel | ResidentPart = ResidentPart(packed) if tiered else packed
            on_disk = memory.records if isinstance(memory, ResidentPart) else None
            runtime = build_expert_runtime(expert_config, experts, place, dtype, True, on_disk)
            read = read_packed(packed, memory, found, config, runtime.native)
            if runtime.native is not None:
                integers, isa = config.quantize_activations, runtime.native.isa
                runtime = runtime.with_workers(worker_identity(packed, integers, isa))
            resident_bytes = memory.num_bytes if isinstance(memory, ResidentPart) else 0
            mapped = () if tiered else packed.mapped  # else copied, and read with checksums
    else:
        if expert_config.is_tiered:
            raise ConfigError(
                f"host_memory: the experts of {config.model} cannot be read one by one",
                field="host_memory_bytes",
                hint=f"run `moeserve pack {config.model} OUT` once and serve OUT",
            )
        with closing(Checkpoint.open(found.path)) as checkpoint:
            dtype, found.notes["dtype"] = choose_dtype(config.dtype, found.raw, checkpoint)
            quantized = config.quantize != "none"
            runtime = build_expert_runtime(expert_config, experts, place, dtype, quantized)
            native = runtime.native
            read = read_checkpoint(
                checkpoint, found, config, dtype, place, native, HeapMemory(), progress
            )
    emulated, weights = config.device == "emulated", read.weights
    if emulated:
        runtime = runtime.with_device(
            routed_experts(spec, weights), rest_bytes(weights), shared_bytes(weights)
        )
    elif beside:
        runtime = runtime.beside(routed_experts(spec, weights), device, dtype)
    runtime = runtime.with_predictor(
        lambda: expert_gates(spec, read.weights),  # on the host
        found.path,
        lambda: config_sha256(found.path),
    )
    moved = beside and not emulated
    if moved:
        rules = found.family.weight_rules(spec, (), dtype)
        dtypes = {HEAD: dtype} | {rule.target: rule.dtype or dtype for rule in rules}
        weights = on_device(weights, dtypes, device, spec.tie_word_embeddings)
        runtime = runtime.on(device)
    notes = runtime.notes | found.notes | read.notes
    generation = read_generation_config(found.path)
    return LoadedModel(
        model=build_transformer(spec, weights, runtime),
        spec=spec,
        path=found.path,
        eos_token_ids=_eos_token_ids(found.raw, generation, spec, notes),
        context_tokens=context_tokens,
        num_parameters=read.num_parameters,
        dtype=dtype,
        device=device,
        notes=notes,
        runtime=runtime,
        resident_bytes=0 if moved else resident_bytes,
        mapped=mapped,
        kv_elsewhere=moved,
    )


def _check_workers(config: ModelConfig, emulate_cpu: bool, packed: bool) -> None:
    if config.device not in ("cpu", "emulated"):
        raise ConfigError(
            f"workers: they are for --device cpu, and device is {config.device}",
            field="workers",
            hint="leave out --worker",
        )
    if emulate_cpu:
        raise ConfigError(
            "workers: their time is real, and with emulate_cpu no other is",
            field="workers",
            hint="leave out --worker or --emulate-cpu",
        )
    if not packed:
        raise ConfigError(
            f"workers: the experts of {config.model} cannot be read one by one",
            field="workers",
            hint=f"run `moeserve pack {config.model} OUT` once and serve OUT",
        )


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
