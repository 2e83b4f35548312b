"""Targets that pack weights for the native kernels as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moeserve.core import ExpertSpec
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight
from moeserve.models.spec import DenseFfnSpec, ModelSpec, MoeFfnSpec
from moeserve.models.stores import EXPERT_USES, Memory, Store, store_of
from moeserve.models.targets import EMBEDDING, HEAD, Target, TensorTarget, Weight
from moeserve.models.weight_formats import ChooseForm
from moeserve.models.weight_map import Index, Use, WeightRule


class PackedWeightTarget:
    """The weight of a linear layer, packed row by row."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self.takes_codes = weight.form.holds_codes
        self._rows = _numbered(weight.shape[:-1])

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        self.weight.put(self._rows[index][rows], piece)
        return piece

    def put_codes(self, index: Index, codes: Tensor, scales: Tensor) -> None:
        self.weight.put_codes(self._rows[index], codes, scales)


class PackedExpertsTarget:
    """One of the matrices of all experts of a layer, or one of their biases."""

    def __init__(self, experts: PackedExperts, rule: WeightRule) -> None:
        """rule.shape: [(E,) rows, K] of a matrix, [(E,) rows] of a bias."""
        self.weight = experts
        forms = {Use.GATE_UP: experts.gate_up_form, Use.DOWN: experts.down_form}
        self.takes_codes = rule.use in forms and forms[rule.use].holds_codes
        self._put = {
            Use.GATE_UP: experts.put_gate_up,
            Use.DOWN: experts.put_down,
            Use.GATE_UP_BIAS: experts.put_gate_up_bias,
            Use.DOWN_BIAS: experts.put_down_bias,
        }[rule.use]
        first = rule.use is Use.GATE_UP
        self._put_codes = experts.put_gate_up_codes if first else experts.put_down_codes
        shape = rule.shape[:-1] if rule.use in forms else rule.shape
        self._rows = _numbered(shape)
        self._num_rows = shape[-1]

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        ids = self._rows[index][rows].flatten()
        numbers = piece.reshape(len(ids), -1)
        for expert, own in self._by_expert(ids):
            self._put(expert, ids[own] % self._num_rows, numbers[own])
        return piece

    def put_codes(self, index: Index, codes: Tensor, scales: Tensor) -> None:
        ids = self._rows[index].flatten()
        codes, scales = codes.reshape(len(ids), -1), scales.reshape(len(ids), -1)
        for expert, own in self._by_expert(ids):
            self._put_codes(expert, ids[own] % self._num_rows, codes[own], scales[own])

    def _by_expert(self, ids: Tensor) -> Iterator[tuple[int, slice]]:
        """Each expert whose rows are among `ids`, which are in order, and where they stand."""
        experts, counts = torch.unique_consecutive(ids // self._num_rows, return_counts=True)
        stop = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            start, stop = stop, stop + count
            yield expert, slice(start, stop)


def _numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


class PackedTargets:
    """Weights of products packed for the native kernels, the others as tensors.

    Biases of experts stand in the experts' records, and a tied head has a copy of the embedding's
    numbers, because products and the look-up of tokens want different forms.
    """

    def __init__(
        self,
        spec: ModelSpec,
        runtime: NativeRuntime,
        choose: ChooseForm,
        dtype: torch.dtype,
        memory: Memory,
    ) -> None:
        """dtype: of plain tensors whose rules name none."""
        self._spec = spec
        self._runtime = runtime.handle
        self._choose = choose
        self._dtype = dtype
        self._memory = memory

    def make(self, rules: Sequence[WeightRule]) -> dict[str, Target]:
        by_store = rules_by_store(self._spec, rules)
        stores = stores_of(self._spec, rules, self._choose, self._dtype)
        rooms = self._memory.reserve(stores)
        made: dict[str, Target] = {}
        for store in stores:
            made |= self._targets(store, by_store[store.name], rooms[store.name])
        return made

    def finish(self, made: Mapping[str, Target]) -> dict[str, Weight]:
        weights = {name: target.weight for name, target in made.items()}
        if self._spec.tie_word_embeddings and not self._memory.is_filled:
            embedding, head = weights[EMBEDDING], weights[HEAD]
            assert isinstance(embedding, Tensor)
            assert isinstance(head, PackedWeight)
            head.put(torch.arange(len(embedding)), embedding)
        return weights

    def _targets(
        self, store: Store, rules: Sequence[WeightRule], room: Tensor
    ) -> dict[str, Target]:
        """By name. room: the memory of that stored weight."""
        if len(store.forms) == 2:
            spec = expert_spec(self._spec, store.name)
            experts = PackedExperts(self._runtime, spec, *store.forms, room.numpy())
            return {rule.target: PackedExpertsTarget(experts, rule) for rule in rules}
        (rule,) = rules
        if not store.forms:
            return {rule.target: TensorTarget(room)}
        weight = PackedWeight(self._runtime, rule.shape, store.forms[0], room.numpy())
        return {rule.target: PackedWeightTarget(weight)}


def rules_by_store(spec: ModelSpec, rules: Sequence[WeightRule]) -> dict[str, list[WeightRule]]:
    """The rules that fill each stored weight, that of a tied head included."""
    by_store: dict[str, list[WeightRule]] = {}
    for rule in (*rules, *tied_head_rules(spec)):
        by_store.setdefault(store_of(rule), []).append(rule)
    return by_store


def stores_of(
    spec: ModelSpec, rules: Sequence[WeightRule], choose: ChooseForm, dtype: torch.dtype
) -> list[Store]:
    """What packed weights of a model will look like, before any memory is taken.

    dtype: of plain tensors whose rules name none. Raises ModelError for sizes that no form has.
    """

    def store(name: str, own: Sequence[WeightRule]) -> Store:
        if own[0].use in EXPERT_USES:
            by_use = {rule.use: rule for rule in own}
            forms = choose(by_use[Use.GATE_UP]), choose(by_use[Use.DOWN])
            experts = expert_spec(spec, name)
            num_bytes = PackedExperts.bytes_of_record(experts, *forms)
            return Store(name, (experts.num_experts, num_bytes), torch.uint8, forms)
        (rule,) = own
        if not rule.use.is_matrix:
            return Store(name, rule.shape, rule.dtype or dtype)
        form = choose(rule)
        num_bytes = form.layout(torch.Size(rule.shape[:-1]).numel(), rule.shape[-1]).num_bytes
        return Store(name, (num_bytes,), torch.uint8, (form,))

    return [store(name, own) for name, own in rules_by_store(spec, rules).items()]


def tied_head_rules(spec: ModelSpec) -> list[WeightRule]:
    """The head of a model that uses its embedding as one, without parts; [] where there is one."""
    if not spec.tie_word_embeddings:
        return []
    return [WeightRule(HEAD, (spec.vocab_size, spec.hidden_size), (), use=Use.HEAD)]


def expert_spec(spec: ModelSpec, block: str) -> ExpertSpec:
    """The experts behind a block of target names: layers.N.experts, .ffn or .shared."""
    _, layer, kind = block.split(".")
    ffn = spec.layers[int(layer)].ffn
    if kind == "experts":
        assert isinstance(ffn, MoeFfnSpec)
        return ffn.experts
    dense = ffn
    if isinstance(ffn, MoeFfnSpec):
        assert ffn.shared is not None
        dense = ffn.shared.ffn
    assert isinstance(dense, DenseFfnSpec)
    return ExpertSpec(
        num_experts=1,
        hidden_size=spec.hidden_size,
        intermediate_size=dense.intermediate_size,
        activation=dense.activation,
        bias=dense.bias,
    )
