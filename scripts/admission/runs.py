"""The simulations of one admission rule in one pool of one trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admission.traces import HISTORY, WINDOWS, Trace, read_window
from moeserve.config import SchedulerConfig
from moeserve.engine.admission import AdmissionPolicy, Aggressive, Conservative
from moeserve.engine.past_future import PastFuture
from moeserve.engine.simulation import Simulation, Slo, StepCost

COST = StepCost(fixed_s=10e-3, per_token_s=85e-6, per_kv_token_s=82e-9)
SLO = Slo(ttft_s=10.0, max_tpot_s=1.5)
BLOCK_TOKENS = 16
BATCH_TOKENS = 2048
MAX_RUNNING = 256
LOADS = (0.6, 0.9, 1.2)
SLO_SHARE = 0.9
BISECTIONS = 6
IN_ORDER = "_in_order"  # ends the name of a rule without overtaking
RULES: dict[str, Callable[[], AdmissionPolicy]] = {
    "past_future": lambda: PastFuture(HISTORY),
    "aggressive": Aggressive,
    "aggressive_1pct": lambda: Aggressive(0.01),
    "conservative": Conservative,
}
POLICIES = (
    *RULES,
    *(rule + IN_ORDER for rule in ("past_future", "aggressive", "conservative")),
)


def memory_bound_rate(trace: Trace, pool_tokens: int) -> tuple[float, float]:
    """Requests per second that a pool always full could turn over, and tokens per step then."""
    prompt, output = trace.mean_new_prompt, trace.mean_output
    in_residence = pool_tokens / (trace.mean_prompt + output / 2)
    steps_each = output + prompt / BATCH_TOKENS
    tokens_per_step = (prompt + output) * in_residence / steps_each
    step_s = COST.fixed_s + COST.per_kv_token_s * pool_tokens + COST.per_token_s * tokens_per_step
    return in_residence / (steps_each * step_s), tokens_per_step


@dataclass(frozen=True)
class Setting:
    """All runs of one policy in one pool of one trace."""

    workloads: Path
    trace: str
    num_requests: int
    pool_size: int
    policy: str


def run_setting(setting: Setting) -> dict[str, Any] | None:
    """Every load on every window, and the capacity. None where compute is the limit."""
    windows = [
        read_window(setting.workloads, setting.trace, start, setting.num_requests)
        for start in WINDOWS[setting.trace]
    ]
    pools = [int(setting.pool_size * (w.mean_prompt + w.mean_output)) for w in windows]
    if any(memory_bound_rate(w, p)[1] > BATCH_TOKENS for w, p in zip(windows, pools, strict=True)):
        return None
    rows: list[dict[str, Any]] = []

    def attained(load: float) -> float:
        """Share of the requests of all windows that meet the SLO."""
        shares = []
        for window, pool_tokens in zip(windows, pools, strict=True):
            row = run_window(window, pool_tokens, load, setting.policy)
            shares.append(row["slo_attained"])
            if load in LOADS:
                rows.append({"pool": setting.pool_size, **row})
        return float(sum(shares) / len(shares))

    below, above = 0.0, 2 * LOADS[-1]
    for load in LOADS:
        if attained(load) >= SLO_SHARE:
            below = load
        else:
            above = min(above, load)
    for _ in range(BISECTIONS):
        load = (below + above) / 2
        below, above = (load, above) if attained(load) >= SLO_SHARE else (below, load)
    return {
        "trace": setting.trace,
        "pool": setting.pool_size,
        "policy": setting.policy,
        "capacity": round(below, 4) or None,  # None: no load is low enough
        "rows": rows,
    }


def run_window(trace: Trace, pool_tokens: int, load: float, policy: str) -> dict[str, Any]:
    """One simulation."""
    rate = load * memory_bound_rate(trace, pool_tokens)[0]
    config = SchedulerConfig(
        max_batch_tokens=BATCH_TOKENS,
        max_running=MAX_RUNNING,
        max_waiting=len(trace.rows),
        overtaking=0 if policy.endswith(IN_ORDER) else SchedulerConfig().overtaking,
    )
    admission = RULES[policy.removesuffix(IN_ORDER)]()
    for num_output in trace.history:
        admission.observe(num_output)
    simulation = Simulation(config, pool_tokens // BLOCK_TOKENS, BLOCK_TOKENS, COST, admission)
    result = simulation.run(trace.arrivals(rate))
    stats = result.stats
    good = sum(times.good(SLO) for times in result.requests)
    return {
        "trace": trace.name,
        "window_at_s": trace.rows[0].at_s,
        "pool_tokens": pool_tokens,
        "max_tokens": trace.max_tokens,
        "load": load,
        "rate_per_s": round(rate, 3),
        "policy": policy,
        "goodput_per_s": round(good / len(trace.rows) * rate, 4),
        "in_time": good,
        "slo_attained": round(good / len(trace.rows), 4),
        "late_first_tokens": sum(times.ttft_s > SLO.ttft_s for times in result.requests),
        "long_gaps": sum(times.longest_gap_s > SLO.max_tpot_s for times in result.requests),
        "mean_ttft_s": round(sum(times.ttft_s for times in result.requests) / len(trace.rows), 3),
        "worst_ttft_s": round(max(times.ttft_s for times in result.requests), 2),
        "preemptions": stats.num_preemptions,
        "recomputed_tokens": int(stats.extra["recomputed_tokens"]),
        "mean_running": round(result.mean_running, 2),
        "mean_kv_use": round(result.mean_kv_use, 3),
        "cached_prompt_share": round(stats.cached_prompt_tokens / stats.prompt_tokens, 3),
        "steps": result.num_steps,
    }
