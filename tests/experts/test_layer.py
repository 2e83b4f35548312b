"""MoE layers against the slow reference in float64 and against transformers' experts."""

from __future__ import annotations

import random

import pytest
import torch
from support.randomness import fresh_generators
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moeserve.cache.expert_cache import Tier, resident_cache
from moeserve.cache.policies.resident import ResidentPolicy
from moeserve.config import ExpertConfig
from moeserve.core import ExpertSpec, ExpertWeights, ModelError, Placement, Routing
from moeserve.cpu_backend.activations import SWIGLU_CLAMPED
from moeserve.cpu_backend.linear import is_row_invariant
from moeserve.cpu_backend.torch_backend import TorchBackend
from moeserve.experts.build_runtime import build_expert_runtime
from moeserve.experts.device.torch_grouped import GroupedExperts, find_grouped_mm
from moeserve.experts.executor import Executor
from moeserve.experts.layer import MoELayer, build_moe_layer
from moeserve.experts.reference import reference_experts
from moeserve.experts.router import RouterSpec, RouterWeights
from moeserve.experts.runtime import ExpertRuntime
from moeserve.experts.schedule.intra_layer import ResidentPlacement
from moeserve.experts.supply import ResidentSupply
from moeserve.experts.weights import deinterleave_gate_up, transpose_experts

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}  # of the largest output


def random_spec(rng: random.Random) -> ExpertSpec:
    clamped = rng.random() < 0.4
    return ExpertSpec(
        num_experts=rng.randint(2, 12),
        hidden_size=8 * rng.randint(2, 12),
        intermediate_size=8 * rng.randint(2, 12),
        activation=SWIGLU_CLAMPED if clamped else rng.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        bias=clamped,
    )


def random_weights(
    spec: ExpertSpec, dtype: torch.dtype, generator: torch.Generator
) -> ExpertWeights:
    experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    return ExpertWeights(
        normal(experts, 2 * inner, hidden),
        normal(experts, hidden, inner),
        normal(experts, 2 * inner) if spec.bias else None,
        normal(experts, hidden) if spec.bias else None,
    )


def random_routing(
    num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> Routing:
    weights, ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k)
    return Routing(ids, weights)


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[y.dtype], f"relative error {error:.2e}"


def random_layer(
    spec: ExpertSpec, top_k: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[MoELayer, ExpertWeights, ExpertRuntime]:
    runtime = build_expert_runtime(ExpertConfig(), {1: spec, 3: spec}, CPU, dtype)
    router_spec = RouterSpec(
        num_experts=spec.num_experts, top_k=top_k, hidden_size=spec.hidden_size, normalize=True
    )
    gate = torch.randn(spec.num_experts, spec.hidden_size, generator=generator).to(dtype)
    weights = random_weights(spec, dtype, generator)
    layer = build_moe_layer(3, router_spec, spec, RouterWeights(gate), weights, runtime)
    return layer, weights, runtime


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(8))
def test_layer_equals_the_reference(case: int, dtype: torch.dtype) -> None:
    rng, generator = fresh_generators()
    spec = random_spec(rng)
    layer, weights, runtime = random_layer(spec, rng.randint(1, spec.num_experts), dtype, generator)
    for num_tokens in (1, 2, rng.randint(3, 40)):
        x = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
        y = layer.forward(x, step=0)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert_near(y, reference_experts(spec, weights, x.double(), layer.router(x)))
        runtime.cache.check_integrity()
    assert layer.forward(x[:0], step=0).shape == (0, spec.hidden_size)
    runtime.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    """Bit by bit, on one torch thread, where oneDNN has the dtype: alone, in parts, all together.

    Widths are multiples of 32, as all real models' are: torch's vectorised silu leaves what is over
    to a scalar one that rounds differently, and where a row ends must not decide which.
    """
    if not is_row_invariant(dtype, CPU):
        pytest.skip(f"oneDNN has no {dtype} product for this processor")
    rng, generator = fresh_generators()
    spec = ExpertSpec(num_experts=8, hidden_size=96, intermediate_size=32 * rng.randint(1, 6))
    layer, _, runtime = random_layer(spec, 3, dtype, generator)
    x = torch.randn(150, 96, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    together = layer.forward(x, step=0)
    for num_tokens in (1, 1, 2, 7, 40, 149):
        start = rng.randint(0, 150 - num_tokens)
        part = slice(start, start + num_tokens)
        assert torch.equal(layer.forward(x[part], step=1), together[part]), f"{num_tokens} tokens"
    torch.set_num_threads(threads)
    runtime.close()


@torch.inference_mode()
def test_reference_equals_transformers() -> None:
    _, generator = fresh_generators()
    spec = ExpertSpec(num_experts=6, hidden_size=16, intermediate_size=24)
    weights = random_weights(spec, torch.float32, generator)
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=6)
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config).double()
    theirs.gate_up_proj.data = weights.gate_up.double()
    theirs.down_proj.data = weights.down.double()
    x = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    routing = random_routing(9, 6, 2, generator)
    expected = theirs(x, routing.ids, routing.weights.double())
    torch.testing.assert_close(reference_experts(spec, weights, x, routing), expected)


