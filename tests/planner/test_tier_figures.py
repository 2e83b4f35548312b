"""Layers over the disk, read from a timeline that was written by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from math import isfinite
from typing import Any

import pytest
from msgspec import structs

from moeserve.experts.schedule.profile import Figure, TierPoint
from moeserve.planner.tier_figures import tier_layers, tier_points
from moeserve.planner.tier_fit import LayerProducts, fit_tier
from moeserve.timeline import Span

MAIN = "MainThread"


def spans(layer: int, *parts: tuple[str, float, float, dict[str, Any]]) -> list[Span]:
    """(name, from, to, details), in microseconds."""
    return [
        Span(name, details.pop("track", MAIN), start / 1e6, end / 1e6, {"layer": layer, **details})
        for name, start, end, details in parts
    ]


def reading(layer: int) -> list[Span]:
    """Two experts there, two read one after the other: computed as they come, then summed."""
    return spans(
        layer,
        ("attention", 0, 100, {}),
        ("router", 100, 110, {}),
        ("place", 110, 130, {}),
        ("acquire", 130, 200, {}),
        ("predict and prefetch", 200, 205, {}),
        ("experts", 240, 300, {"experts": (1, 2)}),
        ("read", 220, 400, {"expert": 5, "track": "expert-transfer-0"}),
        ("read", 230, 500, {"expert": 6, "track": "expert-transfer-1"}),
        ("stall", 310, 450, {"experts": [5, 6]}),
        ("experts", 460, 520, {"experts": (5,)}),
        ("experts", 530, 570, {"experts": (6,)}),
        ("experts", 580, 585, {"experts": ()}),
        ("feed forward", 205, 600, {}),
    )


def test_a_layer_that_reads_is_the_sum_of_its_parts() -> None:
    (layer,) = tier_layers(reading(3), 2, 3.5)
    assert (layer.num_rows, layer.num_active, layer.num_missing, layer.num_groups) == (2, 4, 2, 4)
    assert layer.us == pytest.approx(
        {
            "layer": 500.0,
            "experts": 165.0,
            "stall": 140.0,
            "begin": 40.0,
            "books": 155.0,
            "to read": 20.0,
            "reading": 280.0,
            "beside": 60.0 + 40.0,
            "late": 50.0,
        }
    )


def test_layers_that_are_alike_are_one_point() -> None:
    still = spans(
        0,
        ("router", 0, 10, {}),
        ("place", 10, 20, {}),
        ("acquire", 20, 30, {}),
        ("predict and prefetch", 30, 30, {}),
        ("experts", 35, 90, {"experts": None}),
        ("feed forward", 30, 100, {}),
    )
    layers = tier_layers([*still, *reading(1), *reading(2)], 2, 3.5)
    assert not tier_points(layers), "too few to say anything"
    none, two = tier_points(4 * layers)
    assert (none.num_missing, none.num_layers, none.num_active, none.num_groups) == (0, 4, 3.5, 1)
    assert not {"begin", "to read"} & none.us.keys(), "what is not ordered does not begin"
    assert none.us["books"].value == pytest.approx(45.0)
    assert (two.num_missing, two.num_layers, two.num_active, two.num_groups) == (2, 8, 4, 4)
    assert two.us["late"].value == pytest.approx(50.0)


def test_what_had_arrived_before_a_stall_is_not_late() -> None:
    parts = [span for span in reading(0) if span.name != "stall"]
    parts += spans(0, ("stall", 505, 515, {"experts": [6]}))
    (layer,) = tier_layers(parts, 2, 3.5)
    assert "late" not in layer.us


def test_a_layer_of_which_nothing_is_left_can_be_fitted() -> None:
    """Noise in a calibration, and a CPU imagined faster than that."""
    products = LayerProducts(
        numbers=8, start_us=1.0, experts_us=lambda rows, active: 5.0, other_us=lambda rows: 1.0
    )
    names = ("books", "experts", "layer", "begin", "to read", "late", "beside")
    points = [
        TierPoint(
            num_rows=rows,
            num_missing=rows,
            num_layers=3,
            num_active=2.0,
            num_groups=2.0,
            us={name: Figure(value=0.0) for name in names},
        )
        for rows in (1, 2, 4)
    ]
    found = fit_tier(points, products)
    assert isfinite(found.run_us(5.0, 8.0, 1.0))
    assert isfinite(found.begin_us(1, 1))


def test_reads_take_longer_while_something_is_computed() -> None:
    """As the layers were made: a tenth more than alone, and a third of what is computed."""
    products = LayerProducts(
        numbers=8, start_us=1.0, experts_us=lambda rows, active: 5.0, other_us=lambda rows: 1.0
    )
    rng = random.Random()

    def point(rows: int, missing: int) -> TierPoint:
        alone, beside = rng.uniform(500, 5000), rng.uniform(0, 3000)
        us = {"layer": 2 * alone, "experts": beside, "books": 50.0, "begin": 5.0, "to read": 5.0}
        us |= {"beside": beside, "alone": alone, "reading": 1.1 * alone + beside / 3}
        figures = {name: Figure(value=value) for name, value in us.items()}
        return TierPoint(
            num_rows=rows, num_missing=missing, num_layers=rng.randint(4, 40), num_active=4.0,
            num_groups=3.0, us=figures,
        )  # fmt: skip

    points = [point(rows, missing) for rows in (1, 4, 16) for missing in (1, 3, 7)]
    tier = fit_tier(points, products)
    assert tier.reads == pytest.approx([1.1, 1 / 3])
    assert tier.reading_us(1000.0, 300.0) == pytest.approx(1200.0)
    assert tier.reading_us(1000.0, 1e9) == pytest.approx(1100.0 * 4 / 3), "no longer than they take"
    assert tier.reading_us(0.0, 300.0) == 0.0
    older = [structs.replace(p, us={k: f for k, f in p.us.items() if k != "alone"}) for p in points]
    assert fit_tier(older, products).reading_us(1000.0, 300.0) == 1000.0


def test_what_reads_take_alone_is_asked_of_layers_that_read() -> None:
    (layer,) = tier_layers(reading(3), 2, 3.5)
    assert layer.beside_disk(lambda count: 70.0 * count).us == layer.us | {"alone": 140.0}
    still = replace(layer, num_missing=0)
    assert still.beside_disk(lambda count: 70.0 * count) == still


def test_a_faster_machine_reads_as_this_one() -> None:
    (layer,) = tier_layers(reading(3), 2, 3.5)
    half = layer.faster(2.0)
    for part in ("stall", "to read", "reading", "late"):
        assert half.us[part] == layer.us[part]
    for part in ("experts", "books", "begin", "beside"):
        assert half.us[part] == pytest.approx(layer.us[part] / 2)
    parts = sum(half.us[part] for part in ("experts", "stall", "begin", "books"))
    assert half.us["layer"] == pytest.approx(parts)
    assert layer.faster(1.0).us == pytest.approx(layer.us)
