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
    """ConfigError for settings of an emulated device without one, or one without settings."""
    if model.device == "emulated" and not experts.has_device_slots:
        raise ConfigError(
            "device: emulated: how many experts have room there?",
            field="device",
            hint="give --device-memory or --device-slots",
        )
    if model.device == "emulated" and experts.cpu_backend not in ("auto", "native"):
        raise ConfigError(
            f"cpu_backend: {experts.cpu_backend}: an emulated device computes with native kernels",
            field="cpu_backend",
            hint="choose --cpu-backend native",
        )
    if model.device != "emulated":
        for name, default in (
            ("device_memory_bytes", None),
            ("device_slots", None),
            ("device_profile", ExpertConfig.device_profile),
            ("emulate_cpu", False),
        ):
            if getattr(experts, name) != default:
                raise ConfigError(
                    f"{name}: it is for an emulated device, and device is {model.device}",
                    field=name,
                    hint="give --device emulated, or leave it out",
                )
