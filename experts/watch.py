"""How long experts are computed, per layer; and the timeline, while somebody records one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from moeserve.timeline import Timeline


class Watch:
    """One for all MoE layers of a model.

    timeline: of everything that has to do with a step; its owner starts and stops it.
    cpu_s, device_s: by layer; a device that cannot tell how long it computed adds nothing.
    """

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.cpu_s: dict[int, float] = defaultdict(float)
        self.device_s: dict[int, float] = defaultdict(float)

    def computing(self, layer: int, experts: Sequence[int] | None = None) -> Computing:
        """`with watch.computing(layer, experts):` around work on the CPU. None: all."""
        return Computing(self, layer, experts)


class Computing:
    """One piece of work on the CPU, from the start of its context to the end."""

    def __init__(self, watch: Watch, layer: int, experts: Sequence[int] | None) -> None:
        self._watch = watch
        self._layer = layer
        self._experts = experts

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        end_s = time.perf_counter()
        watch, layer = self._watch, self._layer
        watch.cpu_s[layer] += end_s - self._start_s
        if watch.timeline.recording:
            watch.timeline.add_here(
                "experts", self._start_s, end_s, layer=layer, experts=self._experts
            )
