"""What predicting costs a step that is served, with a part of the experts in memory.

    moeserve pack MODEL PACKED [--quantize int8]
    python scripts/bench_predictor_cost.py PACKED [--share 50] [--turns 12]

Theory. A prediction reads weights that the model has pushed out of the caches: 6 KB a layer for
gate_lookahead on the bundled model, 73 KB for gate_residual, from the last cache at some 10 GB/s.
What a step saves by it depends on how long a read takes. So the engine measures both and predicts
only while it pays (`experts/prefetch.py`); a share of steps below 100 % says that it did not.

All engines are in one process, one stream each, and take turns; their tokens must be the same. Of
the steps that decode a token: medians of their length, of what predicting took of those in which
anything was predicted, its share of these steps, and its share of all steps' time.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine

PROMPT_TOKENS = 16
SEED = 1


@dataclass
class Case:
    """One engine. steps: (its length, what predicting took of it) in microseconds."""

    engine: Engine
    spent_s: float = 0.0
    steps: list[tuple[float, float]] = field(default_factory=list)

    def watch(self) -> None:
        """Its predictor's calls are timed from now on."""
        predictor: Any = self.engine.loaded.runtime.predictor
        for name in ("predict", "foresee"):
            setattr(predictor, name, self._timed(getattr(predictor, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began_s = time.perf_counter()
            result = function(*args)
            self.spent_s += time.perf_counter() - began_s
            return result

        return timed

    def decode(self, prompt: list[int], num_tokens: int, name: str, counts: bool) -> list[int]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        self.engine.add(EngineRequest(request_id=name, token_ids=prompt, params=params))
        tokens: list[int] = []
        while self.engine.has_work:
            is_decode, self.spent_s = bool(tokens), 0.0
            began_s = time.perf_counter()
            deltas = self.engine.step()
            took_s = time.perf_counter() - began_s
            tokens += [token for delta in deltas for token in delta.token_ids]
            if is_decode and counts:
                self.steps.append((took_s * 1e6, self.spent_s * 1e6))
        return tokens

    def figures(self) -> dict[str, float]:
        predicted = [(took, spent) for took, spent in self.steps if spent > 0]
        return {
            "step_us": statistics.median(took for took, _ in self.steps),
            "predict_us": statistics.median([s for _, s in predicted]) if predicted else 0.0,
            "share": statistics.median([s / t for t, s in predicted]) if predicted else 0.0,
            "steps_predicted": len(predicted) / len(self.steps),
            "share_of_all": sum(s for _, s in self.steps) / sum(t for t, _ in self.steps),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="what `moeserve pack` wrote")
    parser.add_argument("--share", type=int, default=50, help="percent of experts with a slot")
    parser.add_argument("--predictors", default="gate_lookahead,gate_residual,markov")
    parser.add_argument("--tokens", type=int, default=64, help="decoded per turn (%(default)s)")
    parser.add_argument("--turns", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = make(args, None, "none").engine.info
    slots = max(2, whole.num_experts * whole.num_moe_layers * args.share // 100)
    cases = {name: make(args, slots, name) for name in ["none", *args.predictors.split(",")]}
    for name, case in cases.items():
        if name != "none":
            case.watch()
    rng = np.random.default_rng(SEED)
    for turn in range(args.turns):
        prompt = rng.integers(0, whole.vocab_size, PROMPT_TOKENS).tolist()
        told = {
            name: case.decode(prompt, args.tokens, f"turn {turn}", turn > 0)
            for name, case in cases.items()
        }
        if len({tuple(tokens) for tokens in told.values()}) > 1:
            raise SystemExit(f"tokens differ: {told}")
    report = {name: case.figures() for name, case in cases.items()}
    print("| | step us | predicting us | of those steps | steps that predict | of all steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, each in report.items():
        shares = (each["share"], each["steps_predicted"], each["share_of_all"])
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        print(f"| {name} | {each['step_us']:.0f} | {each['predict_us']:.0f} | {cells} |")
    print(json.dumps(report))


def make(args: argparse.Namespace, slots: int | None, predictor: str) -> Case:
    experts = ExpertConfig(
        cpu_backend="native", num_threads=args.threads, host_slots=slots, predictor=predictor
    )
    config = EngineConfig(model=ModelConfig(model=str(args.model)), experts=experts)
    return Case(Engine.from_config(config))


if __name__ == "__main__":
    main()
