"""One MoE layer in bfloat16 by kt-kernel's own extension, in a venv that has it.

The package's Python wrappers want pinned memory, and with it a CUDA device; the extension below
them does not, so it is driven here as they drive it.
"""

from __future__ import annotations

from typing import Any

import kt_kernel
import torch
from kt_kernel import kt_kernel_ext as extension
from torch import Tensor

from peers.layer_work import (
    Experts,
    LayerShape,
    LayerWeights,
    random_layer,
    relative_error,
    time_layer,
)
from peers.measure import Skip

ROWS = (1, 16)
CLASSES = ("AMXBF16_MOE", "AVX2BF16_MOE")  # the first that this processor's variant has


@torch.inference_mode()
def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: threads, shape. By rows, in milliseconds."""
    names = [name for name in CLASSES if hasattr(extension.moe, name)]
    if not names:
        raise Skip(f"kt-kernel's {kt_kernel.__cpu_variant__} variant has no bf16 experts")
    shape = LayerShape(**settings["shape"])
    weights = random_layer(shape, torch.bfloat16)
    times: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    for class_name in names:
        layer = KtLayer(class_name, shape, weights, settings["threads"])
        name = f"kt-kernel {class_name}"
        errors[name] = relative_error(layer, weights, shape)
        times[name] = {str(n): time_layer(layer, shape, 1, n, torch.bfloat16) for n in ROWS}
    return {
        "layer": times,
        "relative_error": errors,
        "notes": {"kt-kernel": kt_kernel.__version__, "variant": kt_kernel.__cpu_variant__},
    }


class KtLayer:
    """A Call of peers.layer_work. Keeps the tensors whose addresses the extension has."""

    def __init__(
        self, class_name: str, shape: LayerShape, weights: LayerWeights, threads: int
    ) -> None:
        pool = extension.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [threads]
        self.infer = extension.CPUInfer(pool)
        on_gpu = torch.zeros(shape.num_experts, dtype=torch.bool)
        gate, up = weights.gate_up.chunk(2, dim=1)
        self.kept = [on_gpu, gate.contiguous(), up.contiguous(), weights.down]
        config = extension.moe.MOEConfig(
            shape.num_experts,
            shape.top_k,
            shape.hidden_size,
            shape.intermediate_size,
            on_gpu.data_ptr(),
        )
        config.layer_idx = 0
        config.pool = self.infer.backend_
        config.max_len = max(ROWS)
        config.gate_projs, config.up_projs, config.down_projs = (
            [[expert.data_ptr() for expert in tensor]] for tensor in self.kept[1:]
        )
        no_scales = [[0] * shape.num_experts]
        config.gate_scales = config.up_scales = config.down_scales = no_scales
        self.moe = getattr(extension.moe, class_name)(config)
        order = torch.arange(shape.num_experts)
        self.infer.submit(self.moe.load_weights_task(order.data_ptr()))
        self.infer.sync(0)

    def __call__(self, layer: int, x: Tensor, chosen: Experts) -> Tensor:
        num_rows = torch.tensor([len(x)], dtype=torch.int32)
        out = torch.empty_like(x)
        task = self.moe.forward_task(
            num_rows.data_ptr(),
            chosen.ids.shape[1],
            chosen.ids.data_ptr(),
            chosen.weights.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            False,
        )
        self.infer.submit(task)
        self.infer.sync(0)
        return out
