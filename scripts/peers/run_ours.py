"""moeserve's engine in this process, and its CPU backend alone. Runs in moeserve's own venv."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.environment import tune_native_libraries

tune_native_libraries()  # before torch is imported, as moeserve's own commands do

import torch  # noqa: E402

from moeserve.core import EngineRequest, Routing, SamplingParams  # noqa: E402
from moeserve.cpu_backend.backend import ExpertJob  # noqa: E402
from moeserve.cpu_backend.packing import PackFormat  # noqa: E402
from moeserve.engine.engine import Engine  # noqa: E402
from moeserve.models.weight_formats import weight_formats  # noqa: E402
from peers.layer_work import Experts, LayerShape, time_layer  # noqa: E402
from peers.measure import (  # noqa: E402
    FIRST_PROMPT_TOKENS,
    DecodeRun,
    Limits,
    Skip,
    Workload,
    measure,
    read_into_page_cache,
)
from peers.run_limits import limits_now  # noqa: E402

SECTIONS = {
    "model": ModelConfig,
    "kv": KvConfig,
    "scheduler": SchedulerConfig,
    "experts": ExpertConfig,
}


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: config (section -> field -> value), workload; layer: also the backend alone."""
    read_s = read_into_page_cache(Path(settings["config"]["model"]["model"]))
    started_s = time.perf_counter()
    engine = Engine.from_config(engine_config(settings["config"]))
    load_s = time.perf_counter() - started_s
    ours, work = Ours(engine), Workload(**settings["workload"])
    try:
        # Before pages are touched or have moved: a start waits for neither.
        first_token_s = ours.prefill(*work.prompts("start", 1, FIRST_PROMPT_TOKENS))
        in_huge_pages = huge_pages(engine)
        touch_experts(engine)
        result = {**measure(ours, work, ours.limits), "first_token_s": first_token_s}
        notes = {**engine.info.notes, "read_files_s": round(read_s, 2)}
        notes["mapped in huge pages"] = in_huge_pages
        return {
            "load_s": load_s,
            **result,
            "parts": ours.parts,
            "layer": layer_times(engine),
            "stored_bits": stored_bits(engine),
            "notes": notes,
        }
    finally:
        engine.close()


