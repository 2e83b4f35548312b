"""What transfers into one tier did since they began."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace


@dataclass
class LayerTransfers:
    """Of the records of one layer. busy_s: time that ended with the arrival of one of its chunks.
    stall_s: a step waited for its experts."""

    demand_bytes: int = 0
    prefetch_bytes: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0


@dataclass
class TransferStats:
    """busy_s: at least one chunk was on its way. stall_s: somebody waited."""

    demand_bytes: int = 0
    prefetch_bytes: int = 0
    num_demands: int = 0
    num_prefetches: int = 0
    num_promoted: int = 0
    num_failed: int = 0
    num_retries: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0
    layers: dict[int, LayerTransfers] = field(default_factory=lambda: defaultdict(LayerTransfers))

    def arrived(self, layer: int, num_bytes: int, demanded: bool, busy_s: float) -> None:
        """busy_s: since the last arrival, or since the link was idle."""
        for counts in (self, self.layers[layer]):
            counts.busy_s += busy_s
            if demanded:
                counts.demand_bytes += num_bytes
            else:
                counts.prefetch_bytes += num_bytes

    def waited(self, layer: int | None, seconds: float) -> None:
        """layer: whose step waited, where that is known."""
        self.stall_s += seconds
        if layer is not None:
            self.layers[layer].stall_s += seconds

    def copy(self) -> TransferStats:
        layers = defaultdict(LayerTransfers, {n: replace(of) for n, of in self.layers.items()})
        return replace(self, layers=layers)
