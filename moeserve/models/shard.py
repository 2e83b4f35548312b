"""What an expert worker takes of a packed model: the records of its shard, and nothing else."""

from __future__ import annotations

import mmap
from contextlib import closing

import torch

from moeserve.cache.tiers.disk_store import DiskStore
from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ExpertKey, ModelError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.worker import HeldExperts
from moeserve.models.packed_model import PackedModel, is_packed, mapped_advice, worker_identity
from moeserve.models.read_weights import check_packed_settings, read_packed
from moeserve.models.registry import find_model


def load_shard(
    config: ModelConfig, shard: Shard, native: NativeRuntime, mapped: bool = False
) -> HeldExperts:
    """mapped: experts are used where they lie in the page cache, which all processes share; else
    they are read, with their checksums, into memory of this process, and so of its NUMA node.

    Raises ModelError, ConfigError, StoreError.
    """
    found = find_model(config)
    if not is_packed(found.path):
        raise ModelError(
            f"{config.model}: its experts cannot be read one by one",
            hint=f"run `moeserve pack {config.model} OUT` once and use OUT",
        )
    check_packed_settings(config, torch.device("cpu"))
    advice = mapped_advice() if mapped else mmap.MADV_RANDOM
    with closing(PackedModel(found.path, advice)) as packed:
        weights = read_packed(packed, packed, found, config, native).weights
        layers: dict[int, PackedExperts] = {}
        for layer in found.spec.moe_layers:
            experts = weights[f"layers.{layer}.experts.gate_up"]
            assert isinstance(experts, PackedExperts), "routed experts are packed as such"
            _keep(experts, shard, layer, None if mapped else packed)
            layers[layer] = experts
        identity = worker_identity(packed, config.quantize_activations, native.isa)
    if not any(shard.experts(experts.spec.num_experts) for experts in layers.values()):
        most = max((experts.spec.num_experts for experts in layers.values()), default=0)
        raise ConfigError(
            f"shard: {shard} has no expert of {config.model}, whose layers have at most {most}",
            field="shard",
        )
    return HeldExperts(identity, shard, layers)


def _keep(experts: PackedExperts, shard: Shard, layer: int, packed: PackedModel | None) -> None:
    """Lets go of all records but the shard's, and copies those from the files of `packed`."""
    own = shard.experts(experts.spec.num_experts)
    for expert in range(experts.spec.num_experts):
        if expert not in own:
            experts.native.clear_record(expert)
    if packed is None or not own:
        return
    on_disk = packed.on_disk(f"layers.{layer}.experts")
    records = {ExpertKey(layer, expert): on_disk[expert] for expert in own}
    memory = _native.allocate(len(own) * experts.record_bytes).reshape(len(own), -1)
    with closing(DiskStore(records)) as store:
        for place, key in zip(memory, records, strict=True):
            store.read(key, 0, place.data)
            store.check(key, place.data)
            experts.native.set_record(key.expert, place)
