"""Measures this machine and makes a profile of it."""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moeserve import __version__
from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import FormatName, PackFormat
from moeserve.cpu_backend.threads import torch_threads
from moeserve.experts.schedule.profile import DiskPoint, Profile, TransferPoint
from moeserve.experts.schedule.profile_file import PROFILE_VERSION
from moeserve.models.read_weights import DTYPES
from moeserve.models.registry import find_model
from moeserve.models.spec import Quantization
from moeserve.models.weight_formats import INT4_GROUPS, weight_formats
from moeserve.planner.cpu_figures import (
    CpuPlan,
    ExpertShape,
    measure_cpu,
    pool_bytes_here,
    thread_counts,
)
from moeserve.planner.device_figures import DevicePlan, measure_device, measure_link
from moeserve.planner.disk_figures import DiskPlan, measure_disk
from moeserve.planner.hardware import this_hardware
from moeserve.planner.process_memory import measure_process_bytes
from moeserve.planner.repeats import Repeats
from moeserve.planner.step_figures import measure_steps

#: hidden and intermediate size of the experts of Qwen3-30B-A3B
DEFAULT_SHAPE = (2048, 768)
FORMATS = (
    PackFormat("bfloat16"),
    PackFormat("int8"),
    PackFormat("int4", 32),
    PackFormat("int4", 64),
    PackFormat("int4", 128),
    PackFormat("mxfp4"),
    PackFormat("mxfp4", weight_only=True),
    PackFormat("fp8"),
    PackFormat("float32"),
)
QUICK_FORMATS = FORMATS[:3]
#: of the model whose steps are measured, whatever else is: what its products cost is taken off
STEP_FORMATS = (PackFormat("int8"), PackFormat("float32"))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 4, 16, 64, 256)
#: of small experts and matrices: what numbers cost grows evenly with them
SMALL_ROWS = (1, 16, 256)
DISK_BLOCKS = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
QUICK_DISK_BLOCKS = (1 << 20, 4 << 20)
QUEUE_DEPTHS = (1, 2, 4, 8)
QUICK_QUEUE_DEPTHS = (1, 4)
#: of a figure's turn: products of few rows take less, and what disturbs them lasts longer
TURN_S = 0.01
TRANSFERS = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)


@dataclass(frozen=True)
class Wishes:
    """What to measure. formats: of `FORMATS`, and what else steps need; none: all, or with quick a
    few. disk_dir: None leaves the disk out. model: whose experts are measured, too, besides those
    of the default shape, in the format that its settings ask for."""

    quick: bool = False
    formats: tuple[PackFormat, ...] = ()
    disk_dir: Path | None = None
    model: ModelConfig | None = None


@torch_threads(1)  # as in an engine, whose native threads compute
def calibrate(wishes: Wishes, report: Callable[[str], None]) -> Profile:
    """report: called with what is being measured.

    Raises ConfigError and ModelError for what cannot be measured as wished.
    """
    hardware = this_hardware()
    cpu_plan = _cpu_plan(wishes, hardware.num_cores)
    disk: list[DiskPoint] = []
    if wishes.disk_dir is not None:  # first: it is what a wish can be wrong about
        disk = measure_disk(_disk_plan(wishes.quick, wishes.disk_dir), report)
    cpu = measure_cpu(cpu_plan, report)
    device, link = None, list[TransferPoint]()
    if hardware.gpu is not None:
        plan = _device_plan(wishes, torch.device("cuda", 0))
        memory_bytes = torch.cuda.get_device_properties(0).total_memory
        device = measure_device(plan, hardware.gpu, memory_bytes, report)
        link = measure_link(plan, report)
    scratch = wishes.disk_dir or Path(tempfile.gettempdir())
    figures = Repeats(limit_s=0.1 if wishes.quick else 0.15)
    report("memory of an engine's process")
    process_bytes = measure_process_bytes()
    runtime = NativeRuntime(hardware.num_cores)
    steps = measure_steps(runtime, cpu, scratch, figures, report)
    return Profile(
        version=PROFILE_VERSION,
        source="measured",
        date=datetime.date.today().isoformat(),
        moeserve=__version__,
        hardware=hardware,
        cpu=cpu,
        device=device,
        link=link,
        disk=disk,
        steps=steps,
        process_bytes=process_bytes,
    )


