"""What our engine takes besides products: attention, choosing tokens, a step's own work.

The steps are those of the real engine on a small model of random weights, written for it; the
timeline names their parts. Its experts are larger than a core's cache, so that Python finds its own
memory as cold as beside a real model.

Products are taken off the steps later (`step_fit`), and were measured half a minute before. So some
of them are measured again beside the steps, whose times are then those of a machine that computes
as fast as it did.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from msgspec import structs

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, ExpertSpec, SamplingParams
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.engine.engine import Engine
from moeserve.engine.sampler import Sampler, SampleRow
from moeserve.experts.schedule.profile import (
    AttentionPoint,
    Figure,
    Processor,
    SamplePoint,
    StepFigures,
    StepPoint,
)
from moeserve.planner.disk_figures import DiskPlan, measure_file
from moeserve.planner.disk_times import read_time_us
from moeserve.planner.pace import Pace
from moeserve.planner.random_model import write_random_packed
from moeserve.planner.repeats import Repeats, summarise
from moeserve.planner.step_fit import WATCHING, rows_at_random
from moeserve.planner.tier_figures import TierLayer, tier_layers, tier_points
from moeserve.timeline import Span

QUANTIZE: Final = "int8"
NUM_LAYERS, NUM_EXPERTS, TOP_K, VOCAB_SIZE = 4, 16, 4, 8192
EXPERTS = ExpertSpec(num_experts=NUM_EXPERTS, hidden_size=1024, intermediate_size=768)
CONFIG: dict[str, int | float | str | bool | list[str]] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": EXPERTS.hidden_size,
    "intermediate_size": 1024,
    "moe_intermediate_size": EXPERTS.intermediate_size,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "vocab_size": VOCAB_SIZE,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
#: kv heads, query heads of each, width of a head
HEADS = ((4, 8, 128), (8, 3, 64), (16, 1, 64))
#: rows, context
ATTENTION = ((1, 64), (1, 512), (1, 4096), (64, 64), (256, 256), (256, 1024), (512, 512))
SAMPLING = ((1, 32768), (16, 32768), (16, 131072))
#: streams that decode, and prompts that are computed in one step
DECODES = (1, 4, 16)
PROMPTS = (32, 128, 512)
CONTEXT_TOKENS = 16
#: steps of each kind, the first few of which are cold
NUM_STEPS, NUM_COLD = 20, 4
#: pairs of steps, one recorded and one not
NUM_PAIRS = 48
PARTS_ONCE = ("schedule", "inputs", "commit", "head and sampler")
PARTS_OF_LAYER = ("attention", "feed forward")
#: of one over the disk: its rest is sorted by what it had to read (`tier_figures`)
PARTS_OVER_DISK = ("attention",)
#: of the experts: few and many layers that find what they want
TIER_SHARES = (0.75, 0.375)
#: how the disk is looked at beside steps: records, threads, bytes of a sample
DISK_BLOCKS, DISK_DEPTHS, DISK_SAMPLE_BYTES = (1 << 20, 4 << 20), (1, 2, 4, 8), 32 << 20
DISK_REPEATS = Repeats(at_least=5, at_most=10, limit_s=0.2)
Report = Callable[[str], None]


def measure_steps(
    runtime: NativeRuntime, cpu: Processor, directory: Path, repeats: Repeats, report: Report
) -> StepFigures:
    """cpu: as it was calibrated. directory: where the model is written and removed again, about
    200 MB."""
    report("attention")
    attention = [
        attention_point(runtime, repeats, heads, rows, context)
        for heads in HEADS
        for rows, context in ATTENTION
    ]
    report("choosing tokens")
    sampling = [sample_point(repeats, rows, vocab) for rows, vocab in SAMPLING]
    report("steps of the engine")
    with TemporaryDirectory(dir=directory, prefix=".calibrate-") as scratch:
        model = Path(scratch) / "model"
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(CONFIG))
        write_random_packed(config, model, QUANTIZE)
        layers: list[TierLayer] = []
        num_experts = NUM_LAYERS * NUM_EXPERTS
        steps = [
            point
            for slots in (None, *(round(num_experts * share) for share in TIER_SHARES))
            for point in step_points(model, runtime.num_threads, cpu, slots, layers)
        ]
    return StepFigures(
        config=CONFIG,
        quantize=QUANTIZE,
        attention=attention,
        sampling=sampling,
        steps=steps,
        tier=tier_points(layers),
    )


def attention_point(
    runtime: NativeRuntime, repeats: Repeats, heads: tuple[int, int, int], rows: int, context: int
) -> AttentionPoint:
    """bfloat16, every sample from another part of a pool that no cache holds."""
    kv_heads, group, dim = heads
    num_parts = max(4, (64 << 20) // (context * kv_heads * dim * 4))
    entries = torch.ones(num_parts * context, kv_heads, 2 * dim, dtype=torch.bfloat16)
    queries = torch.ones(rows, kv_heads, group, dim, dtype=torch.bfloat16)
    out = torch.empty_like(queries)
    parts = iter(range(1 << 30))

    def sample() -> float:
        first = next(parts) % num_parts * context
        slots = torch.arange(first, first + context)
        spans = _native.AttentionSpans([(0, rows, context, slots)])
        began_s = time.perf_counter()
        _native.attend(runtime.handle, spans, queries, entries, dim, 1.0, 0, None, out)
        return (time.perf_counter() - began_s) * 1e6

    return AttentionPoint(
        kv_heads=kv_heads,
        group_heads=group,
        head_dim=dim,
        num_rows=rows,
        context_tokens=context,
        us=repeats.figure(sample),
    )


def sample_point(repeats: Repeats, num_rows: int, vocab_size: int) -> SamplePoint:
    sampler = Sampler(vocab_size, (0,), torch.device("cpu"))
    params = SamplingParams(temperature=0.0, max_tokens=8)
    rows = [SampleRow(str(row), [1, 2, 3], 2, params) for row in range(num_rows)]
    logits = torch.randn(num_rows, vocab_size, dtype=torch.bfloat16)

    def sample() -> float:
        began_s = time.perf_counter()
        with torch.inference_mode():
            sampler.sample(logits.float(), rows)
        return (time.perf_counter() - began_s) * 1e6

    return SamplePoint(num_rows=num_rows, vocab_size=vocab_size, us=repeats.figure(sample))


@dataclass
class _Step:
    """One step's times."""

    once_us: dict[str, float]
    layer_us: dict[str, float]
    spans: list[Span]

    def faster(self, factor: float) -> _Step:
        """On a machine that computes so much faster."""
        once, layer = (
            {name: us / factor for name, us in parts.items()}
            for parts in (self.once_us, self.layer_us)
        )
        return _Step(once, layer, self.spans)


