"""Three tiers with real files and kernels, under random operations: every layer's result has the
bits of the one computed from memory, whatever stands, is read and is copied where."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moeserve.cache.expert_cache import CacheError, ExpertCache, Residency, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.tiers.disk_store import DiskRecord, DiskStore, checksum
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.transfer import Transfers
from moeserve.chores import Chores
from moeserve.core import ExpertKey, ExpertSpec, LayerUse, Placement, Routing
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.device.clock import ModelledClock
from moeserve.experts.device.modelled_reads import ModelledReads
from moeserve.experts.device.slot_guard import SlotConflict
from moeserve.experts.device_supply import DeviceSupply, FittingPlacement
from moeserve.experts.device_tier import emulated_device
from moeserve.experts.disk_supply import DiskSupply
from moeserve.experts.host_over_disk import HostOverDisk
from moeserve.experts.hybrid_executor import HybridExecutor
from moeserve.experts.layer_use import count_use
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler
from moeserve.experts.watch import Watch

LAYERS, NUM_EXPERTS, TOP_K = (0, 2, 3), 5, 2
SPEC = ExpertSpec(num_experts=NUM_EXPERTS, hidden_size=32, intermediate_size=32)
TOTAL = len(LAYERS) * NUM_EXPERTS
KEYS = [ExpertKey(layer, e) for layer in LAYERS for e in range(NUM_EXPERTS)]
KEY = st.sampled_from(KEYS)
#: on the device 3 us, on the CPU 7 us, over the link 10.3 us, from disk 40.7 us: sums
#: that are rounded
COSTS = CostModel(
    expert_bytes=1000,
    cpu=Curve([1], [7.0]),
    cpu_start_us=1.0,
    device=Curve([1], [3.0]),
    device_start_us=2.0,
    link=Curve([1], [10.3]),
    disk=Curve([1], [40.7]),
)


class AnyPlacement(IntraLayerScheduler):
    """Puts every expert somewhere it can be."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        active = np.flatnonzero(use.rows).tolist()
        self._rng.shuffle(active)
        wishes = {e: self._rng.random() < 0.6 for e in active}
        return Placement(
            use.layer,
            on_device=tuple(e for e in active if wishes[e] and e in residency.ready),
            fetch_first=tuple(e for e in active if wishes[e] and e not in residency.ready),
            on_cpu=tuple(e for e in active if not wishes[e]),
        )


