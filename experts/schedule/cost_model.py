"""What running or moving an expert costs, as the layer scheduler asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import ConfigError, ExpertSpec
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.product_sizes import Size, SizedCurve, curve_of_size
from moeserve.experts.schedule.profile import DiskPoint, Processor, Profile


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
    """Costs by rows from the measured curves of the format, else from the rates."""
    return as_experts(processor, Size.of_expert(spec), weights, expert_bytes)


def as_experts(processor: Processor, size: Size, weights: str, num_bytes: int) -> Curve:
    """The same for whatever is multiplied as experts are: num_bytes are its weights'."""
    measured = [
        SizedCurve(
            Size.of_expert_sizes(curve.hidden_size, curve.intermediate_size),
            Curve(curve.rows, [figure.value for figure in curve.us]),
        )
        for curve in processor.expert_curves
        if curve.weights == weights
    ]
    if not measured:
        return _roofline(processor, size.weights, weights, num_bytes)
    return curve_of_size(size, measured)


def _roofline(processor: Processor, num_weights: int, weights: str, num_bytes: int) -> Curve:
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
    return roofline(num_bytes, num_weights, rate.bytes_per_s.value, peak)


def roofline(num_bytes: int, num_weights: int, bytes_per_s: float, ops_per_s: float) -> Curve:
    """Microseconds of a product by rows: the longer of reading its weights and multiplying them.

    bytes_per_s: of memory; ops_per_s: a multiply-add is two.
    """
    read_us = num_bytes / bytes_per_s * 1e6
    row_us = 2 * num_weights / ops_per_s * 1e6
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
