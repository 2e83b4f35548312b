"""Traces are read as they are written, and refused with the field and the fix."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.routing_samples import topical_trace

from moeserve.cache.routing_trace import Request, check_for_model, load_trace
from moeserve.core import MoeserveError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "routing"


def arrays(**changes: Any) -> dict[str, Any]:
    trace = topical_trace(random.randrange(2**32), num_tokens=9)
    found = {
        "ids": trace.ids.astype(np.uint8),
        "probs": trace.weights.astype(np.float16),
        "lens": np.array([4, 5]),
        "layers": np.array([2, 3, 4], np.int32),
    }
    found |= changes
    return {name: value for name, value in found.items() if value is not None}


def save(path: Path, content: dict[str, Any]) -> Path:
    np.savez(path, **content)
    return path


def test_as_recorded(tmp_path: Path) -> None:
    content = arrays()
    trace = load_trace(save(tmp_path / "a.npz", content), num_experts=12)
    assert np.array_equal(trace.ids, content["ids"])
    assert np.array_equal(trace.weights, content["probs"].astype(np.float32))
    assert trace.requests == (Request(0, 4, ""), Request(4, 5, ""))
    assert trace.layers == (2, 3, 4)
    assert trace.experts_per_layer == {2: 12, 3: 12, 4: 12}


def test_several_in_one_file(tmp_path: Path) -> None:
    one, two = arrays(), arrays()
    content = {
        f"a_{to}": one[name] for name, to in (("ids", "ids"), ("probs", "w"), ("lens", "lens"))
    }
    content |= {
        f"b_{to}": two[name] for name, to in (("ids", "ids"), ("probs", "w"), ("lens", "lens"))
    }
    trace = load_trace(save(tmp_path / "a.npz", content), num_experts=12)
    assert np.array_equal(trace.ids, np.concatenate([one["ids"], two["ids"]]))
    assert [(r.start, r.group) for r in trace.requests] == [(0, "a"), (4, "a"), (9, "b"), (13, "b")]


def test_requests_beside_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", arrays(lens=None))
    listed = [{"offset": 0, "length": 3, "category": "x"}, {"offset": 3, "length": 6}]
    (tmp_path / "a.json").write_text(json.dumps(listed))
    assert load_trace(path).requests == (Request(0, 3, "x"), Request(3, 6, ""))
    (tmp_path / "a.json").write_text(json.dumps([{"offset": 5, "length": 5}]))
    with pytest.raises(MoeserveError, match="requests: one reaches beyond the 9 tokens"):
        load_trace(path)
    (tmp_path / "a.json").write_text("{}]")
    with pytest.raises(MoeserveError, match="requests: expected a list"):
        load_trace(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "ids: missing"),
        ({"probs": None}, "probs: missing"),
        ({"lens": None}, "lens: missing, and there is no a.json"),
        ({"ids": np.zeros((9, 9), np.uint8)}, "ids: uint8 .*expected integers"),
        ({"ids": np.zeros((9, 3, 3), np.float32)}, "ids: float32 .*expected integers"),
        ({"ids": np.zeros((9, 3, 3), np.uint8)}, "ids: a token takes the same expert twice"),
        ({"ids": np.full((9, 3, 1), 12), "probs": np.ones((9, 3, 1))}, "ids: 12; allowed: 0 to 11"),
        ({"ids": np.full((9, 3, 1), -1), "probs": np.ones((9, 3, 1))}, "ids: -1; allowed"),
        ({"probs": np.ones((9, 3, 2), np.float16)}, "probs: float16 .*expected"),
        ({"probs": np.full((9, 3, 3), np.nan)}, "probs: values that are negative or no numbers"),
        ({"lens": np.array([4, 4])}, "lens: sum to 8, the trace has 9"),
        ({"lens": np.array([0, 9])}, "lens: 0; allowed: 1 or more"),
        ({"lens": np.array([-1, 10])}, "lens: -1; allowed: 1 or more"),
        ({"lens": np.array([[9]])}, r"lens: int64 \(1, 1\); expected integers"),
        ({"lens": np.array([9.0])}, "lens: float64 .*expected integers"),
        ({"lens": np.array(["nine"])}, "lens: <U4 .*expected integers"),
        ({"layers": np.arange(2)}, "layers: .* for 3 layers of ids"),
        ({"layers": np.array(["a", "b", "c"])}, "layers: <U1 .* for 3 layers of ids"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "a.npz", arrays(**changes))
    with pytest.raises(MoeserveError, match=message) as caught:
        load_trace(path, num_experts=12)
    assert caught.value.field is not None
    assert caught.value.hint is not None


@pytest.mark.parametrize("bad", [-1, 1 << 40])
def test_ids_that_no_model_has(tmp_path: Path, bad: int) -> None:
    """Nobody said how many experts there are: the ids do, within reason."""
    ids = np.full((9, 3, 1), bad)
    path = save(tmp_path / "a.npz", arrays(ids=ids, probs=np.ones((9, 3, 1))))
    with pytest.raises(MoeserveError, match=rf"ids: {bad}; allowed: 0 to \d+"):
        load_trace(path)


def test_no_trace_at_all(tmp_path: Path) -> None:
    with pytest.raises(MoeserveError, match=r"none.npz: trace: cannot be read"):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(MoeserveError, match=r"text.npz: trace: cannot be read"):
        load_trace(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(MoeserveError, match=r"one.npy: trace: cannot be read"):
        load_trace(tmp_path / "one.npy")


def test_of_another_model() -> None:
    trace = topical_trace(random.randrange(2**32), num_tokens=5)
    check_for_model(trace, {2: 12, 3: 12, 4: 12}, top_k=3)
    for num_experts, top_k in (({2: 12}, 3), ({2: 8, 3: 8, 4: 8}, 3), ({2: 12, 3: 12, 4: 12}, 2)):
        with pytest.raises(
            MoeserveError, match="3 MoE layers of 12 experts, 3 per token; the model"
        ):
            check_for_model(trace, num_experts, top_k)


@pytest.mark.parametrize(
    ("name", "shape", "experts", "requests"),
    [
        ("gptoss20b_decode", (61386, 24, 4), 32, 222),
        ("deepseekv2lite_prefill", (16701, 26, 6), 64, 140),
    ],
)
def test_real_traces(name: str, shape: tuple[int, ...], experts: int, requests: int) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    trace = load_trace(path)
    assert (trace.ids.shape, trace.num_experts, len(trace.requests)) == (shape, experts, requests)