@dataclass(frozen=True)
class _Kind:
    """Steps that are alike. context_tokens: of each stream, about. slower: how much longer products
    took beside them than when they were calibrated."""

    num_streams: int
    num_rows: int
    context_tokens: int
    steps: list[_Step]
    slower: float = 1.0

    def as_calibrated(self) -> list[_Step]:
        return [step.faster(self.slower) for step in self.steps]


def step_points(
    model: Path, num_threads: int, cpu: Processor, slots: int | None, layers: list[TierLayer]
) -> list[StepPoint]:
    """slots: for experts; None: all are resident. layers: those over the disk are added."""
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model)),
            kv=KvConfig(num_blocks=max(DECODES) * 8 + max(PROMPTS) // 4, prefix_reuse=False),
            scheduler=SchedulerConfig(max_running=max(DECODES), max_batch_tokens=max(PROMPTS)),
            experts=ExpertConfig(cpu_backend="native", num_threads=num_threads, host_slots=slots),
        )
    )
    engine.page_mover.wait()
    rng = np.random.default_rng(0)
    native = engine.loaded.runtime.native
    assert native is not None, "products are those of the native backend"
    pace = Pace.of(native, cpu, PackFormat(QUANTIZE))

    kinds: list[_Kind] = []
    slower: list[float] = []
    watching: Figure | None = None
    for streams in DECODES:
        slower += pace.slower(streams)
        steps = list(_run(engine, rng, streams, CONTEXT_TOKENS, NUM_STEPS))
        slower += pace.slower(streams)
        decodes = steps[-NUM_STEPS + NUM_COLD :]
        kinds.append(_Kind(streams, streams, CONTEXT_TOKENS + NUM_STEPS // 2, decodes))
        if slots is None and streams == 1:
            watching = watching_us(engine, rng)
    # Of all decodes, then of all prompts: of one kind there are few samples, with seconds between
    # them; and a machine whose memory is as fast as ever may multiply half as fast.
    kinds = [replace(kind, slower=median(slower)) for kind in kinds]
    slower, prompts = [], list[_Kind]()
    for rows in PROMPTS:
        found = list[_Step]()
        for _ in range(NUM_STEPS // 2):
            found.append(next(_run(engine, rng, 1, rows, 1)))
            slower += pace.slower(rows)
        prompts.append(_Kind(1, rows, rows, found[2:]))
    engine.close()
    kinds += [replace(kind, slower=median(slower)) for kind in prompts]
    if slots is not None:
        alone_us = _reads_alone(model)
        for kind in kinds:
            usual = sum(count for _, count in rows_at_random(kind.num_rows, NUM_EXPERTS, TOP_K))
            for step in kind.steps:
                of_step = tier_layers(step.spans, kind.num_rows, usual)
                layers.extend(layer.faster(kind.slower).beside_disk(alone_us) for layer in of_step)
    points = [_point(slots is not None, kind) for kind in kinds]
    if watching is not None:
        alike = structs.replace(watching, value=watching.value / kinds[0].slower)
        points[0].layer_us[WATCHING] = alike
    return points


def _reads_alone(model: Path) -> Callable[[int], float]:
    """Microseconds that so many experts take to be read now, when nothing else goes on: a disk may
    read half as much again a minute later."""
    form = PackFormat(QUANTIZE)
    record_bytes = PackedExperts.bytes_of_record(EXPERTS, form, form)
    path = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    points = measure_file(
        DiskPlan(model, 0, DISK_BLOCKS, DISK_DEPTHS, DISK_SAMPLE_BYTES, DISK_REPEATS), path
    )
    return lambda count: read_time_us(points, record_bytes, count, None)


def watching_us(engine: Engine, rng: np.random.Generator) -> Figure:
    """What a layer takes more because its step is recorded: its halves are calls of their own then,
    where resident layers otherwise run in one (models/transformer.py). Of one stream, where that is
    most of a step."""
    _add(engine, rng, 1, CONTEXT_TOKENS, 2 * NUM_PAIRS)
    engine.step()  # the prompt
    samples = []
    for _ in range(NUM_PAIRS - 1):
        began_s = time.perf_counter()
        engine.step()
        plain_s = time.perf_counter() - began_s
        engine.timeline.start()
        began_s = time.perf_counter()
        engine.step()
        recorded_s = time.perf_counter() - began_s
        engine.timeline.stop()
        samples.append((recorded_s - plain_s) * 1e6 / NUM_LAYERS)
    while engine.has_work:
        engine.step()
    return summarise(samples)


def _add(engine: Engine, rng: np.random.Generator, streams: int, prompt: int, output: int) -> None:
    params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    for stream in range(streams):
        ids = rng.integers(1, VOCAB_SIZE, prompt).tolist()
        engine.add(EngineRequest(request_id=str(stream), token_ids=ids, params=params))


def _run(
    engine: Engine, rng: np.random.Generator, streams: int, prompt: int, output: int
) -> Iterator[_Step]:
    """All streams from their prompts, computed in one step or few, to their ends."""
    _add(engine, rng, streams, prompt, output)
    found = []
    while engine.has_work:
        engine.timeline.start()
        engine.step()
        found.append(_step(engine.timeline.stop().spans))
    return iter(found)


def _step(spans: list[Span]) -> _Step:
    times: dict[str, float] = defaultdict(float)
    for span in spans:
        times[span.name] += (span.end_s - span.start_s) * 1e6
    return _Step(
        {name: times[name] for name in PARTS_ONCE},
        {name: times[name] / NUM_LAYERS for name in PARTS_OF_LAYER},
        spans,
    )


def _point(tiered: bool, kind: _Kind) -> StepPoint:
    steps = kind.as_calibrated()

    def figures(names: Sequence[str], us: Callable[[_Step], dict[str, float]]) -> dict[str, Figure]:
        # The middle: what varies from step to step is Python's own and no other's.
        return {name: summarise([us(step)[name] for step in steps]) for name in names}

    return StepPoint(
        tiered=tiered,
        num_streams=kind.num_streams,
        num_rows=kind.num_rows,
        context_tokens=kind.context_tokens,
        once_us=figures(PARTS_ONCE, lambda step: step.once_us),
        layer_us=figures(PARTS_OVER_DISK if tiered else PARTS_OF_LAYER, lambda step: step.layer_us),
    )