@torch.inference_mode()
def test_reference_equals_gpt_oss_from_its_own_layout() -> None:
    _, generator = fresh_generators()
    spec = ExpertSpec(
        num_experts=5,
        hidden_size=16,
        intermediate_size=24,
        activation=SWIGLU_CLAMPED,
        bias=True,
        swiglu_limit=1.5,
    )
    config = GptOssConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=5, swiglu_limit=1.5
    )
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config).double()
    for tensor in theirs.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    weights = ExpertWeights(
        deinterleave_gate_up(transpose_experts(theirs.gate_up_proj.data), dim=-2),
        transpose_experts(theirs.down_proj.data),
        deinterleave_gate_up(theirs.gate_up_proj_bias.data, dim=-1),
        theirs.down_proj_bias.data,
    )
    x = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    routing = random_routing(9, 5, 3, generator)
    expected = theirs(x, routing.ids, routing.weights.double())
    torch.testing.assert_close(reference_experts(spec, weights, x, routing), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(6))
def test_device_path_on_cpu_tensors(case: int, dtype: torch.dtype) -> None:
    """The grouped GEMM (bfloat16) and the loop, with the layer's slots at the end of the tier."""
    rng, generator = fresh_generators()
    spec = random_spec(rng)
    weights = random_weights(spec, dtype, generator)
    has_grouped_mm = hasattr(torch.nn.functional, "grouped_mm")
    assert (find_grouped_mm(weights) is not None) == (dtype is torch.bfloat16 and has_grouped_mm)
    cache = resident_cache(Tier.DEVICE, {0: 4, 2: spec.num_experts}, ResidentPolicy())
    slots = cache.slots(2)
    device = GroupedExperts(spec, weights, first_slot=min(slots.slots))
    top_k = rng.randint(1, spec.num_experts)
    for num_tokens in (1, rng.randint(2, 40)):
        x = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
        routing = random_routing(num_tokens, spec.num_experts, top_k, generator)
        expected = reference_experts(spec, weights, x.double(), routing)
        assert_near(device.run(x, routing, slots).to(dtype), expected)
        everything = tuple(range(spec.num_experts))
        assert_near(device.run(x, routing, slots, everything).to(dtype), expected)


def test_executor_adds_both_sides() -> None:
    """Some experts on the device, some on the CPU, at once: what one side gives is left out by the
    other."""
    rng, generator = fresh_generators()
    spec = random_spec(rng)
    weights = random_weights(spec, torch.float32, generator)
    backend = TorchBackend()
    backend.add_layer(2, spec, weights)
    cache = resident_cache(Tier.DEVICE, {2: spec.num_experts}, ResidentPolicy())
    supply = ResidentSupply(cache)
    executor = Executor(backend, GroupedExperts(spec, weights, first_slot=0))
    x = torch.randn(21, spec.hidden_size, generator=generator)
    routing = random_routing(21, spec.num_experts, min(3, spec.num_experts), generator)
    expected = reference_experts(spec, weights, x.double(), routing)
    experts = list(range(spec.num_experts))
    for num_cpu in range(spec.num_experts + 1):
        rng.shuffle(experts)
        placement = Placement(
            2, on_device=tuple(experts[num_cpu:]), on_cpu=tuple(experts[:num_cpu])
        )
        with supply.acquire(placement) as supplied:
            assert_near(executor.run(x, routing, placement, supplied), expected)
    backend.close()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_resident_placement_runs_all_where_they_stand(tier: Tier) -> None:
    _, generator = fresh_generators()
    cache = resident_cache(tier, {0: 3, 5: 7}, ResidentPolicy())
    scheduler = ResidentPlacement()
    for layer, size in ((0, 3), (5, 7)):
        routing = random_routing(4, size, 2, generator)
        placement = scheduler.place(routing, cache.residency(layer))
        everything = tuple(range(size))
        here = (everything, ()) if tier is Tier.DEVICE else ((), everything)
        assert (placement.on_device, placement.on_cpu) == here
        assert placement.fetch_first == ()
        assert scheduler.place(routing, cache.residency(layer)) is placement


def test_runtime_says_what_it_chose() -> None:
    spec = ExpertSpec(num_experts=4, hidden_size=16, intermediate_size=8)
    config = ExpertConfig(cpu_backend="native")
    runtime = build_expert_runtime(config, {0: spec, 1: spec}, CPU, torch.float32)
    assert runtime.notes["cpu_backend"].startswith("native (asked for)")
    assert "all 8 resident in the host tier" in runtime.notes["experts"]
    runtime.close()


def test_tensors_that_do_not_fit_are_refused() -> None:
    _, generator = fresh_generators()
    spec = ExpertSpec(num_experts=4, hidden_size=16, intermediate_size=8)
    other = ExpertSpec(num_experts=4, hidden_size=16, intermediate_size=16)
    weights = random_weights(other, torch.float32, generator)
    runtime = build_expert_runtime(ExpertConfig(), {0: spec}, CPU, torch.float32)
    router = RouterSpec(num_experts=4, top_k=2, hidden_size=16)
    gate = RouterWeights(torch.zeros(4, 16))
    with pytest.raises(ModelError, match="layer 0: experts' gate_up has shape"):
        build_moe_layer(0, router, spec, gate, weights, runtime)
    runtime.close()
