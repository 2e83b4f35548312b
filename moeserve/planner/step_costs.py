"""How long one step of our engine takes on the machine of a profile.

A step is its products, its attention, its experts and what the engine adds. Products cost by weight
and rows as the profile's products or experts of the same format do; what the engine adds is fitted
to the steps of the profile (`step_fit`). A profile without steps, a data sheet's, says nothing of
that: nothing is added then, kv is read at the memory's speed, and `is_measured` is False.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
from msgspec import structs

from moeserve.config import ModelConfig
from moeserve.core import ConfigError, MoeserveError
from moeserve.experts.schedule.cost_model import CostModel, as_experts
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.product_sizes import Size, SizedCurve, curve_of_size
from moeserve.experts.schedule.profile import Processor, Profile, StepFigures
from moeserve.planner.model_shape import read_shape
from moeserve.planner.plan_types import Resource, StepLoad
from moeserve.planner.shapes import AttentionShape, ExpertsShape, Matrix, ModelShape
from moeserve.planner.step_fit import (
    EngineCosts,
    ProductCosts,
    attention_features,
    attention_width,
    fit_engine,
    rebased,
)

ROUTER, SHARED = "router", "shared"
#: after the format: what torch multiplies head by head
PER_HEAD = "per head"
#: at which arithmetic is at its best
MANY_ROWS = 512


@dataclass
class Work:
    """us: how long it takes. used: how long each resource would, alone."""

    us: float = 0.0
    used: dict[Resource, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, resource: Resource, us: float) -> None:
        """What takes nothing but that resource."""
        self.us += us
        self.used[resource] += us

    def copy(self) -> Work:
        """To add to."""
        return Work(self.us, self.used.copy())


class LayerCosts(Protocol):
    """Of a step and of its layers without routed experts."""

    def step_work(self, load: StepLoad) -> Work:
        """Once per step."""
        ...

    def layer_work(self, layer: int, load: StepLoad) -> Work:
        """One layer."""
        ...


class Products:
    """Products by the curves of linear layers, else of experts in the same format."""

    def __init__(self, profile: Profile, num_threads: int | None = None) -> None:
        """num_threads: that compute; None: as many as the profile's curves were measured with."""
        self._profile = profile
        self._num_threads = num_threads
        self._curves: dict[Matrix, Curve] = {}

    def us(self, matrix: Matrix, num_rows: int) -> float:
        """Microseconds of [num_rows, cols] times the matrix."""
        return self._curve(matrix)[num_rows]

    def add(self, work: Work, matrix: Matrix, num_rows: int) -> None:
        """Reading the weights is what one row takes, multiplying what many rows take of each."""
        curve = self._curve(matrix)
        us = curve[num_rows]
        work.us += us
        work.used[Resource.CPU_MEMORY] += min(us, curve[1])
        work.used[Resource.CPU_COMPUTE] += min(us, curve[MANY_ROWS] / MANY_ROWS * num_rows)

    def _curve(self, matrix: Matrix) -> Curve:
        """Microseconds of the product by rows."""
        kind = replace(matrix, name="")
        found = self._curves.get(kind)
        if found is None:
            found = self._curves[kind] = self._find(kind)
        return found

    def _find(self, matrix: Matrix) -> Curve:
        if matrix.per_head:
            measured = self._measured(matrix, f"{matrix.form} {PER_HEAD}")
            if measured is not None:
                return measured  # on one thread of torch's, however many are ours
            # Calibrated without the format that the model computes in: as if our kernels did them.
        measured = None if matrix.ffn else self._measured(matrix, matrix.form)
        if measured is None:
            measured = as_experts(self._profile.cpu, _size(matrix), matrix.form, matrix.read_bytes)
        return with_threads(measured, self._profile, matrix.form, self._num_threads)

    def _measured(self, matrix: Matrix, weights: str) -> Curve | None:
        found = [
            SizedCurve(size, Curve(curve.rows, [f.value * size.weights / 1e6 for f in curve.ps]))
            for curve in self._profile.cpu.product_curves
            for size in (Size.of_matrix(curve.outputs, curve.inputs),)
            if curve.weights == weights
        ]
        return curve_of_size(_size(matrix), found) if found else None


