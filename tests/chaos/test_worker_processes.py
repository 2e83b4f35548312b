"""Worker processes that die, stop and come back in the middle of a step: the same bits, later."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed
from support.workers import WorkerProcess, worker_process

from moeserve.core import ConfigError, EngineRequest
from moeserve.cpu_backend.worker_pool import WorkerPool
from moeserve.engine.engine import Engine
from moeserve.gateway.curve import write_keys

#: a busy machine is no dead worker
PATIENT = {"worker_timeout_s": 60.0, "worker_start_s": 120.0}


@pytest.fixture(scope="module")
def requests(packed: Path) -> list[EngineRequest]:
    return make_requests(random.Random(fresh_seed()), 3072)


@pytest.fixture(scope="module")
def expected(packed: Path, requests: list[EngineRequest]) -> Iterator[dict[str, object]]:
    engine = make_engine(packed)
    yield answers(engine, requests)
    engine.close()


def pool_of(engine: Engine) -> WorkerPool:
    pool = engine.loaded.runtime.workers
    assert pool is not None
    return pool


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came about"
        time.sleep(0.01)


def all_live(pool: WorkerPool) -> bool:
    pool.refresh()
    return all(link.live for link in pool.links)


def strike(engine: Engine, worker: WorkerProcess, how: signal.Signals) -> threading.Thread:
    """Stops the worker, so that it cannot answer, and does `how` to it once it owes an answer."""
    link = next(x for x in pool_of(engine).links if x.endpoint == worker.endpoint)
    worker.send_signal(signal.SIGSTOP)

    def run() -> None:
        wait_for(lambda: link.num_jobs > 0)
        worker.send_signal(how)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("host_slots", [None, 4])
def test_a_worker_that_is_killed_in_a_step_costs_no_token(
    host_slots: int | None,
    packed: Path,
    requests: list[EngineRequest],
    expected: dict[str, object],
    tmp_path: Path,
) -> None:
    endpoint = f"ipc://{tmp_path}/private/worker"
    with worker_process(packed, endpoint, "--shard", "1/2") as worker:
        engine = make_engine(packed, workers=(endpoint,), host_slots=host_slots, **PATIENT)
        try:
            count, killer = itertools.count(), []

            def between() -> None:
                if next(count) == 2:
                    killer.append(strike(engine, worker, signal.SIGKILL))

            assert answers(engine, requests, between) == expected
            killer[0].join()
            stats = pool_of(engine).count
            assert stats.num_taken_over > 0
            assert not all_live(pool_of(engine))
            with worker_process(packed, endpoint, "--shard", "1/2"):
                wait_for(lambda: all_live(pool_of(engine)))
                before = stats.num_pairs
                assert answers(engine, requests) == expected
                assert stats.num_pairs > before
        finally:
            engine.close()


def test_a_worker_that_is_stopped_is_gone_until_it_goes_on(
    packed: Path, requests: list[EngineRequest], expected: dict[str, object], tmp_path: Path
) -> None:
    """Its connection stays open: heartbeats tell. What it says later is for nobody."""
    endpoint = "tcp://127.0.0.1:*"
    with worker_process(packed, endpoint, "--shard", "0/2", "--mapped") as worker:
        engine = make_engine(
            packed,
            workers=(worker.endpoint,),
            host_slots=4,
            worker_heartbeat_s=0.2,
            worker_timeout_s=2.0,
            worker_start_s=120.0,
        )
        try:
            count = itertools.count()

            def between() -> None:
                if next(count) == 2:
                    worker.send_signal(signal.SIGSTOP)

            assert answers(engine, requests, between) == expected
            assert pool_of(engine).links[0].count.losses >= 1
            worker.send_signal(signal.SIGCONT)
            wait_for(lambda: all_live(pool_of(engine)))
            assert answers(engine, requests) == expected
            check_maps_one_memory(worker)
        finally:
            engine.close()


def check_maps_one_memory(worker: WorkerProcess) -> None:
    """Memory of connections that are gone is let go of."""
    shared = [
        found
        for found in psutil.Process(worker.process.pid).memory_maps(grouped=False)
        if "memfd:moeserve-rows" in found.path
    ]
    assert len(shared) == 1


def test_curve(
    packed: Path, requests: list[EngineRequest], expected: dict[str, object], tmp_path: Path
) -> None:
    keys, others = tmp_path / "keys", tmp_path / "others"
    write_keys(keys)
    write_keys(others)
    flags = ("--shard", "0/2", "--curve-dir", str(keys))
    with worker_process(packed, "tcp://127.0.0.1:*", *flags) as worker:
        settings = {"workers": (worker.endpoint,), "worker_timeout_s": 60.0}
        engine = make_engine(packed, worker_curve_dir=str(keys), worker_start_s=120.0, **settings)
        try:
            assert answers(engine, requests) == expected
            assert pool_of(engine).count.num_pairs > 0
        finally:
            engine.close()
        # The server's key is right, the client's own is unknown there.
        (others / "server.key").write_bytes((keys / "server.key").read_bytes())
        with pytest.raises(ConfigError, match="it does not know this engine's key"):
            make_engine(packed, worker_curve_dir=str(others), worker_start_s=2.0, **settings)
        with pytest.raises(ConfigError, match="does not answer"):
            make_engine(packed, worker_start_s=2.0, **settings)
    with pytest.raises(ConfigError, match=r"worker_curve_dir: .*client\.key_secret"):
        make_engine(packed, worker_curve_dir=str(tmp_path), **settings)
