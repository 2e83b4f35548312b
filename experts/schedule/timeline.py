"""Three timelines of one layer and step, CPU, link and device: simulated, and filled.

The model: the CPU runs its experts one after another; the link moves fetched experts one after
another; the device runs shared experts and what is resident, then every fetched expert once it has
arrived. The layer is over when CPU and device are. An expert costs more with more rows on both, and
every transfer costs the same, since the experts of a layer are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from moeserve.core import ConfigError
from moeserve.experts.schedule.cost_model import CostModel


class Fill(NamedTuple):
    """How many of a layer's experts go where; the CPU runs the others.

    num_on_device, num_fetched: of the resident and of the absent experts, those with most rows.
    makespan_us: until the layer is over.
    """

    num_on_device: int
    num_fetched: int
    makespan_us: float


def fill(
    costs: CostModel,
    resident: Sequence[int],
    absent: Sequence[int],
    loading_us: Sequence[float] = (),
    link_price_us: float = 0.0,
    staying: Sequence[int] = (),
) -> Fill:
    """The shortest of all fills in which the device takes the experts with most rows.

    resident, absent: rows of each expert, falling. loading_us: the first of `absent` are on their
    way already, and take so long from now, one after the other. link_price_us: what a fetch must
    save, because the link has other things to do that save as much. staying: rows of what the
    device runs in any case.

    HybriMoE (Zhong et al., arXiv 2504.05897, section on hybrid scheduling) fills the timelines
    earliest free first: the device takes the resident expert with most rows, the link the absent
    one with most, the CPU the one with least, until none is left. Whatever the timelines, such a
    fill ends with m resident experts on the device and k absent ones fetched, each the ones with
    most rows; so instead of one walk to some (m, k), all pairs are compared. With

        D(k)  time on the device of the k fetched ones
        M(k)  max over i <= k of (i-th arrival - D(i - 1)): the device, waiting for arrivals, is
              over at D(k) + M(k)

    the device ends at D(k) + max(its m resident ones, M(k)), and the best m falls as k grows, so
    one pass over each list compares them all. Between equal ends the fewest bytes win: what the
    link does not carry here it can carry for layers to come.
    """
    cpu, device = costs.cpu, costs.device
    if device is None:
        raise ConfigError("profile: it says nothing of a device", field="profile")
    fetch_us = costs.transfer_us(costs.expert_bytes) if absent else 0.0
    cpu_start_us, least_us = costs.cpu_start_us, costs.device_least_us
    resident_device_us = [device[rows] for rows in resident]
    resident_cpu_us = [cpu[rows] for rows in resident]
    num_resident, num_absent, num_loading = len(resident), len(absent), len(loading_us)

    cpu_us = sum([cpu[rows] for rows in absent])  # what the CPU runs, without its start
    # the device, before what is fetched
    own_us = costs.device_begins_us + sum(resident_device_us)
    own_us += sum([device[rows] for rows in staying])
    fetched_us = waiting_us = arrived_us = price_us = 0.0
    m = num_resident
    best, best_us = Fill(0, 0, inf), inf
    for k in range(num_absent + 1):
        if k:
            rows = absent[k - 1]
            if k > num_loading:
                arrived_us += fetch_us
                price_us += link_price_us
            else:
                arrived_us += loading_us[k - 1]
            waiting_us = max(waiting_us, arrived_us - fetched_us)
            fetched_us += device[rows]
            cpu_us -= cpu[rows]
        device_ends_us = fetched_us + max(own_us, waiting_us) if k or m or staying else least_us
        start_us = cpu_start_us if k < num_absent or m < num_resident else 0.0
        makespan_us = max(device_ends_us, cpu_us + start_us)
        while m:  # to the CPU with the smallest resident expert, as long as that is shorter
            fewer_us = own_us - resident_device_us[m - 1]
            more_us = cpu_us + resident_cpu_us[m - 1]
            device_ends_us = least_us
            if k or m > 1 or staying:
                device_ends_us = fetched_us + max(fewer_us, waiting_us)
            shorter_us = max(device_ends_us, more_us + cpu_start_us)
            if shorter_us >= makespan_us:
                break
            makespan_us, own_us, cpu_us, m = shorter_us, fewer_us, more_us, m - 1
        if makespan_us + price_us < best_us:
            best, best_us = Fill(m, k, makespan_us), makespan_us + price_us
    return best


def run_as_fetched_us(fetch_us: float, run_us: Sequence[float], busy_us: float) -> float:
    """End of a processor that is busy first, then runs experts as they arrive, one by one.

    run_us: in the order of transfers. The largest first is best: this is a flow shop of two
    machines, whose optimal order (Johnson, "Optimal two- and three-stage production schedules",
    1954) is by rising time on the first machine for jobs that are longer on the second, then by
    falling time on the second for the others. With equal times on the first, falling time on the
    second is such an order. What the second machine has to do beforehand is a job that takes no
    time on the first, which Johnson's rule puts first.
    """
    end_us, arrived_us = busy_us, 0.0
    for us in run_us:
        arrived_us += fetch_us
        end_us = max(end_us, arrived_us) + us
    return end_us


def makespan_us(
    costs: CostModel,
    on_cpu: Sequence[int],
    on_device: Sequence[int],
    fetched: Sequence[int],
) -> float:
    """Length of a layer whose experts have so many rows each, for any placement: what `fill`
    minimises, step by step. fetched: in the order of transfers."""
    cpu_us = sum(costs.cpu_us(rows) for rows in on_cpu) + (costs.cpu_start_us if on_cpu else 0.0)
    if not on_device and not fetched:
        return max(cpu_us, costs.device_least_us)
    busy_us = costs.device_begins_us + sum(costs.device_us(rows) for rows in on_device)
    fetch_us = costs.transfer_us(costs.expert_bytes)
    run_us = [costs.device_us(rows) for rows in fetched]
    return max(cpu_us, run_as_fetched_us(fetch_us, run_us, busy_us))
