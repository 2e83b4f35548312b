"""What comes from outside the command line. The only reader of the environment."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What moeserve takes from the environment, read once."""

    api_key: str | None  # MOESERVE_API_KEY
    hf_token: str | None  # HF_TOKEN
    log_level: str  # MOESERVE_LOG_LEVEL
    data_home: Path  # XDG_DATA_HOME: chat history and saved chats
    cache_home: Path  # XDG_CACHE_HOME: what can be found out again
    runtime_home: Path  # XDG_RUNTIME_DIR, else the temporary directory


def read_environment() -> Environment:
    """The settings that come from outside the command line."""
    env = os.environ
    return Environment(
        api_key=env.get("MOESERVE_API_KEY") or None,
        hf_token=env.get("HF_TOKEN") or None,
        log_level=env.get("MOESERVE_LOG_LEVEL", "info"),
        data_home=Path(env.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "moeserve",
        cache_home=Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeserve",
        runtime_home=Path(env.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()),
    )


def bare_environment() -> dict[str, str]:
    """For a helper process: what it takes to start Python, and none of the user's secrets."""
    names = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ")
    return {name: os.environ[name] for name in names if name in os.environ}


def default_endpoint(environment: Environment) -> str:
    """The ipc endpoint that a server binds and a client finds when nothing is named.

    One per user: the directory is private (0700), so the path cannot be squatted.
    """
    return f"ipc://{environment.runtime_home / f'moeserve-{os.getuid()}' / 'client.sock'}"


def tune_native_libraries() -> None:
    """Settings of the libraries under torch; call before torch is imported. What is set stays.

    Kernel caches: oneDNN ("Primitive Cache") and torch's ideep keep up to 1024 compiled kernels,
    about half a MiB each, by matrix shape; batch sizes vary with the load, so memory would grow for
    hours. 128 was measured to cost no speed (16 does).

    GOMP_SPINCOUNT: how long an OpenMP thread spins for its next work before it sleeps. By default
    milliseconds: on a machine where something else runs too, the spinning keeps the thread off the
    core that everybody waits for (docs/log.md has the figures).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")
