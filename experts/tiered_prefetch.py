"""Prefetching through three tiers: from host memory to the device, and from disk to host memory."""

from __future__ import annotations

import numpy as np
import torch

from moeserve.cache.expert_cache import ExpertCache
from moeserve.core import Placement
from moeserve.experts.schedule.inter_layer import InterLayerScheduler
from moeserve.predictors.base import Prediction


class TieredPrefetch(InterLayerScheduler):
    """Two links, each with its own scheduler. What stands on the device, or is on its way there, is
    not wanted of the host tier: it is not read ahead, and its slot there is worth nothing."""

    def __init__(
        self, device: InterLayerScheduler, host: InterLayerScheduler, on_device: ExpertCache
    ) -> None:
        self._device = device
        self._host = host
        self._on_device = on_device

    def looks_ahead(self, layer: int) -> bool:
        device, host = self._device.looks_ahead(layer), self._host.looks_ahead(layer)
        return device or host

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        self._device.prefetch(prediction, protect)
        # What the running step asks of the host tier; what is on the device is none of that.
        asked = Placement(protect.layer, fetch_first=protect.fetch_first, on_cpu=protect.on_cpu)
        self._host.prefetch(self._beyond_device(prediction), asked)

    def _beyond_device(self, prediction: Prediction) -> Prediction:
        left = {}
        for layer, chances in prediction.probabilities.items():
            there = np.array(self._on_device.slots(layer).slots) >= 0
            left[layer] = chances.masked_fill(torch.from_numpy(there), 0.0)
        return Prediction(left)
