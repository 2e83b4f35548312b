"""What a step of the real scheduler costs while the admission rule refuses."""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Seq
from statistics import median

from admission.runs import BLOCK_TOKENS
from moeserve.config import SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.batch import SampledToken, StepResult
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.past_future import PastFuture
from moeserve.engine.request_scheduler import RequestScheduler
from moeserve.engine.sequence import Sequence

RUNNING, WAITING = 64, 17


class FullHouse(PastFuture):
    """Computes the whole rule and then lets 64 run, so that every step pays for refusals."""

    def choose(
        self, candidates: Seq[Sequence], running: Collection[Sequence], blocks: BlockManager
    ) -> Sequence | None:
        super().choose(candidates, running, blocks)
        return candidates[0] if len(running) < RUNNING else None


def scheduler_overhead() -> dict[str, float]:
    """Microseconds of `schedule` and `commit`: 64 decodes of 2000 tokens and more. 17 wait, each
    for a block less than the one before it, so that the rule is asked about every one of them."""
    policy = FullHouse(1000)
    for length in range(1, 1001):
        policy.observe(length)
    blocks = BlockManager(70 * 2400 // BLOCK_TOKENS, BLOCK_TOKENS, prefix_reuse=True)
    config = SchedulerConfig(max_batch_tokens=2048, max_running=RUNNING + 1)
    scheduler = RequestScheduler(config, blocks, (), 1 << 20, policy)
    for number in range(RUNNING + WAITING):
        num_tokens = 2000 - BLOCK_TOKENS * max(0, number - RUNNING)
        scheduler.add(
            EngineRequest(
                request_id=str(number),
                token_ids=[number] * num_tokens,
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
        if len(names) == RUNNING:
            schedule_us.append((scheduled - started) * 1e6)
            commit_us.append((time.perf_counter() - sampled) * 1e6)
    return {
        "schedule_median_us": round(median(schedule_us), 1),
        "commit_median_us": round(median(commit_us), 1),
    }
