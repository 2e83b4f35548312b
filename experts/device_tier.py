"""Sets up a device tier over the host: slots, costs, schedulers; and the clock of one that is
emulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from moeserve.cache.expert_cache import ExpertCache, Tier
from moeserve.cache.floors import check_floor
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.worker_pool import WorkerPool
from moeserve.experts.cpu_costs import measure_cpu
from moeserve.experts.device.clock import EmulatedClock, ModelledClock, RealCpuClock
from moeserve.experts.device.device import Device
from moeserve.experts.device.emulated import EmulatedDevice
from moeserve.experts.device.modelled_reads import ModelledReads
from moeserve.experts.device_supply import DeviceSupply, FittingPlacement
from moeserve.experts.disk_supply import DiskSupply
from moeserve.experts.disk_tier import DiskTier
from moeserve.experts.host_over_disk import HostOverDisk
from moeserve.experts.host_side import HostSide, WholeHost
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.remote import not_held
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.emulation import with_emulated_device
from moeserve.experts.schedule.inter_layer import InterLayerScheduler, WhichBegin, whatever
from moeserve.experts.schedule.intra_layer import (
    IntraLayerScheduler,
    SimulatedPlacement,
    TimelinePlacement,
)
from moeserve.experts.schedule.over_disk import PlacementOverDisk
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import profile_names, read_profile, shipped_profile
from moeserve.experts.tiered_prefetch import TieredPrefetch
from moeserve.experts.watch import Watch
from moeserve.timeline import Timeline

#: experts of one layer that the CPU's costs are measured on
NUM_MEASURED = 16


@dataclass(frozen=True)
class DeviceTier:
    cache: ExpertCache
    supply: DeviceSupply
    intra: IntraLayerScheduler
    inter: InterLayerScheduler
    notes: dict[str, str]


def build_device_tier(
    config: ExpertConfig,
    layers: Mapping[int, PackedExperts],
    native: NativeRuntime,
    rest_bytes: int,
    shared_bytes: int,
    watch: Watch,
    below: DiskTier | None = None,
    workers: WorkerPool | None = None,
) -> DeviceTier:
    """An emulated device. layers: the experts of each MoE layer. rest_bytes: weights of everything
    else, which would stand on the device; shared_bytes: the shared experts among them. below: host
    memory over the disk, where it does not hold all experts. workers: processes that compute some
    of them.

    Raises ConfigError where no slot fits, or the profile says nothing of a device.
    """
    sheet = find_profile(config.device_profile)
    costs = _costs(config, sheet, layers, native)
    clock: EmulatedClock = RealCpuClock()
    if config.emulate_cpu:
        rest_us = rest_of_layer_us(sheet, (rest_bytes - shared_bytes) // len(layers))
        clock = ModelledClock(rest_us)
        shared_us = read_on_device_us(sheet, shared_bytes // len(layers))
        costs = {n: dataclasses.replace(each, shared_us=shared_us) for n, each in costs.items()}
    cache = device_cache(config, layers)
    host: HostSide = WholeHost(layers)
    if below is not None:
        host = HostOverDisk(below.supply, clock.now_us)
        if config.emulate_cpu:
            _read_by_model(below.supply, costs, clock, watch.timeline)
        else:
            costs = with_disk(costs, below)
    device = emulated_device(clock, layers, costs, cache.num_slots, watch, host)
    cpu_time = "its CPU's time, too" if config.emulate_cpu else "the CPU's time is real"
    what = f"emulated: {_device_name(sheet)} by {config.device_profile}; {cpu_time}"
    return assemble(config, cache, device, costs, what, below, workers)


def device_cache(config: ExpertConfig, layers: Mapping[int, PackedExperts]) -> ExpertCache:
    """The books of the slots that the config asks for; no more than there are experts."""
    slot_bytes = max(experts.record_bytes for experts in layers.values())
    num_experts = {layer: experts.spec.num_experts for layer, experts in layers.items()}
    num_slots = min(sum(num_experts.values()), _num_slots(config, slot_bytes))
    check_floor(config.layer_floor, len(num_experts), num_slots)
    policy = build_policy(config.tier_policy, num_experts)
    return ExpertCache(Tier.DEVICE, num_experts, num_slots, policy, config.layer_floor)


def with_disk(costs: Mapping[int, CostModel], below: DiskTier) -> dict[int, CostModel]:
    """With the times of reads from a disk that is there."""
    disk = {layer: each.disk for layer, each in below.intra.costs.items()}
    return {n: dataclasses.replace(each, disk=disk[n]) for n, each in costs.items()}


def assemble(
    config: ExpertConfig,
    cache: ExpertCache,
    device: Device,
    costs: Mapping[int, CostModel],
    what: str,
    below: DiskTier | None = None,
    workers: WorkerPool | None = None,
) -> DeviceTier:
    """The schedulers of a device over host memory, or over that and the disk. what: the device, in
    words."""
    supply = DeviceSupply(cache, device)
    depth = config.layers_ahead
    may_copy = whatever if workers is None else not_held(workers, cache.numbers)
    if below is None:
        intra = TimelinePlacement(costs, device.loading_us)
        inter: InterLayerScheduler = prefetch_to_device(supply, intra, depth, may_copy)
    else:
        intra = over_disk = PlacementOverDisk(costs, below.cache.residency, device.loading_us)
        to_device = prefetch_to_device(supply, intra, depth, may_copy)
        inter = TieredPrefetch(
            to_device, _prefetch_to_host(below.supply, over_disk, device, depth), cache
        )
    others = "all are in host memory" if below is None else "copies of what host memory holds"
    num_slots, total = cache.num_slots, cache.numbers.total
    notes = {
        "device": what,
        "device_experts": f"{num_slots} of {total} ({num_slots / total:.0%}) have room,"
        f" {device.slots.slot_bytes} bytes each; {others}",
        "device_policy": config.tier_policy,
    }
    return DeviceTier(cache, supply, FittingPlacement(intra, cache), inter, notes)


def _read_by_model(
    disk: DiskSupply, costs: Mapping[int, CostModel], clock: EmulatedClock, timeline: Timeline
) -> None:
    """Reads take the profile's time. ConfigError where it says nothing of a disk."""
    read_us = {layer: each.disk_us(each.expert_bytes) for layer, each in costs.items()}
    disk.read_with(
        lambda source, slot: ModelledReads(
            source, slot, clock, lambda key: read_us[key.layer], timeline
        )
    )


