"""How many threads read from a disk, by what was measured."""

from __future__ import annotations

import random

from support.randomness import fresh_seed

from moeserve.cache.tiers.disk_tuning import NEAR, NEAR_AHEAD, choose_threads


def test_fewer_threads_read_on_a_guess_than_for_a_step_that_waits() -> None:
    tuning = choose_threads({1: 1.2e9, 2: 1.85e9, 4: 1.95e9, 8: 2e9})
    assert (tuning.num_threads, tuning.prefetch_threads) == (4, 2)
    assert tuning.best_bytes_per_s == 1.95e9


def test_a_disk_that_wants_many_reads_gets_them_in_both_cases() -> None:
    tuning = choose_threads({1: 0.25e9, 2: 0.5e9, 4: 1e9, 8: 2e9})
    assert (tuning.num_threads, tuning.prefetch_threads) == (8, 8)


def test_both_choices_are_the_least_that_come_near_the_fastest() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(200):
        rates = {n: rng.uniform(1, 2) for n in (1, 2, 4, 8)}
        tuning, fastest = choose_threads(rates), max(rates.values())
        for chosen, near in ((tuning.num_threads, NEAR), (tuning.prefetch_threads, NEAR_AHEAD)):
            assert rates[chosen] >= near * fastest
            assert all(rate < near * fastest for n, rate in rates.items() if n < chosen)
        assert tuning.prefetch_threads <= tuning.num_threads
