"""What a plan is asked about, by the names that users give: a model and a machine."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from moeserve import __version__
from moeserve.config import EngineConfig
from moeserve.core import ConfigError, ModelError
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import (
    check_profile,
    profile_names,
    read_profile,
    shipped_profile,
)
from moeserve.planner.model_shape import read_shape
from moeserve.planner.shapes import ModelShape


def find_shape(engine: EngineConfig) -> ModelShape:
    """The model's sizes: of a config.json, a local directory, or a hub id."""
    path = Path(engine.model.model).expanduser()
    if not path.is_file() and (not path.is_dir() or engine.model.revision is not None):
        _check_is_a_model(path)
        from moeserve.environment import read_environment
        from moeserve.models.hub import resolve_model  # half a second that a file does not take

        path = resolve_model(engine.model, read_environment())
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists()):
        _refuse_gguf(path)
    native = engine.model.device == "cpu" or engine.experts.has_device_slots
    native = native and engine.experts.cpu_backend in ("auto", "native")
    return read_shape(engine.model, path, native)


def _check_is_a_model(path: Path) -> None:
    """ModelError for what was meant as a file and is none: the hub would be asked for it."""
    if path.suffix in (".json", ".gguf") and not path.exists():
        raise ModelError(
            f"{path}: no such file or directory",
            hint="name a config.json, a directory that has one, or a hub id",
        )


def _refuse_gguf(path: Path) -> None:
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files:
        raise ModelError(
            f"{files[0]}: GGUF files are not read",
            hint="plan from the config.json of the model that it was made of, with --quantize int4",
        )


def find_hardware(name: str | None, foreign: bool = False) -> Profile:
    """name: of a shipped profile or a file; None: this machine's own. foreign: a profile that was
    measured on another machine is wanted.

    Raises ConfigError for a profile that is not there, broken, stale, or of another machine.
    """
    from moeserve.planner.hardware import default_profile_path, this_hardware

    shipped = profile_names()
    if name in shipped:
        return shipped_profile(name)
    path = default_profile_path() if name is None else Path(name)
    if not path.exists():
        what = "this machine was not calibrated" if name is None else f"{name!r} is no file"
        raise ConfigError(
            f"hardware: {what}, and the profiles that come with the package are"
            f" {', '.join(shipped)}",
            field="hardware",
            hint="run `moeserve calibrate`, or name one of them with --hardware",
        )
    profile = read_profile(path)
    for processor in (profile.cpu, profile.device):
        if processor is not None and processor.memory_bytes < 1:
            raise ConfigError(
                f"hardware: {path}: memory_bytes of {processor.name} is {processor.memory_bytes};"
                " allowed: 1 or more",
                field="hardware",
                hint="measure again with `moeserve calibrate`",
            )
    if profile.source == "measured" and not foreign:
        check_profile(profile, this_hardware(), __version__, str(path))
        return within_group(profile)
    return profile


def within_group(profile: Profile, limit_bytes: int | None = None) -> Profile:
    """The profile with no more memory than the control group of this process may take, in which
    what is planned will run. limit_bytes: of the group; None for this process's."""
    from moeserve.cpu_backend.cgroup import cgroup_memory_bytes

    limit_bytes = cgroup_memory_bytes() if limit_bytes is None else limit_bytes
    if limit_bytes is None or limit_bytes >= profile.cpu.memory_bytes:
        return profile
    return structs.replace(profile, cpu=structs.replace(profile.cpu, memory_bytes=limit_bytes))
