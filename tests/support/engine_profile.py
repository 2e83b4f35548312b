"""A made-up machine whose engine's costs are known exactly, as a calibration would describe it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moeserve import __version__
from moeserve.config import ModelConfig
from moeserve.experts.schedule.profile import (
    AttentionPoint,
    DiskPoint,
    ExpertCurve,
    Figure,
    Hardware,
    Processor,
    ProductCurve,
    Profile,
    ReadRate,
    SamplePoint,
    StepFigures,
    StepPoint,
    TierPoint,
)
from moeserve.experts.schedule.profile_file import PROFILE_VERSION
from moeserve.planner.model_shape import read_shape
from moeserve.planner.shapes import ModelShape
from moeserve.planner.step_fit import WATCHING, rows_at_random

FORMS = ("float32", "bfloat16", "int8")
ROWS = [1, 4, 16, 64, 256, 512]
#: microseconds of one weight: to read it, and for each row
READ_US, ROW_US = 1e-4, 1e-6
EXPERT_SHAPE = (512, 256)
START_US = 20.0
#: what the engine adds: of a step, a sequence, a row; of a layer
ONCE_US, SEQUENCE_US, ROW_ONCE_US = 300.0, 25.0, 2.0
AROUND_ATTENTION_US = 15.0
#: of a resident layer whose step was recorded
WATCHING_US = 20.0
#: so much more of each where experts come from the disk
COLDER = 1.5
#: of a layer over the disk: of each, of one that reads, of a record, of a run, of a row
BOOKS_US = (30.0, 20.0, 15.0, 5.0, 0.5)
BEGIN_US, TO_READ_US, LATE_US = (20.0, 2.0, 0.25), (15.0, 1.0), 25.0
#: of a run, of a number that it adds, as a share of the time beside reads
RUN_US, NUMBER_US, BESIDE = 30.0, 1e-4, 0.25
#: of a call of attention, a number of kv, a multiply-add
CALL_US, KV_US, OP_US = 6.0, 2e-4, 2e-5
SAMPLE_US = 2e-3
DISK_BYTES_PER_S = 1e9
CALIBRATED: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def weight_us(num_rows: int) -> float:
    return max(READ_US, READ_US * 0.5 + ROW_US * num_rows)


def product_us(num_weights: int, num_rows: int) -> float:
    """Straight between the measured points, as predictions are."""
    before = max((n for n in ROWS if n <= num_rows), default=ROWS[0])
    after = min((n for n in ROWS if n >= num_rows), default=ROWS[-1])
    if before == after:
        return weight_us(num_rows) * num_weights
    share = (num_rows - before) / (after - before)
    return ((1 - share) * weight_us(before) + share * weight_us(after)) * num_weights


def made_profile(tmp_path: Path, with_steps: bool = True) -> Profile:
    weights = 3 * EXPERT_SHAPE[0] * EXPERT_SHAPE[1]
    curves = [
        ExpertCurve(
            weights=form,
            hidden_size=EXPERT_SHAPE[0],
            intermediate_size=EXPERT_SHAPE[1],
            record_bytes=weights,
            rows=ROWS,
            us=[Figure(value=weight_us(n) * weights, spread=0.02) for n in ROWS],
        )
        for form in FORMS
    ]
    products = [
        ProductCurve(
            weights=form,
            outputs=256,
            inputs=256,
            rows=ROWS,
            ps=[Figure(value=weight_us(n) * 1e6) for n in ROWS],
        )
        for form in FORMS
    ]
    reads = [
        ReadRate(kernel="read", num_threads=n, bytes_per_s=Figure(value=n * 1e10)) for n in (1, 2)
    ]
    cpu = Processor(
        name="made up",
        memory_bytes=8 << 30,
        read=reads,
        ops_per_s={"f32": Figure(value=1e12), "bf16": Figure(value=2e12)},
        start_us=Figure(value=START_US),
        expert_curves=curves,
        product_curves=products,
    )
    disk = [
        DiskPoint(block_bytes=1 << 20, queue_depth=d, bytes_per_s=Figure(value=rate))
        for d, rate in ((1, DISK_BYTES_PER_S / 2), (4, DISK_BYTES_PER_S))
    ]
    return Profile(
        version=PROFILE_VERSION,
        source="measured",
        date="2026-01-01",
        moeserve=__version__,
        hardware=Hardware(cpu="made up", num_cores=2, isa="avx2", memory_bytes=8 << 30),
        cpu=cpu,
        disk=disk,
        steps=made_steps(tmp_path) if with_steps else None,
    )


def read_config(tmp_path: Path, config: dict[str, Any], **settings: Any) -> ModelShape:
    path = tmp_path / f"{abs(hash(json.dumps(config)))}.json"
    path.write_text(json.dumps(config))
    return read_shape(ModelConfig(model=str(path), **settings), path)


def made_steps(tmp_path: Path) -> StepFigures:
    model = read_config(tmp_path, CALIBRATED)
    layer = model.layers[0]
    experts = layer.experts
    assert experts is not None
    weights = 3 * CALIBRATED["hidden_size"] * CALIBRATED["moe_intermediate_size"]

    def products(rows: int, wanted: Callable[[str], bool]) -> float:
        return sum(product_us(m.rows * m.cols, rows) for m in layer.products if wanted(m.name))

    def attend(start: int, rows: int) -> float:
        keys = start + (rows + 1) / 2 + (32 if rows > 1 else 0)
        tiles = max(1.0, rows * 2 / 96)
        return CALL_US + KV_US * tiles * keys * 2 * 128 + OP_US * rows * 4 * keys * 128

    def step(tiered: bool, streams: int, rows: int) -> StepPoint:
        each, start = rows // streams, 31 if rows == streams else 0
        spread = rows_at_random(rows, 8, 2)
        router = products(rows, lambda name: name.startswith("router"))
        experts = START_US + sum(n * product_us(weights, r) for r, n in spread)
        colder = COLDER if tiered else 1.0
        head = product_us(model.head.rows * model.head.cols, streams)
        once = colder * (ONCE_US + SEQUENCE_US * streams + ROW_ONCE_US * rows)
        attention = products(rows, lambda name: not name.startswith("router"))
        attention += streams * attend(start, each) + colder * AROUND_ATTENTION_US
        watched = 0.0 if tiered else WATCHING_US / 2
        layer_us = {"attention": Figure(value=attention + watched)}
        if not tiered:
            layer_us["feed forward"] = Figure(value=experts + router + watched)
        if not tiered and rows == 1:
            layer_us[WATCHING] = Figure(value=WATCHING_US)
        return StepPoint(
            tiered=tiered,
            num_streams=streams,
            num_rows=rows,
            context_tokens=start + each,
            once_us={
                "inputs": Figure(value=once),
                "head and sampler": Figure(value=head + SAMPLE_US * streams * 512),
            },
            layer_us=layer_us,
        )

    def tier(rows: int, missing: int) -> TierPoint:
        """Records arrive in a few runs, beside what was there and the sum."""
        spread = rows_at_random(rows, 8, 2)
        of_experts = sum(n * product_us(weights, r) for r, n in spread)
        runs = 2 + min(missing, 1 + rows % 4) if missing else 1
        numbers = rows * 2 * CALIBRATED["hidden_size"] if missing else 0
        beside = 100.0 * missing
        extra = RUN_US * runs + NUMBER_US * numbers + BESIDE * beside
        experts = of_experts + max(1, runs - 1) * START_US + extra
        reads = float(missing > 0)
        books = sum(np.multiply(BOOKS_US, (1, reads, missing, runs, rows)))
        books += products(rows, lambda name: name.startswith("router"))
        us = {"experts": experts, "books": books, "stall": 400.0 * missing}
        if missing:
            us["begin"] = sum(np.multiply(BEGIN_US, (1, missing, rows)))
        us["layer"] = sum(us.values())
        if missing:
            us |= {"beside": beside, "late": LATE_US}
            us["to read"] = TO_READ_US[0] + TO_READ_US[1] * missing
        return TierPoint(
            num_rows=rows,
            num_missing=missing,
            num_layers=1 + rows % 3,
            num_active=sum(n for _, n in spread),
            num_groups=runs,
            us={name: Figure(value=float(value)) for name, value in us.items()},
        )

    kinds = ((1, 1), (4, 4), (16, 16), (1, 32), (1, 128), (1, 512))
    points = [
        AttentionPoint(
            kv_heads=2,
            group_heads=2,
            head_dim=64,
            num_rows=rows,
            context_tokens=start + rows,
            us=Figure(value=attend(start, rows)),
        )
        for start, rows in ((63, 1), (1023, 1), (0, 64), (0, 256), (512, 256))
    ]
    return StepFigures(
        config=CALIBRATED,
        quantize="none",
        attention=points,
        sampling=[
            SamplePoint(num_rows=n, vocab_size=1000, us=Figure(value=SAMPLE_US * n * 1000))
            for n in (1, 8)
        ],
        steps=[step(tiered, *kind) for tiered in (False, True) for kind in kinds],
        tier=[tier(rows, missing) for rows in (1, 4, 16, 128) for missing in (0, 1, 2, 5)],
    )
