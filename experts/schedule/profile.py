"""What one machine's parts cost: the calibration profile. Files: profile_file.py.

`moeserve calibrate` measures a profile, the layer scheduler and the throughput predictor read it. A
profile holds measured points and their spread, never a fitted model: how to go from points to costs
is `cost_model`'s. Machines that are not at hand are described by rates from their data sheets, in
the same form, and say so (`source`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measured value, of several repeats (`planner/repeats.py` says how).

    spread: the distance of the quartiles as a share of it. interval: half of its 95 % confidence
    interval, likewise. Both are 0 for a data sheet's number.
    """

    value: float
    spread: float = 0.0
    interval: float = 0.0

    def __post_init__(self) -> None:
        for name in ("value", "spread", "interval"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")


def _check_rate(name: str, rate: Figure) -> None:
    """ValueError for a rate by which nothing ever ends."""
    if not rate.value > 0:
        raise ValueError(f"{name} {rate.value} must be above 0")


def _check_size(**numbers: int) -> None:
    """ValueError for what no product has, whose weights costs are divided by."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} {number} must be 1 or more")


def _check_rows(rows: Sequence[int], figures: Sequence[Figure]) -> None:
    """ValueError for rows that no curve can be made of."""
    ascending = all(a < b for a, b in pairwise(rows))
    if not rows or len(rows) != len(figures) or not ascending or rows[0] < 1:
        raise ValueError(f"rows {rows} must be ascending from 1, with a time each")


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a measured profile holds for, and for nothing else.

    num_cores: that this process may use. gpu: its name, None where there is none.
    """

    cpu: str
    num_cores: int
    isa: str
    memory_bytes: int
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.num_cores < 1:
            raise ValueError(f"num_cores {self.num_cores} must be 1 or more")


class ReadRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per second that threads read from memory. kernel: "read" for loads alone, or the weight
    format whose product with one row reads them."""

    kernel: str
    num_threads: int
    bytes_per_s: Figure

    def __post_init__(self) -> None:
        _check_rate("bytes_per_s", self.bytes_per_s)


class ExpertCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Microseconds that one more expert adds to a job, by the rows that chose it.

    weights: a `PackFormat.describe()`, or the dtype of plain weights. rows: ascending.
    record_bytes: of one such expert.
    """

    weights: str
    hidden_size: int
    intermediate_size: int
    record_bytes: int
    rows: list[int]
    us: list[Figure]

    def __post_init__(self) -> None:
        _check_size(hidden_size=self.hidden_size, intermediate_size=self.intermediate_size)
        _check_rows(self.rows, self.us)


class ProductCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Picoseconds that a linear layer takes for each of its weights, by the rows it multiplies.

    weights: a `PackFormat.describe()`, or a dtype and "per head": what latent attention multiplies
    head by head, with torch. outputs, inputs: of the measured matrix. rows: ascending.
    """

    weights: str
    outputs: int
    inputs: int
    rows: list[int]
    ps: list[Figure]

    def __post_init__(self) -> None:
        _check_size(outputs=self.outputs, inputs=self.inputs)
        _check_rows(self.rows, self.ps)


#: what numbers of a format are multiplied as, best first: a key of `Processor.ops_per_s`
MULTIPLIED_AS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "float32": ("f32",),
        "bfloat16": ("bf16", "f32"),
        "float16": ("fp16", "bf16", "f32"),
        "int8": ("int8", "bf16", "f32"),
        "int4": ("int8", "bf16", "f32"),
        "mxfp4": ("int8", "bf16", "f32"),
        "fp8": ("bf16", "f32"),
    }
)


class Processor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What computes experts: the CPU threads together, or a device.

    read: by kernel and threads. ops_per_s: peak by number type, a multiply-add being two. start_us:
    what the first expert of a job costs beyond a further one: waking threads or launching kernels,
    preparing the rows and returning the sums. expert_curves, product_curves: may be empty in a data
    sheet's profile; costs then follow from the rates (roofline).
    """

    name: str
    memory_bytes: int
    read: list[ReadRate]
    ops_per_s: dict[str, Figure]
    start_us: Figure
    expert_curves: list[ExpertCurve] = []
    product_curves: list[ProductCurve] = []

    def __post_init__(self) -> None:
        for name, rate in self.ops_per_s.items():
            _check_rate(f"ops_per_s of {name}", rate)

    def best_read(self, kernel: str = "read") -> ReadRate | None:
        """The highest rate of a kernel over the numbers of threads."""
        rates = [rate for rate in self.read if rate.kernel == kernel]
        return max(rates, key=lambda rate: rate.bytes_per_s.value, default=None)

    def peak(self, weights: str) -> float | None:
        """Operations per second on weights of a format (`PackFormat.describe()`), as what they are
        multiplied as; None: not known."""
        name = weights.split("/")[0].split("+")[0].split(" ")[0]
        best_first = sorted(self.ops_per_s, key=lambda kind: -self.ops_per_s[kind].value)
        wanted = MULTIPLIED_AS.get(name, tuple(best_first))
        if "weight-only" in weights:
            wanted = wanted[1:] or wanted
        found = [self.ops_per_s[kind].value for kind in wanted if kind in self.ops_per_s]
        return found[0] if found else None


class TransferPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Microseconds to copy that many bytes from host memory to the device, alone on the link."""

    num_bytes: int
    us: Figure


class DiskPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per second of O_DIRECT reads: records of block_bytes, with so many reads in flight (of
    a large record several at once)."""

    block_bytes: int
    queue_depth: int
    bytes_per_s: Figure

    def __post_init__(self) -> None:
        _check_rate("bytes_per_s", self.bytes_per_s)


class AttentionPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Microseconds of one layer's attention for num_rows rows, the last of their context, whose
    keys and values are read from memory. group_heads: query heads of a kv head. head_dim: of keys
    and of values."""

    kv_heads: int
    group_heads: int
    head_dim: int
    num_rows: int
    context_tokens: int
    us: Figure


class StepPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of step of our engine, by what its parts took, as its timeline names them.

    num_streams: sequences in the step. num_rows: tokens. once_us: of the step, without the layers.
    layer_us: mean of a layer. tiered: experts stood in slots over the disk.
    """

    tiered: bool
    num_streams: int
    num_rows: int
    context_tokens: int
    once_us: dict[str, Figure]
    layer_us: dict[str, Figure]


class TierPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers over the disk that are alike: num_rows tokens, and so many of the experts that they
    chose to be read. num_layers: that were seen. num_active, num_groups: means, of chosen experts
    and of runs in which these were computed, the sum of a row's experts being one of them. us: of a
    layer, by part (`planner/tier_figures.py`)."""

    num_rows: int
    num_missing: int
    num_layers: int
    num_active: float
    num_groups: float
    us: dict[str, Figure]


class SamplePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Microseconds to choose a token for each of num_rows rows, greedily."""

    num_rows: int
    vocab_size: int
    us: Figure


class StepFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What steps of our engine take on this CPU, measured on a model made for it: `config`, its
    config.json, packed with `quantize`. What the engine adds to its products is the difference.
    tier: the layers of the steps over the disk.
    """

    config: dict[str, int | float | str | bool | list[str]]
    quantize: str
    attention: list[AttentionPoint]
    sampling: list[SamplePoint]
    steps: list[StepPoint]
    tier: list[TierPoint]

    def __post_init__(self) -> None:
        """What costs are fitted to must be there: of all experts in memory, and of some on disk."""
        places = {point.tiered for point in self.steps}
        if not (self.attention and self.sampling and len(places) == 2):
            raise ValueError("attention, sampling and steps, tiered and not, must have points")


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is known of one machine.

    source: "measured" on `hardware`, or "datasheet". moeserve: the version whose kernels were
    measured. date: ISO 8601. sources: where a data sheet's numbers come from. device, link: None
    without a device; disk: empty where it was not measured. process_bytes: memory of an engine's
    process without weights, kv and buffers. process_bytes, steps: None where nothing ran.
    """

    version: int
    source: Literal["measured", "datasheet"]
    date: str
    moeserve: str
    hardware: Hardware
    cpu: Processor
    device: Processor | None = None
    link: list[TransferPoint] = []
    disk: list[DiskPoint] = []
    process_bytes: Figure | None = None
    sources: list[str] = []
    steps: StepFigures | None = None


def all_figures(part: object) -> Iterator[Figure]:
    """Every figure of a profile, or of a part of one."""
    if isinstance(part, Figure):
        yield part
    elif isinstance(part, msgspec.Struct):
        for name in part.__struct_fields__:
            yield from all_figures(getattr(part, name))
    elif isinstance(part, dict):
        for value in part.values():
            yield from all_figures(value)
    elif isinstance(part, list):
        for value in part:
            yield from all_figures(value)