def _cpu_plan(wishes: Wishes, num_threads: int) -> CpuPlan:
    formats: tuple[PackFormat, ...] = QUICK_FORMATS if wishes.quick else FORMATS
    if wishes.formats:
        formats = (*wishes.formats, *STEP_FORMATS)
    shapes = [ExpertShape(*DEFAULT_SHAPE, form) for form in formats]
    if wishes.model is not None:
        shapes += model_shapes(wishes.model)
    counts = thread_counts(num_threads)
    return CpuPlan(
        shapes=tuple(dict.fromkeys(shapes)),
        rows=QUICK_ROWS if wishes.quick else ROWS,
        small_rows=SMALL_ROWS,
        threads=(counts[0], counts[-1]) if wishes.quick else counts,
        repeats=Repeats(limit_s=0.15 if wishes.quick else 0.17, turn_s=TURN_S),
        pool_bytes=pool_bytes_here(4 * len(shapes), num_threads, TURN_S),
    )


def read_formats(names: str) -> tuple[PackFormat, ...]:
    """Of `FORMATS`, as `PackFormat.describe` names them, with commas between. Raises ConfigError
    for another name."""
    known = {form.describe(): form for form in FORMATS}
    found = []
    for name in names.split(","):
        form = known.get(name.strip())
        if form is None:
            raise ConfigError(
                f"formats: {name.strip()!r} is not one of {', '.join(known)}",
                field="formats",
                hint="put commas between them: bfloat16,int8",
            )
        found.append(form)
    return tuple(found)


def _disk_plan(quick: bool, directory: Path) -> DiskPlan:
    return DiskPlan(
        directory=directory,
        file_bytes=(128 if quick else 512) << 20,
        block_bytes=QUICK_DISK_BLOCKS if quick else DISK_BLOCKS,
        queue_depths=QUICK_QUEUE_DEPTHS if quick else QUEUE_DEPTHS,
        sample_bytes=64 << 20,
        repeats=Repeats(limit_s=0.3 if quick else 0.5),
    )


def _device_plan(wishes: Wishes, device: torch.device) -> DevicePlan:
    shapes = [DEFAULT_SHAPE]
    if wishes.model is not None:
        shapes += [(s.hidden_size, s.intermediate_size) for s in model_shapes(wishes.model)]
    return DevicePlan(
        device=device,
        shapes=tuple(dict.fromkeys(shapes)),
        rows=QUICK_ROWS if wishes.quick else ROWS,
        transfer_bytes=TRANSFERS,
        copy_bytes=1 << 30,
        matrix=8192,
        pool_experts=64,
        repeats=Repeats(limit_s=0.2),
    )


def model_shapes(config: ModelConfig) -> list[ExpertShape]:
    """The experts of a model, in every format in which its settings may store them.

    Raises ModelError for a model without routed experts.
    """
    found = find_model(config)
    experts = {ffn.experts for ffn in found.spec.moe_layers.values()}
    if not experts:
        raise ModelError(f"{config.name} has no routed experts to measure", field="model")
    said = found.raw.get("dtype", found.raw.get("torch_dtype", "bfloat16"))
    formats = weight_formats(config, DTYPES[said if config.dtype == "auto" else config.dtype])
    # What the checkpoint stores as codes is kept, as weight_formats says of it.
    kept: dict[Quantization, FormatName] = {Quantization.MXFP4: "mxfp4"}
    if not formats.rounds:
        kept[Quantization.FP8_BLOCKS] = "fp8"
    stored = kept.get(found.spec.quantization)
    forms = [formats.experts]
    if stored is not None:
        forms = [PackFormat(stored, weight_only=formats.codes_weight_only)]
    elif config.quantize == "int4" and config.quantize_group == "auto":
        forms = [dataclasses.replace(formats.experts, group=group) for group in INT4_GROUPS]
    return [
        ExpertShape(spec.hidden_size, spec.intermediate_size, form)
        for spec in sorted(experts, key=lambda each: (each.hidden_size, each.intermediate_size))
        for form in forms
    ]
