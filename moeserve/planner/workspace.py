"""Memory that the engine keeps to compute in, for steps of up to so many rows.

kernels     buffers of the native kernels (cpu_backend/csrc: runtime.h, expert_list.cpp, moe.cpp,
            linear.cpp, decoder.cpp), which grow to the largest step and stay
choices     what each choice of a token gave, where experts are computed part by part
            (cpu_backend/native_parts.py): they are added up when all are there; and the rows as
            experts multiply them, kept from part to part
tensors     of a step, which live for moments, and whose memory malloc keeps for the next ones
latent      tensors of latent attention (models/attention.py), for every head as wide as a latent;
            other attention has them in buffers of the kernels
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeserve.models.layers import ROWS_AT_ONCE
from moeserve.planner.shapes import LayerShape, ModelShape

#: outputs of a panel, and what a thread has at once where rows are many: rows and panels of a
#: linear layer (linear.cpp); panels of gate and up (expert_list.cpp) and of down (moe.cpp)
PANEL_OUTPUTS, LINEAR_ROWS, LINEAR_PANELS, GATE_UP_PANELS, DOWN_PANELS = 16, 128, 12, 24, 20
#: experts per thread from which on a thread computes all of one's gate and up; rows that are many
EXPERTS_PER_THREAD, MANY_ROWS = 4, 8
#: of all rows, those that one routed expert has at most, in practice; and that are computed at once
#: of any (expert_list.cpp)
EXPERT_SHARE, GROUP_ROWS = 0.25, 256
#: products of an FFN that every row takes, by their names in a shape: dense ones, shared experts
EVERY_ROW = ("ffn", "shared")
#: what multiplies rows in bfloat16; others widen them to float32
BF16_LEVELS = ("avx512_bf16", "amx", "scalar_bf16")
#: formats that rows are rounded to int8 for
ROUNDED_FORMS = ("int8", "int4", "mxfp4")
FLOAT_BYTES = 4
HUGE_PAGE_BYTES = 2 << 20
#: as large as the stream, and there at the same time as it
STREAM_TENSORS = 3
#: code and tables of torch's own products, which nothing else makes it load: as on our test machine
TORCH_PRODUCT_BYTES = 13 << 19


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is computed at once.

    rows: tokens of the largest step. sampled: rows that choose a token in one step. in_parts:
    whether the experts of a layer are computed as they become readable, not in one call. isa: of
    the kernels.
    """

    rows: int
    sampled: int
    in_parts: bool
    num_threads: int
    isa: str


@dataclass(frozen=True)
class _Experts:
    """A list of experts in one call. rows: that come in. pairs: each with one of its experts.
    most_rows: of one expert, at once. in_parts: whether not all of them need be in the call, and
    each choice goes apart."""

    form: str
    hidden: int
    inner: int
    rows: int
    pairs: int
    most_rows: int
    num_experts: int
    in_parts: bool = False


@dataclass(frozen=True)
class _Call:
    """Bytes of each buffer that one call takes, by the names of runtime.h. Tuples: of the first
    list of experts and of the second."""

    input: int = 0
    hidden: tuple[int, int] = (0, 0)
    activated: tuple[int, int] = (0, 0)
    per_thread: int = 0
    rows: tuple[int, int, int] = (0, 0, 0)  # normed, projected, mixed

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.input, *self.hidden, *self.activated, *self.rows)


def kernel_bytes(shape: ModelShape, steps: Steps) -> int:
    """Each buffer is as large as the call that needs most of it."""
    calls = [call for layer in shape.layers for call in _calls(layer, shape, steps)]
    buffers: int = sum(max(sizes) for sizes in zip(*(call.sizes for call in calls), strict=True))
    return buffers + steps.num_threads * max(call.per_thread for call in calls)


def choices_bytes(shape: ModelShape, steps: Steps) -> int:
    """A float row of each choice, in huge pages; and each row once."""
    routed = [layer.experts for layer in shape.layers if layer.experts]
    if not steps.in_parts or not routed:
        return 0
    numbers = steps.rows * shape.hidden_size
    choices = numbers * max(experts.top_k for experts in routed) * FLOAT_BYTES
    rows = numbers * max(_row_bytes(experts.form, steps.isa) for experts in routed)
    return choices + -choices % HUGE_PAGE_BYTES + rows


def tensor_bytes(shape: ModelShape, steps: Steps) -> int:
    """The stream, its norm and what is added to it, in parts its sums apart from those of a shared
    expert; logits of the rows that choose."""
    count = STREAM_TENSORS + steps.in_parts
    stream = count * steps.rows * shape.hidden_size * shape.number_bytes
    return stream + steps.sampled * shape.vocab_size * FLOAT_BYTES


def latent_bytes(shape: ModelShape, steps: Steps) -> int:
    """Of the widest layer, and what torch takes to multiply head by head."""
    widest = max((_latent_numbers(s, steps.rows) for s in shape.layers if _is_latent(s)), default=0)
    return widest * shape.number_bytes + TORCH_PRODUCT_BYTES if widest else 0


