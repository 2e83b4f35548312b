"""A conversion that was cut off at any file goes on to the same files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dense_models import LAYERS, save_dense
from test_convert import run

from moeserve.convert import shards, workplace
from moeserve.convert.workplace import WORK, Workplace
from moeserve.core import ConfigError
from moeserve.models.checkpoint import INDEX_FILE


class KilledError(BaseException):
    """As SIGKILL: nothing in the package may catch it."""


@pytest.fixture
def dense(tmp_path: Path, seed: int) -> Path:
    save_dense(tmp_path / "dense", "llama", seed)
    return tmp_path / "dense"


def files(out: Path) -> dict[str, bytes]:
    """All but the card, which says how long it took."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "README.md"}


def test_killed_at_any_file_it_goes_on(
    dense: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dense, tmp_path / "whole", text)
    expected = files(tmp_path / "whole")
    sync = os.fsync
    written = 0

    def killed_at(number: int) -> None:
        nonlocal written
        written = 0

        def die(handle: int) -> None:
            nonlocal written
            written += 1
            if written == number:
                raise KilledError
            sync(handle)

        monkeypatch.setattr(shards.os, "fsync", die)

    number = 1
    while True:
        out = tmp_path / f"cut-{number}"
        killed_at(number)
        try:
            run(dense, out, text)
        except KilledError:
            assert not (out / INDEX_FILE).exists(), "a model before it is whole"
        else:
            break
        killed_at(0)
        run(dense, out, text)
        redone = written
        assert files(out) == expected
        shutil.rmtree(out)
        number += 1
    assert number > len(expected), "not every file was a place to be killed at"
    assert redone <= number - 2 * LAYERS, "layers that were done were done again"


def test_the_last_step_is_repeated_when_it_was_cut_off(
    dense: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is there, the work directory still, too."""

    def die(path: Path) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("moeserve.convert.workplace.shutil.rmtree", die)
        with pytest.raises(KilledError):
            run(dense, tmp_path / "out", text)
    assert (tmp_path / "out" / WORK).is_dir()
    run(dense, tmp_path / "out", text)
    assert not (tmp_path / "out" / WORK).exists()


def test_a_full_disk_is_named_and_nothing_is_lost(dense: Path, tmp_path: Path, text: Path) -> None:
    """The limit on files stands for the disk: the system call fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written: .*free some space"):
            run(dense, out, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.rglob("*.partial"))
    run(dense, out, text)
    run(dense, tmp_path / "whole", text)
    assert files(out) == files(tmp_path / "whole")


def test_two_conversions_into_one_directory(
    dense: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, of another recipe or the same, is refused at any time of the first; what that
    one writes is as if it had been alone."""
    run(dense, tmp_path / "alone", text)
    out = tmp_path / "out"
    sync, tried = os.fsync, []

    def second(handle: int) -> None:
        sync(handle)
        seed = len(tried) % 2
        tried.append(handle)
        with pytest.raises(ConfigError, match=r"another conversion is writing .*\(wait for it"):
            run(dense, out, text, seed=seed)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", second)
        run(dense, out, text)
    assert len(tried) > 2 * LAYERS
    assert files(out) == files(tmp_path / "alone")


KILLED = """
import os, signal, sys
from pathlib import Path
from moeserve.convert.workplace import Workplace
with Workplace.open(Path(sys.argv[1]), {"a": 1}):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_conversion_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    with Workplace.open(out, {"a": 1}) as workplace:
        assert workplace.load() is None


def test_another_recipe_does_not_go_on(
    dense: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sync = os.fsync
    seen = []

    def later(handle: int) -> None:
        seen.append(handle)
        if len(seen) == 4:
            raise KilledError
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", later)
        with pytest.raises(KilledError):
            run(dense, out, text)
    with pytest.raises(ConfigError, match=r"unfinished conversion .* seed was 0, is 1"):
        run(dense, out, text, seed=1)
    run(dense, out, text)


def test_a_file_system_without_locks(
    dense: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(workplace.fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"cannot be locked: No locks available"):
        run(dense, tmp_path / "out", text)
