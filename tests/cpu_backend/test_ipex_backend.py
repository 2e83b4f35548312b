"""The ipex backend against float64, where IPEX is installed: scripts/check_ipex.sh does that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.randomness import fresh_generators
from torch import Tensor

from moeserve import LLM
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError, ExpertSpec, ExpertWeights, ModelError, Routing
from moeserve.cpu_backend.backend import Demands, ExpertJob
from moeserve.cpu_backend.choice import choose_backend
from moeserve.cpu_backend.ipex_backend import IpexBackend, why_not_usable
from moeserve.experts.reference import reference_experts

MISSING = why_not_usable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

#: of the largest number: twice what rounding to the dtype once per product gives
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: (hidden, intermediate): one, the other, both or none a multiple of IPEX's blocks of 64
SHAPES = ((64, 32), (96, 64), (33, 17), (512, 704))


@pytest.fixture
def backend() -> Iterator[IpexBackend]:
    backend = IpexBackend()
    yield backend
    backend.close()


def random_layer(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[ExpertSpec, ExpertWeights]:
    hidden, inner = shape
    spec = ExpertSpec(num_experts=7, hidden_size=hidden, intermediate_size=inner)
    gate_up = torch.randn(7, 2 * inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(7, hidden, inner, generator=generator) / inner**0.5
    return spec, ExpertWeights(gate_up.to(dtype), down.to(dtype))


def random_job(
    num_tokens: int, hidden: int, dtype: torch.dtype, generator: torch.Generator
) -> ExpertJob:
    weights, ids = torch.rand(num_tokens, 7, generator=generator).topk(3)
    return ExpertJob(
        0, torch.randn(num_tokens, hidden, generator=generator).to(dtype), Routing(ids, weights)
    )


def assert_near(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = float((y.double() - expected.double()).abs().max() / expected.abs().max())
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_equal_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, backend: IpexBackend
) -> None:
    rng, generator = fresh_generators()
    spec, weights = random_layer(shape, dtype, generator)
    before = ExpertWeights(weights.gate_up.clone(), weights.down.clone())
    backend.add_layer(0, spec, weights)
    for num_tokens in (1, 2, rng.randint(3, 60)):
        job = random_job(num_tokens, shape[0], dtype, generator)
        y = backend.run(job)
        assert (y.shape, y.dtype) == (job.x.shape, torch.float32)
        assert_near(y, reference_experts(spec, before, job.x.double(), job.routing), dtype)
    assert torch.equal(weights.gate_up, before.gate_up), "the caller's weights were changed"
    assert torch.equal(weights.down, before.down), "the caller's weights were changed"
    empty = backend.run(random_job(0, shape[0], dtype, generator))
    assert empty.shape == (0, shape[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parts_add_up(dtype: torch.dtype, backend: IpexBackend) -> None:
    _, generator = fresh_generators()
    backend.add_layer(0, *random_layer((96, 64), dtype, generator))
    job = random_job(33, 96, dtype, generator)
    parts = [
        backend.run(ExpertJob(0, job.x, job.routing, experts))
        for experts in ((0, 4), (1, 2, 3, 5, 6))
    ]
    assert_near(parts[0] + parts[1], backend.run(job), dtype)
    nothing = backend.run(ExpertJob(0, job.x, job.routing, (), dtype))
    assert torch.equal(nothing, torch.zeros(33, 96, dtype=dtype))


def test_an_expert_left_out_is_not_computed(backend: IpexBackend) -> None:
    """Its weights are NaN: a weight of zero in the sum would not be enough."""
    _, generator = fresh_generators()
    spec, weights = random_layer((96, 64), torch.float32, generator)
    weights.down[2] = float("nan")
    backend.add_layer(0, spec, weights)
    job = random_job(20, 96, torch.float32, generator)
    assert backend.run(job).isnan().any()
    kept = tuple(expert for expert in range(7) if expert != 2)
    assert not backend.run(ExpertJob(0, job.x, job.routing, kept)).isnan().any()


def test_submitted_jobs_give_what_run_gives(backend: IpexBackend) -> None:
    _, generator = fresh_generators()
    backend.add_layer(0, *random_layer((64, 32), torch.bfloat16, generator))
    jobs = [random_job(1 + i % 5, 64, torch.bfloat16, generator) for i in range(20)]
    tickets = [backend.submit(job) for job in jobs]
    for job, ticket in zip(jobs, tickets, strict=True):
        assert torch.equal(ticket.wait(), backend.run(job))


def test_a_layer_is_added_once(backend: IpexBackend) -> None:
    _, generator = fresh_generators()
    layer = random_layer((64, 32), torch.float32, generator)
    backend.add_layer(0, *layer)
    with pytest.raises(ModelError, match="layer 0"):
        backend.add_layer(0, *layer)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_among_others_is_near_the_row_alone(
    shape: tuple[int, int],
    dtype: torch.dtype,
    backend: IpexBackend,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All rows take one expert. Prints the numbers of rows that changed a row's bits."""
    _, generator = fresh_generators()
    spec, weights = random_layer(shape, dtype, generator)
    backend.add_layer(0, spec, weights)
    x = torch.randn(64, shape[0], generator=generator).to(dtype)
    routing = Routing(torch.full((64, 1), 3), torch.ones(64, 1))
    together = backend.run(ExpertJob(0, x, routing))
    differ = []
    for rows in (*range(1, 18), 31, 32, 33, 48, 63):
        part = Routing(routing.ids[:rows], routing.weights[:rows])
        y = backend.run(ExpertJob(0, x[:rows], part))
        assert_near(y, together[:rows], dtype)
        if not torch.equal(y, together[:rows]):
            differ.append(rows)
    with capsys.disabled():
        name = str(dtype).removeprefix("torch.")
        said = f"other bits than in 64 rows for {differ} rows" if differ else "the same bits always"
        print(f"\nipex, {name}, {shape[0]} x {shape[1]}: {said}")


def test_a_model_runs_on_it() -> None:
    with LLM(dtype="float32", num_threads=1, cpu_backend="ipex") as llm:
        assert llm.info.notes["cpu_backend"] == "ipex (asked for)"
        ours = llm.generate("Once upon a time", max_tokens=16, temperature=0)[0].text
    with LLM(dtype="float32", num_threads=1, cpu_backend="torch") as llm:
        assert ours == llm.generate("Once upon a time", max_tokens=16, temperature=0)[0].text


def test_packed_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="packed or quantised weights"):
        choose_backend(ExpertConfig(cpu_backend="ipex"), Demands(torch.bfloat16, quantized=True))


PROGRAM = """
import sys, torch
from pathlib import Path
from moeserve.config import ExpertConfig
from moeserve.cpu_backend.backend import Demands
from moeserve.cpu_backend.choice import choose_backend
chosen = choose_backend(ExpertConfig(num_threads=1), Demands(torch.bfloat16), Path(sys.argv[1]))
print(chosen.reason)
print("intel_extension_for_pytorch" in sys.modules)
"""


def test_auto_measures_it_in_a_process_of_its_own(tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(times)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    (measured,) = json.loads(times.read_text())["measured"]
    assert set(measured["layer_ms"]) == {"native", "torch", "ipex"}
    assert measured["machine"]["ipex"].startswith("2.8.")
    reason, imported = done.stdout.splitlines()[-2:]
    best = reason.split(" (", 1)[0]
    assert all(f"x {name}" in reason for name in {"native", "torch", "ipex"} - {best})
    assert imported == str(best == "ipex")
