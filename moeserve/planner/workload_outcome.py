"""What traffic comes to, predicted or measured: the same figures for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeserve.core import ConfigError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class SloTargets:
    """A request is good when its first token comes in ttft_s after its arrival and the others in
    tpot_s each, on average. None: no such target."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("slo_ttft", self.ttft_s), ("slo_tpot", self.tpot_s)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: {value}; allowed: seconds above 0", field=name)


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it. tpot_s: mean time between tokens. error: why it failed."""

    arrived_s: float
    ended_s: float
    ttft_s: float
    tpot_s: float
    num_prompt: int
    num_output: int
    error: str | None = None

    def good(self, slo: SloTargets) -> bool:
        in_time = slo.ttft_s is None or self.ttft_s <= slo.ttft_s
        steady = slo.tpot_s is None or self.tpot_s <= slo.tpot_s
        return self.error is None and in_time and steady


@dataclass(frozen=True)
class Outcome:
    """ttft_s, tpot_s: by percentile. output_tokens_per_s: from the first arrival to the last end.
    goodput_per_s: good requests, likewise. attained: their share."""

    requests: int
    failed: int
    span_s: float
    ttft_s: dict[int, float]
    tpot_s: dict[int, float]
    output_tokens_per_s: float
    goodput_per_s: float
    attained: float

    @classmethod
    def of(cls, answers: Sequence[Answer], slo: SloTargets) -> Outcome:
        """answers: at least one."""
        done = [answer for answer in answers if answer.error is None]
        good = sum(answer.good(slo) for answer in answers)
        began_s = min(answer.arrived_s for answer in answers)
        span_s = max(max(answer.ended_s for answer in answers) - began_s, 1e-9)
        return cls(
            requests=len(answers),
            failed=len(answers) - len(done),
            span_s=span_s,
            ttft_s=_percentiles([answer.ttft_s for answer in done]),
            tpot_s=_percentiles([answer.tpot_s for answer in done if answer.num_output > 1]),
            output_tokens_per_s=sum(answer.num_output for answer in done) / span_s,
            goodput_per_s=good / span_s,
            attained=good / len(answers),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "failed": self.failed,
            "span_s": self.span_s,
            "ttft_s": {f"p{p}": value for p, value in self.ttft_s.items()},
            "tpot_s": {f"p{p}": value for p, value in self.tpot_s.items()},
            "output_tokens_per_s": self.output_tokens_per_s,
            "goodput_per_s": self.goodput_per_s,
            "attained": self.attained,
        }


def outcome_rows(outcomes: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each figure, a cell for each outcome (`Outcome.as_json`)."""
    rows = [
        (f"time to first token, s, p{p}", [o["ttft_s"].get(f"p{p}") for o in outcomes])
        for p in PERCENTILES
    ]
    rows += [
        (
            f"time per output token, ms, p{p}",
            [None if (v := o["tpot_s"].get(f"p{p}")) is None else 1e3 * v for o in outcomes],
        )
        for p in PERCENTILES
    ]
    rows += [
        (name, [outcome[key] for outcome in outcomes])
        for name, key in (
            ("output tokens/s", "output_tokens_per_s"),
            ("requests", "requests"),
            ("failed", "failed"),
            ("good requests/s", "goodput_per_s"),
            ("share of good requests", "attained"),
        )
    ]
    return [(name, *("" if v is None else f"{v:.4g}" for v in values)) for name, values in rows]


def _percentiles(values: Sequence[float]) -> dict[int, float]:
    if not values:
        return {}
    return dict(zip(PERCENTILES, map(float, np.percentile(values, PERCENTILES)), strict=True))
