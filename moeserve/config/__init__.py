"""Settings, as frozen dataclasses.

Every field is implemented or refused by name: a value that asks for a room whose content does not
exist yet raises ConfigError where the config is built, never later and never silently.
"""

from moeserve.config.engine import EngineConfig, check_device
from moeserve.config.experts import (
    CPU_BACKENDS,
    POLICIES,
    PREDICTORS,
    TRAINED_PREDICTORS,
    ExpertConfig,
)
from moeserve.config.fields import setting
from moeserve.config.model import (
    BUNDLED_MODEL,
    QUANTIZE_GROUPS,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.config.server import GatewayConfig, HttpConfig, ZmqConfig

__all__ = [
    "BUNDLED_MODEL",
    "CPU_BACKENDS",
    "POLICIES",
    "PREDICTORS",
    "QUANTIZE_GROUPS",
    "TRAINED_PREDICTORS",
    "EngineConfig",
    "ExpertConfig",
    "GatewayConfig",
    "HttpConfig",
    "KvConfig",
    "ModelConfig",
    "SchedulerConfig",
    "ZmqConfig",
    "check_device",
    "setting",
]
