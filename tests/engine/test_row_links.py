"""Rows across steps: whose last token stood where, and which experts it chose."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.randomness import fresh_seed

from moeserve.config import (
    BUNDLED_MODEL,
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.core import EngineRequest, Routing, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.engine.row_links import recent_tokens


def check_recent(batch: object) -> None:
    """Every row's last tokens, one row after the other."""
    count = len(batch.chunks) + 2  # type: ignore[attr-defined]
    expected = []
    for chunk in batch.chunks:  # type: ignore[attr-defined]
        for place in range(chunk.start, chunk.start + chunk.num_tokens):
            known = chunk.sequence.token_ids[: place + 1][-count:]
            expected.append([-1] * (count - len(known)) + known)
    assert recent_tokens(batch, count).tolist() == expected  # type: ignore[arg-type]


def run(decode_group: int | None, rng: random.Random) -> dict[str, list[int]]:
    """Greedy tokens of six requests; checks every step's links and experts on the way."""
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(BUNDLED_MODEL)),
            kv=KvConfig(num_blocks=64),
            scheduler=SchedulerConfig(decode_group=decode_group, max_batch_tokens=16),
            experts=ExpertConfig(num_threads=1),
        )
    )
    steps: list[list[tuple[str, int]]] = []
    links: list[np.ndarray] = []
    chosen: dict[str, set[int]] = {}
    forward = engine.runner.forward
    num_experts = engine.loaded.spec.num_experts

    def watched(batch: object) -> object:
        rows = []
        for chunk in batch.chunks:  # type: ignore[attr-defined]
            name = chunk.sequence.request_id
            rows += [(name, chunk.start + i) for i in range(chunk.num_tokens)]
            chosen[name] = set()
        steps.append(rows)
        check_recent(batch)
        return forward(batch)  # type: ignore[arg-type]

    def observe(layer: int, x: torch.Tensor, routing: Routing) -> None:
        rank = sorted(engine.loaded.spec.moe_layers).index(layer)
        for row, (name, _) in enumerate(steps[-1]):
            if row + 1 == len(steps[-1]) or steps[-1][row + 1][0] != name:
                chosen[name] |= {rank * num_experts + e for e in routing.ids[row].tolist()}

    engine.runner.forward = watched  # type: ignore[method-assign, assignment]
    engine.loaded.runtime.observers.append(observe)
    of = engine._row_links.of
    engine._row_links.of = lambda batch: links.append(of(batch)) or links[-1]  # type: ignore
    tokens: dict[str, list[int]] = {}
    for number in range(6):
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(max_tokens=rng.randint(3, 9), temperature=0, ignore_eos=True)
        engine.add(EngineRequest(request_id=f"r{number}", token_ids=prompt, params=params))
        tokens[f"r{number}"] = []
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
        memory = engine._last_routing
        if memory is not None:
            for sequence, _ in memory._rows:
                bits = sum(1 << expert for expert in chosen[sequence.request_id])
                assert memory.predicted([sequence]) == [bits]
    for before, rows, found in zip([[], *steps[:-1]], steps, links, strict=True):
        for row, (name, position) in enumerate(rows):
            expected = before.index((name, position - 1)) if (name, position - 1) in before else -1
            assert found[row] == expected
    engine.close()
    return tokens


@pytest.mark.parametrize("decode_group", [1, 2, 4])
def test_decodes_in_groups_give_the_same_tokens(decode_group: int) -> None:
    seed = fresh_seed()
    assert run(decode_group, random.Random(seed)) == run(None, random.Random(seed))
