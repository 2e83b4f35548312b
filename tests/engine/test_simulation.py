"""The simulated clock on small synthetic traffic."""

from __future__ import annotations

import random

import pytest

from moeserve.config import SchedulerConfig
from moeserve.engine.admission import Aggressive, Conservative, PastFuture
from moeserve.engine.simulation import Arrival, RequestTimes, Simulation, Slo, StepCost

COST = StepCost(fixed_s=1.0, per_token_s=0.25, per_kv_token_s=0.125)


def test_one_request_takes_what_the_cost_model_says() -> None:
    config = SchedulerConfig(max_batch_tokens=4)
    result = Simulation(config, 10, 4, COST).run([Arrival(2.0, [7] * 6, 2, 5)])
    (times,) = result.requests
    chunks = (1 + 4 * 0.25 + 4 * 0.125) + (1 + 2 * 0.25 + 6 * 0.125)
    decode = 1 + 0.25 + 7 * 0.125
    assert times.ttft_s == chunks
    assert times.longest_gap_s == decode
    assert result.end_s == 2.0 + chunks + decode
    assert (result.num_steps, times.received) == (3, 2)
    assert times.good(Slo(ttft_s=chunks, max_tpot_s=decode))
    assert not times.good(Slo(ttft_s=chunks - 0.01, max_tpot_s=decode))
    assert not times.good(Slo(ttft_s=chunks, max_tpot_s=decode - 0.01))


def test_an_unfinished_request_is_not_good() -> None:
    assert not RequestTimes(0.0, 1).good(Slo(ttft_s=1e9, max_tpot_s=1e9))


def test_later_turns_reuse_earlier_prompts() -> None:
    arrivals = [Arrival(0.0, [7] * 32, 2, 4), Arrival(1000.0, [7] * 32 + [8] * 8, 2, 4)]
    result = Simulation(SchedulerConfig(), 40, 4, COST).run(arrivals)
    assert [times.num_cached_tokens for times in result.requests] == [0, 32]


@pytest.fixture(scope="module")
def crowd() -> list[Arrival]:
    """More requests than fit, outputs far shorter than clients ask for."""
    rng = random.Random(5)
    return [
        Arrival(0.05 * number, [number] * rng.randint(20, 60), rng.randint(5, 120), 256)
        for number in range(250)
    ]


def test_past_future_evicts_least_of_those_that_fill_the_pool(crowd: list[Arrival]) -> None:
    cost = StepCost(fixed_s=0.01, per_token_s=1e-4, per_kv_token_s=0.0)
    results = {
        name: Simulation(SchedulerConfig(max_running=128), 120, 16, cost, policy).run(crowd)
        for name, policy in (
            ("aggressive", Aggressive(0.0)),
            ("conservative", Conservative()),
            ("past_future", PastFuture(200)),
        )
    }
    for result in results.values():
        assert all(times.received == times.num_output_tokens for times in result.requests)
    evictions = {name: result.stats.num_preemptions for name, result in results.items()}
    assert evictions["conservative"] == 0
    assert evictions["past_future"] < evictions["aggressive"] / 4
    assert results["past_future"].end_s < 0.7 * results["conservative"].end_s


def test_the_same_arrivals_give_the_same_result(crowd: list[Arrival]) -> None:
    cost = StepCost(fixed_s=0.01, per_token_s=1e-4, per_kv_token_s=1e-7)
    first, second = (Simulation(SchedulerConfig(), 120, 16, cost).run(crowd[:60]) for _ in range(2))
    assert first.requests == second.requests
    assert first.end_s == second.end_s


def test_closed_clients_wait_for_their_answers() -> None:
    config = SchedulerConfig(max_batch_tokens=64)
    arrivals = [Arrival(0.0, [number] * 4, 2, 5) for number in range(5)]
    result = Simulation(config, 100, 4, COST).run_closed(arrivals, 2)
    assert [times.received for times in result.requests] == [2] * 5
    # two at a time: prompts together, then one token each, then the next two
    step = [1 + 8 * 0.25 + 8 * 0.125, 1 + 2 * 0.25 + 10 * 0.125]
    assert [times.arrived_s for times in result.requests] == [
        pytest.approx(rank // 2 * sum(step)) for rank in range(5)
    ]
    assert result.requests[0].tpot_s == pytest.approx(step[1])
