"""Everything one engine needs, and what its parts must agree on."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeserve.config.experts import ExpertConfig
from moeserve.config.model import KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything one engine needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)

    def __post_init__(self) -> None:
        check_device(self.model, self.experts)


def check_device(model: ModelConfig, experts: ExpertConfig) -> None:
    """ConfigError for settings of slots on a device without one, or a device without settings."""
    stand_in = model.device in ("emulated", "dry-run")
    if stand_in and not experts.has_device_slots:
        raise ConfigError(
            f"device: {model.device}: how many experts have room there?",
            field="device",
            hint="give --device-memory or --device-slots",
        )
    if experts.has_device_slots and model.device == "cpu":
        given = "device_slots" if experts.device_slots is not None else "device_memory_bytes"
        raise ConfigError(
            f"{given}: it is for a device beside the CPU, and device is cpu",
            field=given,
            hint="give --device cuda or emulated, or leave it out",
        )
    if experts.has_device_slots and experts.cpu_backend not in ("auto", "native"):
        raise ConfigError(
            f"cpu_backend: {experts.cpu_backend}: experts that stand on a device, too, are packed"
            " for the native kernels",
            field="cpu_backend",
            hint="choose --cpu-backend native",
        )
    if model.device != "emulated":
        for name, default in (
            ("device_profile", ExpertConfig.device_profile),
            ("emulate_cpu", False),
        ):
            if getattr(experts, name) != default:
                raise ConfigError(
                    f"{name}: it is for an emulated device, and device is {model.device}",
                    field=name,
                    hint="give --device emulated, or leave it out",
                )
    if model.device.startswith("cuda") and experts.is_tiered and not experts.has_device_slots:
        raise ConfigError(
            "host_memory: with --device cuda all experts stand on the device, unless it has slots"
            " for some",
            field="host_memory_bytes",
            hint="give --device-memory, too",
        )
