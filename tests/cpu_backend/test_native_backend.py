"""Jobs that were submitted to the native backend and whose tickets nobody keeps."""

from __future__ import annotations

import gc
import weakref

import torch
from support.randomness import fresh_generators

from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime

SPEC = ExpertSpec(num_experts=4, hidden_size=256, intermediate_size=512)


def test_dropped_tickets_keep_their_memory_until_the_work_is_done() -> None:
    _, generator = fresh_generators()
    backend = NativeBackend(NativeRuntime(2))
    gate_up = torch.randn(4, 2 * 512, 256, generator=generator)
    down = torch.randn(4, 256, 512, generator=generator)
    backend.add_layer(0, SPEC, ExpertWeights(gate_up, down))
    x = torch.randn(300, 256, generator=generator)
    routing = Routing(torch.randint(4, (300, 1), generator=generator), torch.ones(300, 1))
    expected = backend.run(ExpertJob(0, x, routing))
    rows = []
    for _ in range(20):
        copy = x.clone()
        rows.append(weakref.ref(copy))
        backend.submit(ExpertJob(0, copy, routing))
        del copy
    gc.collect()
    last = backend.submit(ExpertJob(0, x, routing))
    assert torch.equal(last.wait(), expected)
    backend.close()
    gc.collect()
    assert all(ref() is None for ref in rows), "work that is done is not kept"
    backend.close()