class Tiers:
    """Layers whose records are in a file, and the same layers in memory to compare with."""

    def __init__(
        self, device_slots: int, host_slots: int, policy: str, modelled: bool, directory: Path
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.generator = generator
        self.native = NativeRuntime(1)
        whole = {layer: self._packed(generator) for layer in LAYERS}
        self.whole = NativeBackend(self.native)
        self.backend = NativeBackend(self.native)
        store = DiskStore(_written(directory / "experts.bin", whole))
        record_bytes = whole[0].record_bytes
        numbers = dict.fromkeys(LAYERS, NUM_EXPERTS)
        slots = HostSlots(record_bytes, host_slots)
        host_cache = ExpertCache(Tier.HOST, numbers, host_slots, build_policy(policy, numbers))
        transfers = Transfers(store, slots.__getitem__, 2, 4096)
        chores = Chores(most=2)
        host_cache.policy.put_off = chores.put_off
        self.disk = DiskSupply(host_cache, store, slots, transfers, chores, nullcontext())
        self.clock = ModelledClock(5.0)
        if modelled:
            self.disk.read_with(
                lambda source, slot: ModelledReads(
                    source, slot, self.clock, lambda key: 40.7, Watch().timeline
                )
            )
        tiered = {layer: self._packed(None) for layer in LAYERS}
        for layer in LAYERS:
            self.whole.add_layer(layer, SPEC, whole[layer])
            self.backend.add_layer(layer, SPEC, tiered[layer])
            self.disk.add_layer(layer, tiered[layer])
        self.host = HostOverDisk(self.disk, self.clock.now_us)
        costs = dict.fromkeys(LAYERS, COSTS)
        device = emulated_device(self.clock, tiered, costs, device_slots, host=self.host)
        cache = ExpertCache(Tier.DEVICE, numbers, device_slots, build_policy(policy, numbers))
        self.supply = DeviceSupply(cache, device)
        self.executor = HybridExecutor(self.backend, device, Watch())

    def _packed(self, generator: torch.Generator | None) -> PackedExperts:
        packed = PackedExperts(self.native.handle, SPEC, PackFormat("float32"))
        packed.records[:] = 0
        if generator is not None:
            for expert in range(NUM_EXPERTS):
                gate_up = torch.randn(64, 32, generator=generator)
                packed.put_gate_up(expert, torch.arange(64), gate_up)
                packed.put_down(expert, torch.arange(32), torch.randn(32, 32, generator=generator))
        return packed

    def step(self, layer: int, num_rows: int, intra: IntraLayerScheduler) -> None:
        """One layer, as `MoELayer.forward` has it, compared with the same from memory."""
        x = torch.randn(num_rows, 32, generator=self.generator)
        scores = torch.rand(num_rows, NUM_EXPERTS, generator=self.generator)
        weights, ids = scores.topk(TOP_K)
        routing = Routing(ids, weights)
        self.supply.collect()
        use = count_use(layer, routing, NUM_EXPERTS)
        placement = intra.place(use, self.supply.cache.residency(layer))
        self.supply.observe(use, placement)
        with self.supply.acquire(placement) as supplied:
            found = self.executor.run(x, routing, placement, supplied)
        expected = self.whole.run(ExpertJob(layer, x, routing, out_dtype=x.dtype))
        assert torch.equal(found, expected)

    def close(self) -> None:
        self.supply.close()


def _written(path: Path, layers: dict[int, PackedExperts]) -> dict[ExpertKey, DiskRecord]:
    records: dict[ExpertKey, DiskRecord] = {}
    with path.open("wb") as file:
        for key in KEYS:
            content = layers[key.layer].records[key.expert].tobytes()
            digest = checksum(memoryview(content))
            records[key] = DiskRecord(path, file.tell(), len(content), digest)
            file.write(content)
    return records


@contextmanager
def tiers(
    device_slots: int, host_slots: int, policy: str = "lru", modelled: bool = True
) -> Iterator[Tiers]:
    with TemporaryDirectory() as directory:
        made = Tiers(device_slots, host_slots, policy, modelled, Path(directory))
        try:
            yield made
        finally:
            made.close()


class TiersMachine(RuleBasedStateMachine):
    @initialize(
        device_slots=st.integers(1, TOTAL),
        host_slots=st.integers(2, TOTAL),
        policy=st.sampled_from(["lru", "score"]),
        modelled=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def begin(
        self, device_slots: int, host_slots: int, policy: str, modelled: bool, seed: int
    ) -> None:
        self.context = tiers(device_slots, host_slots, policy, modelled)
        self.tiers = self.context.__enter__()
        self.supply, self.disk = self.tiers.supply, self.tiers.disk
        self.intra = FittingPlacement(AnyPlacement(random.Random(seed)), self.supply.cache)

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)

    @rule(layer=st.sampled_from(LAYERS), num_rows=st.integers(1, 6))
    def step(self, layer: int, num_rows: int) -> None:
        self.tiers.step(layer, num_rows, self.intra)

    @rule(keys=st.lists(KEY, max_size=4))
    def prefetch_to_device(self, keys: list[ExpertKey]) -> None:
        ready = [key for key in keys if self.tiers.host.is_ready(key)]
        self.supply.prefetch(self.supply.cache.prefetch(ready))

    @rule(keys=st.lists(KEY, max_size=4))
    def prefetch_to_host(self, keys: list[ExpertKey]) -> None:
        self.disk.begin_prefetch(self.disk.cache.prefetch(keys))

    @rule(num_slots=st.integers(1, TOTAL))
    def resize_device(self, num_slots: int) -> None:
        self.supply.resize(num_slots)

    @rule(num_slots=st.integers(2, TOTAL), settle=st.booleans())
    def resize_host(self, num_slots: int, settle: bool) -> None:
        self.disk.resize(num_slots)
        if settle:
            self.disk.settle()
            assert not self.disk.cache.num_owed

    @rule(us=st.floats(0, 100))
    def time_passes(self, us: float) -> None:
        self.tiers.clock.wait_until(self.tiers.clock.now_us() + us)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "supply"):
            self.supply.check_integrity()


TiersMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestTiersMachine = TiersMachine.TestCase


def brought(made: Tiers, *keys: ExpertKey) -> None:
    """Into host slots, and waits."""
    made.disk.begin_prefetch(made.disk.cache.prefetch(keys))
    made.clock.wait_until(made.clock.now_us() + 1000)
    made.supply.collect()


def test_a_host_slot_is_not_given_away_while_a_copy_reads_it() -> None:
    with tiers(device_slots=2, host_slots=2) as made:
        brought(made, KEYS[0])
        made.supply.prefetch(made.supply.cache.prefetch([KEYS[0]]))
        with pytest.raises(CacheError, match="or in use"):
            made.disk.cache.evict(KEYS[0])
        made.clock.wait_until(made.clock.now_us() + 10.4)
        made.supply.collect()
        made.disk.cache.evict(KEYS[0])
        assert made.supply.cache.residency(0).ready == {0}


def test_overwriting_a_host_slot_that_a_copy_reads_raises() -> None:
    """A mistake made on purpose: the pin of a copy that is under way is taken away."""
    with tiers(device_slots=2, host_slots=2) as made:
        brought(made, KEYS[0])
        slot = made.disk.cache.slots(0).slots[0]
        made.supply.prefetch(made.supply.cache.prefetch([KEYS[0]]))
        made.clock.wait_until(made.clock.now_us() + 4)  # of 10.3
        made.supply.collect()
        made.host.unpin(KEYS[0])
        made.disk.cache.evict(KEYS[0])
        loads = made.disk.cache.prefetch(KEYS[1:3])
        assert slot in {load.slot for load in loads}
        with pytest.raises(SlotConflict, match=r"is written .* while .*expert=0\) is read"):
            made.disk.begin_prefetch(loads)


def test_copying_what_has_not_been_read_yet_raises() -> None:
    """And another: a copy is ordered of a record that is still being read."""
    with tiers(device_slots=2, host_slots=2) as made:
        (load,) = made.disk.cache.prefetch([KEYS[0]])
        made.disk.begin_prefetch((load,))
        made.disk.cache.complete(KEYS[0])
        made.supply.prefetch(made.supply.cache.prefetch([KEYS[0]]))
        made.clock.wait_until(4)
        with pytest.raises(SlotConflict, match="written until inf"):
            made.supply.collect()


class OnDevice(IntraLayerScheduler):
    """Everything runs there."""

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        active = np.flatnonzero(use.rows).tolist()
        return Placement(
            use.layer,
            on_device=tuple(e for e in active if e in residency.ready),
            fetch_first=tuple(e for e in active if e not in residency.ready),
        )


def test_the_host_is_asked_only_for_what_the_device_does_not_serve() -> None:
    with tiers(device_slots=TOTAL, host_slots=TOTAL) as made:
        for _ in range(20):
            made.step(0, 3, OnDevice())
        device, host = (c.counters.totals() for c in (made.supply.cache, made.disk.cache))
        fetched = len(made.supply.cache.residency(0).ready)
        assert device["misses"] == host["misses"] == fetched > 0
        assert host["hits"] == host["late"] == 0 < device["hits"]
