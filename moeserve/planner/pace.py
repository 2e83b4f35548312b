"""How fast the machine computes now, beside how fast it did when it was calibrated.

What else runs on a machine that others share makes it half as fast for minutes. What is measured
then and compared with what was measured before must be told apart from that.
"""

from __future__ import annotations

from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackFormat
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.profile import Processor
from moeserve.planner.product_figures import SIZE, Pool, ProductPool

#: products of a look, and their memory: more than caches hold
NUM_PRODUCTS, PRODUCTS_BYTES = 5, 256 << 20


class Pace:
    """How much longer products take than they did when they were calibrated."""

    def __init__(self, products: Pool, calibrated_ps: Curve) -> None:
        self._products = products
        self._calibrated_ps = calibrated_ps

    @classmethod
    def of(cls, runtime: NativeRuntime, cpu: Processor, form: PackFormat) -> Pace:
        """cpu: whose products in that format are known."""
        wanted = (form.describe(), *SIZE)
        (known,) = (c for c in cpu.product_curves if (c.weights, c.outputs, c.inputs) == wanted)
        pool = ProductPool(runtime, form, SIZE, PRODUCTS_BYTES)
        pool.read_once()  # calibration drops its first turn, too
        return cls(pool, Curve(known.rows, [figure.value for figure in known.ps]))

    def slower(self, num_rows: int) -> list[float]:
        """A few samples, with products of so many rows; 1: as they were."""
        calibrated_ps = self._calibrated_ps[num_rows]
        return [self._products.ps(num_rows) / calibrated_ps for _ in range(NUM_PRODUCTS)]
