"""Stage 1 against sums by hand, and what must hold of any bound."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support.routing_samples import topical_trace

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.belady import BeladyPolicy
from moeserve.cache.replay import Rules, all_uses, through_cache
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import DiskPoint, Figure, Profile, ReadRate
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.bound import Bound, Load, mean_keys
from moeserve.planner.bound import bound as best_bound
from moeserve.planner.deployment import sized
from moeserve.planner.expert_use import RoutedUse, touched_experts
from moeserve.planner.model_shape import read_shape
from moeserve.planner.plan_types import PlanRequest, Resource, Traffic
from moeserve.planner.rates import peak_of
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.routing import recorded
from moeserve.planner.simulate.system import simulate_quickly

RAW: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
READ, PEAK, DISK = 50e9, 4e12, 1.5e9
TRAFFIC = Traffic(concurrency=4, prompt_tokens=300, output_tokens=100)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(RAW))
    return read_shape(ModelConfig(), file)


def machine(read: float = READ, peak: float = PEAK, disk: float = DISK) -> Profile:
    sheet = shipped_profile("a40-xeon8380")
    cpu = structs.replace(
        sheet.cpu,
        read=[ReadRate(kernel="read", num_threads=40, bytes_per_s=Figure(value=read))],
        ops_per_s={"bf16": Figure(value=peak), "f32": Figure(value=peak / 2)},
    )
    points = [DiskPoint(block_bytes=1 << 20, queue_depth=4, bytes_per_s=Figure(value=disk))]
    return structs.replace(sheet, cpu=cpu, device=None, link=[], disk=points)


def bound(
    shape: ModelShape, profile: Profile, traffic: Traffic = TRAFFIC, **settings: Any
) -> Bound:
    request = PlanRequest(engine=EngineConfig(**settings), traffic=traffic)
    return Bound(sized(request, profile, shape))


def test_touched_experts_are_those_of_random_choices() -> None:
    rng = np.random.default_rng(seed := random.randrange(1 << 30))
    for num, top_k, rows in ((8, 2, 1), (8, 2, 5), (64, 6, 20)):
        counts = [
            len({int(e) for _ in range(rows) for e in rng.choice(num, top_k, replace=False)})
            for _ in range(2000)
        ]
        expected = touched_experts(num, top_k, rows)
        assert np.mean(counts) == pytest.approx(expected, rel=0.03), f"seed {seed}"


def test_a_decode_step_reads_what_it_needs(shape: ModelShape) -> None:
    """By hand: 2 layers, heads of 32, 4 sequences in the middle of their outputs."""
    found = bound(shape, machine()).decode_times()
    products = 256 * (8 + 2 * 2) * 32 + 256 * 8 * 32  # q, k, v and the output
    router = 256 * 8
    expert = 3 * 256 * 512
    touched = touched_experts(8, 2, 4)
    head = 1000 * 256
    context = 300 + 50  # of 99 tokens that see 301 to 399
    # sequences, tokens, layers, kv heads, width, a key and a value, bytes
    kv = 4 * context * 2 * 2 * 32 * 2 * 2
    records = shape.layers[0].experts
    assert records is not None
    packed_router = 16 * 256  # a panel has 16 outputs
    panels = shape.head.num_bytes + 2 * (2 * products + 4 * packed_router)
    by_hand = panels + 2 * touched * records.record_bytes + kv
    assert found[Resource.CPU_MEMORY] == pytest.approx(by_hand / READ, rel=1e-3)
    ops = 4 * 2 * (head + 2 * (products + router) + 2 * 2 * expert)
    attention = 4 * 2 * 2 * 8 * context * (32 + 32)  # sequences, layers, multiply and add, heads
    seconds = ops / PEAK + attention / PEAK
    assert found[Resource.CPU_COMPUTE] == pytest.approx(seconds, rel=1e-3)
    assert Resource.DISK not in found


def test_limits_name_the_busiest_resource_and_the_next(shape: ModelShape) -> None:
    slow_memory = bound(shape, machine(read=1e8)).estimate().limits
    assert {limit.resource for limit in slow_memory} == {Resource.CPU_MEMORY}
    slow_cores = bound(shape, machine(peak=1e8)).estimate().limits
    assert {limit.resource for limit in slow_cores} == {Resource.CPU_COMPUTE}
    slow_disk = bound(shape, machine(disk=1e6), experts=ExpertConfig(host_slots=8)).estimate()
    assert {limit.resource for limit in slow_disk.limits} == {Resource.DISK}
    for limit in (*slow_memory, *slow_cores, *slow_disk.limits):
        assert limit.headroom > 1
        assert limit.next_resource is not limit.resource


@pytest.mark.parametrize("on_device", [False, True])
def test_removing_the_limit_gains_its_headroom(shape: ModelShape, on_device: bool) -> None:
    """Without the first limit the step takes as long as that says, and the next one is busiest."""
    profile, settings = machine(read=1e9), {}
    if on_device:
        profile = shipped_profile("rtx4090-pcie4")
        settings = {
            "model": ModelConfig(device="emulated"),
            "experts": ExpertConfig(device_slots=4),
        }
    found = bound(shape, profile, **settings)
    before = found.estimate()
    for limit, times in zip(
        before.limits, (found.prefill_times(), found.decode_times()), strict=True
    ):
        assert limit.headroom > 1
        load = found._prefill if limit.phase == "prefill" else found._decode
        freed = found._machine.busy_s(found.work(load), frozenset({limit.resource}))
        assert max(times.values()) / max(freed.values()) == pytest.approx(limit.headroom, rel=1e-6)
        assert limit.next_resource in freed
        assert freed[limit.next_resource] == pytest.approx(max(freed.values()), rel=1e-6)


def test_disk_bound_follows_the_share_of_experts_that_miss(shape: ModelShape) -> None:
    times = [
        bound(shape, machine(), experts=ExpertConfig(host_slots=slots)).decode_times()
        for slots in (4, 8, 12)
    ]
    records = shape.layers[0].experts
    assert records is not None
    touched = 2 * touched_experts(8, 2, 4) * records.record_bytes
    for slots, found in zip((4, 8, 12), times, strict=True):
        expected = touched * (1 - slots / 16) / DISK
        assert found[Resource.DISK] == pytest.approx(expected)
    full = bound(shape, machine(), experts=ExpertConfig(host_slots=16)).decode_times()
    assert Resource.DISK not in full


def test_a_better_machine_is_never_slower(shape: ModelShape) -> None:
    rng = random.Random(seed := random.randrange(1 << 30))
    for _ in range(40):
        rates = {name: 10 ** rng.uniform(7, 12) for name in ("read", "peak", "disk")}
        better = {name: rate * rng.uniform(1, 10) for name, rate in rates.items()}
        slots = rng.choice([None, rng.randrange(2, 17)])
        traffic = Traffic(
            concurrency=rng.randrange(1, 60),
            prompt_tokens=rng.randrange(1, 2000),
            output_tokens=rng.randrange(1, 1000),
        )
        experts = ExpertConfig(host_slots=slots)
        slow = bound(shape, machine(**rates), traffic, experts=experts).estimate()
        fast = bound(shape, machine(**better), traffic, experts=experts).estimate()
        for of in ("ttft_s", "tpot_s"):
            assert getattr(fast, of).mid <= getattr(slow, of).mid * (1 + 1e-9), f"seed {seed}"
        gained = fast.output_tokens_per_s.mid / slow.output_tokens_per_s.mid
        assert gained >= 1 - 1e-9, f"seed {seed}"


def test_throughput_is_what_the_busiest_resource_has_time_for(shape: ModelShape) -> None:
    """Above prompts first and then their outputs, above prompts among the decodes, and no higher
    than either resource alone allows."""
    traffic = Traffic(concurrency=8, prompt_tokens=400, output_tokens=50)
    found = bound(shape, machine(read=5e9, peak=2e11), traffic)
    prompts = found.work(Load(prompts=8, prompt_tokens=400))
    decode = found.work(Load(8, 401, 449))
    apart_s = found._seconds(prompts) + 49 * found._seconds(decode)
    mixed = found.work(Load(8 * 49 / 50, 401, 449, 8 / 50, 400))
    rate = found.output_tokens_per_s()
    assert rate >= 8 * 50 / apart_s
    assert rate >= 8 / found._seconds(mixed)
    for resource, first_s in found._machine.busy_s(prompts).items():
        busy_s = first_s + 49 * found._machine.busy_s(decode)[resource]
        assert rate <= 8 * 50 / busy_s * (1 + 1e-9)


def test_a_window_is_no_more_than_its_keys(shape: ModelShape) -> None:
    """Keys that sliding windows see, counted one by one."""
    for window in (None, 40, 100, 1000):
        attention = replace(shape.layers[0].attention, window=window)
        for first, last in ((1, 300), (301, 399), (90, 110)):
            counted = [attention.keys(n) for n in range(first, last + 1)]
            assert mean_keys(attention, first, last) == pytest.approx(np.mean(counted))


def test_no_cache_misses_less_than_the_bound_says(shape: ModelShape) -> None:
    """Belady's policy, which knows what comes, over the same tokens."""
    trace = replace(
        topical_trace(random.randrange(1 << 30), 400, num_layers=2, num_experts=8, top_k=2),
        num_experts=8,
    )
    use = RoutedUse(shape, recorded(trace, shape))
    steps = [np.arange(n, n + 2) for n in range(0, 400, 2)]
    numbers = ExpertNumbers(trace.experts_per_layer)
    wanted = all_uses(trace, steps)
    for slots in (4, 8, 12):
        hits = through_cache(trace, steps, BeladyPolicy(numbers, wanted), Rules(slots / 16))
        asked = [np.count_nonzero(use.routing.uses(step)[0]) for step in steps]
        missing = (sum(asked) - sum(hits)) / len(steps) * shape.expert_bytes / shape.num_experts
        assert use.missing_bytes(2, slots, len(steps)) <= missing


