"""Where loaded weights go: into tensors, or packed for the native kernels as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ModelError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight, PackFormat
from moeserve.models.spec import DenseFfnSpec, ModelSpec, MoeFfnSpec
from moeserve.models.weight_formats import ChooseForm
from moeserve.models.weight_map import Index, Use, WeightRule

#: what a rule's target becomes
Weight: TypeAlias = Tensor | PackedWeight | PackedExperts
EXPERT_USES = (Use.GATE_UP, Use.DOWN)
EMBEDDING, HEAD = "embedding", "head"


class Target(Protocol):
    """One target of a rule while it is filled."""

    @property
    def weight(self) -> Weight:
        """What `put` fills."""

    @property
    def takes_codes(self) -> bool:
        """Whether parts give their codes, by `put_codes`, instead of numbers."""

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        """Stores piece, which is rows `rows` of the region `index` of the rule's shape.

        Returns the numbers as far as they can be looked at, for a check.
        """

    def put_codes(self, index: Index, codes: Tensor, scales: Tensor) -> None:
        """Stores the region `index`: what `Part.codes` took of a checkpoint."""


class Targets(Protocol):
    """Makes the targets of a model's rules."""

    def make(self, rules: Sequence[WeightRule]) -> dict[str, Target]:
        """Allocates, by target name. ModelError: there is no memory, or no form for one of them."""

    def finish(self, made: Mapping[str, Target]) -> dict[str, Weight]:
        """The model's weights, after everything has been put."""


class TensorTarget:
    """A tensor."""

    takes_codes = False

    def __init__(self, tensor: Tensor) -> None:
        self.weight = tensor

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        region = self.weight[index]
        if region.dim() == 0:
            region, piece = region.reshape(1), piece.reshape(1)
        stored = region[rows]
        stored.copy_(piece)
        return stored

    def put_codes(self, index: Index, codes: Tensor, scales: Tensor) -> None:
        raise AssertionError("a tensor keeps no codes")


