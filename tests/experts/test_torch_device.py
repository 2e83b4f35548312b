"""A device tier through torch, here on the CPU: any order of copies, placements and slots gives the
experts' sums, and a slot is read only while it holds what it is read for."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.cache.expert_cache import ExpertCache, ExpertState, LayerSlots, Load, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, ExpertSpec, Placement, Routing
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.cpu_costs import ROWS
from moeserve.experts.device import torch_experts
from moeserve.experts.device.device_costs import measure_device
from moeserve.experts.device.torch_device import TorchDevice
from moeserve.experts.device.torch_experts import PairRows
from moeserve.experts.device_executor import DeviceExecutor
from moeserve.experts.device_supply import DeviceSupply
from moeserve.experts.host_side import WholeHost
from moeserve.experts.watch import Watch

LAYERS, EXPERTS = 3, 7


@dataclass
class Rig:
    backend: NativeBackend
    layers: dict[int, PackedExperts]
    device: TorchDevice
    supply: DeviceSupply
    executor: DeviceExecutor
    weights: dict[int, tuple[Tensor, ...]]  # gate_up, down and biases, float64, by layer

    def expected(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        gate_up, down, gate_up_bias, down_bias = self.weights[layer]
        total = torch.zeros(x.shape, dtype=torch.float64)
        for row, (ids, weights) in enumerate(zip(routing.ids, routing.weights, strict=True)):
            for expert, weight in zip(ids.tolist(), weights.double(), strict=True):
                hidden = gate_up[expert] @ x[row].double() + gate_up_bias[expert]
                gate, up = hidden.chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                total[row] += weight * (down[expert] @ inner + down_bias[expert])
        return total


def make_rig(rng: random.Random, generator: torch.Generator, num_slots: int) -> Rig:
    native = NativeRuntime(2)
    backend = NativeBackend(native)
    hidden, inner = rng.randint(4, 70), rng.randint(4, 70)
    spec = ExpertSpec(num_experts=EXPERTS, hidden_size=hidden, intermediate_size=inner, bias=True)
    layers, weights = {}, {}
    for layer in range(LAYERS):
        packed = PackedExperts(native.handle, spec, PackFormat("float32"))
        gate_up = torch.randn(EXPERTS, 2 * inner, hidden, generator=generator) / hidden**0.5
        down = torch.randn(EXPERTS, hidden, inner, generator=generator) / inner**0.5
        biases = (
            torch.randn(EXPERTS, 2 * inner, generator=generator),
            torch.randn(EXPERTS, hidden, generator=generator),
        )
        for expert in range(EXPERTS):
            packed.put_gate_up(expert, torch.arange(2 * inner), gate_up[expert])
            packed.put_down(expert, torch.arange(hidden), down[expert])
        packed.put_biases(*biases)
        backend.add_layer(layer, spec, packed)
        layers[layer] = packed
        weights[layer] = tuple(each.double() for each in (gate_up, down, *biases))
    sizes = dict.fromkeys(layers, EXPERTS)
    cache = ExpertCache(Tier.DEVICE, sizes, num_slots, build_policy("lru", sizes))
    watch = Watch()
    device = TorchDevice(torch.device("cpu"), num_slots, layers, WholeHost(layers), watch)
    supply = DeviceSupply(cache, device)
    return Rig(backend, layers, device, supply, DeviceExecutor(backend, device, watch), weights)


def random_routing(rng: random.Random, generator: torch.Generator) -> Routing:
    num_rows, top_k = rng.randint(1, 9), rng.randint(1, EXPERTS)
    ids = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(num_rows)]
    )
    return Routing(ids, torch.rand(num_rows, top_k, generator=generator))


def random_placement(rng: random.Random, rig: Rig, layer: int, routing: Routing) -> Placement:
    """Anything that is allowed: what is ready may run anywhere, what is not may be fetched."""
    cache = rig.supply.cache
    on_device, fetch, on_cpu = [], [], []
    for expert in sorted(set(routing.ids.flatten().tolist())):
        state = cache.state(ExpertKey(layer, expert))
        if state is ExpertState.READY and rng.random() < 0.7:
            on_device.append(expert)
        elif state is not ExpertState.READY and rng.random() < 0.6:
            fetch.append(expert)
        else:
            on_cpu.append(expert)
    kept = Placement(layer, on_device=tuple(on_device), on_cpu=tuple(on_cpu))
    room = cache.num_obtainable(kept)
    absent = [e for e in fetch if cache.state(ExpertKey(layer, e)) is ExpertState.ABSENT]
    left = set(absent[max(0, room - (len(fetch) - len(absent))) :])
    return Placement(
        layer,
        on_device=tuple(on_device),
        fetch_first=tuple(e for e in fetch if e not in left),
        on_cpu=(*on_cpu, *left),
    )


def test_sums_are_the_experts_whatever_stands_where() -> None:
    rng, generator = fresh_generators()
    for _ in range(6):
        num_slots = rng.randint(1, LAYERS * EXPERTS)
        rig = make_rig(rng, generator, num_slots)
        cache = rig.supply.cache
        hidden = rig.layers[0].spec.hidden_size
        for step in range(25):
            layer = step % LAYERS
            if rng.random() < 0.5:
                keys = [ExpertKey(rng.randrange(LAYERS), rng.randrange(EXPERTS)) for _ in range(3)]
                rig.supply.prefetch(cache.prefetch(list(dict.fromkeys(keys))))
            if rng.random() < 0.2:
                rig.supply.let_go()
            if rng.random() < 0.1:
                rig.supply.resize(rng.randint(1, LAYERS * EXPERTS))
            routing = random_routing(rng, generator)
            x = torch.randn(len(routing.ids), hidden, generator=generator)
            rig.supply.collect()
            placement = random_placement(rng, rig, layer, routing)
            with rig.supply.acquire(placement) as supplied:
                found = rig.executor.run(x, routing, placement, supplied)
            expected = rig.expected(layer, x, routing)
            scale = float(expected.abs().max())
            assert float((found.double() - expected).abs().max()) < 2e-5 * scale
            rig.supply.check_integrity()
        rig.supply.close()
        rig.backend.close()


def test_a_slot_is_read_only_for_what_it_holds() -> None:
    rng, generator = fresh_generators()
    rig = make_rig(rng, generator, EXPERTS)
    with rig.supply.acquire(Placement(0, fetch_first=(1, 2))) as supplied:
        list(supplied.groups)
    while rig.supply.wait_for_copy():
        pass
    first, second = (rig.supply.cache.slots(0).slots[e] for e in (1, 2))
    routing = Routing(torch.tensor([[1, 2]]), torch.ones(1, 2))
    x = torch.randn(1, rig.layers[0].spec.hidden_size)
    swapped = tuple({1: second, 2: first}.get(e, -1) for e in range(EXPERTS))
    work = rig.device.begin(0, x, routing)
    with pytest.raises(AssertionError, match="is read for"):
        work.submit([1, 2], LayerSlots(0, swapped, 99))
    # and not while it is written again
    rig.device.prefetch([Load(ExpertKey(1, 0), first)])
    slots = rig.supply.cache.slots(0)
    with pytest.raises(AssertionError, match="is read for"):
        rig.device.begin(0, x, routing).submit([1], slots)
    rig.supply.close()


def test_the_same_bits_whatever_the_order_and_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums do not depend on when copies arrive: what each choice gave is kept apart to the end."""
    rng, generator = fresh_generators()
    rig = make_rig(rng, generator, LAYERS * EXPERTS)
    with rig.supply.acquire(Placement(0, fetch_first=tuple(range(EXPERTS)))) as supplied:
        list(supplied.groups)
    while rig.supply.wait_for_copy():
        pass
    slots = rig.supply.cache.slots(0)
    routing = random_routing(rng, generator)
    x = torch.randn(len(routing.ids), rig.layers[0].spec.hidden_size, generator=generator)
    found = []
    for _ in range(4):
        order = list(range(EXPERTS))
        rng.shuffle(order)
        work = rig.device.begin(0, x, routing)
        cut = rng.randint(0, EXPERTS)
        work.submit(order[:cut], slots)
        work.submit(order[cut:], slots)
        found.append(work.total())
    scale = float(found[0].abs().max())
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) <= 1e-6 * scale
    monkeypatch.setattr(torch_experts, "UNPACKED_BYTES", 1)  # one expert at a time
    alone = []
    for _ in range(2):
        order = list(range(EXPERTS))
        rng.shuffle(order)
        work = rig.device.begin(0, x, routing)
        work.submit(order, slots)
        alone.append(work.total())
    assert torch.equal(alone[0], alone[1])
    rig.supply.close()


