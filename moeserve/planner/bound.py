"""Stage 1: what nothing can beat on this hardware, and what would limit it.

Every resource works all the time and waits for no other (roofline; Williams, Waterman and
Patterson, CACM 52(4), 2009; for tiers, MoE-Lightning's hierarchical roofline, arXiv:2411.11217).
A step takes what the busiest resource needs. Tokens spread over experts evenly, as in MoE-Lens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moeserve.planner.moe_lens import (
    parallelism_memory_efficiency,
    sequences_in_step,
    tokens_to_saturate,
)
from moeserve.planner.plan_types import (
    AttentionShape,
    Deployment,
    Estimate,
    LayerShape,
    Limit,
    Range,
    Resource,
)
from moeserve.planner.rates import Rates

Times = dict[Resource, float]
#: of a share: to a millionth of a millionth
BISECTIONS = 40


@dataclass(frozen=True)
class Load:
    """Of one step. decodes: sequences, each with `context` tokens of kv. prefill: prompt tokens,
    which see `prefill_context` tokens on average."""

    decodes: float
    context: float
    prefill: float = 0.0
    prefill_context: float = 0.0

    @property
    def rows(self) -> float:
        return self.decodes + self.prefill


@dataclass(frozen=True)
class Saturation:
    """MoE-Lens's view of a deployment.

    tokens: in one step that keep the processor busy while weights arrive. kv_bytes: that so many
    sequences of the traffic's length hold. parallel_tokens: that this deployment's kv allows.
    efficiency: PME. ops_per_byte: of a decode step, over the bytes that it reads.
    """

    tokens: float
    kv_bytes: float
    parallel_tokens: float
    efficiency: float
    ops_per_byte: float


def bound(deployment: Deployment) -> Estimate:
    """Raises ConfigError where the profile lacks a rate that is needed."""
    return Bound(deployment).estimate()


@dataclass(frozen=True)
class Bound:
    """Times of steps by resource, in seconds."""

    deployment: Deployment

    def estimate(self) -> Estimate:
        traffic = self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        prefill, decode = self.prefill_times(), self.decode_times()
        ttft_s, tpot_s = max(prefill.values()), max(decode.values())
        tokens_per_s = self.output_tokens_per_s()
        return Estimate(
            stage="bound",
            ttft_s=_exactly(ttft_s),
            tpot_s=_exactly(tpot_s),
            output_tokens_per_s=_exactly(tokens_per_s),
            prompt_tokens_per_s=_exactly(tokens_per_s * p / g),
            limits=(self._limit("prefill", prefill), self._limit("decode", decode)),
            confidence=1.0,
            basis="rates of the profile, every resource busy all the time",
            hit_rate=self.hit_rate,
        )

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
        """Of experts in the fast tier, where some are not: the share that has room."""
        deployment = self.deployment
        slots = deployment.host_slots
        if deployment.device_slots is not None:
            slots = deployment.device_slots
        total = deployment.shape.num_experts
        return None if slots is None or not total else min(1.0, slots / total)

    def prefill_times(self) -> Times:
        """One prompt by itself."""
        p = self.deployment.request.traffic.prompt_tokens
        return self.times(Load(0, 0, p, (p + 1) / 2))

    def decode_times(self) -> Times:
        """A step in which every sequence decodes, in the middle of its output."""
        traffic = self.deployment.request.traffic
        return self.times(Load(self.running, traffic.prompt_tokens + traffic.output_tokens / 2))

    def mixed_times(self) -> Times:
        """A step of the steady state: sequences at all stages, prompts among them."""
        traffic = self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        return self.times(Load(self.running, p + g / 2, self.running * p / g, (p + 1) / 2))

    def output_tokens_per_s(self) -> float:
        """The better of two ways: prefill overlaps with decode, or one comes after the other.

        With few sequences apart is better: a prompt alone reads each expert once, among decodes
        it makes every step read more of them.
        """
        overlapped_s = max(self.mixed_times().values())
        g = self.deployment.request.traffic.output_tokens
        return max(self.running / overlapped_s, self.running * g / self.apart_s())

    def apart_s(self) -> float:
        """All running requests, prompts first and together, then their outputs."""
        traffic = self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        prompts = self.times(Load(0, 0, self.running * p, (p + 1) / 2))
        return max(prompts.values()) + (g - 1) * max(self.decode_times().values())

    def saturation(self) -> Saturation:
        """Of the link that weights cross: to the device, from disk, or from memory."""
        shape, traffic = self.deployment.shape, self.deployment.request.traffic
        p, g = traffic.prompt_tokens, traffic.output_tokens
        crossing, peak = self._rates.crossing, self._rates.peak(self._widest)
        ops = sum(self._token_ops(layer) for layer in shape.layers)
        tokens = tokens_to_saturate(peak, crossing, shape.expert_bytes, ops)
        decode = Load(self.running, p + g / 2)
        num_bytes = self._read_bytes(decode)
        return Saturation(
            tokens=tokens,
            kv_bytes=tokens * traffic.sequence_tokens * shape.kv_token_bytes,
            parallel_tokens=parallelism_memory_efficiency(p, g) * self.kv_tokens,
            efficiency=parallelism_memory_efficiency(p, g),
            ops_per_byte=decode.rows * ops / num_bytes,
        )

    def times(self, load: Load) -> Times:
        """Seconds that each resource works in a step."""
        deployment, rates = self.deployment, self._rates
        touched_bytes = self._touched_bytes(load.rows)
        rest_ops, expert_ops, attention_ops = self._ops(load)
        other_bytes = self._read_bytes(load) - touched_bytes
        if deployment.device_slots is None:
            num_bytes = other_bytes + touched_bytes
            times = {
                Resource.CPU_MEMORY: num_bytes / rates.cpu_read,
                Resource.CPU_COMPUTE: (rest_ops + expert_ops) / rates.cpu_peak(self._widest)
                + attention_ops / rates.cpu_peak("bfloat16"),
            }
            missing = 1 - (1.0 if self.hit_rate is None else self.hit_rate)
            if missing:
                times[Resource.DISK] = missing * touched_bytes / rates.disk
            return times
        return self._device_times(other_bytes, touched_bytes, rest_ops + attention_ops, expert_ops)

    def _device_times(
        self, other_bytes: float, touched_bytes: float, rest_ops: float, expert_ops: float
    ) -> Times:
        """The CPU computes the share of the experts that makes all end as early as can be; host
        memory has them all. Of the others, those that have no slot cross the link."""
        rates, form = self._rates, self._widest
        missing = 1 - (self.hit_rate if self.hit_rate is not None else 1.0)

        def times(on_cpu: float) -> Times:
            here = 1 - on_cpu
            device_ops = rest_ops + here * expert_ops
            return {
                Resource.DEVICE_MEMORY: (other_bytes + here * touched_bytes) / rates.device_read,
                Resource.DEVICE_COMPUTE: device_ops / rates.device_peak(form),
                Resource.LINK: max(0.0, missing - on_cpu) * touched_bytes / rates.link,
                Resource.CPU_MEMORY: on_cpu * touched_bytes / rates.cpu_read,
                Resource.CPU_COMPUTE: on_cpu * expert_ops / rates.cpu_peak(form),
            }

        low, high = 0.0, 1.0  # the CPU's times rise with its share, all others fall
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = times(middle)
            on_cpu = max(found[Resource.CPU_MEMORY], found[Resource.CPU_COMPUTE])
            low, high = (middle, high) if on_cpu < max(found.values()) else (low, middle)
        return times((low + high) / 2)

    def _limit(self, phase: str, times: Times) -> Limit:
        order = sorted(times, key=times.__getitem__, reverse=True)
        first, second = order[0], order[1]
        headroom = times[first] / times[second] if times[second] else float("inf")
        return Limit(phase, first, second, headroom)

    def _touched_bytes(self, rows: float) -> float:
        """Routed experts that at least one of the rows chooses, in all layers."""
        total = 0.0
        for layer in self.deployment.shape.layers:
            if layer.experts is not None:
                num = layer.experts.spec.num_experts
                total += (
                    touched_experts(num, layer.experts.top_k, rows) * layer.experts.record_bytes
                )
        return total

    def _read_bytes(self, load: Load) -> float:
        """Weights and kv that a step reads. Prompts find their own kv in the caches."""
        shape = self.deployment.shape
        products = sum(m.num_bytes for layer in shape.layers for m in layer.products)
        kv = load.decodes * sum(
            _keys(layer.attention, load.context)
            * layer.attention.kv_heads
            * layer.attention.kv_width
            * shape.number_bytes
            for layer in shape.layers
        )
        return products + shape.head.num_bytes + kv + self._touched_bytes(load.rows)

    def _ops(self, load: Load) -> tuple[float, float, float]:
        """Operations of products, of routed experts, and of attention."""
        shape = self.deployment.shape
        head = 2 * shape.head.rows * shape.head.cols
        # A prompt chooses one token, however long it is.
        rest = head * (load.decodes + (1 if load.prefill else 0))
        experts = attention = 0.0
        for layer in shape.layers:
            rest += load.rows * 2 * sum(m.rows * m.cols for m in layer.products)
            experts += load.rows * _expert_ops(layer)
            width = layer.attention.score_width + layer.attention.value_width
            keys = load.decodes * _keys(layer.attention, load.context)
            keys += load.prefill * _keys(layer.attention, load.prefill_context)
            attention += 2 * layer.attention.num_heads * keys * width
        return rest, experts, attention

    @staticmethod
    def _token_ops(layer: LayerShape) -> float:
        return 2 * sum(m.rows * m.cols for m in layer.products) + _expert_ops(layer)

    @cached_property
    def _rates(self) -> Rates:
        return Rates(self.deployment)

    @cached_property
    def _widest(self) -> str:
        """The format that most weights have."""
        forms = [s.experts.form for s in self.deployment.shape.layers if s.experts is not None]
        return forms[0] if forms else self.deployment.shape.layers[0].products[0].form


def touched_experts(num_experts: int, top_k: int, rows: float) -> float:
    """Expected number of experts that rows choose, each top_k of them, evenly."""
    return num_experts * float(1 - (1 - top_k / num_experts) ** rows)


def _expert_ops(layer: LayerShape) -> float:
    if layer.experts is None:
        return 0.0
    spec = layer.experts.spec
    return 2 * 3 * layer.experts.top_k * spec.hidden_size * spec.intermediate_size


def _keys(attention: AttentionShape, tokens: float) -> float:
    return tokens if attention.window is None else min(tokens, attention.window)


def _exactly(value: float) -> Range:
    return Range(value, value, value)
