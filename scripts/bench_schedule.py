"""What scheduling, prefetching and caching bring to decode, on simulated timelines.

    .venv/bin/python scripts/bench_schedule.py ../shared/data/routing

Experts of a recorded routing on a device whose slots hold 25, 50 and 75 % of them. The baseline
keeps the most popular experts (of other requests) on the device and runs the others on the CPU. The
cache, its policy, the placement and the prefetching are the real ones; computing and copying take
the times of a hardware profile (`moeserve.planner.ablation`). A layer of T us moves at most
T / transfer experts over the link, so what can be won is bounded by the hardware: `resident` is the
time with every expert on the device, `foresight` what the same machinery reaches when it is told
which experts come. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.core import ExpertSpec, Routing
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.device_tier import read_on_device_us, rest_of_layer_us
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.emulation import with_emulated_device
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import read_profile, shipped_profile
from moeserve.planner.ablation import (
    STRATEGIES,
    DecodeSimulation,
    Outcome,
    Setting,
    all_resident_us,
    popularity,
)
from moeserve.predictors.base import Prediction
from moeserve.predictors.markov import MarkovPredictor

Ids = NDArray[np.int64]
#: tokens that predictor and popularity learn from, before those that are simulated
LEARN_TOKENS = 6000
SEGMENTS = 8


@dataclass(frozen=True)
class Trace:
    """file, array: where the ids are. rest_bytes: weights of a layer besides its experts, in bf16;
    shared_bytes: of its shared experts. The device reads both for every token."""

    name: str
    file: str
    array: str
    spec: ExpertSpec
    form: PackFormat
    rest_bytes: int
    shared_bytes: int


TRACES = (
    Trace(
        "GPT-OSS-20B, decode",
        "gptoss20b_decode.npz",
        "ids",
        ExpertSpec(num_experts=32, hidden_size=2880, intermediate_size=2880),
        PackFormat("mxfp4"),
        2 * 2880 * (64 * 64 * 2 + 8 * 64 * 2),
        0,
    ),
    Trace(
        "DeepSeek-V2-Lite, prompts token by token",
        "deepseekv2lite_prefill.npz",
        "intent_ids",
        ExpertSpec(num_experts=64, hidden_size=2048, intermediate_size=1408),
        PackFormat("bfloat16"),
        2 * (2048 * (16 * 192 + 576 + 16 * 128) + 512 * 16 * 256),
        2 * 3 * 2048 * 2 * 1408,
    ),
)


def read_ids(folder: Path, trace: Trace) -> Ids:
    with np.load(folder / trace.file) as arrays:
        ids: Ids = arrays[trace.array].astype(np.int64)
    return ids


def segments(num_tokens: int, wanted: int) -> Ids:
    """Tokens to simulate: stretches spread evenly over what was not learnt from."""
    length = wanted // SEGMENTS
    starts = np.linspace(LEARN_TOKENS, num_tokens - length - 1, SEGMENTS).astype(np.int64)
    return np.concatenate([np.arange(start, start + length) for start in starts])


def by_markov(ids: Ids, tokens: Ids, num_experts: int, depth: int) -> Iterator[list[Prediction]]:
    """What the predictor says after having seen the tokens to learn from."""
    num_layers = ids.shape[1]
    predictor = MarkovPredictor(dict.fromkeys(range(num_layers), num_experts), depth)
    nothing = torch.zeros(0)

    def predict(layer: int, rows: Ids) -> Prediction:
        weights = torch.full(rows.shape, 1 / rows.shape[1])
        return predictor.predict(layer, nothing, Routing(torch.from_numpy(rows), weights))

    for start in range(0, LEARN_TOKENS, 256):
        for layer in range(num_layers):
            predict(layer, ids[start : start + 256, layer])
    for token in tokens:
        yield [predict(layer, ids[token : token + 1, layer]) for layer in range(num_layers)]


def by_foresight(ids: Ids, tokens: Ids, num_experts: int, depth: int) -> Iterator[list[Prediction]]:
    """The truth: a bound for any predictor of that depth."""
    num_layers = ids.shape[1]
    for token in tokens:
        row = []
        for layer in range(num_layers):
            found = {}
            for later in range(layer + 1, layer + 1 + depth):
                chances = torch.full((num_experts,), 0.001)
                chances[ids[token + later // num_layers, later % num_layers]] = 0.999
                found[later % num_layers] = chances
            row.append(Prediction(found))
        yield row


def outcomes(ids: Ids, tokens: Ids, setting: Setting, depth: int) -> dict[str, Outcome]:
    """By strategy, and of the whole with foresight."""
    count = setting.num_experts
    markov = list(by_markov(ids, tokens, count, depth))
    found = {
        strategy.name: DecodeSimulation(strategy, setting).run(ids[tokens], markov)
        for strategy in STRATEGIES
    }
    told = list(by_foresight(ids, tokens, count, depth))
    found["foresight"] = DecodeSimulation(STRATEGIES[-1], setting).run(ids[tokens], told)
    return found


def setting_of(trace: Trace, profile: Profile, ids: Ids, policy: str, depth: int) -> Setting:
    spec = trace.spec
    record_bytes = PackedExperts.bytes_of_record(spec, trace.form, trace.form)
    weights = trace.form.describe()
    costs = CostModel.of(profile, spec, weights, record_bytes)
    return Setting(
        costs=replace(costs, shared_us=read_on_device_us(profile, trace.shared_bytes)),
        between_us=rest_of_layer_us(profile, trace.rest_bytes),
        num_experts=spec.num_experts,
        num_layers=ids.shape[1],
        num_slots=0,
        popular=popularity(ids[:LEARN_TOKENS], spec.num_experts),
        policy=policy,
        depth=depth,
    )


def show(share: float, found: dict[str, Outcome], resident_us: float) -> None:
    base_us = found["static"].token_us
    for name, outcome in found.items():
        print(
            f"| {share:.0%} | {name} | {outcome.token_us:.0f} | {base_us / outcome.token_us:.2f}"
            f" | {outcome.hit_rate:.2f} | {outcome.prefetches_per_token:.1f}"
            f" | {outcome.useful_prefetches:.2f} | {outcome.link_busy:.2f} |"
        )
    print(
        f"| {share:.0%} | resident | {resident_us:.0f} | {base_us / resident_us:.2f} | 1.00 | | | |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("routing", type=Path, help="directory of the recorded routings")
    parser.add_argument("--sheet", default="rtx4090-pcie4", help="profile of the device")
    parser.add_argument(
        "--profile", type=Path, help="measured profile of a CPU, to which the device is scaled"
    )
    parser.add_argument("--policy", default="score")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=480)
    args = parser.parse_args(arguments)
    profile = shipped_profile(args.sheet)
    if args.profile is not None:
        profile = with_emulated_device(read_profile(args.profile), profile)
    summary: dict[str, object] = {"sheet": args.sheet, "policy": args.policy, "depth": args.depth}
    for trace in TRACES:
        ids = read_ids(args.routing, trace)
        tokens = segments(len(ids), args.tokens)
        setting = setting_of(trace, profile, ids, args.policy, args.depth)
        costs = setting.costs
        print(
            f"\n{trace.name}: an expert of {costs.expert_bytes / 2**20:.1f} MiB takes"
            f" {costs.cpu_us(1):.0f} us on the CPU, {costs.device_us(1):.0f} us on the device,"
            f" {costs.transfer_us(costs.expert_bytes):.0f} us on the link\n"
        )
        print("| slots | strategy | us per token | x static | hits | prefetches | useful | link |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        resident_us = all_resident_us(setting, ids.shape[2])
        for share in (0.25, 0.5, 0.75):
            slots = int(share * setting.num_experts * setting.num_layers)
            found = outcomes(ids, tokens, replace(setting, num_slots=slots), args.depth)
            show(share, found, resident_us)
            summary[f"{trace.name}, {share:.0%}"] = {n: asdict(o) for n, o in found.items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
