"""A server that starts its expert workers itself: they die, and so does the engine while one is
away, and every answer is the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_process import Server, running_server
from support.workers import worker_process

from moeserve.client import Client
from moeserve.client.control import Control
from moeserve.config import (
    EngineConfig,
    ExpertConfig,
    GatewayConfig,
)
from moeserve.core import ConfigError
from moeserve.gateway.local_workers import Place, places
from moeserve.llm import LLM

PROMPT = "Once upon a time"
SETTINGS = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
#: a busy machine is no dead worker
PATIENT = ("--worker-timeout-s", "60", "--worker-start-s", "120", "--num-threads", "1")


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Server]:
    flags = ("--local-workers", "2", "--local-worker-threads", "1", "--host-slots", "10")
    with running_server(*flags, *PATIENT, model=packed) as running:
        yield running


@pytest.fixture(scope="module")
def expected(packed: Path) -> tuple[int, ...]:
    with LLM(str(packed), cpu_backend="native", num_threads=1) as alone:
        return tuple(alone.generate(PROMPT, SETTINGS)[0].answers[0].token_ids)


def answer(server: Server) -> tuple[int, ...]:
    with Client(server.zmq) as client:
        return client.generate(PROMPT, **SETTINGS).token_ids


def pool(server: Server) -> dict[str, Any]:
    with Client(server.zmq) as client:
        found: dict[str, Any] = Control(client).stats()["engine"]["experts"]["pool"]
    return found


def children_of(server: Server, *words: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # one that has just ended, perhaps not yet waited for
            if set(words).issubset(child.cmdline()):
                found.append(child)
    return found


def child_of(server: Server, *words: str) -> psutil.Process:
    [child] = children_of(server, *words)
    return child


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came about"
        time.sleep(0.05)


def is_ready(server: Server) -> bool:
    return httpx.get(f"{server.http}/health", trust_env=False, timeout=120).status_code == 200


def kill_engine(server: Server) -> None:
    """Until another is ready. The first may seem so for a moment after its end."""
    engine = child_of(server, "moeserve.engine.process")
    engine.kill()

    def another_is_ready() -> bool:
        pids = {child.pid for child in children_of(server, "moeserve.engine.process")}
        return bool(pids - {engine.pid}) and is_ready(server)

    wait_for(another_is_ready)


def all_live(server: Server) -> bool:
    answer(server)  # an engine looks at its workers when it computes
    return all(worker["live"] for worker in pool(server)["workers"])


def test_they_hold_all_experts(server: Server, expected: tuple[int, ...]) -> None:
    assert answer(server) == expected
    found = pool(server)
    assert [worker["shard"] for worker in found["workers"]] == ["0/2", "1/2"]
    assert found["taken_over_rows"] == 0
    assert sum(worker["rows"] for worker in found["workers"]) == found["rows"] > 0
    for worker in found["workers"]:
        assert worker["shared_memory"]
        assert worker["connects"] == 1
        assert worker["jobs"] > 0
        assert worker["busy_s"] > 0
        assert worker["sent_bytes"] == worker["received_bytes"] == 192 * 4 * worker["rows"]
    metrics: dict[tuple[str, str | None], float] = {}

    def caught_up() -> bool:  # metrics come with the heartbeat
        text = httpx.get(f"{server.http}/metrics", trust_env=False, timeout=120).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                metrics[(sample.name, sample.labels.get("worker"))] = sample.value
        return metrics.get(("moeserve_workers_rows_total", None)) == found["rows"]

    wait_for(caught_up)
    for worker in found["workers"]:
        assert metrics[("moeserve_worker_jobs_total", worker["endpoint"])] == worker["jobs"]
        assert metrics[("moeserve_worker_live", worker["endpoint"])] == 1
    command = [sys.executable, "-m", "moeserve.cli", "ctl", "stats", "--zmq", server.zmq]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert found["workers"][0]["endpoint"] in text
    assert "rows in shared memory" in text


def test_one_that_dies_is_started_again(server: Server, expected: tuple[int, ...]) -> None:
    worker = child_of(server, "worker", "1/2")
    worker.kill()
    assert answer(server) == expected
    wait_for(lambda: all_live(server))
    assert child_of(server, "worker", "1/2").pid != worker.pid
    assert answer(server) == expected
    [first, second] = pool(server)["workers"]
    assert (first["losses"], second["losses"], second["connects"]) == (0, 1, 2)


def test_engine_and_worker_die_together(server: Server, expected: tuple[int, ...]) -> None:
    child_of(server, "worker", "0/2").kill()
    kill_engine(server)
    assert answer(server) == expected
    wait_for(lambda: all_live(server))


def test_they_do_not_outlive_a_killed_server(server: Server) -> None:
    """The last of this server."""
    wait_for(lambda: all_live(server))
    workers = [child_of(server, "worker", shard) for shard in ("0/2", "1/2")]
    server.process.send_signal(signal.SIGKILL)
    for worker in workers:
        wait_for(lambda w=worker: not w.is_running() or w.status() == psutil.STATUS_ZOMBIE)


def test_an_engine_starts_again_without_a_worker_that_is_gone(
    packed: Path, expected: tuple[int, ...], tmp_path: Path
) -> None:
    """Nobody starts this one again: the engine waits for the time it was told, and goes on."""
    endpoint = f"ipc://{tmp_path}/private/worker"
    flags = ("--worker", endpoint, "--worker-start-s", "120", "--num-threads", "1")
    with worker_process(packed, endpoint, "--shard", "0/2") as worker:
        short = ("--worker-start-s", "3", "--host-slots", "10", "--num-blocks", "64")
        with running_server(*flags, *short, model=packed) as server:
            assert answer(server) == expected
            worker.send_signal(signal.SIGKILL)
            kill_engine(server)
            assert answer(server) == expected
            [gone] = pool(server)["workers"]
            assert (gone["live"], gone["problem"]) == (False, "does not answer")
            with worker_process(packed, endpoint, "--shard", "0/2"):
                wait_for(lambda: all_live(server))
                assert answer(server) == expected
                assert pool(server)["rows"] > 0


def test_a_model_that_workers_cannot_read_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--local-workers", "1"]
    done = subprocess.run(
        [*command, "--port", "0", "--runtime-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "moeserve pack" in done.stderr


def test_places() -> None:
    assert places(2, [0, 1, 2, 3], {0: [0, 1, 2, 3]}) == [Place(None, 2)] * 2
    assert places(3, [0, 1], {}) == [Place(None, 1)] * 3
    two = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert places(2, list(range(8)), two) == [Place(0, 4), Place(1, 4)]
    assert places(3, list(range(8)), two) == [Place(0, 2), Place(1, 4), Place(0, 2)]
    assert places(1, [4, 5], two) == [Place(None, 2)], "the other node is not ours"


def test_local_workers_beside_others_are_refused() -> None:
    engine = EngineConfig(experts=ExpertConfig(workers=("ipc:///a",)))
    with pytest.raises(ConfigError, match="local_workers: they hold all experts"):
        GatewayConfig(engine=engine, local_workers=1)
