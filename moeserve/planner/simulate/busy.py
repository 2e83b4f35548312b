"""What each resource did in each phase, and so what the phase waits for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from moeserve.planner.plan_types import Limit, Resource

PREFILL, DECODE = "prefill", "decode"


@dataclass
class Busy:
    """Microseconds by phase: of steps, and of each resource in them. A step that computes any
    prompt is of the phase prefill."""

    step_us: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    resource_us: dict[str, dict[Resource, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )

    def add(self, phase: str, step_us: float, used: Mapping[Resource, float]) -> None:
        self.step_us[phase] += step_us
        for resource, us in used.items():
            self.resource_us[phase][resource] += us

    def limits(self) -> tuple[Limit, ...]:
        """By phase: the busiest resource, the next, and how much faster the phase would be if the
        first were no limit, so that the next is."""
        found = []
        for phase in (PREFILL, DECODE):
            ranked = sorted(
                self.resource_us[phase].items(), key=lambda item: (-item[1], item[0].value)
            )
            if len(ranked) >= 2:
                (first, first_us), (second, second_us) = ranked[:2]
                without_us = self.step_us[phase] - (first_us - second_us)
                headroom = self.step_us[phase] / max(without_us, 1e-9)
                found.append(Limit(phase, first, second, headroom))
        return tuple(found)


def split_work(us: float, floor_us: float, slope_us: float) -> dict[Resource, float]:
    """Of a product's time: what memory and what arithmetic would take of it alone.

    floor_us: of one row, which reads the weights; slope_us: of its arithmetic at its best.
    """
    return {
        Resource.CPU_MEMORY: min(us, floor_us),
        Resource.CPU_COMPUTE: min(us, slope_us),
    }
