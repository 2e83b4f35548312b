"""The supervisor and the real engine process, short of a model that loads (that is tests/chaos)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from zmq_support import private_directory, until

from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, GatewayConfig, ModelConfig
from moeserve.core import MoeserveError
from moeserve.engine import process as engine_process
from moeserve.engine.channel import EXIT_ORPHANED
from moeserve.gateway import supervisor as supervisor_module
from moeserve.gateway.supervisor import EngineSupervisor
from moeserve.gateway.zmq_link import ZmqEngineLink


def config_of(model: Path, restarts: int = 3) -> GatewayConfig:
    engine = EngineConfig(model=ModelConfig(model=str(model)))
    return GatewayConfig(engine=engine, max_engine_restarts=restarts)


async def started(directory: Path, config: GatewayConfig) -> tuple[ZmqEngineLink, EngineSupervisor]:
    link = ZmqEngineLink(f"ipc://{private_directory(directory / 'run')}/engine.sock")
    await link.start()
    supervisor = EngineSupervisor(config, link, backoff_s=0.01)
    await supervisor.start()
    return link, supervisor


def test_exit_statuses_agree() -> None:
    assert supervisor_module.EXIT_REFUSED == engine_process.EXIT_REFUSED


def test_a_model_that_cannot_be_served_is_final(tmp_path: Path) -> None:
    async def main() -> None:
        link, supervisor = await started(tmp_path, config_of(tmp_path / "no-such-model"))
        with pytest.raises(MoeserveError, match="no-such-model"):
            await supervisor.wait_ready()
        assert link.status.stage == "failed"
        assert "no-such-model" in await supervisor.wait_failed()
        assert supervisor.pid is None
        await supervisor.stop()
        await link.stop()

    asyncio.run(asyncio.wait_for(main(), 200))


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "SIGKILL, perhaps for lack of memory"), (signal.SIGBUS, "SIGBUS, as when a")],
)
def test_crashes_are_followed_by_a_limited_number_of_restarts(
    number: int, said: str, tmp_path: Path
) -> None:
    async def main() -> None:
        link, supervisor = await started(tmp_path, config_of(BUNDLED_MODEL, restarts=2))
        seen: list[int] = []
        for _ in range(3):
            await until(lambda: supervisor.pid is not None and supervisor.pid not in seen)
            assert supervisor.pid is not None
            seen.append(supervisor.pid)
            os.kill(supervisor.pid, number)
        reason = await supervisor.wait_failed()
        assert said in reason
        assert "2 times" in reason
        assert len(set(seen)) == 3
        await supervisor.stop()
        await link.stop()

    asyncio.run(asyncio.wait_for(main(), 200))


def test_a_start_that_never_served_may_not_go_on_without_workers(
    packed: Path, tmp_path: Path
) -> None:
    """Killed while it loads: whoever told it to refuse that has not seen it serve."""
    endpoint = f"ipc://{private_directory(tmp_path / 'nobody')}/worker"
    experts = ExpertConfig(workers=(endpoint,), worker_start_s=1.0, num_threads=1)
    engine = EngineConfig(model=ModelConfig(model=str(packed)), experts=experts)

    async def main() -> None:
        link, supervisor = await started(tmp_path, GatewayConfig(engine=engine))
        await until(lambda: supervisor.pid is not None)
        first = supervisor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pid not in (None, first))
        with pytest.raises(MoeserveError, match="worker"):
            await supervisor.wait_ready()
        await supervisor.stop()
        await link.stop()

    asyncio.run(asyncio.wait_for(main(), 200))


def test_stop_while_starting_leaves_no_process(tmp_path: Path) -> None:
    async def main() -> None:
        link, supervisor = await started(tmp_path, config_of(BUNDLED_MODEL))
        await until(lambda: supervisor.pid is not None)
        pid = supervisor.pid
        assert pid is not None
        await supervisor.stop()
        await link.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(asyncio.wait_for(main(), 200))


def run_process(*arguments: str, parent_pid: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeserve.engine.process", *arguments]
    return subprocess.run(
        [*command, "--parent-pid", str(parent_pid)],
        input="{}",
        text=True,
        capture_output=True,
        timeout=240,
    )


def test_an_engine_without_a_gateway_ends_itself(tmp_path: Path) -> None:
    """The bundled model takes longer to load than the six heartbeats of silence."""
    done = run_process(
        f"ipc://{tmp_path}/nobody.sock",
        *("--heartbeat-s", "0.02", "--max-silence-beats", "6"),
        parent_pid=os.getpid(),
    )
    assert done.returncode == EXIT_ORPHANED, done.stderr
    assert "silent" in done.stderr


def test_an_engine_whose_parent_is_gone_does_not_start(tmp_path: Path) -> None:
    done = run_process(f"ipc://{tmp_path}/nobody.sock", parent_pid=1 if os.getppid() != 1 else 2)
    assert done.returncode == 1
    assert "is gone" in done.stderr
