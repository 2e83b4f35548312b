"""Four timelines of one layer and step: CPU, link and device, and the disk that feeds them.

The model of `timeline`, and besides: experts in neither memory are read one after another, all
reads taking equally long, those for the device first, which have further to go. What has been read
goes over the link behind what was in host memory, or to the CPU behind what that has to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeserve.core import ConfigError
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve

Times = NDArray[np.float64]


class Active(NamedTuple):
    """A layer's active experts by where they stand: rows of each, falling.

    on_device: and in host memory, so that the CPU can run them, too. on_device_only: for the CPU
    they would have to be read from disk, so they stay. in_host: not on the device; the first of
    them are on their way there and take `loading_us` from now, one after the other. on_disk: in
    neither memory.
    """

    on_device: Sequence[int] = ()
    on_device_only: Sequence[int] = ()
    in_host: Sequence[int] = ()
    on_disk: Sequence[int] = ()
    loading_us: Sequence[float] = ()


class DiskFill(NamedTuple):
    """How many of each kind the device runs, those with most rows; the CPU runs the others.

    num_read: of the experts on disk, to be read before the others. makespan_us: until the layer is
    over.
    """

    num_on_device: int
    num_fetched: int
    num_read: int
    makespan_us: float


def fill_from_disk(costs: CostModel, active: Active, link_price_us: float = 0.0) -> DiskFill:
    """The shortest of all fills in which the device takes the experts with most rows of each kind.

    link_price_us: what a fetch must save, because the link has other things to do.

    All triples (m, k, x) are compared: m of the experts on the device stay there, k of those in
    host memory are fetched, x of those on disk are read and fetched. With transfers of f and reads
    of r microseconds, and the names of `timeline.fill`:

        A(k, x)  arrival of the x-th read one on the device: max(A(k) + x f, r + x f, x r + f),
                 since f and r do not change it waits for the link all along, or for the disk
        M(k, x)  max(M(k), max over i <= x of A(k, i) - D(k, i - 1))
        C(x)     time on the CPU of what is read for it; it may begin with the i-th at i r, so it is
                 over at L(x), the max over i > x of i r + C(i - 1), or later if it had other work

    and the layer takes the longer of D(k, x) + max(its m resident ones, M(k, x)) on the device and
    max(own work + C(x), L(x)) on the CPU. Between equal ends the fewest bytes win.
    """
    device = costs.device
    if device is None:
        raise ConfigError("profile: it says nothing of a device", field="profile")
    read_us = costs.disk_us(costs.expert_bytes) if active.on_disk else 0.0
    staying_us = sum([device[rows] for rows in active.on_device_only])
    # [m], [k], [x], and [k, x]
    own_us = costs.device_begins_us + staying_us + _sums(device, active.on_device)
    run_us, waiting_us = _as_fetched(costs, active, read_us)
    own_cpu_us = _rest(costs.cpu, active.on_device)
    fetched_cpu_us = _rest(costs.cpu, active.in_host)
    read_cpu_us = _rest(costs.cpu, active.on_disk)
    late_us = _latest_end(costs.cpu, active.on_disk, read_us)

    # [m, k, x]
    device_us = run_us + np.maximum(own_us[:, None, None], waiting_us)
    if not active.on_device_only:
        device_us[0, 0, 0] = costs.device_least_us
    work_us = own_cpu_us[:, None, None] + fetched_cpu_us[:, None] + read_cpu_us
    cpu_us = costs.cpu_start_us + np.maximum(work_us, late_us)
    cpu_us[-1, -1, -1] = 0.0
    makespan_us = np.maximum(device_us, cpu_us)
    num_paid = np.maximum(np.arange(run_us.shape[0]) - len(active.loading_us), 0)[:, None]
    num_paid = num_paid + np.arange(run_us.shape[1])
    priced_us = makespan_us + link_price_us * num_paid
    return _cheapest(priced_us, makespan_us)


def _as_fetched(costs: CostModel, active: Active, read_us: float) -> tuple[Times, Times]:
    """D(k, x) and M(k, x), both [k, x]."""
    assert costs.device is not None
    num_fetched, num_read = len(active.in_host), len(active.on_disk)
    fetch_us = costs.transfer_us(costs.expert_bytes) if num_fetched or num_read else 0.0
    each_us = np.full(num_fetched, fetch_us)
    each_us[: len(active.loading_us)] = active.loading_us
    arrived_us = np.concatenate(([0.0], each_us.cumsum()))  # [k]
    run_us = _sums(costs.device, active.in_host)  # [k]
    late_us = np.concatenate(([0.0], arrived_us[1:] - run_us[:-1]))
    waiting_us = np.maximum.accumulate(late_us)  # [k]

    x = np.arange(1, num_read + 1)
    from_disk_us = np.maximum(read_us + x * fetch_us, x * read_us + fetch_us)
    read_arrived_us = np.maximum(arrived_us[:, None] + x * fetch_us, from_disk_us)  # [k, x from 1]
    all_run_us = run_us[:, None] + _sums(costs.device, active.on_disk)  # [k, x]
    late_us = np.column_stack((waiting_us, read_arrived_us - all_run_us[:, :-1]))
    return all_run_us, np.maximum.accumulate(late_us, axis=1)


def _sums(curve: Curve, rows: Sequence[int]) -> Times:
    """[n + 1]: the first n together."""
    return np.cumsum([0.0, *(curve[each] for each in rows)])


def _rest(curve: Curve, rows: Sequence[int]) -> Times:
    """[n + 1]: all but the first n together."""
    sums = _sums(curve, rows)
    rest: Times = sums[-1] - sums
    return rest


def _latest_end(cpu: Curve, rows: Sequence[int], read_us: float) -> Times:
    """L(x), [x]: when a CPU that is free is over with all but the first x, as they come."""
    starts_us = np.arange(1, len(rows) + 1) * read_us + _rest(cpu, rows)[:-1]
    ends_us = np.append(starts_us, 0.0)
    return np.maximum.accumulate(ends_us[::-1])[::-1]


def _cheapest(priced_us: Times, makespan_us: Times) -> DiskFill:
    """The least price; the fewest transfers where that is the same, and the most on the device."""
    near = priced_us <= priced_us.min() * (1 + 1e-12)
    m, k, x = np.nonzero(near)
    best = np.lexsort((-m, k + x))[0]
    where: tuple[Any, ...] = (m[best], k[best], x[best])
    return DiskFill(int(m[best]), int(k[best]), int(x[best]), float(makespan_us[where]))
