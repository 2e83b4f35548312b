"""Engines with expert workers: the same bits for any number of them, whatever becomes of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed
from support.workers import Reply, fake_worker, worker_thread

from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend import worker_link
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.shared_rows import SharedRows
from moeserve.cpu_backend.worker_pool import Exchange, Put, WorkerPool
from moeserve.cpu_backend.worker_wire import WORKER_VERSION, worker_side_wire
from moeserve.engine.engine import Engine
from moeserve.llm import LLM
from moeserve.models.pack import pack_model
from moeserve.models.shard import load_shard
from moeserve.worker_messages import WorkerJob, WorkerRefusal, WorkerResult, WorkerWelcome

#: of the bundled model
HIDDEN = 192
#: a busy machine is no dead worker
PATIENT = {"worker_timeout_s": 60.0, "worker_start_s": 120.0}


@pytest.fixture(scope="module")
def alone(packed: Path) -> Iterator[Engine]:
    engine = make_engine(packed)
    yield engine
    engine.close()


def pool_of(engine: Engine) -> WorkerPool:
    pool = engine.loaded.runtime.workers
    assert pool is not None
    return pool


@pytest.mark.parametrize("host_slots", [None, 2, 20])
def test_same_bits_for_any_number_of_workers(
    host_slots: int | None, packed: Path, alone: Engine, tmp_path: Path
) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    with ExitStack() as stack:
        first = stack.enter_context(worker_thread(packed, f"ipc://{tmp_path}/first", "0/2"))
        second = stack.enter_context(worker_thread(packed, "tcp://127.0.0.1:*", "1/2"))
        settings = {"predictor": rng.choice(("none", "markov"))} if host_slots else {}
        for workers in ((first,), (second, first)):
            engine = make_engine(
                packed,
                max_batch_tokens=rng.choice((3, 24, 200)),
                workers=workers,
                host_slots=host_slots,
                **settings,
                **PATIENT,
            )
            try:
                assert answers(engine, requests) == expected
                assert pool_of(engine).count.num_pairs > 0
                assert pool_of(engine).count.num_taken_over == 0
                if host_slots:
                    check_tiers_know_nothing_of(engine, len(workers))
            finally:
                engine.close()


def check_tiers_know_nothing_of(engine: Engine, num_workers: int) -> None:
    """Experts at workers are neither in memory nor missed."""
    cache = engine.loaded.runtime.cache
    held = [0, 1] if num_workers == 2 else [0]
    for layer in cache.numbers.layers:
        assert not [e for e in cache.residency(layer).ready if e % 2 in held]
    misses = np.sum(cache.counters.misses)
    assert (misses == 0) == (num_workers == 2)


@pytest.mark.parametrize("room", [0, 3 * 4096])
def test_rows_in_frames_give_the_same_bits(
    room: int, packed: Path, alone: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another host, or where shared memory has room for some of the pieces of a job."""
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    monkeypatch.setattr(worker_link, "MAX_JOB_BYTES", 4096)
    monkeypatch.setattr(worker_link, "SHARED_BYTES", room)
    if not room and rng.random() < 0.5:
        monkeypatch.setattr(SharedRows, "create", lambda num_bytes: None)
        settings: dict[str, object] = {}
    else:
        settings = {"worker_shared_memory": bool(room)}
    endpoint = f"ipc://{tmp_path}/worker"
    with worker_thread(packed, endpoint, "0-5"):
        engine = make_engine(
            packed, max_batch_tokens=200, workers=(endpoint,), **PATIENT, **settings
        )
        try:
            assert pool_of(engine).links[0].shared == bool(room)
            assert answers(engine, requests) == expected
        finally:
            engine.close()


