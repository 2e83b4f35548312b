"""What running or moving experts costs, as the layer scheduler asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod


class CostModel(ABC):
    """Times measured on this machine (DESIGN, invariant 8), in microseconds.

    The rule of `intra_layer` for layers that are wholly resident weighs nothing and needs none.
    """

    @abstractmethod
    def cpu_us(self, num_rows: int) -> float:
        """One expert on that many rows by the CPU backend."""

    @abstractmethod
    def device_us(self, num_rows: int) -> float:
        """One expert on that many rows on the device."""

    @abstractmethod
    def transfer_us(self, num_bytes: int) -> float:
        """That many bytes over the link into the fast tier."""
