"""A device that is not there, in proportion to the CPU that is."""

from __future__ import annotations

from msgspec.structs import replace

from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import ExpertCurve, Figure, Processor, Profile


def with_emulated_device(here: Profile, sheet: Profile) -> Profile:
    """`here` with the device and the link of `sheet`, slowed until both stand to this CPU as they
    stand to the CPU of `sheet`.

    What a scheduler gains depends on how fast device and link are beside the CPU, so that is what
    is kept. Memory bandwidths are compared, since at few rows reading is what experts cost.

    Raises ConfigError where `sheet` has no device or no link, or one CPU's bandwidth is unknown.
    """
    ours, theirs = here.cpu.best_read(), sheet.cpu.best_read()
    if sheet.device is None or not sheet.link or ours is None or theirs is None:
        raise ConfigError(
            "profile: emulating a device takes a profile with a device, a link and the CPU's reads",
            field="profile",
        )
    speed = ours.bytes_per_s.value / theirs.bytes_per_s.value
    link = [replace(point, us=_times(point.us, 1 / speed)) for point in sheet.link]
    return replace(here, device=_slowed(sheet.device, speed), link=link, sources=sheet.sources)


def _slowed(device: Processor, speed: float) -> Processor:
    read = [replace(rate, bytes_per_s=_times(rate.bytes_per_s, speed)) for rate in device.read]
    return replace(
        device,
        name=f"emulated {device.name} at {speed:.2f} of its speed",
        read=read,
        ops_per_s={name: _times(peak, speed) for name, peak in device.ops_per_s.items()},
        start_us=_times(device.start_us, 1 / speed),
        expert_curves=[_slowed_curve(curve, speed) for curve in device.expert_curves],
    )


def _slowed_curve(curve: ExpertCurve, speed: float) -> ExpertCurve:
    return replace(curve, us=[_times(figure, 1 / speed) for figure in curve.us])


def _times(figure: Figure, factor: float) -> Figure:
    return replace(figure, value=figure.value * factor)
