"""Costs of what a device computes besides routed experts: by its rates, the longer of reading and
multiplying."""

from __future__ import annotations

from moeserve.planner.plan_types import Deployment, Resource, StepLoad
from moeserve.planner.rates import Rates
from moeserve.planner.shapes import Matrix
from moeserve.planner.step_costs import Work, attention_ops


class DeviceLayerCosts:
    """`LayerCosts` of a device. What launching kernels costs is the start of a job, for each
    product; what Python adds on that machine is not known, and left out."""

    def __init__(self, deployment: Deployment) -> None:
        rates = Rates(deployment)
        self._model = deployment.shape
        self._rates = rates
        self._bytes_per_us = rates.device_read / 1e6
        device = deployment.profile.device
        assert device is not None, "deployments with slots on a device have one"
        self._start_us = device.start_us.value
        self._peaks: dict[str, float] = {}  # by format
        self._products: dict[tuple[int, int], Work] = {}  # of a layer, by rows

    def step_work(self, load: StepLoad) -> Work:
        work = Work()
        if load.num_sampled:
            self._product(work, self._model.head, load.num_sampled)
        return work

    def layer_work(self, layer: int, load: StepLoad) -> Work:
        attention, num_rows = self._model.layers[layer].attention, load.num_rows
        products = self._products.get((layer, num_rows))
        if products is None:
            products = self._products[layer, num_rows] = Work()
            for matrix in self._model.layers[layer].products:
                self._product(products, matrix, num_rows)
        work = products.copy()
        contexts = [*load.decode_contexts, *(c.start + c.num_tokens for c in load.chunks)]
        tokens = sum(attention.keys(context) for context in contexts)
        num_bytes = tokens * attention.kv_heads * attention.kv_width * self._model.number_bytes
        read_us = num_bytes / self._bytes_per_us
        ops_us = attention_ops(attention, load) / self._ops_per_us(self._model.dtype)
        work.us += max(read_us, ops_us)
        work.used[Resource.DEVICE_MEMORY] += read_us
        work.used[Resource.DEVICE_COMPUTE] += ops_us
        return work

    def _product(self, work: Work, matrix: Matrix, num_rows: int) -> None:
        read_us = matrix.read_bytes / self._bytes_per_us
        ops_us = 2 * num_rows * matrix.rows * matrix.cols / self._ops_per_us(matrix.form)
        work.us += max(read_us, ops_us) + self._start_us
        work.used[Resource.DEVICE_MEMORY] += read_us
        work.used[Resource.DEVICE_COMPUTE] += ops_us
        work.used[Resource.OVERHEAD] += self._start_us

    def _ops_per_us(self, form: str) -> float:
        if form not in self._peaks:
            self._peaks[form] = self._rates.device_peak(form) / 1e6
        return self._peaks[form]
