"""What happened in one tier since it began, per MoE layer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers

Counts = NDArray[np.int64]


def _one_per_layer() -> Counts:
    return np.zeros(0, np.int64)


@dataclass(eq=False)
class CacheCounters:
    """Every field is [L] int64, by the layer's place among the MoE layers.

    Uses are counted per step and expert, not per row. A prefetch is useful once the expert is
    wanted while it stands in its slot or is on its way, wasted when it goes unused.
    """

    hits: Counts = field(default_factory=_one_per_layer)  # READY when the step asked for it
    late: Counts = field(default_factory=_one_per_layer)  # on its way
    misses: Counts = field(default_factory=_one_per_layer)  # ABSENT
    evictions: Counts = field(default_factory=_one_per_layer)
    prefetches_begun: Counts = field(default_factory=_one_per_layer)
    prefetches_useful: Counts = field(default_factory=_one_per_layer)
    prefetches_wasted: Counts = field(default_factory=_one_per_layer)

    @classmethod
    def of(cls, numbers: ExpertNumbers) -> CacheCounters:
        size = len(numbers.layers)
        return cls(**{f.name: np.zeros(size, np.int64) for f in fields(cls)})

    def totals(self) -> dict[str, int]:
        """Sums over the layers, by field."""
        return {f.name: int(getattr(self, f.name).sum()) for f in fields(self)}

    def by_layer(self, numbers: ExpertNumbers) -> dict[int, dict[str, int]]:
        """The counts of each layer, by the layer's index in the model."""
        return {
            layer: {f.name: int(getattr(self, f.name)[rank]) for f in fields(self)}
            for layer, rank in numbers.rank_of.items()
        }
