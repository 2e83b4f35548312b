"""A plan for recorded traffic: what comes of it, and the equal requests that stand for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from moeserve.experts.schedule.profile import Profile
from moeserve.planner.nearest import plan_on
from moeserve.planner.plan_types import PlanRequest, Traffic
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.traffic import TrafficEstimate, check_lengths, simulate_traffic
from moeserve.planner.workload import Workload
from moeserve.planner.workload_outcome import SloTargets, outcome_rows


@dataclass(frozen=True)
class Recorded:
    """request: equal requests of the workload's mean lengths, as many at once as run at once when
    most of its own do; what memory and speed are planned for."""

    workload: Workload
    slo: SloTargets
    found: TrafficEstimate
    request: PlanRequest

    @classmethod
    def of(
        cls,
        workload: Workload,
        slo: SloTargets,
        request: PlanRequest,
        profile: Profile,
        shape: ModelShape,
    ) -> Recorded:
        """request: its settings count, its traffic does not. Raises as `plan_on` and
        `simulate_traffic` do."""
        check_lengths(request, shape, workload)
        request = replace(request, longest_tokens=workload.longest)
        one = replace(request, traffic=mean_traffic(workload, 1))
        found = simulate_traffic(plan_on(one, profile, shape), workload, slo)
        running = min(found.most_at_once, request.engine.scheduler.max_running)
        many = replace(request, traffic=mean_traffic(workload, running))
        return cls(workload, slo, found, many)

    def as_json(self) -> dict[str, Any]:
        targets = {"ttft_s": self.slo.ttft_s, "tpot_s": self.slo.tpot_s}
        return {**self.workload.as_json(), "slo": targets, **self.found.as_json()}

    def show(self, console: Console) -> None:
        """The likeliest outcome, and those of an engine as slow and as fast as it may be."""
        console.print(
            f"\n[bold]{self.workload.name}[/bold]: {self.workload.in_words} in"
            f" {self.workload.span_s:.0f} s, at most {self.found.most_at_once} at once;"
            f" {self.found.basis}",
            soft_wrap=True,
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("", "predicted", "at the slowest", "at the fastest"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        found = self.found
        for row in outcome_rows([o.as_json() for o in (found.mid, found.low, found.high)]):
            table.add_row(*row)
        console.print(table)


def mean_traffic(workload: Workload, concurrency: int) -> Traffic:
    """Equal requests of a workload's mean lengths."""
    count = len(workload.requests)
    return Traffic(
        concurrency=concurrency,
        prompt_tokens=max(1, workload.prompt_tokens // count),
        output_tokens=max(1, workload.output_tokens // count),
    )
