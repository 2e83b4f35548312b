"""The steps of scripts/gpu_check.sh: what is needed, the parity tests, the benchmark, the report.

Every step runs in a process of its own with the time that is left, so that a crash or a hang of
one is a line in the report and not the end of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
NEEDED = (
    "torch", "numpy", "msgspec", "safetensors", "tokenizers", "huggingface_hub", "jinja2",
    "threadpoolctl", "transformers", "pytest", "pytest_timeout", "scikit_build_core", "nanobind",
)  # fmt: skip
# The random model: large enough that a decode step reads far more than the card's L2 cache.
MODEL_BYTES = 8 * GIB
FLAGS = ("--repeats", "3")
# A dry run shows that the steps work; its speed is of no interest, and threads that share cores
# with other programs wait for each other.
DRY_FLAGS = ("--repeats", "1", "--threads", "1")
REPORT_S = 10  # kept back for writing the report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("needs", "run"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=500.0, help="seconds for all steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--install-s", type=float, default=0.0)
    args = parser.parse_args()
    if args.step == "needs":
        return check_needs(args.device)
    return run(args)


def check_needs(device: str) -> int:
    """Says what is missing before anything is built."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("cmake") is None and shutil.which("cmake") is None:
        missing.append("cmake")
    if missing:
        print(f"gpu_check: missing packages: {', '.join(missing)}", file=sys.stderr)
        return 1
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} sees no CUDA device; "
            "`--device cpu` makes a dry run without one",
            file=sys.stderr,
        )
        return 1
    return 0


def run(args: argparse.Namespace) -> int:
    ends_s = time.monotonic() + args.budget_s - args.install_s - REPORT_S
    started_s = time.monotonic()
    report: dict[str, Any] = {
        "dry_run_on_cpu": args.device == "cpu",
        "device": args.device,
        "machine": machine(args.device),
        "moeserve": installed(),
        "install_s": args.install_s,
    }
    report["parity"] = parity(args, ends_s)
    report["benchmarks"] = benchmarks(args, ends_s)
    report["slots"] = slots_speed(args, left_s(ends_s))
    report["total_s"] = round(time.monotonic() - started_s + args.install_s, 1)
    report["ok"] = bool(report["parity"]["ok"] and all(b["ok"] for b in report["benchmarks"]))
    report["ok"] = report["ok"] and report["slots"]["ok"]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (args.out / "gpu_check.md").write_text(text)
    print(text)
    return 0 if report["ok"] else 1


def machine(device: str) -> dict[str, Any]:
    """The facts that the figures hold for."""
    import torch

    facts: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        ),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": card.name,
            "gpu_memory_gib": round(card.total_memory / GIB, 1),
            "gpu_free_gib": round(torch.cuda.mem_get_info()[0] / GIB, 1),
            "compute_capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return facts


def driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 else done.stderr.strip()


def installed() -> dict[str, str]:
    """What was tested: the installed package, not the checkout."""
    import moeserve

    path = Path(moeserve.__file__).resolve()
    if ROOT in path.parents:
        raise SystemExit(
            f"gpu_check: moeserve comes from {path}, not from the copy installed for this check; "
            "an editable install in this interpreter goes first: use one without it"
        )
    return {"version": moeserve.__version__, "path": str(path.parent)}


def left_s(ends_s: float) -> float:
    return max(1.0, ends_s - time.monotonic())


def run_step(command: list[str], args: argparse.Namespace, timeout_s: float) -> tuple[str, str]:
    """(standard output, what went wrong or "")."""
    environment = {
        **os.environ,
        "MOESERVE_TEST_DEVICE": args.device,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=args.work, env=environment, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return said, f"stopped after {timeout_s:.0f} s: {said[-2000:]}"
    problem = (
        "" if done.returncode == 0 else f"exit status {done.returncode}: {done.stdout[-2000:]}"
    )
    return done.stdout, problem


def parity(args: argparse.Namespace, ends_s: float) -> dict[str, Any]:
    """Runs tests/gpu on the device and reads what pytest wrote about each test."""
    file = args.work / "parity.xml"
    started_s = time.monotonic()
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"),
        "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider",
        f"--junitxml={file}", "-o", "junit_family=xunit1", "--timeout=120",
    ]  # fmt: skip
    _, problem = run_step(command, args, left_s(ends_s) * 0.6)
    cases = read_cases(file) if file.exists() else []
    counts = {
        kind: sum(case["outcome"] == kind for case in cases)
        for kind in ("passed", "failed", "skipped")
    }
    return {
        "ok": not problem and counts["passed"] > 0 and not counts["skipped"],
        "problem": problem,
        **counts,
        "seconds": round(time.monotonic() - started_s, 1),
        "cases": cases,
    }


def read_cases(file: Path) -> list[dict[str, Any]]:
    """pytest's junit file as one record per test; properties are the figures a test measured."""
    cases = []
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        outcomes = {child.tag: child for child in case}
        bad = outcomes.get("failure", outcomes.get("error"))
        skipped = outcomes.get("skipped")
        said = bad if bad is not None else skipped
        cases.append(
            {
                "name": case.get("name"),
                "outcome": "failed" if bad is not None else "passed" if said is None else "skipped",
                "seconds": float(case.get("time", 0)),
                "message": "" if said is None else said.get("message", "")[:500],
                "figures": {p.get("name"): p.get("value") for p in case.iter("property")},
            }
        )
    return cases


