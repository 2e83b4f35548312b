"""What our engine adds to its products: fitted to the steps that a profile has.

The fit takes from every measured part what its products cost by the same curves that predictions
use, so that it holds whatever those leave out, and the steps of the profile come out as measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np
from msgspec import structs

from moeserve.experts.schedule.profile import (
    AttentionPoint,
    Figure,
    StepFigures,
    StepPoint,
    TierPoint,
)
from moeserve.planner.least_squares import Costs, fit_costs
from moeserve.planner.shapes import AttentionShape, LayerShape, ModelShape
from moeserve.planner.tier_fit import LayerProducts, TierCosts, fit_tier

#: keys that attention computes together (csrc/attention.h): a row pays for whole blocks
BLOCK_KEYS = 64
#: pairs of rows and heads that read keys together, at most (csrc/attention.cpp)
TILE_PAIRS = 96
#: part of a resident layer: what recording added to it, half to either of its halves
WATCHING = "watching"


def attention_features(
    shape: AttentionShape, starts: Sequence[int], num_rows: Sequence[int]
) -> Costs:
    """What sequences' rows cost by, [3]: sequences, numbers of kv that are read, multiply-adds.

    starts: tokens before the rows of each. Prompts pay for whole blocks of keys.
    """
    before, rows = np.asarray(starts, np.float64), np.asarray(num_rows, np.float64)
    window = np.inf if shape.window is None else shape.window
    keys = (np.minimum(before + 1, window) + np.minimum(before + rows, window)) / 2
    keys += np.where(rows > 1, BLOCK_KEYS / 2, 0)
    tiles = np.maximum(1.0, rows * (shape.num_heads / shape.kv_heads / TILE_PAIRS))
    width = shape.score_width + shape.value_width
    numbers = float((tiles * keys).sum()) * shape.kv_heads * width
    return np.array([len(rows), numbers, float((rows * keys).sum()) * shape.num_heads * width])


def rows_at_random(num_rows: int, num_experts: int, top_k: int) -> list[tuple[int, float]]:
    """(rows of an expert, how many experts have so many), where every choice is as likely."""
    share = top_k / num_experts
    return [
        (r, num_experts * comb(num_rows, r) * share**r * (1 - share) ** (num_rows - r))
        for r in range(1, num_rows + 1)
    ]


@dataclass(frozen=True)
class ProductCosts:
    """Microseconds by the curves alone: of the head and of a layer's attention products for a
    number of rows, of one expert, of the start of a job."""

    head_us: Callable[[int], float]
    attention_us: Callable[[LayerShape, int], float]
    router_us: Callable[[LayerShape, int], float]
    expert_us: Callable[[LayerShape, int], float]
    start_us: float


@dataclass(frozen=True)
class StepCosts:
    """Microseconds by feature of what Python does for a step, which finds its memory colder where
    experts come from the disk beside it.

    once: of a step, of a sequence, of a row. around_attention: of a layer, of a number of a row.
    """

    once: Costs = field(default_factory=lambda: np.zeros(3))
    around_attention: Costs = field(default_factory=lambda: np.zeros(2))


@dataclass(frozen=True)
class EngineCosts:
    """Microseconds by feature; zeros where nothing is known.

    attention: of `attention_features`. sampling: of a step, of a row's number of the vocabulary.
    resident, over_disk: steps by where the experts are. around_experts: of a layer, of a number of
    a row. tier: of a layer over the disk.
    """

    attention: Costs = field(default_factory=lambda: np.zeros(3))
    sampling: Costs = field(default_factory=lambda: np.zeros(2))
    resident: StepCosts = field(default_factory=StepCosts)
    over_disk: StepCosts = field(default_factory=StepCosts)
    around_experts: Costs = field(default_factory=lambda: np.zeros(2))
    tier: TierCosts = field(default_factory=TierCosts)

    def attention_us(self, shape: AttentionShape, start: int, num_rows: int) -> float:
        return float(self.attention @ attention_features(shape, [start], [num_rows]))

    def sampling_us(self, num_rows: int, vocab_size: int) -> float:
        return float(self.sampling @ (1.0, num_rows * vocab_size)) if num_rows else 0.0


def fit_engine(figures: StepFigures, model: ModelShape, products: ProductCosts) -> EngineCosts:
    """model: of figures.config."""
    layer = model.layers[0]
    attention = fit_costs(
        [_of_point(point) for point in figures.attention], [p.us.value for p in figures.attention]
    )
    sampling = fit_costs(
        [(1.0, p.num_rows * p.vocab_size) for p in figures.sampling],
        [p.us.value for p in figures.sampling],
    )
    known = EngineCosts(attention=attention, sampling=sampling)
    resident = [point for point in figures.steps if not point.tiered]
    over_disk = [point for point in figures.steps if point.tiered]
    watching_us = max((_value(point, WATCHING) for point in resident), default=0.0)

    def of_steps(points: Sequence[StepPoint], watching_us: float) -> StepCosts:
        return StepCosts(
            once=_fit(
                points,
                lambda p: (1.0, p.num_streams, p.num_rows),
                lambda p: (
                    _sum(p.once_us)
                    - products.head_us(p.num_streams)
                    - known.sampling_us(p.num_streams, model.vocab_size)
                ),
            ),
            around_attention=_fit(
                points,
                lambda p: (1.0, p.num_rows * attention_width(model, layer)),
                lambda p: (
                    _value(p, "attention")
                    - products.attention_us(layer, p.num_rows)
                    - _attend_us(known, layer, p)
                    - watching_us / 2
                ),
            ),
        )

    around_experts = _fit(
        resident,
        lambda p: (1.0, p.num_rows * model.hidden_size),
        lambda p: (
            _value(p, "feed forward")
            - products.router_us(layer, p.num_rows)
            - _experts_us(products, layer, p.num_rows)
            - products.start_us
            - watching_us / 2
        ),
    )
    return EngineCosts(
        attention=attention,
        sampling=sampling,
        resident=of_steps(resident, watching_us),
        over_disk=of_steps(over_disk, 0.0) if over_disk else of_steps(resident, watching_us),
        around_experts=around_experts,
        tier=fit_tier(
            figures.tier,
            LayerProducts(
                numbers=_top_k(layer) * model.hidden_size,
                start_us=products.start_us,
                experts_us=lambda rows, active: _some_experts_us(products, layer, rows, active),
                other_us=lambda rows: (
                    products.router_us(layer, rows)
                    + float(around_experts @ (1.0, rows * model.hidden_size))
                ),
            ),
        ),
    )


def _of_point(point: AttentionPoint) -> Costs:
    shape = AttentionShape(
        num_heads=point.kv_heads * point.group_heads,
        score_width=point.head_dim,
        value_width=point.head_dim,
        kv_heads=point.kv_heads,
        kv_width=2 * point.head_dim,
        window=None,
    )
    return attention_features(shape, [point.context_tokens - point.num_rows], [point.num_rows])


def _fit(
    points: Sequence[StepPoint],
    features: Callable[[StepPoint], Sequence[float]],
    us: Callable[[StepPoint], float],
) -> Costs:
    return fit_costs([features(point) for point in points], [us(point) for point in points])


def attention_width(model: ModelShape, layer: LayerShape) -> int:
    """Numbers of a row that stand around attention's products: normed, turned, added."""
    shape = layer.attention
    return (
        2 * model.hidden_size
        + shape.num_heads * shape.score_width
        + (shape.kv_heads * shape.kv_width)
    )