def test_kv_bounds_how_many_run_at_once(shape: ModelShape) -> None:
    traffic = replace(TRAFFIC, concurrency=50)
    plenty = bound(shape, machine(), traffic, kv=KvConfig(num_blocks=5000))
    assert plenty.running == 50
    little = bound(shape, machine(), traffic, kv=KvConfig(num_blocks=100))
    assert little.running == pytest.approx(100 * 16 / (300 + 100 / 2))
    few = SchedulerConfig(max_running=7)
    assert bound(shape, machine(), traffic, scheduler=few).running == 7


def test_fewer_threads_have_less_of_everything(shape: ModelShape) -> None:
    profile = machine()
    reads = [
        ReadRate(kernel="read", num_threads=count, bytes_per_s=Figure(value=rate))
        for count, rate in ((1, 10e9), (4, 30e9), (40, READ))
    ]
    profile = structs.replace(profile, cpu=structs.replace(profile.cpu, read=reads))
    all_threads = bound(shape, profile).decode_times()
    four = bound(shape, profile, experts=ExpertConfig(num_threads=4)).decode_times()
    ratio = four[Resource.CPU_MEMORY] / all_threads[Resource.CPU_MEMORY]
    assert ratio == pytest.approx(READ / 30e9)
    assert four[Resource.CPU_COMPUTE] == pytest.approx(10 * all_threads[Resource.CPU_COMPUTE])


