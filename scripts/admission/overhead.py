"""What a step of the real scheduler costs while the admission rule refuses."""

from __future__ import annotations

import time
from collections.abc import Collection
from statistics import median

from admission.runs import BLOCK_TOKENS
from moeserve.config import SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.admission import PastFuture
from moeserve.engine.batch import SampledToken, StepResult
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.request_scheduler import RequestScheduler
from moeserve.engine.sequence import Sequence


class FullHouse(PastFuture):
    """Computes the whole rule and then lets 64 run, so that every step pays for a refusal."""

    def admits(
        self, candidate: Sequence, running: Collection[Sequence], blocks: BlockManager
    ) -> bool:
        super().admits(candidate, running, blocks)
        return len(running) < 64


def scheduler_overhead() -> dict[str, float]:
    """Microseconds of `schedule` and `commit`: 64 decodes of 2000 tokens and more, one waiting."""
    policy = FullHouse(1000)
    for length in range(1, 1001):
        policy.observe(length)
    blocks = BlockManager(70 * 2400 // BLOCK_TOKENS, BLOCK_TOKENS, prefix_reuse=True)
    config = SchedulerConfig(max_batch_tokens=2048, max_running=65)
    scheduler = RequestScheduler(config, blocks, (), 1 << 20, policy)
    for number in range(65):
        scheduler.add(
            EngineRequest(
                request_id=str(number),
                token_ids=[number] * 2000,
                params=SamplingParams(max_tokens=300),
            ),
            0.0,
        )
    schedule_us: list[float] = []
    commit_us: list[float] = []
    while len(commit_us) < 200:
        started = time.perf_counter()
        batch = scheduler.schedule(0.0)
        scheduled = time.perf_counter()
        assert batch is not None
        names = [chunk.sequence.request_id for chunk in batch.chunks if chunk.samples]
        result = StepResult({name: SampledToken(1) for name in names})
        sampled = time.perf_counter()
        scheduler.commit(batch, result, 0.0)
        if len(names) == 64:
            schedule_us.append((scheduled - started) * 1e6)
            commit_us.append((time.perf_counter() - sampled) * 1e6)
    return {
        "schedule_median_us": round(median(schedule_us), 1),
        "commit_median_us": round(median(commit_us), 1),
    }