def prefetch_to_device(
    supply: DeviceSupply,
    intra: SimulatedPlacement,
    depth: int,
    may_copy: WhichBegin = whatever,
) -> WatchedPrefetch:
    """Over the link, of what is ready in host memory. may_copy: which experts are any use there."""
    device = supply.device
    return WatchedPrefetch(
        supply.cache,
        intra,
        supply.prefetch,
        device.link_busy_s,
        depth,
        lambda: device.now_us() / 1e6,
        lambda numbers: supply.host.which_ready(numbers) & may_copy(numbers),
        device.link_left_us,
    )


def _prefetch_to_host(
    disk: DiskSupply, intra: PlacementOverDisk, device: Device, depth: int
) -> WatchedPrefetch:
    """From disk, of what does not stand on the device."""
    return WatchedPrefetch(
        disk.cache,
        intra.reads,
        disk.begin_prefetch,
        disk.busy_s,
        depth,
        lambda: device.now_us() / 1e6,
    )


def _costs(
    config: ExpertConfig,
    sheet: Profile,
    layers: Mapping[int, PackedExperts],
    native: NativeRuntime,
) -> dict[int, CostModel]:
    _device_name(sheet)  # there is one
    profile = sheet
    if not config.emulate_cpu:
        cpu = measure_cpu(native, copies_of_some(native, next(iter(layers.values()))))
        profile = with_emulated_device(replace(sheet, cpu=cpu), sheet)
    return {layer: costs_of(profile, experts) for layer, experts in layers.items()}


def copies_of_some(native: NativeRuntime, experts: PackedExperts) -> PackedExperts:
    """Enough of a layer's experts to measure with, read from wherever they are."""
    count = min(experts.spec.num_experts, NUM_MEASURED)
    spec = dataclasses.replace(experts.spec, num_experts=count)
    copies = PackedExperts(native.handle, spec, experts.gate_up_form, experts.down_form)
    copies.records[:] = experts.records[:count]
    return copies


def emulated_device(
    clock: EmulatedClock,
    layers: Mapping[int, PackedExperts],
    costs: Mapping[int, CostModel],
    num_slots: int,
    watch: Watch | None = None,
    host: HostSide | None = None,
) -> EmulatedDevice:
    """A device for the experts of those layers. host: where copies are made from; None: all of them
    are in memory."""
    slot_bytes = max(experts.record_bytes for experts in layers.values())
    source = WholeHost(layers) if host is None else host
    device = EmulatedDevice(clock, HostSlots(slot_bytes, num_slots), source, watch)
    for layer, experts in layers.items():
        device.add_layer(layer, experts, costs[layer])
    return device


def find_profile(name: str) -> Profile:
    """A profile that comes with the package, or a file. ConfigError: there is none."""
    if name in profile_names():
        return shipped_profile(name)
    if Path(name).exists():
        return read_profile(Path(name))
    raise ConfigError(
        f"device_profile: {name!r} is no file and not one of {', '.join(profile_names())}",
        field="device_profile",
    )


def costs_of(profile: Profile, experts: PackedExperts) -> CostModel:
    weights = experts.gate_up_form.describe()
    return CostModel.of(profile, experts.spec, weights, experts.record_bytes)


def rest_of_layer_us(profile: Profile, num_bytes: int) -> float:
    """Attention and all else of a layer, but for experts and for a few rows: the device reads its
    weights."""
    read_us = read_on_device_us(profile, num_bytes)
    assert profile.device is not None
    return profile.device.start_us.value + read_us


def read_on_device_us(profile: Profile, num_bytes: int) -> float:
    """Work of a few rows on the device, whose weights are so many bytes."""
    read = None if profile.device is None else profile.device.best_read()
    if read is None:
        raise ConfigError("device_profile: it has no rate of a device", field="device_profile")
    return num_bytes / read.bytes_per_s.value * 1e6


def _device_name(profile: Profile) -> str:
    if profile.device is None or not profile.link:
        raise ConfigError(
            f"device_profile: {profile.hardware.cpu} has no device and link to emulate",
            field="device_profile",
            hint=f"name a profile with both: {', '.join(profile_names())}",
        )
    return profile.device.name


def _num_slots(config: ExpertConfig, slot_bytes: int) -> int:
    if config.device_slots is not None:
        return config.device_slots
    budget_bytes = config.device_memory_bytes or 0
    if budget_bytes < slot_bytes:
        raise ConfigError(
            f"device_memory: {budget_bytes} bytes hold no expert of {slot_bytes}",
            field="device_memory_bytes",
            hint="raise --device-memory",
        )
    return budget_bytes // slot_bytes