def _latent_numbers(layer: LayerShape, num_rows: int) -> int:
    """Of every tensor of `LatentAttention`, also of those that others follow: sizes differ, and
    malloc leaves a hole for each. Only parts of the rows go through the ups at once."""
    attention = layer.attention
    ups = {matrix.name: matrix for matrix in layer.products if matrix.per_head}
    key = ups["key_up"].rows // attention.num_heads
    turned = attention.score_width - attention.value_width
    # of a head: as projected; as they meet the latents; what comes out; its value
    widths = (key + turned, attention.score_width, attention.value_width, ups["value_up"].cols)
    numbers = num_rows * (attention.num_heads * sum(widths) + attention.kv_width)
    part = min(num_rows, ROWS_AT_ONCE) * attention.num_heads * (key + attention.value_width)
    return numbers + part


def _is_latent(layer: LayerShape) -> bool:
    return any(matrix.per_head for matrix in layer.products)


def _calls(layer: LayerShape, shape: ModelShape, steps: Steps) -> Iterator[_Call]:
    rows, item = steps.rows, shape.number_bytes
    qkv, mixed = 0, shape.hidden_size
    if not _is_latent(layer):  # else they are tensors
        qkv = sum(m.rows for m in layer.products if m.name == "qkv.weight")
        mixed = max(layer.attention.num_heads * layer.attention.value_width, mixed)
    widest = max((_row_bytes(m.form, steps.isa) * m.cols for m in layer.products), default=0)
    yield _Call(
        input=rows * widest,
        per_thread=min(rows, LINEAR_ROWS) * LINEAR_PANELS * PANEL_OUTPUTS * FLOAT_BYTES,
        rows=(rows * shape.hidden_size * item, rows * qkv * item, rows * mixed * item),
    )
    lists = list(_lists(layer, shape, steps))
    if steps.in_parts:  # one call for shared experts, one for a part of the routed ones
        for own in lists:
            yield _run([own], steps)
    elif lists:
        yield _run(lists, steps)


def _lists(layer: LayerShape, shape: ModelShape, steps: Steps) -> Iterator[_Experts]:
    rows, hidden = steps.rows, shape.hidden_size
    if (experts := layer.experts) is not None:
        pairs, inner = rows * experts.top_k, experts.spec.intermediate_size
        yield _Experts(
            form=experts.form,
            hidden=hidden,
            inner=inner,
            rows=rows,
            pairs=pairs,
            most_rows=min(GROUP_ROWS, round(rows * EXPERT_SHARE)),
            num_experts=experts.spec.num_experts,
            in_parts=steps.in_parts,
        )
    for matrix in layer.products:
        if matrix.name in EVERY_ROW:  # gate, up and down together, of as many columns
            yield _Experts(
                form=matrix.form,
                hidden=hidden,
                inner=matrix.rows // 3,
                rows=rows,
                pairs=rows,
                most_rows=min(GROUP_ROWS, rows),
                num_experts=1,
            )


def _run(lists: list[_Experts], steps: Steps) -> _Call:
    """What run_experts (moe.cpp) takes for lists of experts that it computes together."""
    threads, isa = steps.num_threads, steps.isa
    hidden, activated, alone = [0, 0], [0, 0], 0
    for place, own in enumerate(lists):
        row_bytes = _row_bytes(own.form, isa)
        hidden[place] = own.pairs * own.inner * row_bytes
        if row_bytes < FLOAT_BYTES:  # else they need not be rounded, and stand where they belong
            enough = EXPERTS_PER_THREAD * threads
            together = own.pairs
            if own.num_experts >= enough:  # a thread computes all of an expert's gate and up
                alone = max(alone, own.most_rows * own.inner)
                together = min(together, MANY_ROWS * own.num_experts)
                if own.in_parts:  # in a part there may be fewer experts
                    few = own.pairs * (enough - 1) // own.num_experts
                    together = max(together, min(own.pairs, few))
            activated[place] = together * own.inner * FLOAT_BYTES
    panels = max(own.most_rows for own in lists) * GATE_UP_PANELS
    # Choices that go apart are summed up elsewhere (pair_sum.cpp).
    panels += max(0 if own.in_parts else own.rows for own in lists) * DOWN_PANELS
    return _Call(
        input=max(own.rows * own.hidden * _row_bytes(own.form, isa) for own in lists),
        hidden=(hidden[0], hidden[1]),
        activated=(activated[0], activated[1]),
        per_thread=(panels * PANEL_OUTPUTS + alone) * FLOAT_BYTES,
    )


def _row_bytes(form: str, isa: str) -> int:
    """Of one number of a row as the kernels multiply it (gemm_kernels.h, row_form)."""
    if form.startswith(ROUNDED_FORMS) and "weight-only" not in form:
        return 1
    return 2 if form == "bfloat16" and isa in BF16_LEVELS else FLOAT_BYTES
