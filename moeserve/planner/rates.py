"""The rates of a deployment's hardware that bounds are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import DiskPoint, Processor, Profile, ReadRate
from moeserve.planner.plan_types import Deployment


@dataclass(frozen=True)
class Rates:
    """Bytes and operations per second. Each raises ConfigError where the profile lacks it."""

    deployment: Deployment

    @cached_property
    def cpu_read(self) -> float:
        """Of the threads that the deployment uses, or of the fewest that were measured."""
        cpu = self.deployment.profile.cpu
        few = [r for r in cpu.read if r.num_threads <= self.deployment.num_threads]
        return _best_read(cpu, few or cpu.read)

    @cached_property
    def device_read(self) -> float:
        return _best_read(self._device, self._device.read)

    def cpu_peak(self, form: str) -> float:
        """With fewer threads than were calibrated, in proportion."""
        profile = self.deployment.profile
        share = min(1.0, self.deployment.num_threads / max(1, profile.hardware.num_cores))
        return share * peak_of(profile.cpu, form)

    def device_peak(self, form: str) -> float:
        return peak_of(self._device, form)

    def peak(self, form: str) -> float:
        """Of what computes: the device where there is one."""
        on_device = self.deployment.device_slots is not None
        return self.device_peak(form) if on_device else self.cpu_peak(form)

    @cached_property
    def link(self) -> float:
        """The best over all sizes of a copy, or of what more bytes take beyond fewer."""
        points = sorted(self.deployment.profile.link, key=lambda point: point.num_bytes)
        rates = [p.num_bytes / p.us.value for p in points if p.us.value]
        rates += [
            (b.num_bytes - a.num_bytes) / (b.us.value - a.us.value)
            for a, b in pairwise(points)
            if b.us.value > a.us.value
        ]
        if not any(rates):
            raise ConfigError("hardware: the profile has no link to the device", field="hardware")
        return max(rates) * 1e6

    @cached_property
    def disk(self) -> float:
        return max(point.bytes_per_s.value for point in disk_points(self.deployment.profile))

    @property
    def crossing(self) -> float:
        """Of the slowest link that weights cross on their way to what computes."""
        if self.deployment.device_slots is not None:
            return self.link
        return self.cpu_read if self.deployment.host_slots is None else self.disk

    @property
    def _device(self) -> Processor:
        device = self.deployment.profile.device
        assert device is not None, "deployments with slots on a device have one"
        return device


def disk_points(profile: Profile) -> Sequence[DiskPoint]:
    """What the profile knows of its disk. Raises ConfigError."""
    if not profile.disk:
        raise ConfigError(
            "hardware: the profile has no disk, and experts are to be read from one",
            field="hardware",
            hint="name a profile with a disk, or run `moeserve calibrate --disk-dir DIR`",
        )
    return profile.disk


def peak_of(processor: Processor, form: str) -> float:
    """form: a `PackFormat.describe()`. Raises ConfigError."""
    found = processor.peak(form)
    if found is None:
        raise ConfigError(
            f"hardware: the profile has no peak of {processor.name} for {form} weights",
            field="hardware",
        )
    return found


def _best_read(processor: Processor, rates: list[ReadRate]) -> float:
    plain = [rate.bytes_per_s.value for rate in rates if rate.kernel == "read"]
    if not plain:
        raise ConfigError(
            f"hardware: the profile has no reads of {processor.name}", field="hardware"
        )
    return max(plain)
