"""moeserve beside llama.cpp and transformers, on the same random weights.

    make bench-peers
    python scripts/bench_peers.py --layers 2 --repeats 1 --data DIR     # a try, minutes
    python scripts/bench_peers.py --engines limits,moeserve --no-rows   # shares of the limits only

Theory. Decoding reads every active weight once per step, so its bound is the memory's read
bandwidth over the bytes of a step; a prompt's bound is the peak of dot products over its
operations. Both limits are measured by moeserve's own native functions, in the process that they
are for, just before and after each timed part: a share is held against what the machine gave then.
Bytes and operations are computed from the shape (peers/traffic.py), the experts that 16 streams
touch are counted in a router's output. Ratios hold from machine to machine, absolute figures do
not.

Weights: qwen3_moe with the layer shape of Qwen3-30B-A3B (hidden 2048, 128 experts x 768, top 8) and
8 layers, about 10 GB in bf16. They are written once under --data as safetensors and as GGUF (bf16;
Q8_0, Q4_0, Q4_K by llama.cpp's quantiser), about 32 GB together, and reused; moeserve packs its own
copies beside them (about 18 GB). Every run is a process of its own; the engines take turns, so that
a machine whose speed drifts is unfair to none. Medians. Run it alone: the report names the largest
share of the CPU that other processes took.

Result: <out>/<date>-peers.md, .json and .png; last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from peers.figures import Figures
from peers.markdown import report
from peers.measure import Workload
from peers.plan import LLAMA_CPP, Plan, pack, run_rounds, run_rows
from peers.plot import draw
from peers.processes import run_alone
from peers.traffic import Traffic
from random_checkpoint import Qwen3MoeShape

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 32_000
TINY = Qwen3MoeShape(
    num_hidden_layers=2,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    vocab_size=512,
)


def main() -> int:
    args = parse()
    shape = TINY
    if args.shape == "qwen3-30b-a3b":
        shape = Qwen3MoeShape(num_hidden_layers=args.layers, vocab_size=VOCAB_SIZE)
    plan = Plan(
        data=args.data or default_data(shape),
        shape=shape,
        work=Workload(vocab_size=shape.vocab_size),
        threads=args.threads,
        repeats=args.repeats,
        engines=tuple(args.engines.split(",")),
        ours_python=args.ours_python,
        ours_config=tuple(map(setting, args.ours_config)),
        quantize_field=tuple(args.quantize_field.split(".", 1)),
        other_pythons={
            kind: python
            for kind, python in (("ipex", args.ipex_python), ("kt-kernel", args.kt_python))
            if python
        },
    )
    prepare(plan)
    packed, why_not = pack(plan, say)
    plan = replace(plan, packed=packed)
    results = run_rounds(plan, say)
    rows = {} if args.no_rows else run_rows(plan, say)
    publish(args.out, plan, results, rows, why_not)
    failed = [name for name, found in results.items() if any("failed" in each for each in found)]
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of the weights; default: under the user's cache")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add("--shape", choices=("qwen3-30b-a3b", "tiny"), default="qwen3-30b-a3b")
    add("--layers", type=int, default=8)
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add(
        "--engines",
        default="limits,llama.cpp,transformers,moeserve,layer",
        help="comma list of beginnings of names, such as 'limits,moeserve bf16,llama.cpp BF16'",
    )
    add("--no-rows", action="store_true", help="without the curves by rows and threads")
    add("--ours-python", default=sys.executable, help="interpreter that has moeserve")
    add(
        "--ours-config",
        action="append",
        default=["experts.cpu_backend=native"],  # `auto` would measure while the clock runs
        metavar="SECTION.FIELD=VALUE",
        help="a field of EngineConfig, for all runs of moeserve; default: experts.cpu_backend="
        "native",
    )
    add("--quantize-field", default="model.quantize", help="where an unpacked model's width goes")
    add("--ipex-python", help="interpreter of a venv with intel-extension-for-pytorch")
    add("--kt-python", help="interpreter of a venv with kt-kernel")
    return parser.parse_args()


def setting(text: str) -> tuple[str, str, Any]:
    """SECTION.FIELD=VALUE; the value is JSON where it can be, else text."""
    name, _, value = text.partition("=")
    section, _, field = name.partition(".")
    try:
        return section, field, json.loads(value)
    except json.JSONDecodeError:
        return section, field, value


def default_data(shape: Qwen3MoeShape) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "moeserve-peers" / f"{shape.hidden_size}x{shape.num_hidden_layers}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(plan: Plan) -> None:
    names = [name for name, label in LLAMA_CPP.items() if plan.wants(f"llama.cpp {label}")]
    say(f"weights in {plan.data}")
    settings = {
        "data": str(plan.data),
        "shape": asdict(plan.shape),
        "seed": 0,
        "gguf": names,
        "threads": plan.threads,
    }
    result = run_alone("prepare", settings)
    say(str(result))
    if "seconds" not in result:
        raise SystemExit(f"the weights were not written: {result}")


def publish(
    out: Path,
    plan: Plan,
    results: dict[str, list[dict[str, Any]]],
    rows: dict[str, dict[str, Any]],
    why_not_packed: str | None,
) -> None:
    work = plan.work
    contexts = {
        "decode_1": work.prompt_tokens + work.decode_steps / 2,
        "decode_streams": work.prompt_tokens + work.stream_steps / 2,
        "prefill": float(work.prefill_tokens),
    }
    figures = Figures(results, Traffic(plan.shape), contexts)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{date.today()}-peers"
    plotted = draw(rows, path.with_suffix(".png"))
    facts = machine(plan)
    text = report(figures, facts, why_not_packed, f"{path.name}.png" if plotted else None)
    path.with_suffix(".md").write_text(text)
    ratios = [*figures.peer_ratios(), *figures.limit_ratios(), *figures.layer_ratios()]
    ratios += figures.start_ratio(why_not_packed)
    for found in results.values():
        for result in found:
            result.pop("token_ids", None)  # the report has what they say
    whole = {
        **facts,
        "other_load": figures.other_load(),
        "ratios": [asdict(ratio) for ratio in ratios],
        "rows": rows,
        "rounds": results,
    }
    path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    print(text)
    short = {f"{r.name} / {r.against}": r.found and round(r.found, 3) for r in ratios}
    print(json.dumps({**facts, "other_load": figures.other_load(), "ratios": short}))


def machine(plan: Plan) -> dict[str, Any]:
    """What the figures hold for."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "threads": plan.threads,
        "python": platform.python_version(),
        "layers": plan.shape.num_hidden_layers,
        "parameters": plan.shape.num_parameters,
        "repeats": plan.repeats,
    }


if __name__ == "__main__":
    sys.exit(main())
