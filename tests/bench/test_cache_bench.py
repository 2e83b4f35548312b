"""`moeserve bench cache` on synthetic routing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from support.routing_samples import topical_trace

from moeserve.bench.cache_report import below_lru, markdown
from moeserve.bench.cache_suite import POLICIES, Job, Outcome, run_jobs, whole_requests
from moeserve.cache.routing_trace import Request
from moeserve.cli import main
from moeserve.core import ConfigError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    seed = random.randrange(2**32)
    made = topical_trace(seed, num_tokens=160)
    path = tmp_path / f"seed{seed}.npz"
    lens = np.full(8, 20)
    np.savez(path, ids=made.ids.astype(np.uint8), probs=made.weights.astype(np.float16), lens=lens)
    return path


def run_job(job: Job) -> Outcome:
    (outcome,) = run_jobs([job])
    return outcome


def test_last_line_is_the_result(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = "lru,score,score+markov,belady"
    arguments = ["bench", "cache", "--trace", str(trace), "--steps", "single,streams:2,chunk:5"]
    assert main([*arguments, "--policies", policies, "--tokens", "0", "--history", "40"]) == 0
    table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    report = json.loads(last)
    assert report["num_tokens"][f"{trace.stem} single"] == 80
    for figure in report["figures"]:
        assert 0 <= figure["hit_rate"] <= 1
        low, high = (
            next(
                other["hit_rate"]
                for other in report["figures"]
                if other["policy"] == end
                and all(other[k] == figure[k] for k in ("steps", "slots", "share"))
            )
            for end in ("lru", "belady")
        )
        assert figure["hit_rate"] <= high + 1e-12, trace.stem
        if figure["closed"] is not None:
            assert figure["closed"] == pytest.approx((figure["hit_rate"] - low) / (high - low))
    shown = {(f["policy"], f["slots"]) for f in report["figures"] if f["steps"] == "single"}
    assert ("score+bypass", "per layer") in shown
    assert ("score+markov", "shared") in shown
    assert markdown(report) in table
    assert set(report["groups"][trace.stem]) >= {"lru 0.25", "score 0.5"}


def test_history_changes_what_policies_know_and_not_what_is_held(trace: Path) -> None:
    """LFU remembers; a cache that starts empty still misses every expert once."""
    plain = Job(trace, "single", (1.0,), ("lru", "lfu"))
    with_history = Job(trace, "single", (0.5,), ("lfu",), history_tokens=80)
    without = Job(trace, "single", (0.5,), ("lfu",))
    first = run_job(plain).figures
    assert len({f.hit_rate for f in first}) == 1
    assert run_job(with_history).figures != run_job(without).figures, trace.stem


def test_a_past_learnt_once_is_the_past_learnt_by_each(trace: Path) -> None:
    """Every policy and the predictor, whose copies must share nothing."""
    jobs = [
        Job(trace, steps, (0.25, 0.5), POLICIES, history_tokens=60)
        for steps in ("single", "streams:3", "chunk:7", "single")
    ]
    assert run_jobs(jobs) == [run_job(job) for job in jobs], trace.stem


def test_below_lru_names_the_groups() -> None:
    rates = {
        "lru 0.5": {"a": 0.5, "b": 0.6},
        "score 0.5": {"a": 0.4, "b": 0.7},
        "mrs 0.5": {"a": 0.0, "b": 0.0},
    }
    assert below_lru(rates) == {"score 0.5": ["a"]}


def test_a_part_without_requests_is_refused(tmp_path: Path) -> None:
    """As a trace of one prompt has."""
    made = topical_trace(random.randrange(2**32), num_tokens=30)
    path = tmp_path / "alone.npz"
    probs = made.weights.astype(np.float16)
    np.savez(path, ids=made.ids.astype(np.uint8), probs=probs, lens=np.array([30]))
    with pytest.raises(ConfigError, match=r"part: 'report' of the 1 requests .* is empty"):
        run_job(Job(path, "single", (0.5,), ("lru",), part="report"))


def test_whole_requests_come_from_all_over() -> None:
    requests = [Request(10 * n, 10, "") for n in range(20)]
    assert whole_requests(requests, None) == requests
    chosen = whole_requests(requests, 40)
    assert sum(r.length for r in chosen) == 40
    assert (chosen[0], chosen[-1]) == (requests[0], requests[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "trace: none given"),
        (["--trace", "nowhere.npz"], "nowhere.npz: trace: cannot be read"),
        (["--trace", "x.npz", "--slots", "150%"], "slots: '150%'; allowed"),
        (["--trace", "x.npz", "--slots", "half"], "slots: 'half'; allowed"),
        (["--trace", "x.npz", "--policies", "lur"], "policies: 'lur'; there are lru"),
        (["--trace", "x.npz", "--steps", "streams:0"], "steps: 'streams:0'; allowed"),
        (["--trace", "x.npz", "--tokens", "-1"], "tokens: -1; allowed"),
        (["--trace", "x.npz", "--num-experts", "-3"], "num_experts: -3; allowed: 1 or more"),
        (["--trace", "x.npz", "--slots", ","], "slots: none given"),
        (["--trace", "x.npz", "--steps", ""], "steps: none given"),
        (["--trace", "x.npz", "--out", "no/such/stem"], "out: there is no directory no/such"),
    ],
)
def test_wrong_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "cache", *arguments]) == 2
    assert message in capsys.readouterr().err
