"""The benchmark of the emulated device: real layers, cache and scheduler take the times that the
simulation of decode, written without any of device, link and executor, says they take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench_emulated import row_of
from emulated.cases import SHAPES, Case
from emulated.report import markdown
from emulated.runs import DEPTH, Decoder, Learnt
from support.randomness import fresh_seed

from moeserve.cache.policies.registry import build_policy
from moeserve.cache.routing_trace import RoutingTrace
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve
from moeserve.planner.ablation import STRATEGIES, DecodeSimulation, Setting, popularity
from moeserve.predictors.base import Prediction
from moeserve.predictors.none import NonePredictor

LAYERS, EXPERTS, CHOSEN, TOKENS = 4, 16, 3, 60
# No sums of these are equal by chance: whether a copy that is complete to the instant is there in
# time would be rounding, which goes its own way in the engine and in the simulation.
REST_US, OUTSIDE_US = 50.2473, 1000.0
COSTS = CostModel(
    expert_bytes=1000,
    cpu=Curve([1, 2], [160.3391, 170.1187]),
    cpu_start_us=20.0713,
    device=Curve([1], [13.1579]),
    device_start_us=20.2911,
    shared_us=35.4177,
    link=Curve([1000], [200.5563]),
)


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(fresh_seed())
    ids = np.zeros((TOKENS, LAYERS, CHOSEN), np.int64)
    for token in range(TOKENS):
        if token % 20 == 0:  # another request: other experts are popular
            chances = rng.dirichlet(np.full(EXPERTS, 0.3), LAYERS) + 1e-6
            chances /= chances.sum(1, keepdims=True)
        for layer in range(LAYERS):
            ids[token, layer] = rng.choice(EXPERTS, CHOSEN, replace=False, p=chances[layer])
    weights = np.full(ids.shape, 1 / CHOSEN, np.float32)  # which is what the simulation takes
    trace = RoutingTrace("random", ids, weights, (), EXPERTS, tuple(range(LAYERS)))
    tokens = np.arange(TOKENS)
    shape = replace(SHAPES[0], num_experts=EXPERTS)
    return Case(
        shape,
        trace,
        tokens[:0],
        tokens[:0],
        tokens,
        COSTS,
        REST_US,
        OUTSIDE_US,
        (),
        (0.4, 0.6, 0.8),
    )


@pytest.fixture(scope="module")
def decoder(case: Case) -> Decoder:
    return Decoder(case, NativeRuntime(1))


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("policy_name", ["lru", "score"])
def test_times_are_those_of_the_simulation_and_bits_those_of_all(
    case: Case, decoder: Decoder, share: float, policy_name: str
) -> None:
    num_slots = int(share * LAYERS * EXPERTS)
    popular = popularity(case.trace.ids, EXPERTS)
    policy = build_policy(policy_name, case.trace.experts_per_layer)
    learnt = Learnt(popular, policy, NonePredictor())
    rows = []
    for strategy in STRATEGIES:
        run = decoder.begin(strategy, num_slots, learnt)
        run.decode(TOKENS // 3)
        run.decode(TOKENS)
        outcome = run.outcome()
        setting = Setting(COSTS, REST_US, EXPERTS, LAYERS, num_slots, popular, policy_name, DEPTH)
        nothing = [[Prediction()] * LAYERS] * TOKENS
        simulated = DecodeSimulation(strategy, setting).run(case.trace.ids, nothing)
        assert outcome.token_us == pytest.approx(simulated.token_us, rel=1e-6), strategy.name
        rows.append(row_of(case, share, strategy.name, outcome, outcome))
        assert rows[-1]["checksum"] == rows[0]["checksum"]
    table = markdown(rows, ["About."])
    assert all(f"| {strategy.name} |" in table for strategy in STRATEGIES)
