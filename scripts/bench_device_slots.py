"""Decode and prefill with some of the experts in slots of a device, beside the CPU alone.

    python scripts/bench_device_slots.py MODEL [--device cuda] [--shares 25,50,100] [--out DIR]

Theory. A token reads its experts once, from wherever they stand: the device's memory, or host
memory by the CPU. With a share s of the uses on the device, the CPU reads 1 - s of the bytes, and
the device unpacks what it has (eight times an int4 expert's bytes, written and read). So speed
rises with the share until the device's own work, its launches first, is what is left. Random
weights route nearly evenly, so hits are near the share of slots: real texts do better.

MODEL is a checkpoint or what `moeserve pack` wrote; a checkpoint is packed first, in --quantize.
The CPU alone is measured in the same run, on the same packed model. Medians of --repeats after a
warm-up. `--device dry-run` shows that it works, and no figure of a device. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from moeserve.environment import tune_native_libraries

tune_native_libraries()

import torch  # noqa: E402

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig  # noqa: E402
from moeserve.core import EngineRequest, SamplingParams  # noqa: E402
from moeserve.cpu_backend.machine import cpu_model  # noqa: E402
from moeserve.engine.engine import Engine  # noqa: E402
from moeserve.models.pack import pack_model  # noqa: E402
from moeserve.models.packed_model import is_packed  # noqa: E402

PROMPT_TOKENS, PREFILL_TOKENS = 16, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or dry-run")
    parser.add_argument("--quantize", default="int4", help="of a checkpoint: none, int8 or int4")
    parser.add_argument("--shares", default="25,50,100", help="of the experts, percent")
    parser.add_argument("--predictor", default="none")
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for the result, named by date")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if not is_packed(model):
            settings = ModelConfig(model=str(model), quantize=args.quantize)
            model = pack_model(settings, Path(scratch) / "packed").path
        shares = [None, *map(int, args.shares.split(","))]
        rows = [measure(args, model, share) for share in shares]
    report = {
        "benchmark": "device slots",
        "date": date.today().isoformat(),
        "machine": machine(args.device),
        "rows": rows,
    }
    print(table(rows))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{report['date']}-device-slots.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def measure(args: argparse.Namespace, model: Path, share: int | None) -> dict[str, Any]:
    """share: None for the CPU alone."""
    slots = None if share is None else max(1, num_experts(model) * share // 100)
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model), device="cpu" if share is None else args.device),
            kv=KvConfig(kv_bytes=256 << 20, prefix_reuse=False),
            experts=ExpertConfig(
                cpu_backend="native",
                device_slots=slots,
                predictor="none" if slots is None else args.predictor,
            ),
        )
    )
    engine.page_mover.wait()
    row: dict[str, Any] = {"share": share, "slots": slots, "notes": engine.info.notes}
    for streams in map(int, args.streams.split(",")):
        seconds = [
            play(engine, streams, PROMPT_TOKENS, args.tokens) for _ in range(args.repeats + 1)
        ]
        row[f"decode_{streams}"] = streams * args.tokens / statistics.median(seconds[1:])
    seconds = [play(engine, 1, PREFILL_TOKENS, 1) for _ in range(args.repeats + 1)]
    row["prefill"] = PREFILL_TOKENS / statistics.median(seconds[1:])
    counters = engine.loaded.runtime.cache.counters.totals()
    asked = counters["hits"] + counters["late"] + counters["misses"]
    row["hit_rate"] = counters["hits"] / asked if slots is not None and asked else None
    stats = engine.loaded.runtime.stats()
    row["cpu_busy_s"] = sum(stats.cpu_busy_s)
    row["device_busy_s"] = sum(stats.device_busy_s or [])
    engine.close()
    del engine
    gc.collect()
    if torch.cuda.is_available():  # what torch keeps counts as used for the next engine
        torch.cuda.empty_cache()
    return row


def num_experts(model: Path) -> int:
    """Of all MoE layers together."""
    from moeserve.models.registry import find_model

    found = find_model(ModelConfig(model=str(model)))
    return sum(ffn.experts.num_experts for ffn in found.spec.moe_layers.values())


def play(engine: Engine, streams: int, prompt_tokens: int, new_tokens: int) -> float:
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    for number in range(streams):
        ids = torch.randint(1, engine.info.vocab_size, (prompt_tokens,), generator=generator)
        engine.add(EngineRequest(request_id=str(number), token_ids=ids.tolist(), params=params))
    begun_s = time.perf_counter()
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
    return time.perf_counter() - begun_s


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": str(torch.__version__),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def table(rows: list[dict[str, Any]]) -> str:
    speeds = [name for name in rows[0] if name.startswith("decode_") or name == "prefill"]
    lines = [
        "| experts on the device | hits | " + " | ".join(f"{n}, tokens/s" for n in speeds) + " |",
        "| --- | --- |" + " --- |" * len(speeds),
    ]
    for row in rows:
        where = "none: the CPU alone" if row["share"] is None else f"{row['share']}%"
        hits = "" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"
        lines.append(
            f"| {where} | {hits} | " + " | ".join(f"{row[name]:.1f}" for name in speeds) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
