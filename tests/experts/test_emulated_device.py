"""The parts of an emulated device against a step-by-step oracle, and orders that must not be."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.randomness import fresh_generators, fresh_seed

from moeserve.cache.expert_cache import CacheError, ExpertCache, LayerSlots, Load, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, ExpertSpec, Placement, Routing
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.device.clock import ModelledClock, RealCpuClock
from moeserve.experts.device.emulated_link import EmulatedLink, Written
from moeserve.experts.device.slot_guard import SlotConflict, SlotGuard
from moeserve.experts.device_supply import DeviceSupply
from moeserve.experts.device_tier import emulated_device
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve

#: begins or ends, slot, microseconds
Event = tuple[str, int, float]
SPEC = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32)
#: a copy takes 10 us, an expert on the device 3 us after a start of 2 us, on the CPU 7 us
COSTS = CostModel(
    expert_bytes=1000,
    cpu=Curve([1], [7.0]),
    cpu_start_us=0.0,
    device=Curve([1], [3.0]),
    device_start_us=2.0,
    link=Curve([1], [10.0]),
)


def key(expert: int) -> ExpertKey:
    return ExpertKey(0, expert)


@dataclass
class Rig:
    """Four experts of one layer, two slots."""

    backend: NativeBackend
    supply: DeviceSupply
    job: ExpertJob

    def submit(self, placement: Placement, slots: LayerSlots) -> None:
        parts = self.backend.in_parts(self.job)
        experts = placement.on_device + placement.fetch_first
        self.supply.device.submit(parts, np.ones(4, np.int64), experts, slots)

    def bring(self, *experts: int) -> None:
        """Into the slots, and waits."""
        with self.supply.acquire(Placement(0, fetch_first=experts)):
            clock = self.supply.device.clock
            clock.wait_until(clock.now_us() + 1000)


@pytest.fixture
def rig() -> Rig:
    _, generator = fresh_generators()
    native = NativeRuntime(1)
    packed = PackedExperts(native.handle, SPEC, PackFormat("float32"))
    for expert in range(4):
        packed.put_gate_up(expert, torch.arange(64), torch.randn(64, 32, generator=generator))
        packed.put_down(expert, torch.arange(32), torch.randn(32, 32, generator=generator))
    backend = NativeBackend(native)
    backend.add_layer(0, SPEC, packed)
    cache = ExpertCache(Tier.DEVICE, {0: 4}, 2, build_policy("lru", {0: 4}))
    device = emulated_device(ModelledClock(0.0), {0: packed}, {0: COSTS}, 2)
    routing = Routing(torch.arange(4)[None], torch.full((1, 4), 0.25))
    job = ExpertJob(0, torch.randn(1, 32, generator=generator), routing)
    return Rig(backend, DeviceSupply(cache, device), job)


def test_work_waits_for_what_it_needs(rig: Rig) -> None:
    device = rig.supply.device
    rig.bring(0)
    assert device.clock.now_us() == 1000
    placement = Placement(0, on_device=(0,), fetch_first=(1,), on_cpu=(2, 3))
    with rig.supply.acquire(placement) as supplied:
        rig.submit(placement, supplied.slots)
        assert not device.is_idle()
        device.wait(0)
    # expert 0 runs from 1002 to 1005, expert 1 arrives at 1010 and runs to 1013
    assert device.clock.now_us() == 1013
    assert device.busy_us == 2 + 3 + 3
    rig.supply.check_integrity()


def test_bits_are_those_of_the_cpu(rig: Rig) -> None:
    expected = rig.backend.run(rig.job)
    placement = Placement(0, fetch_first=(3, 1), on_cpu=(0, 2))
    parts = rig.backend.in_parts(rig.job)
    with rig.supply.acquire(placement) as supplied:
        for group in supplied.groups:
            on_device = [e for e in group if e in placement.fetch_first]
            rig.supply.device.submit(parts, np.ones(4, np.int64), on_device, supplied.slots)
            parts.add([e for e in group if e in placement.on_cpu])
        rig.supply.device.wait(0)
    assert torch.equal(parts.total(), expected)


def test_a_slot_is_not_written_while_it_is_read(rig: Rig) -> None:
    """The device has work on a slot to do; a copy into it begins before that is done."""
    rig.bring(0, 1)
    placement = Placement(0, on_device=(0, 1))
    slots = rig.supply.cache.slots(0)
    rig.submit(placement, slots)  # until 1008 us, and nobody waits
    with pytest.raises(SlotConflict, match=r"is written .* while .*expert=0\) is read"):
        rig.supply.device.demand([Load(key(2), slots.slots[0])])


def test_a_lease_holds_slots_until_their_last_reader_is_done(rig: Rig) -> None:
    """The same through the cache: it gives no slot away before the device's event."""
    rig.bring(0, 1)
    placement = Placement(0, on_device=(0, 1))
    with rig.supply.acquire(placement) as supplied:
        rig.submit(placement, supplied.slots)
    with (
        pytest.raises(CacheError, match="0 of 2 slots can be had"),
        rig.supply.acquire(Placement(0, fetch_first=(2,))),
    ):
        pass
    rig.supply.device.wait(0)
    rig.bring(2)
    assert 2 in rig.supply.cache.residency(0).ready


