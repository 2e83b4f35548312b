"""Expert workers beside a device tier, with experts in memory and on disk: the same bits, also when
a worker is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed
from support.workers import fake_worker, worker_thread

from moeserve.core import ConfigError
from moeserve.cpu_backend.worker_wire import worker_side_wire
from moeserve.engine.engine import Engine
from moeserve.experts.device_supply import DeviceSupply
from moeserve.worker_messages import WorkerJob, WorkerRefusal

#: a busy machine is no dead worker
PATIENT = {"worker_timeout_s": 60.0, "worker_start_s": 120.0}


@pytest.fixture(scope="module")
def alone(packed: Path) -> Iterator[Engine]:
    engine = make_engine(packed)
    yield engine
    engine.close()


def refuse(job: WorkerJob) -> list[bytes]:
    return worker_side_wire().encode(WorkerRefusal(number=job.number, reason="no mood"))


@pytest.mark.parametrize("host_slots", [None, 2, 20])
@pytest.mark.parametrize("willing", [True, False])
def test_same_bits_beside_a_device(
    willing: bool, host_slots: int | None, packed: Path, alone: Engine, tmp_path: Path
) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    endpoint = f"ipc://{tmp_path}/worker"
    worker = (
        worker_thread(packed, endpoint, "0/2") if willing else fake_worker(endpoint, "0/2", refuse)
    )
    with worker:
        engine = make_engine(
            packed,
            rng.choice((3, 24, 200)),
            "emulated",
            workers=(endpoint,),
            device_slots=rng.choice((1, 8, 60)),
            host_slots=host_slots,
            predictor=rng.choice(("none", "markov")),
            **PATIENT,
        )
        try:
            assert answers(engine, requests) == expected
            runtime = engine.loaded.runtime
            pool, supply = runtime.workers, runtime.supply
            assert pool is not None
            assert isinstance(supply, DeviceSupply)
            assert (pool.count.num_taken_over > 0) != willing
            if willing:  # the tiers know nothing of what the worker has
                assert pool.count.num_pairs > 0
                for layer in supply.cache.numbers.layers:
                    assert not [e for e in supply.cache.residency(layer).ready if e % 2 == 0]
        finally:
            engine.close()


def test_a_modelled_time_and_a_real_one_do_not_mix(packed: Path) -> None:
    with pytest.raises(ConfigError, match="their time is real"):
        make_engine(
            packed,
            device="emulated",
            device_slots=3,
            emulate_cpu=True,
            workers=("tcp://127.0.0.1:7000",),
        )
