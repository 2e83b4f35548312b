"""Random layers to be scheduled: what they cost, who is asked for, what is there."""

from __future__ import annotations

import numpy as np

from moeserve.cache.expert_cache import Residency, Tier
from moeserve.core import LayerUse
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve


def random_costs(
    rng: np.random.Generator,
    link: tuple[float, float] = (0.3, 5),
    disk: tuple[float, float] = (0.3, 5),
) -> CostModel:
    """Rates as machines have them: a CPU slowed by rows, a device far faster.

    link, disk: bounds of the time of an expert, as multiples of the CPU's for one row of it.
    """
    cpu_us = rng.uniform(50, 400)
    device_us = cpu_us / rng.uniform(3, 40)
    row_us = cpu_us / rng.choice([2, 4, 8, 16, 32])
    return CostModel(
        expert_bytes=10**6,
        cpu=Curve([1, 2, 4096], [cpu_us, cpu_us + row_us, cpu_us + 4095 * row_us]),
        cpu_start_us=rng.uniform(0, cpu_us / 3),
        device=Curve([1, 64, 4096], [device_us, device_us * 1.2, device_us * rng.uniform(2, 20)]),
        device_start_us=rng.uniform(0, device_us),
        shared_us=rng.choice([0.0, device_us, cpu_us]),
        link=Curve([10**6], [cpu_us * rng.uniform(*link)]),
        disk=Curve([10**6], [cpu_us * rng.uniform(*disk)]),
    )


def random_rows(rng: np.random.Generator, num_active: int, num_experts: int) -> np.ndarray:
    """[E] int32: a few experts with many rows, most with few, as batches have them."""
    rows = np.zeros(num_experts, np.int32)
    active = rng.permutation(num_experts)[:num_active]
    rows[active] = np.minimum(1 + rng.pareto(0.9, num_active), 300).astype(np.int32)
    return rows


def use_of(rows: np.ndarray) -> LayerUse:
    return LayerUse(0, rows, rows.astype(np.float32))


def residency_of(rng: np.random.Generator, num_experts: int, tier: Tier) -> Residency:
    ready = np.flatnonzero(rng.random(num_experts) < rng.choice([0.25, 0.5, 0.75]))
    return Residency(0, tier, num_experts, frozenset(ready.tolist()))
