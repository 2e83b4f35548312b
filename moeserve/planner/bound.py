"""Stage 1: what nothing can beat on this hardware, and what would limit it.

Every resource works all the time and waits for no other (`work`). A step takes what the busiest
resource needs, and a request what all its steps need of it. Experts are touched and missed as
little as the routing allows (`expert_use`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from moeserve.planner.expert_use import EvenUse, ExpertUse, best_use
from moeserve.planner.moe_lens import (
    parallelism_memory_efficiency,
    sequences_in_step,
    tokens_to_saturate,
)
from moeserve.planner.plan_types import Deployment, Estimate, Limit, Range
from moeserve.planner.rates import Rates
from moeserve.planner.shapes import AttentionShape, LayerShape
from moeserve.planner.work import Machine, Times, Work


@dataclass(frozen=True)
class Load:
    """Rows of one step. decodes: sequences, whose contexts are spread evenly from `first_context`
    to `last_context` tokens of kv. prompts: that are computed whole, of prompt_tokens each.
    sampled: rows that choose a token. steps: like this one, one after another."""

    decodes: float = 0.0
    first_context: float = 0.0
    last_context: float = 0.0
    prompts: float = 0.0
    prompt_tokens: int = 0
    steps: int = 1

    @property
    def rows(self) -> float:
        return self.decodes + self.prompts * self.prompt_tokens

    @property
    def sampled(self) -> float:
        return self.decodes + self.prompts


@dataclass(frozen=True)
class Saturation:
    """MoE-Lens's view of a deployment's routed experts.

    tokens: in one step that keep the processor busy with experts while those of them arrive that
    have no slot. kv_bytes: that so many sequences of the traffic's length hold. parallel_tokens:
    that this deployment's kv allows. efficiency: PME. ops_per_byte: of a decode step, over the
    bytes that it reads.
    """

    tokens: float
    kv_bytes: float
    parallel_tokens: float
    efficiency: float
    ops_per_byte: float


def bound(deployment: Deployment) -> Estimate:
    """With the experts' use that is best for it. Raises ConfigError where the profile lacks a rate
    that is needed, MoeserveError for a trace of another model."""
    return Bound(deployment, best_use(deployment)).estimate()


@dataclass(frozen=True)
class Bound:
    """Times of steps by resource, in seconds. use: None for even use."""

    deployment: Deployment
    use: ExpertUse | None = field(default=None)

    def estimate(self) -> Estimate:
        traffic = self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        prefill, decode = self.work(self._prefill), self.work(self._decode)
        tokens_per_s = self.output_tokens_per_s()
        limits = [Limit("prefill", *self._machine.limits(prefill))]
        if g > 1:
            limits.append(Limit("decode", *self._machine.limits(decode)))
        return Estimate(
            stage="bound",
            ttft_s=_exactly(self._seconds(prefill)),
            tpot_s=_exactly(self._seconds(decode)) if g > 1 else None,
            output_tokens_per_s=_exactly(tokens_per_s),
            prompt_tokens_per_s=_exactly(tokens_per_s * p / g),
            limits=tuple(limits),
            confidence=1.0,
            basis=self._basis,
            hit_rate=self.hit_rate,
        )

    @property
    def _basis(self) -> str:
        basis = "rates of the profile, every resource busy all the time"
        even = self.use is None or not self.deployment.shape.num_experts
        return basis if even else f"{basis}, experts used as few as a text may"

    @property
    def running(self) -> float:
        """Sequences that run at once: as many as wanted, allowed, and kv has room for."""
        request, traffic = self.deployment.request, self.deployment.request.traffic
        room = sequences_in_step(traffic.prompt_tokens, traffic.output_tokens, self.kv_tokens)
        return min(traffic.concurrency, request.engine.scheduler.max_running, max(1.0, room))

    @property
    def kv_tokens(self) -> int:
        return self.deployment.num_kv_blocks * self.deployment.request.engine.kv.block_tokens

    @property
    def hit_rate(self) -> float | None:
        """Of experts that a decode step wants of the fast tier, at most: a prompt's step where
        nothing is decoded. None where all are there."""
        if self._fast_slots is None:
            return None
        decodes = self.deployment.request.traffic.output_tokens > 1
        work = self.work(self._decode if decodes else self._prefill)
        return 1 - work.missing_bytes / work.expert_bytes

    def prefill_times(self) -> Times:
        """One prompt by itself."""
        return self._machine.busy_s(self.work(self._prefill))

    def decode_times(self) -> Times:
        """A step in which every sequence decodes, at all stages of their outputs."""
        return self._machine.busy_s(self.work(self._decode))

    def output_tokens_per_s(self) -> float:
        """Prefill and decode overlap wholly: all running requests take as long as the busiest
        resource needs for all of their work. Prompts first and together read each weight once."""
        traffic = self.deployment.request.traffic
        prompts = Load(prompts=self.running, prompt_tokens=traffic.prompt_tokens)
        steps = traffic.output_tokens - 1
        whole = self.work(prompts) + self.work(self._decode).times(steps)
        return self.running * traffic.output_tokens / self._seconds(whole)

    @property
    def _prefill(self) -> Load:
        return Load(prompts=1, prompt_tokens=self.deployment.request.traffic.prompt_tokens)

    @property
    def _decode(self) -> Load:
        """The first token comes with the prompt: the others see it and those before them."""
        traffic = self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        return Load(self.running, p + 1, max(p + 1, p + g - 1), steps=max(1, g - 1))

    def saturation(self) -> Saturation:
        """Of the link that experts cross: to the device, from disk, or from memory."""
        shape, traffic = self.deployment.shape, self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        rates = self._rates
        slots, total = self._fast_slots, shape.num_experts
        absent = 1.0 if slots is None else 1 - slots / total
        expert_ops = sum(_expert_ops(layer) for layer in shape.layers)
        tokens = 0.0
        if expert_ops:
            crossing = absent * shape.expert_bytes
            tokens = tokens_to_saturate(
                rates.peak(self._form), rates.crossing, crossing, expert_ops
            )
        decode = self.work(self._decode)
        ops = decode.ops + decode.expert_ops
        return Saturation(
            tokens=tokens,
            kv_bytes=tokens * traffic.sequence_tokens * shape.kv_token_bytes,
            parallel_tokens=parallelism_memory_efficiency(p, g) * self.kv_tokens,
            efficiency=parallelism_memory_efficiency(p, g),
            ops_per_byte=ops / (decode.other_bytes + decode.expert_bytes),
        )

    def work(self, load: Load) -> Work:
        """Of one step. Prompts find their own kv in the caches."""
        shape, use = self.deployment.shape, self._use
        other_bytes = float(shape.head.read_bytes)
        ops = 2.0 * shape.head.rows * shape.head.cols * load.sampled
        expert_ops = attention_ops = 0.0
        for layer in shape.layers:
            other_bytes += sum(m.num_bytes for m in layer.products)
            ops += load.rows * 2 * sum(m.rows * m.cols for m in layer.products)
            expert_ops += load.rows * _expert_ops(layer)
            attention = layer.attention
            keys = load.decodes * mean_keys(attention, load.first_context, load.last_context)
            width = attention.kv_heads * attention.kv_width
            other_bytes += keys * width * shape.number_bytes
            keys += load.prompts * load.prompt_tokens * mean_keys(attention, 1, load.prompt_tokens)
            widths = attention.score_width + attention.value_width
            attention_ops += 2 * attention.num_heads * keys * widths
        missing = unread = 0.0
        if (slots := self._fast_slots) is not None:
            missing = use.missing_bytes(load.rows, slots, load.steps)
        if (in_memory := self._memory_slots) is not None:
            unread = use.missing_bytes(load.rows, in_memory, load.steps)
        touched = use.touched_bytes(load.rows)
        return Work(other_bytes, touched, missing, unread, ops, attention_ops, expert_ops)

    def _seconds(self, work: Work) -> float:
        return max(self._machine.busy_s(work).values())

    @property
    def _fast_slots(self) -> int | None:
        """Of the device, else of the host tier; None where all are resident, or there are none."""
        if not self.deployment.shape.num_experts:
            return None
        device, host = self.deployment.device_slots, self.deployment.host_slots
        return host if device is None else device

    @property
    def _memory_slots(self) -> int | None:
        """Of all memory: a host tier's, and what stands on the device besides."""
        device, host = self.deployment.device_slots, self.deployment.host_slots
        return None if host is None else host + (device or 0)

    @cached_property
    def _use(self) -> ExpertUse:
        return EvenUse(self.deployment.shape) if self.use is None else self.use

    @cached_property
    def _rates(self) -> Rates:
        return Rates(self.deployment)

    @cached_property
    def _machine(self) -> Machine:
        on_device = self.deployment.device_slots is not None
        return Machine(self._rates, self._form, self.deployment.shape.dtype, on_device)

    @cached_property
    def _form(self) -> str:
        """The format that most weights have."""
        forms = [s.experts.form for s in self.deployment.shape.layers if s.experts is not None]
        return forms[0] if forms else self.deployment.shape.layers[0].products[0].form


def _expert_ops(layer: LayerShape) -> float:
    if layer.experts is None:
        return 0.0
    spec = layer.experts.spec
    return 2 * 3 * layer.experts.top_k * spec.hidden_size * spec.intermediate_size


def mean_keys(attention: AttentionShape, first: float, last: float) -> float:
    """That queries at all contexts from the first to the last see, on average."""
    window = attention.window
    if window is None or last <= window:
        return (first + last) / 2
    if first >= window:
        return window
    below, count = window - first, last - first + 1
    return (below * (first + window - 1) / 2 + (count - below) * window) / count


def _exactly(value: float) -> Range:
    return Range(value, value, value)
