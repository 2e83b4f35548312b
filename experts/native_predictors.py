"""Predictors on the native kernels: one call or two per layer, weights of gates in int8.

A call of numpy or torch costs more than what it computes of a few rows, and a step has many
layers; so all of a layer is one call (`csrc/predictor.h`), which writes into tensors that are there
from the start. Rounding the weights changes less than what predictions are wrong by anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from moeserve.core import Routing
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_linear import NativeLinear
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.predictors import calibration
from moeserve.predictors.base import NOTHING, Prediction, Predictor
from moeserve.predictors.calibration import Calibration
from moeserve.predictors.gate_lookahead import CALIBRATE_EVERY, GateLookahead, gates_ahead
from moeserve.predictors.gates import LayerGate, MakeProduct, RowProduct, check_gates
from moeserve.predictors.layers import LayerRing
from moeserve.predictors.log_linear import BIAS_STEP, MOST_LOGIT, STEPS, Ids
from moeserve.predictors.markov import MarkovPredictor, MarkovShape
from moeserve.predictors.registry import Implementations
from moeserve.predictors.residual_weights import ResidualWeights, TrainedPredictor
from moeserve.predictors.row_links import RowLinks

FORMAT = PackFormat("int8")
#: numbers of outputs, ranks and units are padded to multiples of it (csrc/packed.h)
PANEL_OUTPUTS = 16


def native_implementations(native: NativeRuntime) -> Implementations:
    """Predictors for a model that the native backend computes."""

    def markov(num_experts: Mapping[int, int], depth: int) -> Predictor:
        return MarkovPredictor(num_experts, depth, partial(NativeMarkovModel, native))

    def lookahead(gates: Sequence[LayerGate], depth: int) -> Predictor:
        if all(gate.ranking is None for gate in gates):
            return NativeLookahead(native, gates, depth)
        return GateLookahead(gates, depth, native_products(native))  # ranks by a router's own code

    def residual(trained: TrainedPredictor, gates: Sequence[LayerGate], depth: int) -> Predictor:
        return NativeResidual(native, trained, gates, depth)

    return Implementations(markov, lookahead, residual)


def native_products(native: NativeRuntime) -> MakeProduct:
    """Products of gate predictors that are not native as a whole."""

    def make(weight: Tensor, bias: Tensor | None) -> RowProduct:
        return pack_product(native, weight, bias)

    return make


def pack_product(native: NativeRuntime, weight: Tensor, bias: Tensor | None) -> NativeLinear:
    """weight [N, K], bias [N] or none, to a product [T, K] -> [T, N] float32."""
    packed = PackedWeight(native.handle, tuple(weight.shape), FORMAT)
    packed.put(torch.arange(len(weight)), weight.float())
    return NativeLinear(packed, bias, torch.float32)


class NativeMarkovModel:
    """`predictors.markov.MarkovModel` in one native call for what is seen, one for what is said and
    one for what is learnt (`csrc/markov_model.h`)."""

    def __init__(self, native: NativeRuntime, shape: MarkovShape, out: list[Tensor]) -> None:
        self._runtime = native.handle
        self._model = _native.MarkovModel(
            sizes=list(shape.sizes),
            depth=shape.depth,
            num_context=shape.num_context,
            steps=STEPS.tolist(),
            bias_step=BIAS_STEP,
            most_logit=MOST_LOGIT,
        )
        for place, chances in enumerate(out):
            self._model.set_out(place, chances.numpy())

    def turn(self, links: RowLinks, num_rows: int, top_k: int) -> None:
        self._model.turn(links.rows, links.before, num_rows, top_k)

    def forget(self) -> None:
        self._model.forget()

    def see(self, place: int, ids: Ids) -> bool:
        return self._model.see(place, ids)

    def learn(self) -> None:
        self._model.learn(self._runtime)

    def say(self, place: int) -> None:
        self._model.say(self._runtime, place)


class _Results:
    """Where the native code writes what it predicts from each layer, and what is returned of it."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.places = {layer: (place, NOTHING) for place, layer in enumerate(layers)}

    def add(self, layer: int, ahead: Sequence[int], num_experts: int) -> NDArray[np.float32]:
        """[D, E], for the D layers of `ahead`."""
        chances = torch.zeros(len(ahead), num_experts)
        prediction = Prediction(dict(zip(ahead, chances.unbind(), strict=True)))
        self.places[layer] = (self.places[layer][0], prediction)
        array: NDArray[np.float32] = chances.numpy()
        return array