def test_pairs_of_a_batch_are_those_that_chose_the_expert() -> None:
    rng, generator = fresh_generators()
    for _ in range(50):
        routing = random_routing(rng, generator)
        rows = PairRows(routing, EXPERTS)
        wanted = rng.sample(range(EXPERTS), rng.randint(0, EXPERTS))
        ids = routing.ids.flatten()
        seen: dict[int, list[int]] = {}
        for batch, pairs in rows.batches(wanted, rng.randint(1, EXPERTS)):
            for expert, own in zip(batch, pairs.tolist(), strict=True):
                assert expert not in seen
                seen[expert] = [pair for pair in own if pair < rows.num_pairs]
        chosen = {e: np.flatnonzero(ids == e).tolist() for e in wanted}
        assert seen == {e: pairs for e, pairs in chosen.items() if pairs}


def test_costs_are_measured_with_any_number_of_slots() -> None:
    rng, generator = fresh_generators()
    for num_slots in (1, 2, 30):
        rig = make_rig(rng, generator, num_slots)
        hidden = rig.layers[0].spec.hidden_size
        found = measure_device(rig.device, 0, hidden, torch.float32)
        assert len(found.one_more_us) == len(ROWS)
        assert found.copy_us > 0
        assert found.record_bytes == rig.layers[0].record_bytes
        rig.supply.close()


def test_the_link_counts_what_it_moves() -> None:
    rng, generator = fresh_generators()
    rig = make_rig(rng, generator, EXPERTS)
    rig.supply.prefetch(rig.supply.cache.prefetch([ExpertKey(0, 0), ExpertKey(1, 3)]))
    while rig.supply.wait_for_copy():
        pass
    with rig.supply.acquire(Placement(2, fetch_first=(4,))) as supplied:
        list(supplied.groups)
    while rig.supply.wait_for_copy():
        pass
    stats = rig.device.link_stats()
    record_bytes = rig.layers[0].record_bytes
    assert stats.prefetch_bytes == 2 * record_bytes
    assert stats.demand_bytes == record_bytes
    assert stats.layers[2].demand_bytes == record_bytes
    assert rig.device.link_busy_s() > 0
    assert rig.device.copying() == set()
    rig.supply.close()