def test_experts_of_a_device_are_split_so_that_all_end_together(tmp_path: Path) -> None:
    sheet = shipped_profile("rtx4090-pcie4")
    wide = RAW | {"hidden_size": 1024, "intermediate_size": 3584}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    shape = read_shape(ModelConfig(), tmp_path / "config.json")
    model = ModelConfig(device="emulated")
    found = bound(shape, sheet, model=model, experts=ExpertConfig(device_slots=4)).decode_times()
    cpu = max(found[Resource.CPU_MEMORY], found[Resource.CPU_COMPUTE])
    others = max(found[each] for each in (Resource.LINK, Resource.DEVICE_MEMORY))
    assert cpu == pytest.approx(others, rel=1e-6)
    whole = bound(shape, sheet, model=model, experts=ExpertConfig(device_slots=16)).decode_times()
    assert whole[Resource.LINK] == 0
    assert max(whole.values()) < max(found.values())


def test_rates_that_are_not_known_are_named(shape: ModelShape) -> None:
    blind = structs.replace(machine(), disk=[])
    with pytest.raises(ConfigError, match="no disk"):
        bound(shape, blind, experts=ExpertConfig(host_slots=4)).estimate()
    mute = structs.replace(machine(), cpu=structs.replace(machine().cpu, read=[]))
    with pytest.raises(ConfigError, match="no reads of"):
        bound(shape, mute).estimate()
    cpu = structs.replace(machine().cpu, ops_per_s={"int8": Figure(value=1e12)})
    with pytest.raises(ConfigError, match=r"no peak of .* for bfloat16"):
        peak_of(cpu, "bfloat16")
    assert peak_of(cpu, "int4/32") == 1e12
    with pytest.raises(ConfigError, match="int4/32 weight-only"):
        peak_of(cpu, "int4/32 weight-only")


