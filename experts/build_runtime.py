"""Sets up what the MoE layers of a model share, before the model is there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeserve.cache.expert_cache import Tier, resident_cache
from moeserve.cache.policies.resident import ResidentPolicy
from moeserve.cache.tiers.disk_store import DiskRecord
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError, ExpertKey, ExpertSpec
from moeserve.cpu_backend.backend import Demands
from moeserve.cpu_backend.choice import BackendChoice, choose_backend
from moeserve.cpu_backend.torch_backend import TorchBackend
from moeserve.experts.disk_tier import build_disk_tier
from moeserve.experts.layer_use import count_use, nobody_looks
from moeserve.experts.runtime import ExpertRuntime
from moeserve.experts.schedule.inter_layer import ResidentPrefetch
from moeserve.experts.schedule.intra_layer import ResidentPlacement
from moeserve.experts.supply import ResidentSupply
from moeserve.experts.watch import Watch
from moeserve.predictors.none import NonePredictor


def build_expert_runtime(
    config: ExpertConfig,
    specs: Mapping[int, ExpertSpec],
    device: torch.device,
    dtype: torch.dtype,
    quantized: bool = False,
    on_disk: Mapping[ExpertKey, DiskRecord] | None = None,
) -> ExpertRuntime:
    """specs: of the experts of each MoE layer, by the layer's index in the model. dtype: of the
    model's computation. quantized: its weights are stored in 8 bits or fewer. on_disk: records to
    be read as they are wanted; None: all experts are resident.

    On the CPU the experts stand in the host tier and run on the CPU backend; on another device they
    stand and run there. Raises ConfigError for what is not implemented or cannot run the model.
    """
    num_experts = {layer: spec.num_experts for layer, spec in specs.items()}
    if device.type == "cpu":
        choice = choose_backend(config, Demands(dtype, tuple(specs.values()), quantized))
    else:
        choice = BackendChoice(TorchBackend(), f"unused, experts run on {device.type}", None)
    notes = {"cpu_backend": choice.reason}
    if on_disk is not None:
        if choice.native is None:
            raise ConfigError(
                "host_memory: experts on disk are packed for the native backend",
                field="cpu_backend",
                hint="choose --cpu-backend native",
            )
        watch = Watch()
        tier = build_disk_tier(config, specs, on_disk, choice.native, watch.timeline)
        notes |= tier.notes
        notes["experts"] = tier.slots_in_words
        return ExpertRuntime(
            config=config,
            device=device,
            backend=choice.backend,
            native=choice.native,
            cache=tier.cache,
            supply=tier.supply,
            intra=tier.intra,
            inter=ResidentPrefetch(),
            predictor=NonePredictor(),
            count_use=count_use,
            notes=notes,
            watch=watch,
            disk=tier,
        )
    tier_name = Tier.HOST if device.type == "cpu" else Tier.DEVICE
    cache = resident_cache(tier_name, num_experts, ResidentPolicy())
    notes["experts"] = f"all {cache.num_slots} resident in the {tier_name.value} tier"
    return ExpertRuntime(
        config=config,
        device=device,
        backend=choice.backend,
        native=choice.native,
        cache=cache,
        supply=ResidentSupply(cache),
        intra=ResidentPlacement(),
        inter=ResidentPrefetch(),
        predictor=NonePredictor(),
        count_use=nobody_looks,
        notes=notes,
    )
