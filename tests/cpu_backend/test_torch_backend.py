"""The torch backend: jobs, tickets, threads. That its sums are right: tests/experts."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from support.randomness import fresh_generators

from moeserve.core import ExpertSpec, ExpertWeights, ModelError, Routing
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.torch_backend import TorchBackend

SPEC = ExpertSpec(num_experts=6, hidden_size=32, intermediate_size=64)


def random_weights(generator: torch.Generator) -> ExpertWeights:
    gate_up = torch.randn(6, 128, 32, generator=generator) / 6
    return ExpertWeights(gate_up, torch.randn(6, 32, 64, generator=generator) / 8)


def random_job(layer: int, num_tokens: int, generator: torch.Generator) -> ExpertJob:
    scores = torch.rand(num_tokens, 6, generator=generator)
    weights, ids = scores.topk(3)
    x = torch.randn(num_tokens, 32, generator=generator)
    return ExpertJob(layer, x, Routing(ids, weights))


@pytest.fixture
def backend() -> Iterator[TorchBackend]:
    backend = TorchBackend()
    yield backend
    backend.close()


def test_many_submitted_jobs_give_what_run_gives(backend: TorchBackend) -> None:
    _, generator = fresh_generators()
    for layer in (3, 5):
        backend.add_layer(layer, SPEC, random_weights(generator))
    jobs = [random_job(3 + 2 * (i % 2), 1 + i % 7, generator) for i in range(40)]
    tickets = [backend.submit(job) for job in jobs]
    for job, ticket in zip(jobs, tickets, strict=True):
        assert torch.equal(ticket.wait(), backend.run(job))
        assert ticket.done()


def test_submit_returns_before_the_job_ends(backend: TorchBackend) -> None:
    """A layer whose activation waits for us: only a submit that does not wait lets us go on."""
    _, generator = fresh_generators()
    backend.add_layer(0, SPEC, random_weights(generator))
    entered, go_on = threading.Event(), threading.Event()
    layer = backend._layers[0]

    def held(gate_up: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert go_on.wait(120)
        return layer.activation(gate_up)

    backend._layers[0] = type(layer)(layer.spec, held, layer.experts)
    ticket = backend.submit(random_job(0, 2, generator))
    assert entered.wait(120)
    assert not ticket.done()
    go_on.set()
    assert ticket.wait().shape == (2, 32)


def test_parts_add_up(backend: TorchBackend) -> None:
    _, generator = fresh_generators()
    backend.add_layer(0, SPEC, random_weights(generator))
    job = random_job(0, 33, generator)
    parts = [
        backend.run(ExpertJob(0, job.x, job.routing, experts)) for experts in ((0, 4), (1, 2, 3, 5))
    ]
    torch.testing.assert_close(parts[0] + parts[1], backend.run(job))
    nothing = backend.run(ExpertJob(0, job.x, job.routing, ()))
    assert torch.equal(nothing, torch.zeros(33, 32))


def test_wait_raises_what_the_job_raised(backend: TorchBackend) -> None:
    _, generator = fresh_generators()
    backend.add_layer(0, SPEC, random_weights(generator))
    ticket = backend.submit(random_job(1, 2, generator))  # layer 1 is unknown
    with pytest.raises(KeyError):
        ticket.wait()
    assert backend.submit(random_job(0, 2, generator)).wait().shape == (2, 32)


def test_a_layer_is_added_once(backend: TorchBackend) -> None:
    _, generator = fresh_generators()
    backend.add_layer(0, SPEC, random_weights(generator))
    with pytest.raises(ModelError, match="layer 0"):
        backend.add_layer(0, SPEC, random_weights(generator))


def test_close_ends_the_thread_after_its_jobs() -> None:
    _, generator = fresh_generators()
    before = threading.active_count()
    backend = TorchBackend()
    assert threading.active_count() == before, "a thread before the first job"
    backend.add_layer(0, SPEC, random_weights(generator))
    ticket = backend.submit(random_job(0, 200, generator))
    backend.close()
    assert ticket.done()
    backend.close()
    assert threading.active_count() == before
