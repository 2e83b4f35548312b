"""Time beside a device that is emulated.

This machine cannot compute at the device's rate, so its time is reckoned, not waited for: every
piece of the device's work is really done, on the CPU, and then stands on a timeline at the time and
for as long as the device would have taken. What the emulation itself takes is left out.

Times are microseconds since the clock was made.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class EmulatedClock(ABC):
    """Says how late it would be if the device were there. For one thread, the engine's."""

    @abstractmethod
    def now_us(self) -> float:
        """Never falls."""

    @abstractmethod
    def wait_until(self, us: float) -> None:
        """Lets that time come, without sleeping; nothing where it is past."""

    @abstractmethod
    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Time stands still: what is done here would be done elsewhere, or not at all."""

    @abstractmethod
    @contextmanager
    def cpu_work(self, us: float) -> Iterator[None]:
        """Experts' work that this machine's CPU stands for. us: what the cost model says of it."""

    @abstractmethod
    def end_layer(self) -> None:
        """The experts of a layer are done; what else belongs to a layer follows."""


class RealCpuClock(EmulatedClock):
    """All that the CPU does takes as long as it takes here; only device and link are emulated."""

    def __init__(self, ticks_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._ticks_ns = ticks_ns
        self._zero_us = ticks_ns() / 1e3
        self._stopped_at_us: float | None = None

    def now_us(self) -> float:
        if self._stopped_at_us is not None:
            return self._stopped_at_us
        return self._ticks_ns() / 1e3 - self._zero_us

    def wait_until(self, us: float) -> None:
        self._zero_us -= max(0.0, us - self.now_us())

    @contextmanager
    def left_out(self) -> Iterator[None]:
        if self._stopped_at_us is not None:
            yield
            return
        self._stopped_at_us = now_us = self.now_us()
        try:
            yield
        finally:
            self._stopped_at_us = None
            self._zero_us = self._ticks_ns() / 1e3 - now_us

    @contextmanager
    def cpu_work(self, us: float) -> Iterator[None]:
        yield

    def end_layer(self) -> None:
        """It takes the time that it takes."""


class ModelledClock(EmulatedClock):
    """The CPU's time follows from costs, too, so that the ratios of a profile hold on any machine
    and a run gives the same times again. What is no expert work takes a fixed time per layer, and
    the bookkeeping none.
    """

    def __init__(self, rest_of_layer_us: float) -> None:
        """rest_of_layer_us: attention and all else of a layer that is no expert, on the device."""
        self.rest_of_layer_us = rest_of_layer_us
        self._now_us = 0.0

    def now_us(self) -> float:
        return self._now_us

    def wait_until(self, us: float) -> None:
        self._now_us = max(self._now_us, us)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        yield

    @contextmanager
    def cpu_work(self, us: float) -> Iterator[None]:
        yield
        self._now_us += us

    def end_layer(self) -> None:
        self._now_us += self.rest_of_layer_us
