"""Figures of a device and of the link to it, through torch: what the device tier runs on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from moeserve.cache.expert_cache import LayerSlots
from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.experts.device.torch_grouped import GroupedExperts
from moeserve.experts.schedule.profile import (
    ExpertCurve,
    Figure,
    Processor,
    ReadRate,
    TransferPoint,
)
from moeserve.planner.repeats import Repeats

WEIGHTS = "bfloat16"
#: of the two jobs whose difference is taken
EXPERTS = (2, 8)


@dataclass(frozen=True)
class DevicePlan:
    """shapes: (hidden, intermediate) sizes of experts. pool_experts: on the device, so many that
    their weights do not stay in its caches. matrix: rows and columns of the product that the peak
    is taken from."""

    device: torch.device
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    transfer_bytes: tuple[int, ...]
    copy_bytes: int
    matrix: int
    pool_experts: int
    repeats: Repeats


def measure_device(
    plan: DevicePlan, name: str, memory_bytes: int, report: Callable[[str], None]
) -> Processor:
    timer = _Timer(plan.device)
    report(f"{name}: memory and arithmetic")
    source = torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    copy_us = plan.repeats.figure(partial(timer.us, partial(target.copy_, source)))
    # A copy reads and writes.
    rate = Figure(value=2 * plan.copy_bytes / copy_us.value * 1e6, spread=copy_us.spread)
    a = torch.randn(plan.matrix, plan.matrix, device=plan.device).to(torch.bfloat16)
    product_us = plan.repeats.figure(partial(timer.us, partial(torch.matmul, a, a)))
    peak = Figure(value=2 * plan.matrix**3 / product_us.value * 1e6, spread=product_us.spread)
    report(f"{name}: experts")
    small = _Jobs(plan, (plan.shapes[0][0], 16))
    return Processor(
        name=name,
        memory_bytes=memory_bytes,
        read=[ReadRate(kernel="read", num_threads=1, bytes_per_s=rate)],
        ops_per_s={"bf16": peak},
        start_us=plan.repeats.figure(partial(small.us, 1, 1)),
        expert_curves=[_curve(plan, shape) for shape in plan.shapes],
    )


def measure_link(plan: DevicePlan, report: Callable[[str], None]) -> list[TransferPoint]:
    """Copies from pinned memory, as the device tier makes them."""
    report("link to the device")
    timer = _Timer(plan.device)
    points = []
    for num_bytes in plan.transfer_bytes:
        pinned = plan.device.type == "cuda"
        source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        target = torch.empty(num_bytes, dtype=torch.uint8, device=plan.device)
        copy = partial(target.copy_, source, non_blocking=True)
        us = plan.repeats.figure(partial(timer.us, copy))
        points.append(TransferPoint(num_bytes=num_bytes, us=us))
    return points


class _Timer:
    """Microseconds until the device has done what a call asked of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def us(self, call: Callable[[], object]) -> float:
        self._wait()
        started_s = time.perf_counter()
        call()
        self._wait()
        return (time.perf_counter() - started_s) * 1e6

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Jobs:
    """Jobs on a pool of experts of one shape; experts take turns."""

    def __init__(self, plan: DevicePlan, shape: tuple[int, int]) -> None:
        hidden, inner = shape
        num = plan.pool_experts
        spec = ExpertSpec(num_experts=num, hidden_size=hidden, intermediate_size=inner)
        self._device = plan.device
        self._hidden = hidden
        gate_up = self._numbers(num, 2 * inner, hidden)
        self._experts = GroupedExperts(
            spec, ExpertWeights(gate_up, self._numbers(num, hidden, inner)), 0
        )
        self._slots = LayerSlots(0, tuple(range(num)), 0)
        self._turns = cycle(range(num))
        self._timer = _Timer(plan.device)

    def _numbers(self, *shape: int) -> Tensor:
        numbers = torch.randn(shape, device=self._device) / float(shape[-1] ** 0.5)
        return numbers.to(torch.bfloat16)

    def us(self, num_experts: int, num_rows: int) -> float:
        """One job in which num_rows rows choose the same num_experts experts."""
        ids = torch.tensor([next(self._turns) for _ in range(num_experts)], device=self._device)
        ids = ids.expand(num_rows, -1).contiguous()  # [T, K]
        weights = torch.full(ids.shape, 1.0 / num_experts, device=self._device)
        routing, x = Routing(ids, weights), self._numbers(num_rows, self._hidden)
        return self._timer.us(partial(self._experts.run, x, routing, self._slots))

    def one_more_us(self, repeats: Repeats, num_rows: int, few: int, many: int) -> Figure:
        more, less = partial(self.us, many, num_rows), partial(self.us, few, num_rows)
        return repeats.difference(more, less, many - few)


def _curve(plan: DevicePlan, shape: tuple[int, int]) -> ExpertCurve:
    jobs = _Jobs(plan, shape)
    return ExpertCurve(
        weights=WEIGHTS,
        hidden_size=shape[0],
        intermediate_size=shape[1],
        record_bytes=3 * shape[0] * shape[1] * 2,
        rows=list(plan.rows),
        us=[jobs.one_more_us(plan.repeats, rows, *EXPERTS) for rows in plan.rows],
    )
