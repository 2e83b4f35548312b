"""Which engines run with what settings, and the rounds: A B C, A B C, ... so that a machine whose
speed drifts is unfair to none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from random_checkpoint import Qwen3MoeShape

from peers.measure import Workload
from peers.processes import run_alone
from peers.weights import CHECKPOINT, gguf_path

LLAMA_CPP = {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K"}
#: moeserve's --quantize -> the width's name in the tables
WIDTHS = {"none": "bf16", "int8": "int8", "int4": "int4"}
ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line.

    ours_config: (section, field, value), applied to every run of moeserve.
    quantize_field: (section, field) that takes the width where the model is not packed.
    other_pythons: runner kind -> interpreter of the venv that has it.
    """

    data: Path
    shape: Qwen3MoeShape
    work: Workload
    threads: int
    repeats: int
    engines: tuple[str, ...]
    ours_python: str
    ours_config: tuple[tuple[str, str, Any], ...] = ()
    quantize_field: tuple[str, str] = ("model", "quantize")
    other_pythons: dict[str, str] = field(default_factory=dict)
    packed: dict[str, Path] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return any(name.startswith(prefix) for prefix in self.engines)

    def ours_settings(self, quantize: str, threads: int) -> dict[str, dict[str, Any]]:
        """Sections of moeserve's EngineConfig."""
        path = self.packed.get(quantize, self.data / CHECKPOINT)
        sections: dict[str, dict[str, Any]] = {
            "model": {"model": str(path)},
            "experts": {"num_threads": threads},
        }
        if quantize != "none" and quantize not in self.packed:
            section, name = self.quantize_field
            sections.setdefault(section, {})[name] = quantize
        for section, name, value in self.ours_config:
            sections.setdefault(section, {})[name] = value
        return sections


@dataclass(frozen=True)
class Run:
    """python: the interpreter that has what the kind needs; None where none was named."""

    name: str
    kind: str
    settings: dict[str, Any]
    python: str | None = sys.executable

    def __call__(self) -> dict[str, Any]:
        if self.python is None:
            return {"skipped": f"no interpreter that has {self.kind} was given"}
        return run_alone(self.kind, self.settings, self.python)


def runs_of_a_round(plan: Plan, first: bool) -> Iterator[Run]:
    """In the order of a round. first: also what needs to be counted only once."""
    common = {"threads": plan.threads, "workload": asdict(plan.work)}
    yield Run("limits", "limits", {"threads": plan.threads}, plan.ours_python)
    for name, label in LLAMA_CPP.items():
        settings = {**common, "gguf": str(gguf_path(plan.data, name))}
        yield Run(f"llama.cpp {label}", "llama.cpp", settings)
    peer = {**common, "checkpoint": str(plan.data / CHECKPOINT), "count_experts": first}
    yield Run("transformers bf16", "transformers", peer)
    for quantize, label in WIDTHS.items():
        ours = {**common, "config": plan.ours_settings(quantize, plan.threads)}
        yield Run(f"moeserve {label}", "ours", ours, plan.ours_python)
    shape = plan.shape
    layer = {
        "threads": plan.threads,
        "shape": {
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.moe_intermediate_size,
            "num_experts": shape.num_experts,
            "top_k": shape.num_experts_per_tok,
        },
    }
    yield Run("layer", "layer", layer)
    for kind in ("ipex", "kt-kernel"):
        yield Run(f"layer {kind}", kind, layer, plan.other_pythons.get(kind))


def run_rounds(plan: Plan, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Name -> one result per round. A run that was skipped or failed is not tried again.

    After each round the results so far are written to rounds.json beside the weights.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(plan.repeats):
        for run in runs_of_a_round(plan, first=number == 0):
            past = results.setdefault(run.name, [])
            if past and not past[-1].keys().isdisjoint({"skipped", "failed"}):
                continue
            if not plan.wants(run.name):
                past.append({"skipped": "not asked for (--engines)"})
                continue
            started_s = time.perf_counter()
            past.append(run())
            took_s = time.perf_counter() - started_s
            line = f"{run.name}: {took_s:.0f} s {summary(past[-1])}"
            say(f"round {number + 1} of {plan.repeats}: {line}")
        (plan.data / "rounds.json").write_text(json.dumps(results))
    return results


def run_rows(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """moeserve's layer by rows, for each width and number of threads; once, not in the rounds."""
    results = {}
    for quantize, label in WIDTHS.items():
        for threads in sorted({1, plan.threads}):
            name = f"moeserve {label}, {threads} threads"
            if plan.wants(f"moeserve {label}"):
                settings = {"config": plan.ours_settings(quantize, threads), "rows": ROWS}
                results[name] = run_alone("ours rows", settings, plan.ours_python)
                say(f"rows: {name}: {summary(results[name])}")
    return results


def pack(plan: Plan, say: Callable[[str], None]) -> tuple[dict[str, Path], str | None]:
    """Packed directories of moeserve by --quantize value, and why there are none."""
    command = [plan.ours_python, "-m", "moeserve.cli", "pack"]
    probe = subprocess.run([*command, "--help"], capture_output=True, text=True)
    if probe.returncode != 0:
        return {}, "this moeserve has no `pack`: it loads the checkpoint"
    packed = {}
    for quantize, label in WIDTHS.items():
        path = plan.data / f"packed-{label}"
        if plan.wants(f"moeserve {label}") and not path.exists():
            say(f"packing {path.name}")
            part = plan.data / f"packed-{label}.part"
            source = str(plan.data / CHECKPOINT)
            subprocess.run([*command, source, str(part), "--quantize", quantize], check=True)
            part.rename(path)
        if path.exists():
            packed[quantize] = path
    return packed, None


def summary(result: dict[str, Any]) -> str:
    """A line for the terminal."""
    for outcome in ("skipped", "failed"):
        if outcome in result:
            return f"{outcome}: {result[outcome]}"
    rates = result.get("rates", {})
    return ", ".join(f"{name} {value:.1f} tok/s" for name, value in rates.items())
