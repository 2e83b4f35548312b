"""Sets up a device tier over the host on a device that torch has."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeserve.config import ExpertConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.threads import torch_threads
from moeserve.experts.cpu_costs import ROWS, measure_cpu
from moeserve.experts.device.device_costs import DeviceCosts, measure_device
from moeserve.experts.device.torch_device import TorchDevice, wall_us
from moeserve.experts.device.torch_link import check_room
from moeserve.experts.device_tier import (
    DeviceTier,
    assemble,
    copies_of_some,
    device_cache,
    with_disk,
)
from moeserve.experts.disk_tier import DiskTier
from moeserve.experts.host_over_disk import HostOverDisk
from moeserve.experts.host_side import HostSide, WholeHost
from moeserve.experts.schedule.cost_model import CostModel, expert_curve
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.profile import Processor
from moeserve.experts.watch import Watch


def build_torch_tier(
    config: ExpertConfig,
    layers: Mapping[int, PackedExperts],
    native: NativeRuntime,
    device: torch.device,
    dtype: torch.dtype,
    watch: Watch,
    below: DiskTier | None = None,
) -> DeviceTier:
    """layers: the experts of each MoE layer. dtype: of the rows. below: host memory over the disk,
    where it does not hold all experts.

    What experts cost on both sides, and their copies, is measured here, on one layer's.
    Raises ConfigError where no slot fits, or the device has no room for the slots.
    """
    cache = device_cache(config, layers)
    first = next(iter(layers))
    record_bytes = max(experts.record_bytes for experts in layers.values())
    check_room(device, cache.num_slots * record_bytes)
    host: HostSide = WholeHost(layers)
    if below is not None:
        host = HostOverDisk(below.supply, wall_us)
    try:
        tier = TorchDevice(device, cache.num_slots, layers, host, watch)
    except MemoryError as error:
        raise ConfigError(
            f"device_memory: {error}", field="device_memory_bytes", hint="lower --device-memory"
        ) from error
    cpu = measure_cpu(native, copies_of_some(native, layers[first]))
    try:
        with torch_threads(1):  # where the device is this CPU
            measured = measure_device(tier, first, layers[first].spec.hidden_size, dtype)
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on the CPU
        tier.close()
        raise ConfigError(
            f"device_memory: nothing can be computed beside {cache.num_slots} slots: {error}",
            field="device_memory_bytes",
            hint="lower --device-memory",
        ) from error
    costs = {layer: _costs(cpu, measured, experts) for layer, experts in layers.items()}
    if below is not None:
        costs = with_disk(costs, below)
    tier.know_costs(costs)
    rate = measured.record_bytes / measured.copy_us / 1e3
    what = f"{_name(device)}: a record in {measured.copy_us:.0f} us ({rate:.1f} GB/s)"
    return assemble(config, cache, tier, costs, what, below)


def _costs(cpu: Processor, measured: DeviceCosts, experts: PackedExperts) -> CostModel:
    """Of experts of another size: in proportion to their bytes."""
    scale = experts.record_bytes / measured.record_bytes
    weights = experts.gate_up_form.describe()
    return CostModel(
        expert_bytes=experts.record_bytes,
        cpu=expert_curve(cpu, experts.spec, weights, experts.record_bytes),
        cpu_start_us=cpu.start_us.value,
        device=Curve(ROWS, [us * scale for us in measured.one_more_us]),
        device_start_us=measured.start_us,
        link=Curve([experts.record_bytes], [measured.copy_us * scale]),
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, in place of a device"