def test_prefill_counts_every_key_once(shape: ModelShape) -> None:
    """The mean context of a prompt's rows, against a sum over them."""
    whole = bound(shape, machine())
    rows = 300
    together = whole._machine.busy_s(whole.work(Load(prompts=1, prompt_tokens=rows)))[
        Resource.CPU_COMPUTE
    ]
    keys = sum(range(1, rows + 1))
    attention = 2 * 2 * 8 * keys * 64 / PEAK
    products = rows * sum(
        2 * sum(m.rows * m.cols for m in s.products) + 6 * 2 * 256 * 512 for s in shape.layers
    )
    head = 2 * 1000 * 256
    assert together == pytest.approx((products + head) / PEAK + attention)


@pytest.mark.parametrize("seed", range(6))
def test_our_engine_is_never_faster_than_the_bound(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Random models, tiers, requests and machines, whose profiles add nothing to their rates."""
    rng = random.Random(seed)
    raw = {**RAW, "num_local_experts": rng.choice([8, 32]), "hidden_size": rng.choice([128, 512])}
    if rng.random() < 0.3:
        dense = ("num_local_experts", "num_experts_per_tok")
        raw = {**{k: v for k, v in raw.items() if k not in dense}, "model_type": "llama"}
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(raw))
    shape = read_shape(ModelConfig(), file)
    traffic = Traffic(
        concurrency=rng.choice([1, 3, 20]),
        prompt_tokens=rng.choice([8, 100, 700]),
        output_tokens=rng.choice([2, 30]),
    )
    profile = machine(read=10 ** rng.uniform(8, 11), peak=10 ** rng.uniform(10, 13))
    settings: dict[str, Any] = {}
    if shape.num_experts and rng.random() < 0.7:
        slots = rng.randrange(2, shape.num_experts)
        settings["experts"] = ExpertConfig(host_slots=slots)
        if rng.random() < 0.5:
            profile = shipped_profile("rtx4090-pcie4")
            settings["experts"] = ExpertConfig(device_slots=slots)
            settings["model"] = ModelConfig(device="emulated")
    request = PlanRequest(engine=EngineConfig(**settings), traffic=traffic)
    deployment = sized(request, profile, shape)
    most, found = best_bound(deployment), simulate_quickly(deployment)
    assert found.output_tokens_per_s.mid <= most.output_tokens_per_s.mid * (1 + 1e-9)
    assert found.ttft_s.mid >= most.ttft_s.mid * (1 - 1e-9)
