"""The work of a step, and how long the resources of a machine take for it when none waits for
another (roofline; Williams, Waterman and Patterson, CACM 52(4), 2009; for tiers, MoE-Lightning's
hierarchical roofline, arXiv:2411.11217)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moeserve.planner.plan_types import Resource
from moeserve.planner.rates import Rates

Times = dict[Resource, float]
NONE: frozenset[Resource] = frozenset()
#: of a time: to a millionth of a millionth
BISECTIONS = 60


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one step or of many.

    other_bytes: of all that is read but routed experts. expert_bytes: of the routed experts that
    rows choose. missing_bytes: of these, what the fast tier cannot have; unread_bytes: what no
    memory can have. ops: of products but routed experts' in their format. attention_ops: of scores
    and values. expert_ops: of the routed experts.
    """

    other_bytes: float = 0.0
    expert_bytes: float = 0.0
    missing_bytes: float = 0.0
    unread_bytes: float = 0.0
    ops: float = 0.0
    attention_ops: float = 0.0
    expert_ops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: float) -> Work:
        return Work(*(count * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Machine:
    """What does the work. form: of most weights, whose peak counts. dtype: of kv. on_device:
    whether all but the experts without a slot is computed there."""

    rates: Rates
    form: str
    dtype: str
    on_device: bool

    def busy_s(self, work: Work, without: frozenset[Resource] = NONE) -> Times:
        """Seconds that each resource works; the longest of them is how long the work takes.

        without: resources that are no limit.
        """
        times = self._on_device(work, without) if self.on_device else self._on_cpu(work)
        if work.unread_bytes:
            times[Resource.DISK] = work.unread_bytes / self.rates.disk
        return {resource: s for resource, s in times.items() if resource not in without}

    def _on_cpu(self, work: Work) -> Times:
        rates = self.rates
        products_s = (work.ops + work.expert_ops) / rates.cpu_peak(self.form)
        return {
            Resource.CPU_MEMORY: (work.other_bytes + work.expert_bytes) / rates.cpu_read,
            Resource.CPU_COMPUTE: products_s + work.attention_ops / rates.cpu_peak(self.dtype),
        }

    def _on_device(self, work: Work, without: frozenset[Resource]) -> Times:
        """The shortest time in which all can be done: in T seconds the CPU reads and computes what
        it can of the experts, the device must do the rest in the same time. What it reads and what
        it computes are looked at apart, so nothing that can be done takes less."""
        rates = self.rates
        cpu_peak, device_peak = rates.cpu_peak(self.form), rates.device_peak(self.form)
        scores_s = work.attention_ops / rates.device_peak(self.dtype)

        def in_time(time_s: float) -> Times:
            all_bytes, all_ops = work.expert_bytes, work.expert_ops
            read, computed = all_bytes, all_ops
            if Resource.CPU_MEMORY not in without:
                read = min(read, time_s * rates.cpu_read)
            if Resource.CPU_COMPUTE not in without:
                computed = min(computed, time_s * cpu_peak)
            on_device = work.other_bytes + all_bytes - read
            products_s = (work.ops + all_ops - computed) / device_peak
            return {
                Resource.DEVICE_MEMORY: on_device / rates.device_read,
                Resource.DEVICE_COMPUTE: products_s + scores_s,
                Resource.LINK: max(0.0, work.missing_bytes - read) / rates.link,
                Resource.CPU_MEMORY: read / rates.cpu_read,
                Resource.CPU_COMPUTE: computed / cpu_peak,
            }

        def rest_s(time_s: float) -> float:
            """Of what the CPU leaves. It itself is done in time, but for rounding."""
            others = without | {Resource.CPU_MEMORY, Resource.CPU_COMPUTE}
            return max((s for r, s in in_time(time_s).items() if r not in others), default=0.0)

        low, high = 0.0, rest_s(0.0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if rest_s(middle) > middle else (low, middle)
        return in_time(high)

    def limits(self, work: Work) -> tuple[Resource, Resource, float]:
        """What the work waits for: the resource without which it would be shortest. Then what it
        would wait for, and how much faster it would be until there."""
        everything = self.busy_s(work)
        whole_s = max(everything.values())

        def longest_s(without: frozenset[Resource]) -> float:
            return max(self.busy_s(work, without).values(), default=0.0)

        first = min(everything, key=lambda r: (longest_s(frozenset({r})), r.value))
        rest = [resource for resource in everything if resource is not first]
        after = min(rest, key=lambda r: (longest_s(frozenset({first, r})), r.value))
        freed_s = longest_s(frozenset({first}))
        return first, after, whole_s / freed_s if freed_s else float("inf")
