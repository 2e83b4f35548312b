"""Which model, its kv, and which tokens run in a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeserve.config.fields import at_least, one_of, setting
from moeserve.core import ConfigError

QUANTIZE_GROUPS = (32, 64, 128, "auto")
BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "tiny-moe"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, in what precision, on what device."""

    model: str = setting(str(BUNDLED_MODEL), "local directory or hub id")
    served_name: str | None = setting(
        None, "name that clients use; default: the last part of `model`"
    )
    revision: str | None = setting(None, "hub revision (branch, tag or commit)")
    offline: bool = setting(False, "never reach the network")
    dtype: str = setting("auto", "auto (what config.json says), float32, bfloat16, float16")
    device: str = setting(
        "cpu",
        "cpu, cuda or cuda:N; emulated: experts as on a device that is not there, at its speed; "
        "dry-run: what runs on a GPU, by torch on the CPU",
    )
    quantize: str = setting(
        "none", "none, int8 or int4: the weights of products on the CPU, rounded as they are read"
    )
    quantize_group: int | str = setting(
        32, "int4: inputs that share a scale: 32, 64, 128, or auto: for each matrix by its error"
    )
    quantize_zero_points: bool = setting(False, "int4: a zero point for every group, too")
    quantize_head: str = setting(
        "int8", "with int4: int8 or int4 for the output head, whose errors go into the logits"
    )
    quantize_activations: bool | None = setting(
        None,
        "multiply int8, int4 and mxfp4 weights in integers, inputs rounded to int8 per token; "
        "default: with --quantize, and not for the codes that a checkpoint comes with",
    )
    check_weights: bool = setting(False, "refuse NaN and Inf in the weights; reads them all")
    context_tokens: int | None = setting(None, "context length in tokens; default: the model's")

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError(
                "model: the name is empty",
                field="model",
                hint="name a directory or a hub id; without a name it is the bundled model",
            )
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        one_of("quantize", self.quantize, ("none", "int8", "int4"))
        if self.quantize_group not in QUANTIZE_GROUPS:
            raise ConfigError(
                f"quantize_group: {self.quantize_group!r} is not one of 32, 64, 128, auto",
                field="quantize_group",
            )
        one_of("quantize_head", self.quantize_head, ("int8", "int4"))
        for name, default in (
            ("quantize_group", 32),
            ("quantize_zero_points", False),
            ("quantize_head", "int8"),
        ):
            value = getattr(self, name)
            if value != default and self.quantize != "int4":
                raise ConfigError(
                    f"{name}: {value} is for weights of --quantize int4, not {self.quantize}",
                    field=name,
                    hint="leave it out, or give --quantize int4",
                )
        index = self.device.removeprefix("cuda:")
        known = self.device in ("cpu", "cuda", "emulated", "dry-run")
        if not known and not (index != self.device and index.isdigit()):
            raise ConfigError(
                f"device: {self.device!r} is not one of cpu, cuda, cuda:N, emulated, dry-run",
                field="device",
            )
        if self.context_tokens is not None:
            at_least("context_tokens", self.context_tokens, 1)

    @property
    def name(self) -> str:
        return self.served_name or Path(self.model).name


@dataclass(frozen=True, kw_only=True)
class KvConfig:
    """The paged kv pool."""

    block_tokens: int = setting(16, "tokens in one block")
    kv_bytes: int | None = setting(
        None,
        "memory for kv; default: what max_running sequences of full context need, at most 1 GiB, "
        "and at most half of what host_memory_bytes leaves beside the weights of every token",
    )
    num_blocks: int | None = setting(None, "exact number of blocks, instead of kv_bytes")
    prefix_reuse: bool = setting(True, "reuse blocks of equal prefixes across requests")

    def __post_init__(self) -> None:
        at_least("block_tokens", self.block_tokens, 1)
        if self.kv_bytes is not None and self.num_blocks is not None:
            raise ConfigError("kv_bytes and num_blocks contradict each other; give one")
        for name in ("kv_bytes", "num_blocks"):
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, 1)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Which tokens run in the next step."""

    max_batch_tokens: int = setting(512, "token budget of a step, prefill and decode together")
    max_running: int = setting(64, "sequences that may run at once")
    max_waiting: int = setting(1024, "requests that may wait; more are refused as overloaded")
    admission: str = setting("past_future", "past_future, aggressive or conservative")
    history_requests: int = setting(
        1000, "finished requests whose output lengths past_future remembers"
    )
    overtaking: int = setting(
        16, "smaller requests that may start before one that kv has no room for; 0: strict order"
    )
    decode_group: int | None = setting(
        None,
        "most decodes in a step, chosen to want the same experts; more only where deadlines need "
        "them; default: all of them",
    )
    decode_wait_steps: int = setting(
        4, "with decode_group: steps that a decode may be left out in a row, if turns allow"
    )

    def __post_init__(self) -> None:
        one_of("admission", self.admission, ("past_future", "aggressive", "conservative"))
        for name in ("max_batch_tokens", "max_running", "max_waiting", "history_requests"):
            at_least(name, getattr(self, name), 1)
        if self.decode_group is not None:
            at_least("decode_group", self.decode_group, 1)
        for name in ("overtaking", "decode_wait_steps"):
            at_least(name, getattr(self, name), 0)
