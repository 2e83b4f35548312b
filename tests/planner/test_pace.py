"""Steps are timed by a clock that runs as the machine computes."""

from __future__ import annotations

from statistics import median

import pytest

from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackFormat
from moeserve.experts.schedule.curve import Curve
from moeserve.planner.pace import Pace
from moeserve.planner.product_figures import ProductPool
from moeserve.planner.step_figures import _Kind, _point, _Step


def test_a_step_is_as_long_as_on_the_machine_that_was_calibrated() -> None:
    step = _Step({"commit": 30.0}, {"attention": 12.0, "feed forward": 60.0}, [])
    here = step.faster(1.5)
    assert here.once_us == pytest.approx({"commit": 20.0})
    assert here.layer_us == pytest.approx({"attention": 8.0, "feed forward": 40.0})


def test_steps_of_one_kind_are_as_of_a_machine_at_their_pace() -> None:
    parts = ("schedule", "inputs", "commit", "head and sampler")
    step = _Step(dict.fromkeys(parts, 30.0), {"attention": 12.0, "feed forward": 60.0}, [])
    point = _point(False, _Kind(1, 4, 16, [step, step], slower=1.5))
    assert {name: figure.value for name, figure in point.once_us.items()} == pytest.approx(
        dict.fromkeys(parts, 20.0)
    )
    assert point.layer_us["feed forward"].value == pytest.approx(40.0)


def test_the_pace_is_that_of_products_now_over_those_of_then() -> None:
    pool = ProductPool(NativeRuntime(1), PackFormat("int8"), (32, 64), 1 << 16)
    now = [pool.ps(4) for _ in range(50)]
    fast, slow = (Pace(pool, Curve([1, 8], [ps, ps])) for ps in (min(now) / 2, 1e3 * max(now)))
    assert min(fast.slower(4)) > 1
    assert median(slow.slower(4)) < 1
