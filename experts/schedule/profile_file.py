"""Profiles as files: read, written, and refused where they are of another machine or version."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import Hardware, Profile

#: to be raised when a field of the profile changes its meaning
PROFILE_VERSION = 5
#: where the package keeps profiles of machines that are not at hand
SHIPPED = files("moeserve") / "planner" / "profiles"


def profile_names() -> list[str]:
    """Of the profiles that come with the package."""
    names = (entry.name for entry in SHIPPED.iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def shipped_profile(name: str) -> Profile:
    """One of the package's own profiles. ConfigError names those that there are."""
    if name not in profile_names():
        known = ", ".join(profile_names())
        raise ConfigError(f"profile: {name!r} is not one of {known}", field="profile")
    return decode_profile((SHIPPED / f"{name}.json").read_bytes(), name)


def read_profile(path: Path) -> Profile:
    """ConfigError, naming the file and what is wrong in it, where it is no profile."""
    try:
        return decode_profile(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(
            f"profile: {path} cannot be read: {error.strerror}",
            field="profile",
            hint="`moeserve calibrate` writes one",
        ) from error


class _Versioned(msgspec.Struct):
    version: int


def decode_profile(content: bytes, name: str) -> Profile:
    """name: how errors call it."""
    again = "measure again with `moeserve calibrate`"
    try:
        # First alone: fields of another version would be refused as unknown, which says too little.
        version = msgspec.json.decode(content, type=_Versioned).version
        if version != PROFILE_VERSION:
            raise ConfigError(
                f"profile: {name} has version {version}, this moeserve reads {PROFILE_VERSION}",
                field="profile",
                hint=again,
            )
        return msgspec.json.decode(content, type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"profile: {name} is no profile: {error}", field="profile", hint=again
        ) from error


def encode_profile(profile: Profile) -> bytes:
    return msgspec.json.format(msgspec.json.encode(profile)) + b"\n"


def check_profile(profile: Profile, here: Hardware, moeserve: str, name: str) -> None:
    """Raises ConfigError where figures were not measured on this hardware with these kernels.

    Each difference is named. A data sheet's profile is for planning and emulation: it is refused
    as a description of this machine.
    """
    if profile.source != "measured":
        raise ConfigError(
            f"profile: {name} comes from data sheets; it does not describe this machine",
            field="profile",
            hint="measure this one with `moeserve calibrate`",
        )
    differences = _differences(profile.hardware, here)
    if differences:
        raise ConfigError(
            f"profile: {name} is of another machine: {'; '.join(differences)}",
            field="profile",
            hint="measure this one with `moeserve calibrate`",
        )
    if profile.moeserve != moeserve:
        raise ConfigError(
            f"profile: {name} is stale: it was measured with moeserve {profile.moeserve} on"
            f" {profile.date}, this is {moeserve}",
            field="profile",
            hint="measure again with `moeserve calibrate`",
        )


def _differences(there: Hardware, here: Hardware) -> list[str]:
    # What the kernel leaves of the memory for itself changes with its version.
    if abs(there.memory_bytes - here.memory_bytes) < 0.05 * here.memory_bytes:
        here = msgspec.structs.replace(here, memory_bytes=there.memory_bytes)
    return [
        f"{field} {getattr(there, field)!r}, here {getattr(here, field)!r}"
        for field in Hardware.__struct_fields__
        if getattr(there, field) != getattr(here, field)
    ]
