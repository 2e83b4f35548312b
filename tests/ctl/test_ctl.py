"""Heat maps and reports of `moeserve ctl`, without a server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.randomness import fresh_seed

from moeserve.cli import main
from moeserve.core import ConfigError, EngineStats
from moeserve.ctl.heatmap import Use, check_picture, read_use, relative_use
from moeserve.ctl.report import describe, size
from moeserve.stats import (
    CacheStats,
    ExpertStats,
    LinkStats,
    MemoryStats,
    PageStats,
    PoolStats,
    WorkerStats,
)


def test_heat_map_of_a_recorded_trace(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(fresh_seed())
    ids = np.array([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(50)], np.uint8)
    ids[0, 0] = (7, 0)  # so that the highest expert is seen
    probs = np.full(ids.shape, 0.5, np.float16)
    trace, picture = tmp_path / "t.npz", tmp_path / "t.png"
    np.savez(trace, ids=ids, probs=probs, lens=np.array([20, 30]))
    use = read_use(trace)
    for layer in range(3):
        expected = [(ids[:, layer] == expert).sum() for expert in range(8)]
        assert use.counts[layer] == expected
    assert main(["ctl", "heatmap", "--trace", str(trace), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_counts_are_relative_to_their_layer() -> None:
    table = relative_use(Use("", {4: [1, 3], 2: [0, 6, 0], 7: [0, 0, 0]}))
    nan = np.nan
    np.testing.assert_array_equal(table, [[0, 3, 0], [0.5, 1.5, nan], [nan, nan, nan]])


def test_what_is_wrong_is_said_before_anything_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ctl", "heatmap", "-o", str(tmp_path / "x.gif")]) == 2
    assert "no .png, .svg or .pdf" in capsys.readouterr().err
    for action, name in (("heatmap", "dir.png"), ("timeline", "dir.json")):
        (tmp_path / name).mkdir()
        assert main(["ctl", action, "-o", str(tmp_path / name)]) == 2
        assert "is a directory" in capsys.readouterr().err
    missing = tmp_path / "no.npz"
    assert main(["ctl", "heatmap", "--trace", str(missing), "-o", str(tmp_path / "x.png")]) == 2
    assert "no.npz" in capsys.readouterr().err
    real = importlib.util.find_spec
    hide = lambda name, *a: None if name == "matplotlib" else real(name, *a)  # noqa: E731
    monkeypatch.setattr("moeserve.ctl.heatmap.find_spec", hide)
    with pytest.raises(ConfigError, match=r"pip install 'moeserve\[bench\]'"):
        check_picture(tmp_path / "x.png")


def test_report_says_every_layer() -> None:
    ones = [1, 2]
    experts = ExpertStats(
        layers=[3, 9],
        num_experts=[8, 8],
        cpu_busy_s=[0.25, 0.5],
        caches=[
            CacheStats(
                tier="host",
                num_slots=10,
                num_used=9,
                num_owed=0,
                slot_bytes=24_576,
                hits=[30, 30],
                late=[0, 0],
                misses=[10, 10],
                evictions=ones,
                prefetches_begun=ones,
                prefetches_useful=ones,
                prefetches_wasted=[0, 0],
            )
        ],
        links=[
            LinkStats(
                tier="host",
                demand_bytes=[1 << 20, 1 << 21],
                prefetch_bytes=[0, 1 << 20],
                busy_s=[0.5, 0.25],
                stall_s=[0.125, 0.125],
                num_demands=3,
                num_prefetches=1,
                num_promoted=0,
                num_failed=0,
                num_retries=0,
            )
        ],
    )
    stats: dict[str, Any] = {
        "model": "m",
        "uptime_s": 10.0,
        "engine": msgspec.to_builtins(EngineStats(num_steps=4, experts=experts)),
    }
    text = describe(stats)
    assert "75.0% of uses found" in text
    assert "9 of 10 slots used, 24.0 KiB each" in text
    assert "steps waited 0.2 s" in text
    rows = [" ".join(line.split()) for line in text.splitlines()[-2:]]
    assert rows[0] == "3 30 0 10 1 1 1 0 1.0 0.0 500.0 125.0 250.0"
    assert rows[1] == "9 30 0 10 2 2 2 0 2.0 1.0 250.0 125.0 500.0"


def test_report_says_who_has_memory_and_what_workers_did() -> None:
    worker = WorkerStats(
        endpoint="tcp://node:5570", shard="0/2", live=True, standby=False, shared_memory=False,
        problem="", jobs=12, rows=34, sent_bytes=1 << 20, received_bytes=1 << 21, busy_s=0.25,
        connects=2, losses=1, refusals=0,
    )  # fmt: skip
    gone = msgspec.structs.replace(worker, endpoint="ipc:///w", shard="", problem="does not answer")
    pool = PoolStats(rows=68, taken_over_rows=3, wait_s=1.5, workers=[worker, gone])
    memory = MemoryStats(
        budget_bytes=6 << 30, weights_bytes=1 << 30, kv_bytes=1 << 28, kv_limit_bytes=1 << 30,
        experts_bytes=4 << 30, num_kv_grown=5, num_kv_shrunk=4,
    )  # fmt: skip
    experts = ExpertStats(layers=[0], num_experts=[8], cpu_busy_s=[1.0], pool=pool)
    engine = EngineStats(experts=experts, memory=memory)
    stats = {"model": "m", "uptime_s": 1.0, "engine": msgspec.to_builtins(engine)}
    lines = [" ".join(line.split()) for line in describe(stats).splitlines()]
    assert (
        "memory: of 6,144.0 MiB: weights of every token 1,024.0 MiB, kv 256.0 MiB of 1,024.0 MiB at"
        " most, experts 4,096.0 MiB; kv took from experts 5 times and gave back 4 times" in lines
    )
    assert "workers: 68 rows, 3 of them computed by somebody else; steps waited 1.5 s" in lines
    assert "tcp://node:5570 0/2 rows in frames 3.0 0.2 12 34 2 1 0" in lines
    assert "ipc:///w ? does not answer 3.0 0.2 12 34 2 1 0" in lines


@pytest.mark.parametrize(
    ("moving", "problem", "end"),
    [
        (True, "", "moved in 2.5 s so far"),
        (False, "", "moved in 2.5 s"),
        (False, "no memory", "moved in 2.5 s; the rest stays: no memory"),
    ],
)
def test_report_says_what_pages_weights_stand_in(moving: bool, problem: str, end: str) -> None:
    pages = PageStats(
        mapped_bytes=5 << 20, cached_huge_bytes=1 << 20, moved_bytes=3 << 20, moving=moving,
        seconds=2.5, problem=problem,
    )  # fmt: skip
    engine = msgspec.to_builtins(EngineStats(pages=pages))
    lines = describe({"model": "m", "uptime_s": 1.0, "engine": engine}).splitlines()
    start = "weights: 5,120.0 KiB mapped; in huge pages 1,024.0 KiB of the page cache and"
    assert f"{start} 3,072.0 KiB {end}" in lines


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (9_999, "9,999 bytes"), (10_240, "10.0 KiB"), (3 << 40, "3,072.0 GiB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