class NativeLookahead(Predictor):
    """`GateLookahead` for routers that rank by their logits. A prediction holds until the next one
    from the same layer."""

    name = "gate_lookahead"

    def __init__(self, native: NativeRuntime, gates: Sequence[LayerGate], depth: int) -> None:
        """As `GateLookahead`."""
        check_gates(gates)
        of = {gate.layer: gate for gate in gates}
        ring = LayerRing({gate.layer: gate.num_experts for gate in gates}, depth)
        first, start = gates[0], Calibration.guessed()
        self._runtime = native.handle
        self._predictor = _native.LookaheadPredictor(
            num_layers=len(gates),
            num_experts=first.num_experts,
            hidden=first.weight.shape[1],
            top_k=first.top_k,
            bins_per_unit=calibration.BINS_PER_UNIT,
            half_life_tokens=calibration.HALF_LIFE_TOKENS,
            neighbour=calibration.NEIGHBOUR,
            least_chance=calibration.LEAST_CHANCE,
            every_steps=CALIBRATE_EVERY,
            hits=start.hits.tolist(),
            counts=start.counts.tolist(),
        )
        results = _Results(ring.layers)
        for place, layer in enumerate(ring.layers):
            if ahead := ring.ahead(layer):
                weight, bias = gates_ahead(of[layer], [of[n] for n in ahead])
                product = pack_product(native, weight, bias)
                out = results.add(layer, ahead, first.num_experts)
                self._predictor.set_view(place, product.matrix, out)
        self._places = results.places

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class; says nothing of the next token's layers."""
        place, prediction = self._places[layer]
        said = self._predictor.predict(self._runtime, place, x, routing.ids)
        return prediction if said else NOTHING


class NativeResidual(Predictor):
    """`GateResidual`. A prediction holds until the next one from the same layer."""

    name = "gate_residual"

    def __init__(
        self,
        native: NativeRuntime,
        trained: TrainedPredictor,
        gates: Sequence[LayerGate],
        depth: int,
    ) -> None:
        """As `GateResidual`."""
        check_gates(gates)
        ring = LayerRing({gate.layer: gate.num_experts for gate in gates}, depth)
        num_experts, hidden = gates[0].num_experts, gates[0].weight.shape[1]
        self._runtime = native.handle
        self._predictor = _native.ResidualPredictor(len(gates), num_experts, hidden)
        results = _Results(ring.layers)
        behind: ResidualWeights | None = None
        for place, layer in enumerate(ring.layers):
            own = trained.views.get(layer)
            if own is not None:
                ahead = ring.ahead(layer)[: trained.shape.depth]
                out = results.add(layer, ahead, num_experts)
                self._set_view(native, place, own, behind, len(ahead) * num_experts, out)
            elif behind is not None:
                product = pack_product(native, _padded(behind.past_next, 0), None)
                self._predictor.set_last(place, product.matrix)
            behind = own
        self._places = results.places

    def _set_view(
        self,
        native: NativeRuntime,
        place: int,
        own: ResidualWeights,
        behind: ResidualWeights | None,
        num_outputs: int,
        out: NDArray[np.float32],
    ) -> None:
        """num_outputs: of those that were trained; fewer layers may be looked at."""
        hidden = own.past.shape[1]
        linear, here = _padded(own.linear[:num_outputs], 0), _padded(own.here, 0)
        parts = [linear[:, :hidden], here[:, :hidden], _padded(own.past, 0)]
        next_rank = 0
        if behind is not None:
            parts.append(_padded(behind.past_next, 0))
            next_rank = len(parts[-1])
        units = _padded(own.expert_in, 1)  # [E, U, H]
        unit_bias = _padded(own.expert_bias, 1)
        outputs = own.expert_out[..., :num_outputs]
        bias = torch.cat([_padded(own.bias[:num_outputs], 0), _padded(own.context_bias, 0)])
        self._predictor.set_looking(
            place=place,
            products=pack_product(native, torch.cat(parts), None).matrix,
            expert_in=pack_product(native, units.flatten(0, 1), unit_bias.flatten()).matrix,
            rank=len(here),
            next_rank=next_rank,
            bias=bias.numpy(),
            chosen=torch.cat([linear[:, hidden:], here[:, hidden:]]).T.contiguous().numpy(),
            context_out=_padded(_padded(own.context_out[:, :num_outputs], 0), 1).numpy(),
            expert_out=_padded(_padded(outputs, 1), 2).numpy(),
            out=out,
        )

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._predictor.begin_step(previous_rows)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class; says nothing of the next token's layers."""
        place, prediction = self._places[layer]
        said = self._predictor.predict(self._runtime, place, x, routing.ids, routing.weights)
        return prediction if said else NOTHING


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """Zeros behind, up to a multiple of PANEL_OUTPUTS; contiguous."""
    missing = -tensor.shape[dim] % PANEL_OUTPUTS
    behind = (0, 0) * (tensor.dim() - 1 - dim)
    return pad(tensor, (*behind, 0, missing)).contiguous()
