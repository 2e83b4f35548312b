"""Experts through intel-extension-for-pytorch (IPEX) 2.8: its GatedMLPMOE, one per layer.

What the package (2.8.0) offers and does, as found by trying it:

- Gated SiLU without biases, gate rows before up rows, which is our own order of weights.
- It repacks weights ("prepack") for speed. bfloat16, in the memory of the weights it is given:
  right where hidden and intermediate size are both multiples of 64. Where one of them is not, the
  module takes the products to be packed alike, and gives zeros or fails with an AttributeError.
  float32: right at every size tried. float16: only on processors with AVX-512 FP16. What is not
  packed takes IPEX's plain path, which was right everywhere.
- It weighs and adds up in the compute dtype, over experts, in a Python loop. We give it every
  (token, choice) pair as a row of its own with weight 1 and sum in float32 ourselves: a cold expert
  can then be left out, and the sum is as exact as that of the other backends.
- Its kernels are chosen by the number of rows: `IpexBackend` says what that means for a row's bits.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from moeserve.core import ConfigError, ExpertSpec, ExpertWeights, ModelError
from moeserve.cpu_backend.backend import Demands, ExpertJob
from moeserve.cpu_backend.grouping import weighted_sum
from moeserve.cpu_backend.one_thread import OneThreadBackend
from moeserve.cpu_backend.packing import PackedExperts

PACKAGE = "intel-extension-for-pytorch"
INSTALL = "pip install 'moeserve[ipex]', in an environment of its own: it wants torch 2.8"


def ipex_version() -> str | None:
    """Of the package that is installed, None where there is none. Imports nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def why_not_usable() -> str | None:
    """Why the package cannot be imported, and the fix; None: it can be.

    Beside another torch than its own it would end the process (`os._exit`), so it is not tried.
    """
    found = ipex_version()
    if found is None:
        return f"{PACKAGE} is not installed: {INSTALL}"
    if _minor(found) != _minor(torch.__version__):
        return f"{PACKAGE} {found} does not fit torch {torch.__version__}: {INSTALL}"
    return None


def _minor(release: str) -> list[str]:
    return release.split(".")[:2]


@dataclass(frozen=True)
class Layer:
    spec: ExpertSpec
    module: Any  # GatedMLPMOE


class IpexBackend(OneThreadBackend):
    """A row's bits may depend on the other rows of its job: IPEX chooses kernels by their number.

    tests/cpu_backend/test_ipex_backend.py prints where they did, docs/architecture.md keeps it.
    """

    name = "ipex"

    def __init__(self) -> None:
        """Raises ConfigError where the package is not there. Importing it changes the process:
        it replaces some of torch's operators."""
        super().__init__()
        missing = why_not_usable()
        if missing is not None:
            raise ConfigError(f"cpu_backend: {missing}", field="cpu_backend")
        self._ipex = importlib.import_module("intel_extension_for_pytorch")
        self._layers: dict[int, Layer] = {}

    @classmethod
    def lacks(cls, demands: Demands) -> str | None:
        if demands.quantized:
            return "it reads plain tensors, not packed or quantised weights"
        for spec in demands.experts:
            if spec.bias or spec.activation not in ("silu", "swish"):
                kind = f"{spec.activation}{' with biases' if spec.bias else ''}"
                return f"its experts are SiLU without biases, the model's {kind}"
        return why_not_usable()

    def add_layer(
        self, layer: int, spec: ExpertSpec, weights: ExpertWeights | PackedExperts
    ) -> None:
        """Copies the weights: packing would overwrite those of the caller."""
        assert isinstance(weights, ExpertWeights), "weights are packed for the native backend only"
        if layer in self._layers:
            raise ModelError(f"layer {layer}: its experts were added before")
        module = self._ipex.llm.modules.GatedMLPMOE(
            weights.gate_up.clone(),
            weights.down.clone(),
            use_prepack=_packs_rightly(spec, weights.down.dtype),
        )
        self._layers[layer] = Layer(spec, module)

    @torch.inference_mode()
    def run(self, job: ExpertJob) -> Tensor:
        layer = self._layers[job.layer]
        ids = job.routing.ids
        num_tokens, top_k = ids.shape
        if job.experts is None:
            wanted = torch.arange(ids.numel())
        else:
            wanted = torch.isin(ids.flatten(), torch.tensor(job.experts, dtype=ids.dtype)).nonzero()
        pairs = wanted.flatten()  # pair t*K + k is token t's k-th choice
        rows = job.x.index_select(0, pairs.div(top_k, rounding_mode="floor"))  # [P, H]
        pair_ids = ids.flatten()[pairs].unsqueeze(1)  # [P, 1]
        out = job.x.new_zeros(num_tokens * top_k, layer.spec.hidden_size)
        out.index_copy_(0, pairs, _experts_of_rows(layer.module, rows, pair_ids))
        per_choice = out.view(num_tokens, top_k, layer.spec.hidden_size)
        return weighted_sum(per_choice, job.routing.weights).to(job.out_dtype)


def _packs_rightly(spec: ExpertSpec, dtype: torch.dtype) -> bool:
    """Whether IPEX 2.8's packed form of such experts can be trusted; see the top of this file."""
    if dtype is torch.bfloat16:
        return spec.hidden_size % 64 == 0 and spec.intermediate_size % 64 == 0
    return dtype is torch.float32


def _experts_of_rows(module: Any, rows: Tensor, ids: Tensor) -> Tensor:
    """rows [P, H] and the expert of each, [P, 1], to what that expert makes of it, [P, H]."""
    ones = torch.ones(len(rows), 1)

    def routing(**_: object) -> tuple[Tensor, Tensor]:
        return ones, ids

    # The third argument is top_k, the fourth would be the router's logits: nothing reads them.
    result: Tensor = module(rows, False, 1, rows, False, custom_routing_function=routing)
    return result
