"""Engines on the bundled model, packed, and what they answer to random requests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine

#: token ids and their log-probabilities, by request
Answers = dict[str, list[tuple[int, float]]]


def make_engine(
    path: Path,
    max_batch_tokens: int = 24,
    device: str = "cpu",
    dtype: str = "auto",
    **experts: Any,
) -> Engine:
    return Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(path), device=device, dtype=dtype),
            kv=KvConfig(num_blocks=128),
            scheduler=SchedulerConfig(max_batch_tokens=max_batch_tokens),
            experts=ExpertConfig(cpu_backend="native", num_threads=2, **experts),
        )
    )


def make_requests(rng: random.Random, vocab_size: int) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=f"r{number}",
            token_ids=[rng.randrange(vocab_size) for _ in range(rng.randint(1, 40))],
            params=SamplingParams(
                max_tokens=rng.randint(2, 12), temperature=0, ignore_eos=True, logprobs=0
            ),
        )
        for number in range(5)
    ]


def answers(engine: Engine, requests: list[EngineRequest], between: Any = None) -> Answers:
    """Requests join while others run."""
    found: Answers = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while engine.has_work or waiting:
        if waiting:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            assert delta.error is None, delta.error
            for entry in delta.logprobs or ():
                found[delta.request_id].append((entry.token_id, entry.logprob))
        if between is not None:
            between()
    engine.check_integrity()
    return found