def nonsense(what: str) -> Reply:
    wire = worker_side_wire()

    def reply(job: WorkerJob) -> list[bytes] | None:
        size = sum(job.counts) * HIDDEN * 4
        good = wire.encode(WorkerResult(number=job.number))
        late = WorkerResult(number=job.number, busy_s=1e6)
        return {
            "a refusal": wire.encode(WorkerRefusal(number=job.number, reason="no mood")),
            "bytes that are no msgpack": [WORKER_VERSION, b"\xc1\x00"],
            "another version": [b"MOESERVE-WORKER/0", *good[1:]],
            "no results": good,
            "results of another shape": [*good, bytes(size + 4)],
            "an unknown job": [*wire.encode(WorkerResult(number=job.number + 17)), bytes(size)],
            "NaN": [*good, np.full(size // 4, np.nan, np.float32).tobytes()],
            "Inf": [*good, np.full(size // 4, np.inf, np.float32).tobytes()],
            "a time of its own": [*wire.encode(late), bytes(size)],
            "silence": None,
        }[what]

    return reply


@pytest.mark.parametrize("host_slots", [None, 4])
@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("a refusal", "it refused a job: no mood"),
        ("bytes that are no msgpack", "msgpack type 0xc1"),
        ("another version", "MOESERVE-WORKER/0"),
        ("no results", "frames of [] bytes"),
        ("results of another shape", "bytes for results, expected"),
        ("an unknown job", "was not given"),
        ("NaN", "numbers that are not finite"),
        ("Inf", "numbers that are not finite"),
        ("a time of its own", "it computed for 1000000.0 s, it says"),
        ("silence", "a job was not done within 0.2 s"),
    ],
)
def test_a_worker_that_answers_nonsense_is_not_asked_again(
    what: str, problem: str, host_slots: int | None, packed: Path, alone: Engine, tmp_path: Path
) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    endpoint = f"ipc://{tmp_path}/worker"
    with fake_worker(endpoint, "0/2", nonsense(what)) as jobs:
        limit_s = 0.2 if what == "silence" else 60.0
        engine = make_engine(
            packed, workers=(endpoint,), host_slots=host_slots, worker_job_s=limit_s, **PATIENT
        )
        try:
            assert engine.loaded.spec.hidden_size == HIDDEN
            if what == "silence":
                engine.add(requests[0])
                engine.step()  # it may come back afterwards, being no liar
                assert pool_of(engine).links[0].count.losses >= 1
                while engine.has_work:
                    engine.step()
            else:
                assert answers(engine, requests) == expected
                assert len(jobs) == 1
            assert problem in pool_of(engine).links[0].problem or what == "silence"
            assert pool_of(engine).count.num_taken_over > 0 or what in ("NaN", "Inf")
        finally:
            engine.close()


def test_one_session_has_one_welcome(packed: Path, alone: Engine, tmp_path: Path) -> None:
    """A second one would begin the shared memory anew, on top of the jobs that lie there."""
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    held = load_shard(
        ModelConfig(model=str(packed)), Shard.parse("0/2"), NativeRuntime(1), mapped=True
    )
    again = WorkerWelcome(
        epoch="fake", identity=held.identity, shard="0/2", standby=False, shared=False
    )
    endpoint = f"ipc://{tmp_path}/worker"
    with fake_worker(endpoint, "0/2", lambda _: worker_side_wire().encode(again)) as jobs:
        engine = make_engine(packed, workers=(endpoint,), **PATIENT)
        try:
            assert answers(engine, requests) == expected
            assert "a second welcome" in pool_of(engine).links[0].problem
            assert len(jobs) == 1
        finally:
            engine.close()


def test_what_does_not_fit_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    other = pack_model(
        ModelConfig(model=str(BUNDLED_MODEL), quantize="int8"), tmp_path / "other"
    ).path
    endpoint = f"ipc://{tmp_path}/worker"
    with worker_thread(other, endpoint, "0/2"), pytest.raises(ConfigError, match="manifest_sha256"):
        make_engine(packed, workers=(endpoint,), **PATIENT)
    with (
        worker_thread(packed, endpoint, "0/2", isa="scalar"),
        pytest.raises(ConfigError, match=rf"{endpoint}: isa scalar there, \w+ here"),
    ):
        make_engine(packed, workers=(endpoint,), **PATIENT)
    with (
        worker_thread(packed, endpoint, "0/2"),
        pytest.raises(ConfigError, match="integers None there, False here"),
    ):
        Engine.from_config(
            EngineConfig(
                model=ModelConfig(model=str(packed), quantize_activations=False),
                experts=ExpertConfig(workers=(endpoint,), cpu_backend="native", **PATIENT),
            )
        )
    with pytest.raises(ConfigError, match=r"does not answer .*start it with `moeserve worker"):
        make_engine(packed, workers=(endpoint,), worker_start_s=0.1)
    with pytest.raises(ConfigError, match="run `moeserve pack"):
        make_engine(BUNDLED_MODEL, workers=(endpoint,))


def test_an_engine_can_be_told_to_go_on_without(
    packed: Path, alone: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is not there, and one of another ISA level; the former comes later and is used."""
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    absent, other = f"ipc://{tmp_path}/absent", f"ipc://{tmp_path}/other"
    with worker_thread(packed, other, "0/2", isa="scalar"):
        engine = make_engine(
            packed,
            workers=(absent, other),
            worker_absent="go_on",
            worker_timeout_s=60.0,
            worker_start_s=0.5,
            host_slots=rng.choice((None, 4)),
        )
        try:
            assert f"{absent}: does not answer; going on without it" in caplog.text
            assert "does not answer" in engine.info.notes["workers"]
            pool = pool_of(engine)
            while "isa scalar there" not in pool.links[1].problem:  # it may be slow to answer, too
                pool.wait()
                pool.refresh()
            assert answers(engine, requests) == expected
            assert pool_of(engine).count.num_pairs == 0
            with worker_thread(packed, absent, "1/2"):
                while not pool_of(engine).links[0].live:  # bounded by the test's own limit
                    pool_of(engine).wait()
                    pool_of(engine).refresh()
                assert answers(engine, requests) == expected
                assert pool_of(engine).count.num_pairs > 0
                first, second = pool_of(engine).stats().workers
                assert (first.live, first.shard, second.live) == (True, "1/2", False)
                assert second.refusals >= 1
                assert first.busy_s > 0
        finally:
            engine.close()


def test_one_shard_has_one_worker_and_another_standing_by(
    packed: Path, alone: Engine, tmp_path: Path
) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, alone.info.vocab_size)
    expected = answers(alone, requests)
    one, two = f"ipc://{tmp_path}/one", f"ipc://{tmp_path}/two"
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(worker_thread(packed, one, "0/2"))
        with (
            worker_thread(packed, two, "4-5"),
            pytest.raises(ConfigError, match=r"both have expert 4 \(start one of them with --st"),
        ):
            make_engine(packed, workers=(one, two), **PATIENT)
        second.enter_context(worker_thread(packed, two, "0/2", standby=True))
        engine = make_engine(packed, workers=(one, two), **PATIENT)
        try:
            primary, spare = pool_of(engine).links
            assert (primary.standby, spare.standby) == (False, True)
            assert answers(engine, requests) == expected
            assert spare.count.jobs == 0
            first.close()
            assert answers(engine, requests) == expected
            assert spare.count.jobs > 0
            sent = spare.count.jobs
            second.close()
            assert answers(engine, requests) == expected
            assert spare.count.jobs - sent <= 1
        finally:
            engine.close()


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("tcp://10.0.0.1:5", "beyond this machine and there are no CURVE keys"),
        ("tcp://somewhere:5", "beyond this machine"),
        ("tcp://127.0.0.1", "is not tcp://HOST:PORT"),
        ("ipc://relative", "is neither ipc:///PATH nor"),
        ("inproc://x", "is neither ipc:///PATH nor"),
    ],
)
def test_endpoints_that_cannot_be_workers(endpoint: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ExpertConfig(workers=(endpoint,))
    with pytest.raises(ConfigError, match="named twice"):
        ExpertConfig(workers=("ipc:///a", "ipc:///b", "ipc:///a"))
    with pytest.raises(ConfigError, match=r"worker_timeout_s: 1\.5 is below the minimum 2"):
        ExpertConfig(worker_timeout_s=1.5)


def test_an_interrupt_leaves_nothing_that_a_later_step_could_take_for_its_own(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(fresh_seed())
    prompt = [rng.randrange(3072) for _ in range(9)]
    endpoint, interrupt_at = f"ipc://{tmp_path}/worker", rng.randint(1, 20)
    calls = itertools.count()
    collect = Exchange.collect

    def interrupted(self: Exchange, put: Put) -> tuple[int, ...]:
        if next(calls) == interrupt_at:
            raise KeyboardInterrupt
        return collect(self, put)

    settings = {"workers": (endpoint,), "cpu_backend": "native", "num_threads": 1, **PATIENT}
    sampling = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with worker_thread(packed, endpoint, "0/2"), LLM(str(packed), **settings) as llm:
        expected = llm.generate(prompt, sampling)[0].text
        monkeypatch.setattr(Exchange, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt, sampling)
        assert [llm.generate(prompt, sampling)[0].text for _ in range(2)] == [expected] * 2