def test_a_slot_is_not_read_while_it_is_written(rig: Rig) -> None:
    loads = rig.supply.cache.prefetch([key(0)])
    rig.supply.prefetch(loads)
    slots = rig.supply.cache.slots(0)
    with pytest.raises(SlotConflict, match="holds nothing"):  # the copy has not begun
        rig.submit(Placement(0, on_device=(0,)), slots)
    rig.supply.device.clock.wait_until(4.0)
    rig.supply.collect()
    with pytest.raises(SlotConflict, match="written until inf"):
        rig.submit(Placement(0, on_device=(0,)), slots)
    rig.supply.device.clock.wait_until(10.0)
    rig.supply.collect()
    rig.submit(Placement(0, on_device=(0,)), slots)


def test_a_slot_is_not_read_for_another_expert(rig: Rig) -> None:
    rig.bring(0, 1)
    first, second, *_ = rig.supply.cache.slots(0).slots
    swapped = LayerSlots(0, (second, first, -1, -1), 99)
    with pytest.raises(SlotConflict, match="and holds"):
        rig.submit(Placement(0, on_device=(0,)), swapped)


def test_the_end_of_a_write_that_never_began() -> None:
    with pytest.raises(SlotConflict, match="where nothing is written"):
        SlotGuard().write_ends(0, key(0), 5.0)


def note(what: str, events: list[Event]) -> Written:
    return lambda load, us: events.append((what, load.slot, us))


def test_link_moves_as_it_does_tick_by_tick() -> None:
    """Whole microseconds, one at a time: the first demand moves, or else the first prefetch."""
    rng = random.Random(fresh_seed())
    for _ in range(200):
        written: list[Event] = []
        link = EmulatedLink(note("begins", written), note("ends", written))
        demands: dict[int, int] = {}
        prefetches: dict[int, int] = {}
        lengths: dict[int, int] = {}
        expected: list[Event] = []
        arrived: dict[int, int] = {}
        slot = 0
        for now in range(60):
            for _ in range(rng.choice((0, 0, 0, 1, 2))):
                us, urgent = rng.randint(1, 9), rng.random() < 0.5
                lengths[slot] = us
                load = Load(key(slot), slot)
                if urgent:
                    demands[slot] = us
                    link.demand(load, 1, us, now)
                else:
                    prefetches[slot] = us
                    link.advance(now)
                    link.prefetch(load, 1, us)
                slot += 1
            if prefetches and rng.random() < 0.1:
                promoted = rng.choice(list(prefetches))
                demands[promoted] = prefetches.pop(promoted)
                link.promote(key(promoted), now)
            told = {load.slot for load in link.finished(now)}
            assert told == {s for s, us in arrived.items() if us <= now}
            arrived = {s: us for s, us in arrived.items() if us > now}
            queue = demands or prefetches
            if queue:
                first = next(iter(queue))
                if queue[first] == lengths[first]:
                    expected.append(("begins", first, now))
                queue[first] -= 1
                if not queue[first]:
                    del queue[first]
                    expected.append(("ends", first, now + 1))
                    arrived[first] = now + 1
        link.finished(60)
        # demands are written down when they are known, ahead of the clock
        assert sorted(w for w in written if w[2] < 60) == sorted(e for e in expected if e[2] < 60)


def test_a_prefetch_that_has_not_begun_can_be_called_off() -> None:
    link = EmulatedLink(lambda load, us: None, lambda load, us: None)
    for slot in range(3):
        link.prefetch(Load(key(slot), slot), 1, 10.0)
    assert link.finished(15.0) == [Load(key(0), 0)]
    assert link.cancel_prefetches() == [Load(key(2), 2)]
    assert link.left_us(0) == {1: 5.0}
    assert link.finished(20.0) == [Load(key(1), 1)]
    assert link.num_active == 0


def test_a_real_clock_leaves_out_what_the_emulation_takes() -> None:
    ticks = 5_000_000

    def read() -> int:
        return ticks

    clock = RealCpuClock(read)
    ticks += 3000
    assert clock.now_us() == pytest.approx(3)
    with clock.left_out():
        ticks += 900_000
        assert clock.now_us() == pytest.approx(3)
        with clock.left_out():
            ticks += 900_000
        assert clock.now_us() == pytest.approx(3)
    with clock.cpu_work(50.0):
        ticks += 2000
    assert clock.now_us() == pytest.approx(5)
    clock.wait_until(100.0)
    clock.wait_until(90.0)
    assert clock.now_us() == pytest.approx(100)
    ticks += 1000
    assert clock.now_us() == pytest.approx(101)


def test_a_modelled_clock_takes_the_times_of_the_model() -> None:
    clock = ModelledClock(rest_of_layer_us=40.0)
    with clock.cpu_work(7.0):
        pass
    clock.wait_until(5.0)
    assert clock.now_us() == 7
    clock.end_layer()
    assert clock.now_us() == 47


def test_waiting_for_the_next_end_gets_there_whatever_is_rounded() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(200):
        link = EmulatedLink(lambda load, us: None, lambda load, us: None)
        for expert in range(5):
            link.prefetch(Load(key(expert), expert), 1, rng.uniform(0.1, 90))
        now_us, told = rng.uniform(0, 1e6), []
        link.advance(now_us)
        while (end_us := link.next_end_us(now_us)) is not None:
            now_us += max(0.0, rng.uniform(0, end_us - now_us)) if rng.random() < 0.5 else 0.0
            link.advance(now_us)
            now_us = max(now_us, end_us)
            arrived = link.finished(now_us)
            assert arrived
            told += arrived
        assert [load.key.expert for load in told] == list(range(5))
