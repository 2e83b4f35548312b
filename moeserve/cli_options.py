"""Command-line flags made from the settings: one name, one help, one default per field."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from moeserve.config import (
    BUNDLED_MODEL,
    EngineConfig,
    ExpertConfig,
    GatewayConfig,
    HttpConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
    ZmqConfig,
)
from moeserve.core import ConfigError

T = TypeVar("T")

ENGINE_SETTINGS = (ModelConfig, KvConfig, SchedulerConfig, ExpertConfig)
#: what matters while a model is packed
PACK_SETTINGS = frozenset(
    (
        "revision",
        "offline",
        "dtype",
        "quantize",
        "quantize_group",
        "quantize_zero_points",
        "quantize_head",
        "quantize_activations",
        "check_weights",
        "num_threads",
    )
)
#: what an expert worker shares with its engine, of the model and of threads
WORKER_SETTINGS = frozenset(
    (
        "revision",
        "offline",
        "dtype",
        "quantize_activations",
        "isa",
        "num_threads",
        "pin_threads",
        "spin_us",
    )
)
UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

#: settings given as an argument of its own, or made from another one
NOT_A_FLAG = {"model", "engine", "http", "zmq"}
#: shorter or clearer names than the field's own
FLAG_NAMES = {
    "endpoint": "zmq",
    "allowed_hosts": "allowed-host",
    "host_memory_bytes": "host-memory",
    "device_memory_bytes": "device-memory",
    "workers": "worker",
}


#: flag, type and help of what every command that generates may be told
SAMPLING_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "most tokens to generate"),
    ("temperature", float, "0: greedy"),
    ("top_k", int, "only so many of the likeliest tokens; 0: all"),
    ("top_p", float, "only the likeliest tokens that make up this probability"),
    ("min_p", float, "only tokens with this share of the likeliest one's probability"),
    ("repetition_penalty", float, "above 1: what was said is less likely"),
    ("seed", int, "the same seed, the same tokens"),
)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for how tokens are chosen. What is not given is left to the model's defaults."""
    group = parser.add_argument_group("Sampling")
    for name, kind, text in SAMPLING_FLAGS:
        short = ["-n"] if name == "max_tokens" else []
        flag = "--" + name.replace("_", "-")
        group.add_argument(
            *short, flag, type=kind, metavar=name.rsplit("_", 1)[-1].upper(), help=text
        )
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop string; repeatable")


def sampling_params(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the flags of `add_sampling_flags`."""
    names = [name for name, _, _ in SAMPLING_FLAGS] + ["stop"]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def parse_bytes(text: str) -> int:
    """A size such as 6GiB, 512MB or 4096. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 6GiB, 512MB or 4096")
    return int(float(match[1]) * UNITS[match[2].lower()])


def add_flags(
    parser: argparse.ArgumentParser, *settings: type, only: Collection[str] | None = None
) -> None:
    """One flag per field of each settings class. only: names of fields; None for all."""
    for cls in settings:
        group = parser.add_argument_group((cls.__doc__ or "").strip().splitlines()[0].rstrip("."))
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in NOT_A_FLAG and (only is None or field.name in only):
                _add_flag(group, field, hints[field.name])


def flags_of(settings: Any, only: Collection[str]) -> list[str]:
    """The flags that make these settings of a dataclass; none for defaults. only: of these."""
    flags: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in only or value == field.default:
            continue
        name = _flag_name(field.name)
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _flag_name(name: str) -> str:
    return FLAG_NAMES.get(name, name).replace("_", "-")


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    flag = "--" + _flag_name(field.name)
    text = field.metadata["help"].replace("%", "%%")
    if field.default not in (None, ()):
        text += f" (default: {field.default})"
    if hint in (bool, bool | None):
        group.add_argument(
            flag,
            dest=field.name,
            action=argparse.BooleanOptionalAction,
            default=field.default,
            help=text,
        )
        return
    if hint == tuple[str, ...]:
        group.add_argument(
            flag, dest=field.name, action=_Append, default=(), metavar="NAME", help=text
        )
        return
    group.add_argument(
        flag,
        dest=field.name,
        type=_parser_of(field.name, hint),
        default=field.default,
        metavar=field.name.rsplit("_", 1)[-1].upper(),
        help=text,
    )


class _Append(argparse.Action):
    """One more value of a repeatable flag; unlike argparse's own action, for settings' tuples."""

    def __call__(
        self, _: argparse.ArgumentParser, args: argparse.Namespace, value: Any, __: Any = None
    ) -> None:
        before = getattr(args, self.dest, None) or ()  # a namespace may be without defaults
        setattr(args, self.dest, (*before, value))


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parser_of(name: str, hint: Any) -> Callable[[str], Any]:
    if hint == int | str:
        return _number_or_word
    if isinstance(hint, types.UnionType):
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
    if name.endswith("_bytes"):
        return parse_bytes
    assert hint in (int, float, str, Path), f"setting {name}: no flag for {hint}"
    return typing.cast(Callable[[str], Any], hint)


def check_output(name: str, path: Path) -> None:
    """Before anything is computed: ConfigError where a file that the flag names could not be
    written, a directory for one."""
    if not path.parent.is_dir():
        raise ConfigError(f"{name}: there is no directory {path.parent}", field=name)
    if path.is_dir():
        raise ConfigError(f"{name}: {path} is a directory", field=name, hint="name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{name}: {path} may not be written", field=name)


def write_output(name: str, path: Path, content: bytes) -> None:
    """ConfigError where it cannot be written after all, as on a full disk."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"{name}: {path} cannot be written: {error.strerror}", field=name
        ) from error


def read_flags(cls: type[T], args: argparse.Namespace, **given: Any) -> T:
    """An instance of a settings class from parsed flags. Raises ConfigError for a bad value."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    values = {name: value for name, value in vars(args).items() if name in names}
    return cls(**{**values, **given})


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """args: with the flags of ENGINE_SETTINGS and `model` (None: the bundled one)."""
    model = str(BUNDLED_MODEL) if args.model is None else args.model
    return EngineConfig(
        model=read_flags(ModelConfig, args, model=model),
        kv=read_flags(KvConfig, args),
        scheduler=read_flags(SchedulerConfig, args),
        experts=read_flags(ExpertConfig, args),
    )


def gateway_config(args: argparse.Namespace, api_key: str | None) -> GatewayConfig:
    """api_key: from the environment; the flag wins."""
    return read_flags(
        GatewayConfig,
        args,
        engine=engine_config(args),
        http=read_flags(
            HttpConfig, args, api_key=api_key if args.api_key is None else args.api_key
        ),
        zmq=read_flags(ZmqConfig, args),
    )