def benchmarks(args: argparse.Namespace, ends_s: float) -> list[dict[str, Any]]:
    """The bundled model, then a random one that fills memory as a real model does."""
    bundled = {"name": "bundled tiny-moe", **decode_speed([], args, left_s(ends_s) * 0.4)}
    return [bundled, random_model_speed(args, ends_s)]


def decode_speed(flags: list[str], args: argparse.Namespace, timeout_s: float) -> dict[str, Any]:
    """What scripts/bench_decode.py measures: its last line is one JSON object."""
    command = [
        sys.executable, str(ROOT / "scripts" / "bench_decode.py"), "--device", args.device,
        *(DRY_FLAGS if args.device == "cpu" else FLAGS), *flags,
    ]  # fmt: skip
    said, problem = run_step(command, args, timeout_s)
    if problem:
        return {"ok": False, "problem": problem}
    return {"ok": True, "problem": "", **json.loads(said.strip().splitlines()[-1])}


def random_model_speed(args: argparse.Namespace, ends_s: float) -> dict[str, Any]:
    import torch
    from random_checkpoint import Qwen3MoeShape, write_random_checkpoint

    device = torch.device(args.device)
    if args.device == "cuda":
        layer_bytes = 2 * Qwen3MoeShape(1).num_layer_parameters
        room = min(
            MODEL_BYTES,
            torch.cuda.mem_get_info()[0] // 3,
            shutil.disk_usage(args.work).free // 2,
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4,
        )
        shape = Qwen3MoeShape(max(1, room // layer_bytes - 1))
        name = f"random, shape of Qwen3-30B-A3B, {shape.num_hidden_layers} of 48 layers"
    else:
        shape = Qwen3MoeShape(4, 256, 8, 2, 32, 16, 4, 128, 2048)
        name = "random, small qwen3_moe for the dry run"
    path = args.work / "random-model"
    started_s = time.monotonic()
    write_random_checkpoint(path, shape, device)
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the benchmark's process needs the memory
    found = {
        "name": name,
        "shape": asdict(shape),
        "write_s": round(time.monotonic() - started_s, 1),
        "active_parameters": shape.num_active_parameters,
        **decode_speed(["--model", str(path)], args, left_s(ends_s)),
    }
    if found["ok"]:
        bytes_per_s = found["machine"]["read_bandwidth_gb_s"] * 1e9
        found["bound_tokens_per_s"] = round(bytes_per_s / (2 * shape.num_active_parameters), 1)
    return found


def slots_speed(args: argparse.Namespace, timeout_s: float) -> dict[str, Any]:
    """What scripts/bench_device_slots.py measures, on the random model."""
    dry = args.device == "cpu"
    command = [
        sys.executable, str(ROOT / "scripts" / "bench_device_slots.py"),
        str(args.work / "random-model"), "--device", "dry-run" if dry else args.device,
        *(("--repeats", "1", "--tokens", "4", "--shares", "50") if dry else ()),
    ]  # fmt: skip
    said, problem = run_step(command, args, timeout_s)
    if problem:
        return {"ok": False, "problem": problem}
    lines = said.strip().splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    return {"ok": True, "problem": "", "table": table, **json.loads(lines[-1])}


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    facts = report["machine"]
    title = "dry run on the CPU, no GPU figure" if report["dry_run_on_cpu"] else facts["gpu"]
    lines = [f"# gpu_check: {title}", "", "| machine | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [
        f"| moeserve | {report['moeserve']['version']}, installed in {report['install_s']:.0f} s |",
        f"| all steps | {report['total_s']:.0f} s, {'passed' if report['ok'] else 'NOT passed'} |",
        "",
        "## Parity tests",
        "",
        "| test | outcome | s | figures |",
        "| --- | --- | --- | --- |",
    ]
    parity = report["parity"]
    for case in parity["cases"]:
        figures = ", ".join(f"{name} {value}" for name, value in case["figures"].items())
        said = " ".join(f"{figures} {case['message']}".split()).replace("|", "\\|")
        lines.append(f"| {case['name']} | {case['outcome']} | {case['seconds']:.1f} | {said} |")
    counts = ", ".join(f"{parity[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    lines += ["", f"{counts}, {parity['seconds']:.0f} s", ""]
    if parity["problem"]:
        lines += ["```", parity["problem"], "```", ""]
    repeats = DRY_FLAGS[1] if report["dry_run_on_cpu"] else FLAGS[1]
    lines += [f"## Speed (tokens per second, medians of {repeats} after one warm-up)", ""]
    for result in report["benchmarks"]:
        lines += benchmark_table(result)
    slots = report["slots"]
    lines += ["### Experts in slots of the device, the others on the CPU, int4", ""]
    lines += [slots["table"], ""] if slots["ok"] else ["```", slots["problem"], "```", ""]
    return "\n".join(lines) + "\n"


def benchmark_table(result: dict[str, Any]) -> list[str]:
    if not result["ok"]:
        return [f"### {result['name']}: not measured", "", "```", result["problem"], "```", ""]
    size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['dtype']}, {result['device']}"
    lines = [f"### {result['name']} ({size})", "", "| measured | tokens/s |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in result["tokens_per_s"].items()]
    if "bound_tokens_per_s" in result:
        bandwidth = result["machine"]["read_bandwidth_gb_s"]
        bound = result["bound_tokens_per_s"]
        lines.append(f"| bound of batch 1: active weights at {bandwidth} GB/s | {bound} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