def _top_k(layer: LayerShape) -> int:
    assert layer.experts is not None, "the model that is measured has experts in all layers"
    return layer.experts.top_k


def _attend_us(known: EngineCosts, layer: LayerShape, point: StepPoint) -> float:
    rows = point.num_rows // point.num_streams
    start = point.context_tokens - rows
    return point.num_streams * known.attention_us(layer.attention, start, rows)


def _experts_us(products: ProductCosts, layer: LayerShape, num_rows: int) -> float:
    """As if every choice were as likely: the model's routers are random."""
    return sum(count * products.expert_us(layer, rows) for rows, count in _spread(layer, num_rows))


def _some_experts_us(
    products: ProductCosts, layer: LayerShape, num_rows: int, num_active: float
) -> float:
    """Of a layer in which so many were chosen, which may be more or fewer than usual."""
    usual = sum(count for _, count in _spread(layer, num_rows))
    return _experts_us(products, layer, num_rows) * num_active / usual


def _spread(layer: LayerShape, num_rows: int) -> list[tuple[int, float]]:
    experts = layer.experts
    assert experts is not None, "the model that is measured has experts in all layers"
    return rows_at_random(num_rows, experts.spec.num_experts, experts.top_k)


def _sum(parts: dict[str, Figure]) -> float:
    return sum(figure.value for figure in parts.values())


def _value(point: StepPoint, part: str) -> float:
    figure = point.layer_us.get(part)
    return 0.0 if figure is None else figure.value


def rebased(
    figures: StepFigures, model: ModelShape, before: ProductCosts, after: ProductCosts
) -> StepFigures:
    """The steps as they would be measured if products took other times: what the engine adds to
    them stays as it is."""
    layer = model.layers[0]

    def more_us(costs: Callable[[ProductCosts], float]) -> float:
        return costs(after) - costs(before)

    def router_us(rows: int) -> float:
        return more_us(lambda costs: costs.router_us(layer, rows))

    def step(point: StepPoint) -> StepPoint:
        rows = point.num_rows
        head = more_us(lambda costs: costs.head_us(point.num_streams))
        attention = more_us(lambda costs: costs.attention_us(layer, rows))
        experts = more_us(lambda costs: costs.start_us + _experts_us(costs, layer, rows))
        return structs.replace(
            point,
            once_us=_with_more(point.once_us, {"head and sampler": head}),
            layer_us=_with_more(
                point.layer_us,
                {"attention": attention, "feed forward": experts + router_us(rows)},
            ),
        )

    def tier(point: TierPoint) -> TierPoint:
        rows, starts = point.num_rows, max(1.0, point.num_groups - 1)
        experts = more_us(
            lambda costs: (
                starts * costs.start_us + _some_experts_us(costs, layer, rows, point.num_active)
            )
        )
        router = router_us(rows)
        changed = {"experts": experts, "books": router, "layer": experts + router}
        return structs.replace(point, us=_with_more(point.us, changed))

    return structs.replace(
        figures,
        steps=[step(point) for point in figures.steps],
        tier=[tier(point) for point in figures.tier],
    )


def _with_more(parts: dict[str, Figure], more_us: dict[str, float]) -> dict[str, Figure]:
    return {
        name: structs.replace(figure, value=max(0.0, figure.value + more_us.get(name, 0.0)))
        for name, figure in parts.items()
    }
