"""When a shared expert is computed, and that nobody sees it in the tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed
from support.workers import worker_thread

from moeserve.cache.types import LayerSlots
from moeserve.core import Placement
from moeserve.engine.engine import Engine
from moeserve.experts.beside import Beside
from moeserve.experts.supply import Group, Supplied
from moeserve.planner.random_model import write_random_packed
from moeserve.timeline import Span, Timeline

SLOTS = LayerSlots(0, tuple(range(8)), 0)
NUM_LAYERS, NUM_EXPERTS = 3, 12
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "vocab_size": 300,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}


def turns_of(placement: Placement, groups: list[Group]) -> tuple[list[object], torch.Tensor]:
    """What happens, in its order: groups that are computed, and the function."""
    seen: list[object] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append("shared")
        return 2 * x

    def arriving() -> Iterator[Group]:
        for number, group in enumerate(groups):
            seen.append(f"asked {number}")
            yield group

    beside = Beside(function, torch.ones(2, 3), 0, Timeline())
    supplied = beside.within(Supplied(SLOTS, arriving()), placement)
    while (group := next(supplied.groups, None)) is not None:
        seen.append(group)
    return seen, beside.result()


def test_it_waits_for_what_is_at_hand_and_for_nothing_else() -> None:
    fetched = Placement(0, fetch_first=(3, 4), on_cpu=(1, 2))
    seen, y = turns_of(fetched, [(1, 2), (4,), (3,)])
    assert seen == ["asked 0", (1, 2), "shared", "asked 1", (4,), "asked 2", (3,)]
    assert torch.equal(y, torch.full((2, 3), 2.0))


def test_it_comes_first_where_nothing_is_at_hand() -> None:
    seen, _ = turns_of(Placement(0, fetch_first=(3, 4)), [(4,), (3,)])
    assert seen == ["shared", "asked 0", (4,), "asked 1", (3,)]


def test_it_is_computed_where_nobody_asks_for_groups() -> None:
    beside = Beside(torch.neg, torch.ones(1, 2), 0, Timeline())
    beside.within(Supplied(SLOTS, iter(((1,),))), Placement(0, on_cpu=(1,)))
    assert torch.equal(beside.result(), -torch.ones(1, 2))


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, every layer with a shared expert."""
    folder = tmp_path_factory.mktemp("shared")
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    write_random_packed(config, folder / "model", "int8")
    return folder / "model"


@pytest.fixture(scope="module")
def resident(shared_model: Path) -> Iterator[Engine]:
    engine = make_engine(shared_model)
    yield engine
    engine.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_the_same_tokens_whatever_is_fetched(
    device: str, shared_model: Path, resident: Engine
) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, resident.info.vocab_size)
    expected = answers(resident, requests)
    for host_slots in (2, rng.randint(3, NUM_LAYERS * NUM_EXPERTS - 1)):
        tiers: dict[str, Any] = {"host_slots": host_slots}
        if device == "emulated":
            tiers["device_slots"] = rng.randint(1, NUM_LAYERS * NUM_EXPERTS)
        predictor = rng.choice(("none", "markov", "gate_lookahead"))
        engine = make_engine(
            shared_model, rng.choice((3, 24, 200)), device, predictor=predictor, **tiers
        )
        try:
            assert answers(engine, requests) == expected
        finally:
            engine.close()


@pytest.mark.parametrize("host_slots", [None, 9])
def test_the_same_tokens_beside_a_worker(
    host_slots: int | None, shared_model: Path, resident: Engine, tmp_path: Path
) -> None:
    requests = make_requests(random.Random(fresh_seed()), resident.info.vocab_size)
    with worker_thread(shared_model, f"ipc://{tmp_path}/worker", "0/2") as endpoint:
        engine = make_engine(
            shared_model,
            workers=(endpoint,),
            host_slots=host_slots,
            worker_timeout_s=60.0,
            worker_start_s=120.0,
        )
        try:
            assert answers(engine, requests) == answers(resident, requests)
            assert engine.loaded.runtime.workers is not None
            assert engine.loaded.runtime.workers.count.num_pairs > 0
        finally:
            engine.close()


def test_a_layer_over_the_disk_computes_it_before_it_waits(shared_model: Path) -> None:
    engine = make_engine(shared_model, host_slots=NUM_LAYERS * NUM_EXPERTS // 3)
    engine.timeline.start()
    answers(engine, make_requests(random.Random(fresh_seed()), engine.info.vocab_size))
    spans = engine.timeline.stop().spans
    engine.close()
    routers = sorted((span for span in spans if span.name == "router"), key=lambda s: s.end_s)
    shared = sorted((s for s in spans if s.name == "shared expert"), key=lambda s: s.end_s)
    assert len(routers) == len(shared) > 0
    stalls = [span for span in spans if span.name == "stall" and "experts" in span.details]
    assert stalls, "with a third of the experts in memory something is waited for"
    for began, own in zip(routers, shared, strict=True):
        assert began.details["layer"] == own.details["layer"]
        assert not _between(stalls, began.end_s, own.start_s)


def _between(stalls: list[Span], begin_s: float, end_s: float) -> list[Span]:
    return [span for span in stalls if begin_s <= span.start_s < end_s]
