"""The `calibrate` subcommand."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from moeserve.cli_options import add_flags, read_flags
from moeserve.config import ModelConfig
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import encode_profile, read_profile
from moeserve.planner.hardware import default_profile_path
from moeserve.planner.printing import printing
from moeserve.planner.report import show_profile

#: settings of a model that decide how its experts are stored
MODEL_SETTINGS = frozenset(
    (
        "revision",
        "offline",
        "dtype",
        "quantize",
        "quantize_group",
        "quantize_zero_points",
        "quantize_head",
        "quantize_activations",
    )
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or hub id: measure its experts, too"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="profile to write (default: where `serve` looks, in the user's cache directory)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer formats, rows and block sizes: half the time"
    )
    parser.add_argument(
        "--formats",
        metavar="NAMES",
        help="measure weights in these formats and the few that every engine's steps need; with"
        " commas between, as --show names them: bfloat16,int8,int4/32 (default: all)",
    )
    parser.add_argument(
        "--disk-dir",
        type=Path,
        metavar="DIR",
        help="where to write and read a temporary file: the disk that models lie on (default: the"
        " profile's directory)",
    )
    parser.add_argument("--no-disk", action="store_true", help="do not measure the disk")
    parser.add_argument(
        "--show", action="store_true", help="print the profile that there is and measure nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_flags(parser, ModelConfig, only=MODEL_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the profile, prints it. Raises ConfigError and ModelError."""
    path = args.out or default_profile_path()
    if args.show:
        _print(read_profile(path), args.json)
        return 0
    if args.no_disk and args.disk_dir is not None:
        raise ConfigError("disk_dir: contradicts --no-disk; give one", field="disk_dir")
    from moeserve.planner.calibrate import Wishes, calibrate, read_formats

    formats = () if args.formats is None else read_formats(args.formats)
    if args.out is None:
        _make_directory(path.parent)
    _check_can_be_written(path)
    wishes = Wishes(
        quick=args.quick,
        formats=formats,
        disk_dir=None if args.no_disk else args.disk_dir or path.parent,
        model=None if args.model is None else read_flags(ModelConfig, args),
    )
    started_s = time.monotonic()
    profile = calibrate(wishes, lambda what: print(f"measuring {what}", file=sys.stderr))
    _write(path, profile)
    _print(profile, args.json)
    took_s = time.monotonic() - started_s
    print(f"{path}: written after {took_s:.0f} s", file=sys.stderr)
    return 0


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: {directory} cannot be made: {error.strerror}", field="out"
        ) from error


def _check_can_be_written(path: Path) -> None:
    """ConfigError where `_write` would fail: what cannot be kept should not be measured."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"out: {path} is no file", field="out", hint="name a file")
        if not path.parent.is_dir():
            raise ConfigError(
                f"out: {path.parent} is no directory", field="out", hint="make it first"
            )
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name):
            pass
    except OSError as error:
        raise ConfigError(
            f"out: {path} cannot be written: {error.strerror}", field="out"
        ) from error


def _write(path: Path, profile: Profile) -> None:
    """As a whole: who reads meanwhile sees the old profile or the new one, and what cannot be
    written leaves nothing behind."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(encode_profile(profile))
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"out: {path} cannot be written: {error.strerror}", field="out"
        ) from error


def _print(profile: Profile, as_json: bool) -> None:
    with printing():
        if as_json:
            sys.stdout.write(encode_profile(profile).decode())
        else:
            show_profile(Console(), profile)
