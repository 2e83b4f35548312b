"""What running or moving an expert costs, as the layer scheduler asks for it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import ConfigError, ExpertSpec
from moeserve.experts.schedule.profile import DiskPoint, Processor, Profile


class Curve(dict[int, float]):
    """A cost in microseconds over a count: exact at the measured points, straight between them.

    `curve[count]`. Below the first point the first cost holds, beyond the last the last slope goes
    on; a single point is a constant. Costs that were asked for are kept, since the scheduler asks
    for the same few in every layer of every step.
    """

    def __init__(self, counts: Sequence[int], us: Sequence[float]) -> None:
        """counts: ascending."""
        super().__init__(zip(counts, us, strict=True))
        self._counts = tuple(counts)
        self._us = tuple(us)

    def __missing__(self, count: int) -> float:
        counts, us = self._counts, self._us
        after = bisect_right(counts, count)
        if after == 0 or len(counts) == 1:
            cost = us[0]
        else:
            left = min(after, len(counts) - 1) - 1
            slope = (us[left + 1] - us[left]) / (counts[left + 1] - counts[left])
            cost = us[left] + slope * (count - counts[left])
        self[count] = cost
        return cost


@dataclass(frozen=True)
class CostModel:
    """Times of one kind of expert, in microseconds (DESIGN, invariant 8: measured, no literals).

    cpu, device: of one further expert in a job, by rows. cpu_start_us: what the first expert on the
    CPU costs beyond a further one. shared_us: of a layer's shared experts, which the device runs
    before its routed ones, whatever is placed there. link, disk: of a transfer alone, by bytes.
    device, link, disk are None where the machine has none. expert_bytes: of one record.
    """

    expert_bytes: int
    cpu: Curve
    cpu_start_us: float
    device: Curve | None = None
    device_start_us: float = 0.0
    shared_us: float = 0.0
    link: Curve | None = None
    disk: Curve | None = None

    @classmethod
    def of(
        cls,
        profile: Profile,
        spec: ExpertSpec,
        weights: str,
        expert_bytes: int,
        device_weights: str | None = None,
    ) -> CostModel:
        """weights: `PackFormat.describe()` of the experts on the CPU; device_weights: of those on
        the device, None for the same.

        Raises ConfigError where the profile knows neither the format nor rates to derive it from.
        """
        device = profile.device
        on_device = None
        if device is not None:
            on_device = expert_curve(device, spec, device_weights or weights, expert_bytes)
        link = sorted(profile.link, key=lambda point: point.num_bytes)
        return cls(
            expert_bytes=expert_bytes,
            cpu=expert_curve(profile.cpu, spec, weights, expert_bytes),
            cpu_start_us=profile.cpu.start_us.value,
            device=on_device,
            device_start_us=0.0 if device is None else device.start_us.value,
            link=Curve([p.num_bytes for p in link], [p.us.value for p in link]) if link else None,
            disk=disk_curve(profile.disk) if profile.disk else None,
        )

    @property
    def device_begins_us(self) -> float:
        """Before the first routed expert on the device."""
        return self.device_start_us + self.shared_us

    @property
    def device_least_us(self) -> float:
        """Of a layer with no routed expert on the device."""
        return self.device_begins_us if self.shared_us else 0.0

    def cpu_us(self, num_rows: int) -> float:
        """One more expert on that many rows by the CPU backend."""
        return self.cpu[num_rows]

    def device_us(self, num_rows: int) -> float:
        """One more expert on that many rows on the device."""
        return _there(self.device, "device")[num_rows]

    def transfer_us(self, num_bytes: int) -> float:
        """That many bytes from host memory over the link."""
        return _there(self.link, "link")[num_bytes]

    def disk_us(self, num_bytes: int) -> float:
        """One record of that many bytes from disk, in a stream of such records."""
        return _there(self.disk, "disk")[num_bytes]


def _there(curve: Curve | None, what: str) -> Curve:
    if curve is None:
        raise ConfigError(
            f"profile: it says nothing of a {what}",
            field="profile",
            hint=f"measure it with `moeserve calibrate` on the machine that has the {what}",
        )
    return curve


def expert_curve(processor: Processor, spec: ExpertSpec, weights: str, expert_bytes: int) -> Curve:
    """Costs by rows from the measured curve of the format, else from the rates.

    An expert of another size than the measured one costs in proportion to its weights: at few rows
    they are what is read, at many what is multiplied.
    """
    curve = processor.curve(weights, spec)
    if curve is None:
        return _roofline(processor, spec, weights, expert_bytes)
    scale = 3 * spec.hidden_size * spec.intermediate_size / curve.num_weights
    return Curve(curve.rows, [figure.value * scale for figure in curve.us])


def _roofline(processor: Processor, spec: ExpertSpec, weights: str, expert_bytes: int) -> Curve:
    """The longer of reading the weights and multiplying them: flat, then a line through 0.

    Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
    """
    rate = processor.best_read(weights) or processor.best_read()
    peak = processor.peak(weights)
    if rate is None or not rate.bytes_per_s.value or not peak:
        known = sorted({curve.weights for curve in processor.expert_curves}) or ["none"]
        raise ConfigError(
            f"profile: {processor.name} has no figures for {weights} experts, and no rates; it has"
            f" {', '.join(known)}",
            field="profile",
            hint="measure again with `moeserve calibrate`",
        )
    return roofline(expert_bytes, spec, rate.bytes_per_s.value, peak)


def roofline(expert_bytes: int, spec: ExpertSpec, bytes_per_s: float, ops_per_s: float) -> Curve:
    """Microseconds of an expert by rows: the longer of reading its weights and multiplying them.

    bytes_per_s: of memory; ops_per_s: a multiply-add is two.
    """
    read_us = expert_bytes / bytes_per_s * 1e6
    row_us = 6 * spec.hidden_size * spec.intermediate_size / ops_per_s * 1e6
    ridge = int(read_us / row_us) + 1  # the first number of rows at which products take longer
    points = {1: max(read_us, row_us), ridge: ridge * row_us, ridge + 1: (ridge + 1) * row_us}
    if ridge > 2:
        points[ridge - 1] = read_us
    counts = sorted(points)
    return Curve(counts, [points[count] for count in counts])


def disk_curve(points: Sequence[DiskPoint]) -> Curve:
    """Microseconds per block when reads stream at the best of the measured queue depths."""
    best: dict[int, float] = {}
    for point in points:
        rate = point.bytes_per_s.value
        best[point.block_bytes] = max(best.get(point.block_bytes, 0.0), rate)
    blocks = sorted(best)
    return Curve(blocks, [block / best[block] * 1e6 for block in blocks])