def run_rows(settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of one MoE layer by number of rows. settings: config, rows."""
    engine = Engine.from_config(engine_config(settings["config"]))
    engine.page_mover.wait()
    touch_experts(engine)
    try:
        return {"rows": layer_times(engine, settings["rows"]), "notes": engine.info.notes}
    finally:
        engine.close()


def touch_experts(engine: Engine) -> None:
    """Has every expert compute once: the pages of a mapped model enter this process's page table
    at their first use, which would be timed with whatever comes first."""
    for layer, ffn in engine.loaded.spec.moe_layers.items():
        ids = torch.arange(ffn.experts.num_experts)[:, None]
        x = torch.zeros(len(ids), ffn.experts.hidden_size, dtype=engine.loaded.dtype)
        engine.loaded.runtime.backend.run(ExpertJob(layer, x, Routing(ids, torch.ones(ids.shape))))


def engine_config(sections: dict[str, dict[str, Any]]) -> EngineConfig:
    """Raises Skip for a field that this version of moeserve does not know."""
    built = {}
    for section, values in sections.items():
        kind = SECTIONS[section]
        known = {field.name for field in dataclasses.fields(kind)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise Skip(f"moeserve's {kind.__name__} has no field {', '.join(unknown)}")
        built[section] = kind(**values)
    return EngineConfig(**built)


def huge_pages(engine: Engine) -> str:
    """How much of a mapped model stands in huge pages, once what moves has moved."""
    engine.page_mover.wait()
    pages = engine.stats().pages
    if pages is None:
        return "not mapped"
    huge = (pages.cached_huge_bytes + pages.moved_bytes) / pages.mapped_bytes
    moved = pages.moved_bytes / pages.mapped_bytes
    return f"{huge:.0%} of the files, {moved:.0%} moved there in {pages.seconds:.1f} s"


class Ours:
    """Drives the engine step by step, as its own process does."""

    def __init__(self, engine: Engine) -> None:
        """parts: metric -> seconds of a step by part, of the last call that measured it."""
        self.engine = engine
        self.parts: dict[str, dict[str, float]] = {}
        self._numbers = itertools.count()

    def limits(self) -> Limits:
        """Nothing where other kernels than ours compute."""
        native = self.engine.loaded.runtime.native
        return {} if native is None else limits_now(native.handle)

    def decode(self, prompts: list[list[int]], num_steps: int) -> DecodeRun:
        # Streams that were prefilled first decode while the others still prefill.
        most_steps = num_steps + 1 + sum(map(len, prompts))
        outputs = self._add(prompts, most_steps)
        while not all(outputs.values()):
            self._step(outputs)
        self._take_parts()
        started_s = time.perf_counter()
        num_tokens = sum(self._step(outputs) for _ in range(num_steps))
        seconds = time.perf_counter() - started_s
        metric = "decode_1" if len(prompts) == 1 else "decode_streams"
        self.parts[metric] = self._take_parts(seconds, num_steps)
        for name in outputs:
            self.engine.abort(name)
        assert num_tokens == num_steps * len(prompts), "a stream was left out of a step"
        return DecodeRun(seconds, num_tokens, [o[: num_steps + 1] for o in outputs.values()])

    def prefill(self, prompt: list[int]) -> float:
        outputs = self._add([prompt], 1)
        self._take_parts()
        started_s = time.perf_counter()
        while not all(outputs.values()):
            self._step(outputs)
        seconds = time.perf_counter() - started_s
        self.parts["prefill"] = self._take_parts(seconds)
        return seconds

    def _take_parts(self, seconds: float = 0.0, num_steps: int = 1) -> dict[str, float]:
        """Seconds of a step by part, since they were last taken; rest: what no part counts."""
        native = self.engine.loaded.runtime.native
        if native is None:
            return {}
        parts = native.handle.take_part_times()
        parts["rest"] = seconds - sum(parts.values())
        return {part: total / num_steps for part, total in parts.items()}

    def _add(self, prompts: list[list[int]], max_tokens: int) -> dict[str, list[int]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        names = [f"r{next(self._numbers)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add(EngineRequest(request_id=name, token_ids=prompt, params=params))
        return {name: [] for name in names}

    def _step(self, outputs: dict[str, list[int]]) -> int:
        """Number of tokens that the step gave."""
        deltas = self.engine.step()
        for delta in deltas:
            outputs[delta.request_id] += delta.token_ids
        return sum(len(delta.token_ids) for delta in deltas)


def layer_times(engine: Engine, rows: tuple[int, ...] = (1, 16)) -> dict[str, float]:
    """Milliseconds of the backend's part of one MoE layer, by number of rows."""
    spec = engine.loaded.spec
    layers = sorted(spec.moe_layers)
    experts = spec.moe_layers[layers[0]].experts
    backend = engine.loaded.runtime.backend
    dtype = engine.loaded.dtype
    shape = LayerShape(
        experts.hidden_size, experts.intermediate_size, experts.num_experts, _top_k(engine)
    )

    def call(layer: int, x: torch.Tensor, chosen: Experts) -> torch.Tensor:
        return backend.run(ExpertJob(layers[layer], x, Routing(chosen.ids, chosen.weights)))

    return {str(n): time_layer(call, shape, len(layers), n, dtype) for n in rows}


def stored_bits(engine: Engine) -> dict[str, float]:
    """Bits per weight in memory, scales included; keys of traffic.StoredBits."""
    loaded = engine.loaded
    if loaded.runtime.native is None:
        plain = float(8 * loaded.dtype.itemsize)
        return {"experts": plain, "product": plain, "head": plain, "router": plain}
    hidden = loaded.spec.hidden_size
    moe_layer, ffn = next(iter(loaded.spec.moe_layers.items()))
    experts = ffn.experts
    gate_up = (2 * experts.intermediate_size, experts.hidden_size)
    down = (experts.hidden_size, experts.intermediate_size)
    layer = f"layers.{moe_layer}"
    forms = _forms(engine, layer)
    return {
        "experts": _bits(forms[f"{layer}.experts"], gate_up, down),
        "product": _bits(forms[f"{layer}.output.weight"], (hidden, hidden)),
        "head": _bits(forms["head"], (loaded.spec.vocab_size, hidden)),
        "router": _bits(forms[f"{layer}.router.weight"], (experts.num_experts, hidden)),
    }


def _forms(engine: Engine, layer: str) -> dict[str, PackFormat]:
    """How the model's weights are stored, by the names of a packed model's manifest."""
    manifest = engine.loaded.path / "moeserve_pack.json"
    if manifest.is_file():
        weights = json.loads(manifest.read_text())["weights"]
        return {n: PackFormat(**w["forms"][0]) for n, w in weights.items() if w["forms"]}
    formats = weight_formats(engine.config.model, engine.loaded.dtype)
    return {
        f"{layer}.experts": formats.experts,
        f"{layer}.output.weight": formats.product,
        f"{layer}.router.weight": formats.scores,
        "head": formats.head,
    }


def _bits(form: PackFormat, *shapes: tuple[int, int]) -> float:
    num_bytes = sum(form.layout(*shape).num_bytes for shape in shapes)
    return 8 * num_bytes / sum(rows * cols for rows, cols in shapes)


def _top_k(engine: Engine) -> int:
    spec = engine.loaded.spec
    return next(iter(spec.moe_layers.values())).router.top_k
