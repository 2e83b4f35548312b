"""What every test may count on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A timing is never a test: how long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """Ctrl-C means KeyboardInterrupt here and in children, also in a background job of a script.

    Shells start background jobs with SIGINT ignored; processes inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured times of backends go into this run's directory, not into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in four bits; to be read, and copied where files are to be changed."""
    return pack_bundled(tmp_path_factory, "int4")


@pytest.fixture(scope="session")
def packed_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `packed`, in eight bits."""
    return pack_bundled(tmp_path_factory, "int8")


def pack_bundled(tmp_path_factory: pytest.TempPathFactory, quantize: str) -> Path:
    # Imported here: most tests need no torch, and importing it takes seconds.
    from moeserve.config import BUNDLED_MODEL, ModelConfig
    from moeserve.models.pack import pack_model

    out = tmp_path_factory.mktemp("packed") / "tiny"
    return pack_model(ModelConfig(model=str(BUNDLED_MODEL), quantize=quantize), out).path
