"""A converted model served: decode speed beside its dense one, with experts on disk, expert reuse.

    moeserve convert DENSE OUT --text calibration.txt --pregate
    moeserve pack OUT OUT-int8 --quantize int8
    python scripts/bench_converted.py DENSE OUT --packed OUT-int8 --text held_out.txt [--threads 1]

Theory. At batch 1 a decode step reads every active weight once. A conversion with a quarter of the
FFN idle reads a quarter less of it, but pays for a router, two products instead of one in each
layer, and rows that are gathered by expert; on models that lie in cache the latter is what counts.

All engines are in one process, on the native backend, one sequence each, and take turns: the rate
is that of the fastest of --turns, because whatever else runs here can only slow a turn down. The
packed model is run with all its experts in memory and with slots for half of them, by predictor;
all of these must give the same tokens. Reuse is the share of a token's experts that the token
before it chose, too, on the text; chance is what independent choices would share.

Last line: one JSON object. For recall: `moeserve predictors eval OUT-int8 --text held_out.txt`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import EngineRequest, Routing, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.predictors.pregate_file import PREGATE_FILE
from moeserve.text.tokenizer import Tokenizer
from moeserve.text_windows import read_texts, token_windows

PROMPT_TOKENS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dense", help="directory or hub id")
    add("converted", help="what `moeserve convert` wrote of it")
    add("--packed", type=Path, help="what `moeserve pack` wrote of that")
    add("--text", type=Path, nargs="+", required=True, help="held-out text")
    add("--tokens", type=int, default=128, help="decoded per turn (%(default)s)")
    add("--turns", type=int, default=20, help="(%(default)s)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    return parser.parse_args()


def engines(args: argparse.Namespace) -> dict[str, Engine]:
    """By name, the dense one first."""
    found = {"dense": engine(args.dense, args.threads)}
    found["converted"] = engine(args.converted, args.threads)
    if args.packed is not None:
        packed = engine(str(args.packed), args.threads)
        found["packed"] = packed
        half = max(2, packed.info.num_experts * packed.info.num_moe_layers // 2)
        predictors = ["none", "markov", "gate_lookahead"]
        if (args.packed / PREGATE_FILE).exists():
            predictors.append("pregate")
        for name in predictors:
            settings = {"host_slots": half, "predictor": name}
            found[f"packed, half on disk, {name}"] = engine(
                str(args.packed), args.threads, **settings
            )
    return found


def engine(model: str, threads: int, **settings: Any) -> Engine:
    experts = ExpertConfig(cpu_backend="native", num_threads=threads, **settings)
    found = Engine.from_config(EngineConfig(model=ModelConfig(model=model), experts=experts))
    found.page_mover.wait()
    return found


def decode(
    engine: Engine, prompt: list[int], num_tokens: int, name: str
) -> tuple[list[int], float]:
    """The tokens and the seconds that all of them but the first took."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id=name, token_ids=prompt, params=params))
    tokens: list[int] = []
    started_s = 0.0
    while engine.has_work:
        deltas = engine.step()
        if not tokens:
            started_s = time.perf_counter()
        tokens += [token for delta in deltas for token in delta.token_ids]
    return tokens, time.perf_counter() - started_s


def reuse(engine: Engine, windows: torch.Tensor) -> dict[str, float]:
    """windows: [N, W]. Means over layers and tokens."""
    shared: list[float] = []
    chances: list[float] = []

    def observe(layer: int, x: torch.Tensor, routing: Routing) -> None:
        ids = routing.ids
        if len(ids) > 1:
            same = (ids[1:, :, None] == ids[:-1, None]).any(2).float()
            shared.append(float(same.mean()))
            chances.append(ids.shape[1] / engine.info.num_experts)

    engine.loaded.runtime.observers.append(observe)
    for number, window in enumerate(windows.tolist()):
        decode(engine, window, 1, f"reuse {number}")
    engine.loaded.runtime.observers.remove(observe)
    return {"reuse": sum(shared) / len(shared), "chance": sum(chances) / len(chances)}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    found = engines(args)
    tokenizer = Tokenizer.load(found["dense"].loaded.path)
    windows = token_windows(tokenizer, read_texts(args.text), None, 256, 256 * 64)
    best: dict[str, float] = dict.fromkeys(found, float("inf"))
    for turn in range(args.turns):
        prompt = windows[turn % len(windows), :PROMPT_TOKENS].tolist()
        told: dict[str, list[int]] = {}
        for name, each in found.items():
            told[name], took_s = decode(each, prompt, args.tokens, f"turn {turn}")
            best[name] = min(best[name], took_s)
        check_same(told)
    rates = {name: (args.tokens - 1) / took_s for name, took_s in best.items()}
    print("| | tokens/s | of dense |\n| --- | --- | --- |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / rates['dense']:.2f} × |")
    report: dict[str, Any] = {"tokens_per_s": rates, **reuse(found["converted"], windows)}
    print(f"reuse {report['reuse']:.3f}, by chance {report['chance']:.3f}")
    report["hits"] = {name: hit_share(each) for name, each in found.items() if "disk" in name}
    for name, share in report["hits"].items():
        print(f"{name}: {share:.3f} of uses found their expert in memory")
    print(json.dumps(report))


def check_same(told: Mapping[str, list[int]]) -> None:
    """SystemExit where the packed model's tokens depend on where its experts are."""
    packed = {name: tokens for name, tokens in told.items() if name.startswith("packed")}
    if len({tuple(tokens) for tokens in packed.values()}) > 1:
        raise SystemExit(f"tokens differ: {packed}")


def hit_share(engine: Engine) -> float:
    stats = engine.stats(fresh=True).experts
    assert stats is not None
    (cache,) = stats.caches
    hits, late, misses = (sum(part) for part in (cache.hits, cache.late, cache.misses))
    return hits / (hits + late + misses)


if __name__ == "__main__":
    main()
