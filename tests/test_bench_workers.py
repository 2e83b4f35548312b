"""scripts/bench_workers.py on the bundled model: what it counts, and that it compares tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from bench_workers import CASES, pack_bundled, run_engine, summarise
from support.workers import worker_thread


def test_rows_to_and_fro_are_counted_and_tokens_compared(tmp_path: Path) -> None:
    model = pack_bundled(tmp_path / "packed")
    with worker_thread(model, f"ipc://{tmp_path}/worker", "0/1") as endpoint:
        runs: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
        for count, way in CASES[:3]:
            endpoints = [endpoint] * count
            case = {"workers": endpoints, "shared": way == "shared", "rows": 2}
            runs[count, way, 2] = [run_engine(model, 1, 4, case)]
    args = argparse.Namespace(model=model, threads=1, tokens=4, repeats=1)
    alone, shared, frames = summarise(args, runs)["table"]
    assert alone["bytes_per_step"] == 0
    # 2 rows for 4 experts in each of 6 layers, 192 numbers each, float32 there and back
    assert shared["bytes_per_step"] == frames["bytes_per_step"] == 2 * 4 * 6 * 192 * 4 * 2
    assert alone["exchange_us_per_layer"] == 0
    runs[1, "tcp", 2][0]["tokens"][0][1][-1] ^= 1
    with pytest.raises(RuntimeError, match="1 workers, tcp, 2 rows: other tokens than alone"):
        summarise(args, runs)
