"""Replays a workload against a server: requests go out when they came, whatever has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from moeserve.bench.serve_targets import RequestFailed, Target
from moeserve.planner.workload import MOONCAKE_BLOCK, Workload, WorkloadRequest
from moeserve.planner.workload_outcome import Answer

#: ids below it are in the vocabulary of nearly every tokenizer
DEFAULT_VOCAB_SIZE = 256
#: the first few ids are often special
FIRST_ID = 4


async def replay(
    target: Target,
    workload: Workload,
    vocab_size: int,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> list[Answer]:
    """In the order of the workload. vocab_size: prompts hold ids below it. report: called with the
    number of requests that have ended, and of all."""
    prompts = [
        prompt_of(request, number, vocab_size) for number, request in enumerate(workload.requests)
    ]
    began_s = time.perf_counter()
    answers: list[Answer] = []

    async def one(request: WorkloadRequest, ids: list[int]) -> Answer:
        await asyncio.sleep(began_s + request.at_s - time.perf_counter())
        answer = await _answer(target, request, ids, began_s)
        answers.append(answer)
        report(len(answers), len(prompts))
        return answer

    tasks = [
        asyncio.create_task(one(request, ids))
        for request, ids in zip(workload.requests, prompts, strict=True)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _answer(
    target: Target, request: WorkloadRequest, ids: list[int], began_s: float
) -> Answer:
    """Counted from when the request should have gone out: a client that falls behind waits, too."""
    first_s = last_s = 0.0
    count, error = 0, None
    try:
        async for at_s, num_tokens in target.answer(ids, request.num_output):
            first_s = first_s or at_s
            last_s = at_s if num_tokens > count else last_s or at_s
            count = num_tokens
    except RequestFailed as failure:
        error = str(failure)
    if error is None and count != request.num_output:
        error = f"{count} tokens came, {request.num_output} were asked for"
    return Answer(
        arrived_s=request.at_s,
        ended_s=time.perf_counter() - began_s,
        ttft_s=first_s - began_s - request.at_s,
        tpot_s=(last_s - first_s) / max(count - 1, 1),
        num_prompt=len(ids),
        num_output=count,
        error=error,
    )


def prompt_of(request: WorkloadRequest, number: int, vocab_size: int) -> list[int]:
    """Random ids: equal where the trace says that prefixes are equal, else like no other's."""
    low = min(FIRST_ID, vocab_size - 1)
    if not request.hash_ids:
        rng = np.random.default_rng([number, request.num_prompt])
        ids: list[int] = rng.integers(low, vocab_size, request.num_prompt).tolist()
        return ids
    tokens: list[int] = []
    for hash_id in request.hash_ids:
        size = min(MOONCAKE_BLOCK, request.num_prompt - len(tokens))
        block = np.random.default_rng(hash_id).integers(low, vocab_size, MOONCAKE_BLOCK)
        tokens += block[:size].tolist()
    return tokens
