"""The thread pool under stress: short regions from many Python threads, right sums, no hang."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from support.native_matrices import F32, INT8, LEVELS, allocate, pack_random
from support.randomness import fresh_generators

from moeserve.cpu_backend import _native as native

Call = Callable[[native.Runtime], bool]


def calls_with_known_results(generator: torch.Generator) -> list[Call]:
    """Regions of every kind, each large enough to be shared out; True: the result is right."""
    calls: list[Call] = []
    for kind, num_rows in ((F32, 1), (F32, 40), (INT8, 7)):
        packed = pack_random(kind, 160, 130, generator)
        matrix = native.PackedMatrix(packed.layout, packed.data)
        x = torch.randn(num_rows, 130, generator=generator)
        product = packed.product(LEVELS[-1], x)

        def multiply(
            own: native.Runtime,
            matrix: native.PackedMatrix = matrix,
            x: torch.Tensor = x,
            product: torch.Tensor = product,
        ) -> bool:
            out = torch.full_like(product, torch.nan)
            matrix.run(own, x, out)
            return torch.equal(out, product)

        calls.append(multiply)

    weight = torch.randn(50, 20, generator=generator)

    def pack(own: native.Runtime) -> bool:
        layout = native.Layout(0, 50, 20)
        data, out = allocate(layout.num_bytes), torch.empty(50, 20)
        good = native.pack(own, layout, data, torch.arange(50), weight)
        native.unpack(layout, data, out)
        return good and torch.equal(out, weight)

    rows = torch.randn(90, 800, generator=generator)

    def norm(own: native.Runtime) -> bool:
        out = torch.empty_like(rows)
        native.rms_norm(own, rows, torch.ones(800), 0.0, out)
        return torch.allclose(out.square().mean(dim=1), torch.ones(90), atol=1e-4)

    return [*calls, pack, norm]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("spin_us", [0, 100])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num_callers", [1, 2, 5])
def test_many_short_regions(num_callers: int, num_threads: int, spin_us: int) -> None:
    """More threads than cores, too; without spinning every region wakes sleepers."""
    _, generator = fresh_generators()
    calls = calls_with_known_results(generator)
    own = native.Runtime(LEVELS[-1], num_threads, spin_us=spin_us)
    wrong: list[str] = []

    def work(caller: int) -> None:
        for repeat in range(200 // num_callers):
            which = (caller + repeat) % len(calls)
            if not calls[which](own):
                wrong.append(f"call {which}, caller {caller}, repeat {repeat}")

    callers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(num_callers)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(100)
    assert not any(caller.is_alive() for caller in callers), "a region hangs"
    assert not wrong


@pytest.mark.timeout(120)
def test_runtimes_come_and_go() -> None:
    """Threads that have had no work, or that are still on their way to sleep, end at once."""
    _, generator = fresh_generators()
    call = calls_with_known_results(generator)[1]
    for repeat in range(60):
        own = native.Runtime(LEVELS[-1], 1 + repeat % 5, spin_us=repeat % 3 * 50)
        assert repeat % 4 == 0 or call(own)
