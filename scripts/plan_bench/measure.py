"""One configuration on the real engine, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.engine.simulation import RequestTimes
from moeserve.models.packed_model import config_sha256
from moeserve.planner.disk_figures import DiskPlan, measure_file
from moeserve.planner.plan_types import Traffic
from moeserve.planner.process_memory import resident_bytes
from moeserve.planner.repeats import Repeats
from moeserve.planner.simulate.system import num_requests, steady_window
from moeserve.predictor_tools.trace import RoutingRecorder
from plan_bench.cases import OUTPUT_TOKENS, SHAPES, Case, num_experts

BLOCK_TOKENS = 16
#: a case is played until so much time has passed, and at least so often
LEAST_S, LEAST_TIMES = 4.0, 1
#: sequences whose routing is recorded, by the tokens of their prompts: other prompts than those
#: that are timed, but as long, because what a token chooses follows from what it can see
TRACED = {64: 24, 256: 16, 768: 12}
#: how the disk is looked at beside a case: records, threads, bytes of a sample
DISK_BLOCKS, DISK_DEPTHS = (256 << 10, 1 << 20, 16 << 20), (1, 2, 4, 8)
DISK_SAMPLE_BYTES = 64 << 20


def engine_settings(model: Path, case: Case) -> EngineConfig:
    """Slots by the share; kv for all streams and no more."""
    blocks = case.num_streams * -(-(case.context_tokens + OUTPUT_TOKENS) // BLOCK_TOKENS)
    slots = None if case.share == 100 else num_experts(case.shape) * case.share // 100
    return EngineConfig(
        model=ModelConfig(model=str(model)),
        kv=KvConfig(num_blocks=blocks, block_tokens=BLOCK_TOKENS, prefix_reuse=False),
        scheduler=SchedulerConfig(max_running=case.num_streams, admission="aggressive"),
        experts=ExpertConfig(cpu_backend="native", host_slots=slots),
    )


def measure(model: Path, case: Case) -> dict[str, Any]:
    """Medians over the times that the case is played, after a round that warms caches up."""
    engine = Engine.from_config(engine_settings(model, case))
    engine.page_mover.wait()
    traffic = Traffic(
        concurrency=case.num_streams,
        prompt_tokens=case.context_tokens,
        output_tokens=OUTPUT_TOKENS,
    )
    count = num_requests(traffic)  # as many as are simulated
    rng = np.random.default_rng(7)
    play(engine, case, rng, case.num_streams)
    runs: list[dict[str, float]] = []
    began_s = time.perf_counter()
    while len(runs) < LEAST_TIMES or time.perf_counter() - began_s < LEAST_S:
        runs.append(steady(engine, case, rng, count))
    result: dict[str, Any] = {key: median(run[key] for run in runs) for key in runs[0]}
    result["rss_bytes"] = resident_bytes()
    speeds = [run["tokens_per_s"] for run in runs]
    result |= {"times": len(runs), "fastest": max(speeds), "slowest": min(speeds)}
    engine.close()
    return result


def middle_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several measurements of a case. What is known of the disk is all that was seen of it."""
    numbers = [key for key in rounds[0] if key != "disk"]
    found: dict[str, Any] = {key: median(each[key] for each in rounds) for key in numbers}
    found["times"] = sum(each["times"] for each in rounds)
    found["fastest"] = max(each["fastest"] for each in rounds)
    found["slowest"] = min(each["slowest"] for each in rounds)
    found["disk"] = [point for each in rounds for point in each["disk"]]
    return found


def disk_points(model: Path, case: Case) -> list[dict[str, float]]:
    """Reads of records from the model's file, each kind for a moment. Nothing where all experts are
    in memory."""
    if case.share == 100:
        return []
    path = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    once = Repeats(at_least=3, at_most=8, limit_s=0.2)
    plan = DiskPlan(model, 0, DISK_BLOCKS, DISK_DEPTHS, DISK_SAMPLE_BYTES, once)
    return [
        {"block": p.block_bytes, "depth": p.queue_depth, "bytes_per_s": p.bytes_per_s.value}
        for p in measure_file(plan, path)
    ]


def steady(engine: Engine, case: Case, rng: np.random.Generator, count: int) -> dict[str, float]:
    """What the clients see while all are busy: as the planner counts it."""
    counters = engine.loaded.runtime.cache.counters
    before = counters.totals()
    times, emitted = play(engine, case, rng, count)
    after = counters.totals()
    used = {name: after[name] - before[name] for name in ("hits", "late", "misses")}
    asked = sum(used.values())
    window = steady_window(times, case.num_streams)
    tokens = sum(n for at_s, n in emitted if window.begin_s < at_s <= window.end_s)
    return {
        "ttft_s": float(np.mean([each.ttft_s for each in window.requests])),
        "tpot_s": float(np.mean([each.tpot_s for each in window.requests])),
        "tokens_per_s": tokens / (window.end_s - window.begin_s),
        "hit_rate": used["hits"] / asked if asked else 1.0,
    }


def play(
    engine: Engine, case: Case, rng: np.random.Generator, count: int
) -> tuple[list[RequestTimes], list[tuple[float, int]]]:
    """`count` requests of as many clients as the case has, each sent when another has ended."""
    coming = requests(case, rng, count)
    times: dict[str, RequestTimes] = {}
    emitted: list[tuple[float, int]] = []
    free = case.num_streams
    while free or engine.has_work:
        while free and (request := next(coming, None)) is not None:
            times[request.request_id] = RequestTimes(time.perf_counter(), OUTPUT_TOKENS)
            engine.add(request)
            free -= 1
        if not engine.has_work:
            break
        deltas = engine.step()
        now_s = time.perf_counter()
        emitted.append((now_s, len(deltas)))
        for delta in deltas:
            times[delta.request_id].token(now_s)
            free += delta.finish_reason is not None
    return list(times.values()), emitted


def requests(case: Case, rng: np.random.Generator, count: int) -> Iterator[EngineRequest]:
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    for number in range(count):
        ids = rng.integers(1, SHAPES[case.shape]["vocab_size"], case.context_tokens).tolist()
        yield EngineRequest(request_id=str(number), token_ids=ids, params=params)


def record_routing(model: Path, shape: str, outs: dict[int, Path]) -> None:
    """Routing of other random prompts and their answers, one after the other: hit rates of the
    prediction follow from it, as a user would record them with `moeserve trace`. outs: by the
    tokens of a prompt."""
    blocks = -(-(max(outs) + OUTPUT_TOKENS) // BLOCK_TOKENS)
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model)),
            kv=KvConfig(num_blocks=blocks, block_tokens=BLOCK_TOKENS, prefix_reuse=False),
            experts=ExpertConfig(cpu_backend="native"),
        )
    )
    sizes = {i: ffn.experts.num_experts for i, ffn in engine.loaded.spec.moe_layers.items()}
    rng = np.random.default_rng(99)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    for prompt_tokens, out in outs.items():
        recorder = RoutingRecorder(sizes)
        engine.loaded.runtime.observers[:] = [recorder]
        for number in range(TRACED[prompt_tokens]):
            ids = rng.integers(1, SHAPES[shape]["vocab_size"], prompt_tokens).tolist()
            engine.add(EngineRequest(request_id=str(number), token_ids=ids, params=params))
            answer = [token for _ in iter_steps(engine) for token in _]
            recorder.end_sequence(ids + answer[:-1])
        recorder.save(out, config_sha256(model))
    engine.close()


def iter_steps(engine: Engine) -> Iterator[list[int]]:
    while engine.has_work:
        for delta in engine.step():
            yield delta.token_ids
