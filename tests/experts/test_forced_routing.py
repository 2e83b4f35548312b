"""Forced routing: rows see the recorded tokens of their streams, and nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.randomness import fresh_seed

from moeserve.cache.routing_trace import RoutingTrace, load_trace
from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, KvConfig, ModelConfig
from moeserve.core import EngineRequest, ModelError, Routing, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.experts.replay import RoutingReplay, force_routing
from moeserve.models.transformer import MoeFfn


def random_trace(
    rng: random.Random, tokens: int, layers: int, top_k: int, experts: int
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rng.randrange(2**31))
    ids = generator.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)
    weights = generator.random((tokens, layers, top_k), np.float32)
    return ids[..., :top_k].astype(np.uint8), weights


def as_trace(ids: np.ndarray, weights: np.ndarray, num_experts: int) -> RoutingTrace:
    layers = tuple(range(ids.shape[1]))
    return RoutingTrace("random", ids.astype(np.int64), weights, (), num_experts, layers)


def test_rows_see_the_tokens_of_their_streams() -> None:
    rng = random.Random(fresh_seed())
    ids, weights = random_trace(rng, 50, 3, 2, 7)
    trace = as_trace(ids, weights, 7)
    starts = [rng.randrange(50) for _ in range(4)]
    replay = RoutingReplay(trace, starts)
    for step in range(60):
        for rank in range(3):
            routing = replay.routing(rank, 4)
            tokens = [(start + step) % 50 for start in starts]
            assert np.array_equal(routing.ids.numpy(), ids[tokens, rank])
            assert np.array_equal(routing.weights.numpy(), weights[tokens, rank])
    prefill = RoutingReplay(trace, [3, 9])
    assert np.array_equal(prefill.routing(0, 5).ids.numpy(), ids[3:8, 0])
    assert np.array_equal(prefill.routing(0, 2).ids.numpy(), ids[[8, 9], 0])


def test_a_model_runs_the_experts_of_the_trace(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(BUNDLED_MODEL)),
            kv=KvConfig(num_blocks=32),
            experts=ExpertConfig(num_threads=1),
        )
    )
    layers = [x.ffn.routed for x in engine.loaded.model.layers if isinstance(x.ffn, MoeFfn)]
    spec = layers[0].router.spec
    ids, weights = random_trace(rng, 40, len(layers), spec.top_k, spec.num_experts)
    file = tmp_path / "trace.npz"
    np.savez(file, ids=ids, probs=weights.astype(np.float16), lens=np.array([40]))
    trace = load_trace(file, spec.num_experts)
    force_routing(layers, RoutingReplay(trace), trace)
    seen: list[tuple[int, np.ndarray]] = []

    def observe(layer: int, x: torch.Tensor, routing: Routing) -> None:
        seen.append((layer, routing.ids.numpy()))

    assert not layers[0].is_whole  # somebody forces it
    engine.loaded.runtime.observers.append(observe)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id="r", token_ids=[1, 2, 3], params=params))
    while engine.has_work:
        engine.step()
    engine.close()
    by_layer: dict[int, list[np.ndarray]] = {}
    for layer, rows in seen:
        by_layer.setdefault(layer, []).append(rows)
    for rank, layer in enumerate(sorted(by_layer)):
        assert np.array_equal(np.concatenate(by_layer[layer]), ids[:7, rank])


def test_a_trace_of_another_model_is_refused() -> None:
    rng = random.Random(fresh_seed())
    engine = Engine.from_config(
        EngineConfig(model=ModelConfig(model=str(BUNDLED_MODEL)), kv=KvConfig(num_blocks=8))
    )
    layers = [x.ffn.routed for x in engine.loaded.model.layers if isinstance(x.ffn, MoeFfn)]
    ids, weights = random_trace(rng, 4, len(layers), layers[0].router.spec.top_k + 1, 64)
    trace = as_trace(ids, weights, 64)
    with pytest.raises(ModelError, match="replay a trace of a model of the same shape"):
        force_routing(layers, RoutingReplay(trace), trace)
    engine.close()
