"""Which form each weight takes on the native backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch

from moeserve.config import ModelConfig
from moeserve.cpu_backend.packing import FormatName, PackFormat, dense_format
from moeserve.models.spec import ModelSpec, Quantization
from moeserve.models.weight_map import Use, WeightRule

INT4_GROUPS = (32, 64, 128)
#: the form of a rule's target, for every use that is a matrix
ChooseForm: TypeAlias = Callable[[WeightRule], PackFormat]

#: what they are called in notes
USE_NAMES: Mapping[Use, str] = MappingProxyType(
    {
        Use.GATE_UP: "gate and up",
        Use.DOWN: "down",
        Use.PRODUCT: "attention",
        Use.HEAD: "head",
        Use.SCORES: "routers",
    }
)


@dataclass(frozen=True)
class WeightFormats:
    """How packed weights are stored, by what they are for.

    groups: where `quantize_group` is auto, the group of each target that has one of its own.
    rounds: weights are to be rounded. Then fp8 codes are, too; mxfp4 codes are kept in any case,
    since nothing is smaller, and rounding them again would only lose.
    codes_weight_only: whether products with a checkpoint's own codes leave their inputs alone.
    """

    product: PackFormat
    experts: PackFormat
    head: PackFormat
    scores: PackFormat
    rounds: bool = False
    codes_weight_only: bool = True
    groups: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, rule: WeightRule) -> PackFormat:
        """Raises KeyError for what is no matrix."""
        stored = stored_codes(rule)
        keeps = stored == "mxfp4" or not self.rounds
        if stored is not None and keeps and rule.use is not Use.SCORES:
            return PackFormat(stored, weight_only=self.codes_weight_only)
        form = {
            Use.PRODUCT: self.product,
            Use.GATE_UP: self.experts,
            Use.DOWN: self.experts,
            Use.HEAD: self.head,
            Use.SCORES: self.scores,
        }[rule.use]
        if form.name == "int4" and rule.target in self.groups:
            return PackFormat("int4", self.groups[rule.target], form.zero_points, form.weight_only)
        return form


def weight_formats(config: ModelConfig, dtype: torch.dtype) -> WeightFormats:
    """How `config` wants packed weights of a model that computes in `dtype` stored.

    Where `quantize_group` is auto, `groups` are left to whoever can look at the weights. Raises
    ModelError for a dtype that is not kept.
    """
    scores = PackFormat("float32")  # small, and a rounded score can choose another expert
    rounds = config.quantize != "none"
    integers = rounds if config.quantize_activations is None else config.quantize_activations
    weight_only = not integers
    if not rounds:
        plain = dense_format(dtype)
        return WeightFormats(plain, plain, plain, scores, codes_weight_only=weight_only)
    int8 = PackFormat("int8", weight_only=weight_only)
    if config.quantize == "int8":
        return WeightFormats(int8, int8, int8, scores, True, weight_only)
    group = config.quantize_group
    coarsest = group if isinstance(group, int) else max(INT4_GROUPS)
    int4 = PackFormat("int4", coarsest, config.quantize_zero_points, weight_only)
    # The head's errors go straight into the logits, and it is a small part of an MoE.
    head = int8
    if config.quantize_head == "int4":
        finest = group if isinstance(group, int) else min(INT4_GROUPS)  # a tied one has no choice
        head = PackFormat("int4", finest, config.quantize_zero_points, weight_only)
    return WeightFormats(int4, int4, head, scores, True, weight_only)


def stored_codes(rule: WeightRule) -> FormatName | None:
    """The format in which the checkpoint holds all of a target, None: not all in one."""
    forms = {part.codes.form if part.codes is not None else None for part in rule.parts}
    return forms.pop() if len(forms) == 1 else None


def describe_forms(rules: Iterable[WeightRule], choose: ChooseForm) -> str:
    """The formats by use, for a note: `gate and up: int4/64, down: int4/32 (3), int4/64 (5), …`."""
    found: dict[Use, Counter[str]] = {use: Counter() for use in USE_NAMES}
    for rule in rules:
        if rule.use.is_matrix:
            found[rule.use][choose(rule).describe()] += 1
    parts = []
    for use, forms in found.items():
        several = len(forms) > 1
        names = [f"{name} ({count})" if several else name for name, count in sorted(forms.items())]
        if names:
            parts.append(f"{USE_NAMES[use]}: {', '.join(names)}")
    return "; ".join(parts)


def describe_quantization(
    spec: ModelSpec, rules: Iterable[WeightRule], choose: ChooseForm | None, dtype: torch.dtype
) -> str | None:
    """What became of a quantised checkpoint's codes, for a note; None where it has none.

    choose: None where nothing is packed.
    """
    if spec.quantization is Quantization.NONE:
        return None
    kept, changed = 0, Counter[str]()
    for rule in rules:
        if not any(len(part.names) > 1 for part in rule.parts):  # names of codes and scales
            continue
        packed = choose is not None and rule.use.is_matrix
        name = choose(rule).name if choose is not None and packed else _name(dtype)
        if stored_codes(rule) == name:
            kept += 1
        else:
            changed[name] += 1
    said = [f"kept in {kept} weights"] if kept else []
    said += [f"{count} weights converted to {name}" for name, count in sorted(changed.items())]
    block = spec.quantization_block
    if choose is not None and block is not None and block[1] % 128:
        said.append(f"blocks of {block[0]} x {block[1]}; kept are those of 128 columns or more")
    return f"{spec.quantization.value}: {', '.join(said)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