@dataclass(frozen=True)
class TensorTargets:
    """Every weight a tensor, in `dtype` unless its rule names another, on `device`.

    tied_head: the model uses its embedding [V, H] as its head.
    """

    dtype: torch.dtype
    device: torch.device
    tied_head: bool = False

    def make(self, rules: Sequence[WeightRule]) -> dict[str, Target]:
        return {rule.target: TensorTarget(self._allocate(rule)) for rule in rules}

    def finish(self, made: Mapping[str, Target]) -> dict[str, Weight]:
        weights = {name: target.weight for name, target in made.items()}
        if self.tied_head:
            weights[HEAD] = weights[EMBEDDING]
        return weights

    def _allocate(self, rule: WeightRule) -> Tensor:
        try:
            return torch.empty(rule.shape, dtype=rule.dtype or self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on the CPU
            raise ModelError(
                f"{rule.target}: no memory on {self.device} for {list(rule.shape)}: {error}",
                hint="use a smaller dtype, a smaller model or a device with more memory",
            ) from error


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
    """One of the two matrices of all experts of a layer. shape: [(E,) rows, K]."""

    def __init__(self, experts: PackedExperts, use: Use, shape: tuple[int, ...]) -> None:
        self.weight = experts
        first = use is Use.GATE_UP
        self.takes_codes = (experts.gate_up_form if first else experts.down_form).holds_codes
        self._put = experts.put_gate_up if first else experts.put_down
        self._put_codes = experts.put_gate_up_codes if first else experts.put_down_codes
        self._rows = _numbered(shape[:-1])
        self._num_rows = shape[-2]

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


@dataclass(frozen=True)
class Store:
    """What one stored weight looks like.

    forms: none for a plain tensor in `dtype`; one for a packed matrix, whose shape is [bytes]; for
    experts those of gate and up and of down, [E, bytes of a record].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    forms: tuple[PackFormat, ...] = ()


def store_of(rule: WeightRule) -> str:
    """The stored weight that a rule fills: experts have one for both of their matrices."""
    return block_of(rule.target) if rule.use in EXPERT_USES else rule.target


class Memory(Protocol):
    """Where packed weights lie."""

    @property
    def is_filled(self) -> bool:
        """Whether `reserve` gives weights that are there already, and nothing is to be put."""

    def reserve(self, stores: Sequence[Store]) -> Mapping[str, Tensor]:
        """Room for each, by name. Raises ModelError where there is none."""


class HeapMemory:
    """This process's own memory, in huge pages where the system allows."""

    is_filled = False

    def reserve(self, stores: Sequence[Store]) -> dict[str, Tensor]:
        return {store.name: self._allocate(store) for store in stores}

    def _allocate(self, store: Store) -> Tensor:
        try:
            if not store.forms:
                return torch.empty(store.shape, dtype=store.dtype)
            num_bytes = torch.Size(store.shape).numel()
            return torch.from_numpy(_native.allocate(num_bytes)).view(store.shape)
        except (MemoryError, RuntimeError) as error:
            raise ModelError(
                f"{store.name}: no memory for {list(store.shape)} {store.dtype}: {error}",
                hint="use a smaller dtype, --quantize, or a smaller model",
            ) from error


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
        self._biases: set[str] = set()

    def make(self, rules: Sequence[WeightRule]) -> dict[str, Target]:
        blocks = expert_blocks(rules)
        in_records = {
            r.target for r in rules if r.use is Use.PLAIN and block_of(r.target) in blocks
        }
        self._biases = in_records
        all_rules = [*rules, *tied_head_rules(self._spec)]
        stores = [self._experts_store(block, *pair) for block, pair in blocks.items()]
        stores += [
            self._store(rule)
            for rule in all_rules
            if rule.use not in EXPERT_USES and rule.target not in in_records
        ]
        rooms = dict(self._memory.reserve(stores))
        made: dict[str, Target] = {}
        for store in stores:
            if len(store.forms) == 2:
                experts = self._experts(store, rooms[store.name])
                for rule in blocks[store.name]:
                    made[rule.target] = PackedExpertsTarget(experts, rule.use, rule.shape)
        for rule in all_rules:
            if rule.target in in_records:
                if not self._memory.is_filled:
                    made[rule.target] = TensorTarget(torch.empty(rule.shape, dtype=torch.float32))
            elif rule.use not in EXPERT_USES:
                made[rule.target] = self._target(rule, rooms[rule.target])
        return made

    def finish(self, made: Mapping[str, Target]) -> dict[str, Weight]:
        weights = {name: target.weight for name, target in made.items()}
        if self._memory.is_filled:
            return weights
        if self._spec.tie_word_embeddings:
            embedding, head = weights[EMBEDDING], weights[HEAD]
            assert isinstance(embedding, Tensor)
            assert isinstance(head, PackedWeight)
            head.put(torch.arange(len(embedding)), embedding)
        biases = {name: weights.pop(name) for name in self._biases}
        for block in {block_of(name) for name in biases}:
            _put_biases(block, weights, biases)
        return weights

    def _experts_store(self, block: str, gate_up: WeightRule, down: WeightRule) -> Store:
        spec = expert_spec(self._spec, block)
        forms = self._choose(gate_up), self._choose(down)
        shape = (spec.num_experts, PackedExperts.bytes_of_record(spec, *forms))
        return Store(block, shape, torch.uint8, forms)

    def _store(self, rule: WeightRule) -> Store:
        if rule.use is Use.PLAIN:
            return Store(rule.target, rule.shape, rule.dtype or self._dtype)
        form = self._choose(rule)
        num_bytes = form.layout(torch.Size(rule.shape[:-1]).numel(), rule.shape[-1]).num_bytes
        return Store(rule.target, (num_bytes,), torch.uint8, (form,))

    def _experts(self, store: Store, room: Tensor) -> PackedExperts:
        spec = expert_spec(self._spec, store.name)
        gate_up, down = store.forms
        return PackedExperts(self._runtime, spec, gate_up, down, room.numpy())

    def _target(self, rule: WeightRule, room: Tensor) -> Target:
        if rule.use is Use.PLAIN:
            return TensorTarget(room)
        form = self._choose(rule)
        return PackedWeightTarget(PackedWeight(self._runtime, rule.shape, form, room.numpy()))


def _put_biases(block: str, weights: Mapping[str, Weight], biases: Mapping[str, Weight]) -> None:
    """Moves the biases of a block of experts [E, …], or of one dense FFN […], into its records."""
    (experts,) = {
        id(weight): weight
        for name, weight in weights.items()
        if isinstance(weight, PackedExperts) and block_of(name) == block
    }.values()
    found: dict[str, Tensor] = {}
    for name, bias in biases.items():
        if block_of(name) == block:
            assert isinstance(bias, Tensor)
            kind = name.removeprefix(f"{block}.").partition("_bias")[0].partition(".bias")[0]
            found[kind] = bias.reshape(experts.spec.num_experts, -1)
    experts.put_biases(found["gate_up"], found["down"])


def tied_head_rules(spec: ModelSpec) -> list[WeightRule]:
    """The head of a model that uses its embedding as one, without parts; [] where there is one."""
    if not spec.tie_word_embeddings:
        return []
    return [WeightRule(HEAD, (spec.vocab_size, spec.hidden_size), (), use=Use.HEAD)]


def block_of(target: str) -> str:
    """layers.3.experts.gate_up -> layers.3.experts"""
    return ".".join(target.split(".")[:3])


def expert_blocks(rules: Sequence[WeightRule]) -> dict[str, tuple[WeightRule, WeightRule]]:
    """The rules of gate and up and of down, by the block that both fill."""
    gate_up = {block_of(rule.target): rule for rule in rules if rule.use is Use.GATE_UP}
    down = {block_of(rule.target): rule for rule in rules if rule.use is Use.DOWN}
    assert gate_up.keys() == down.keys(), "experts have both halves"
    return {block: (rule, down[block]) for block, rule in gate_up.items()}


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