def _size(matrix: Matrix) -> Size:
    """An FFN's rows are those of gate, up and down."""
    if matrix.ffn:
        return Size.of_expert_sizes(matrix.cols, matrix.rows // 3)
    return Size.of_matrix(matrix.rows, matrix.cols)


def with_threads(curve: Curve, profile: Profile, form: str, num_threads: int | None) -> Curve:
    """The curve with fewer threads than were calibrated: reading by the rates that were measured
    with so many, arithmetic in proportion, also where it was hidden behind reading before."""
    most = profile.hardware.num_cores
    if num_threads is None or num_threads >= most:
        return curve
    rates = {r.num_threads: r.bytes_per_s.value for r in profile.cpu.read if r.kernel == form}
    rates = rates or {r.num_threads: r.bytes_per_s.value for r in profile.cpu.read}
    counts = sorted(rates)
    values = [rates[count] for count in counts]
    reading = float(np.interp(most, counts, values) / np.interp(num_threads, counts, values))
    slower = most / num_threads
    rows, read_us = sorted(curve), curve[1]
    row_us = curve[rows[-1]] / rows[-1] * slower  # at which arithmetic is at its best
    ridge = int(read_us * reading / row_us)  # up to which reading may hide it
    rows = sorted({*rows, max(1, ridge), ridge + 1})
    return Curve(
        rows,
        [max(read_us * reading + max(0.0, curve[n] - read_us) * slower, n * row_us) for n in rows],
    )


class EngineStepCosts:
    """Costs of one model's steps."""

    def __init__(
        self,
        model: ModelShape,
        profile: Profile,
        num_threads: int | None = None,
        over_disk: bool = False,
    ) -> None:
        """num_threads: None for as many as were calibrated. over_disk: experts are read from it.

        Raises ConfigError where the profile has neither curves nor rates.
        """
        self.model = model
        self.profile = profile
        self.products = Products(profile, num_threads)
        self._of_products: dict[tuple[int, int], Work] = {}  # of a layer, by rows
        self._slower = profile.hardware.num_cores / (num_threads or profile.hardware.num_cores)
        costs: dict[ExpertsShape, CostModel] = {}
        for layer in model.layers:
            shape = layer.experts
            if shape is not None and shape not in costs:
                found = CostModel.of(profile, shape.spec, shape.form, shape.record_bytes)
                cpu = with_threads(found.cpu, profile, shape.form, num_threads)
                costs[shape] = replace(found, cpu=cpu)
        self._experts = [
            None if layer.experts is None else costs[layer.experts] for layer in model.layers
        ]
        self.engine = EngineCosts()
        self.is_measured = profile.steps is not None
        if profile.steps is not None:
            self.engine = fit_profile(profile, profile.steps)
        self._around = self.engine.over_disk if over_disk else self.engine.resident
        self._over_disk = over_disk

    def expert_costs(self, layer: int) -> CostModel:
        costs = self._experts[layer]
        assert costs is not None, f"layer {layer} has no experts"
        return costs

    def step_work(self, load: StepLoad) -> Work:
        """Once per step, and what of the machine that uses."""
        sequences = len(load.decode_contexts) + len(load.chunks)
        work = Work()
        work.add(Resource.OVERHEAD, float(self._around.once @ (1.0, sequences, load.num_rows)))
        if load.num_sampled:
            self.products.add(work, self.model.head, load.num_sampled)
            work.add(
                Resource.OVERHEAD,
                self.engine.sampling_us(load.num_sampled, self.model.vocab_size),
            )
        return work

    def layer_work(self, layer: int, load: StepLoad) -> Work:
        """One layer without its routed experts, and over the disk without what is computed while
        they are read (`beside_work`); and what of the machine that uses."""
        shape, rows = self.model.layers[layer], load.num_rows
        products = self._of_products.get((layer, rows))
        if products is None:
            products = self._of_products[layer, rows] = Work()
            for matrix in shape.products:
                if not (self._over_disk and is_shared(matrix)):
                    self.products.add(products, matrix, rows)
        work = products.copy()
        kv, ops, calls = self._attention_us(layer, load)
        work.add(Resource.CPU_MEMORY, kv)
        work.add(Resource.CPU_COMPUTE, ops)
        width = attention_width(self.model, shape)
        around = float(self._around.around_attention @ (1.0, rows * width))
        around += float(self.engine.around_experts @ (1.0, rows * self.model.hidden_size))
        work.add(Resource.OVERHEAD, calls + around)
        return work

    def beside_work(self, layer: int, num_rows: int) -> Work:
        """The shared expert of a layer over the disk: a job of its own."""
        work = Work()
        for matrix in filter(is_shared, self.model.layers[layer].products):
            self.products.add(work, matrix, num_rows)
        if work.us:
            work.add(Resource.OVERHEAD, self.expert_costs(layer).cpu_start_us)
        return work

    def _attention_us(self, layer: int, load: StepLoad) -> tuple[float, float, float]:
        """Scores and values of all sequences: reading kv, multiplying, calls."""
        attention = self.model.layers[layer].attention
        if not self.is_measured:
            read_us, ops_us = self._kv_read_us(layer, load), self._scores_us(layer, load)
            return max(0.0, read_us - ops_us), ops_us, 0.0
        starts = [context - 1 for context in load.decode_contexts]
        starts += [chunk.start for chunk in load.chunks]
        rows = [1] * len(load.decode_contexts) + [chunk.num_tokens for chunk in load.chunks]
        calls, kv, ops = self.engine.attention * attention_features(attention, starts, rows)
        return float(kv) * self._slower, float(ops) * self._slower, float(calls)

    def _kv_read_us(self, layer: int, load: StepLoad) -> float:
        attention = self.model.layers[layer].attention
        rate = self.profile.cpu.best_read()
        if rate is None or not rate.bytes_per_s.value:
            raise ConfigError("profile: it has no rate of memory", field="profile")
        ends = [*load.decode_contexts, *(c.start + c.num_tokens for c in load.chunks)]
        tokens = sum(attention.keys(end) for end in ends)
        num_bytes = tokens * attention.kv_heads * attention.kv_width * self.model.number_bytes
        return num_bytes / rate.bytes_per_s.value * 1e6

    def _scores_us(self, layer: int, load: StepLoad) -> float:
        """At the peak of the number type that kv has."""
        peak = self.profile.cpu.peak(self.model.dtype)
        if peak is None:
            raise ConfigError("profile: it has no peak of the CPU", field="profile")
        return attention_ops(self.model.layers[layer].attention, load) / peak * 1e6 * self._slower


def attention_ops(attention: AttentionShape, load: StepLoad) -> float:
    """Of the scores and values of all rows of one layer; a multiply-add is two."""
    keys = float(sum(attention.keys(context) for context in load.decode_contexts))
    for chunk in load.chunks:
        contexts = np.arange(chunk.start + 1, chunk.start + chunk.num_tokens + 1)
        keys += float(np.minimum(contexts, attention.window or contexts[-1]).sum())
    return 2 * attention.num_heads * (attention.score_width + attention.value_width) * keys


def fit_profile(profile: Profile, steps: StepFigures) -> EngineCosts:
    """The engine's own costs on the machine of a profile."""
    model = _model_of(steps)
    return fit_engine(steps, model, _product_costs(profile, model))


def on_other_cpu(profile: Profile, cpu: Processor) -> Profile:
    """The profile with a processor of other speed, on which our engine adds to its products what it
    adds on this one."""
    changed = structs.replace(profile, cpu=cpu)
    if profile.steps is None:
        return changed
    model = _model_of(profile.steps)
    before, after = _product_costs(profile, model), _product_costs(changed, model)
    return structs.replace(changed, steps=rebased(profile.steps, model, before, after))


def _model_of(steps: StepFigures) -> ModelShape:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(steps.config))
        try:
            return read_shape(ModelConfig(model=str(path), quantize=steps.quantize), path)
        except MoeserveError as error:
            raise ConfigError(
                f"profile: the model that its steps were measured on is none: {error}",
                field="profile",
                hint="measure again with `moeserve calibrate`",
            ) from error


def _product_costs(profile: Profile, model: ModelShape) -> ProductCosts:
    products = Products(profile)
    experts = model.layers[0].experts
    assert experts is not None, "the model that is measured has experts"
    costs = CostModel.of(profile, experts.spec, experts.form, experts.record_bytes)
    return ProductCosts(
        head_us=lambda rows: products.us(model.head, rows),
        attention_us=lambda layer, rows: sum(
            products.us(matrix, rows) for matrix in layer.products if not is_router(matrix)
        ),
        router_us=lambda layer, rows: sum(
            products.us(matrix, rows) for matrix in layer.products if is_router(matrix)
        ),
        expert_us=lambda layer, rows: costs.cpu[rows],
        start_us=costs.cpu_start_us,
    )


def is_router(matrix: Matrix) -> bool:
    return matrix.name.split(".")[0] == ROUTER


def is_shared(matrix: Matrix) -> bool:
    """Whether it belongs to a shared expert, its gate included."""
    return matrix.name.split(".")[0] == SHARED
