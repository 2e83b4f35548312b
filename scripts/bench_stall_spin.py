"""What it costs to let cores halt while a step waits for experts from disk.

    python scripts/bench_stall_spin.py PACKED [--share 50] [--rounds 12] [--spin-us 20000 100000]

Theory. A core that nothing runs on halts, and what runs first when it is back runs slower: the host
of a virtual machine must give the core back, clocks and caches must recover. A step over the disk
waits once a layer; threads of the idle policy that spin meanwhile (csrc/core_waker.h) spare it
that. How much there is to gain is the share of a step that is neither reading nor would run as slow
in any case: measured here, since no figure of a processor says it.

Measured: decode of one stream, greedy, --share percent of the experts in memory. One engine for
each --spin-us and one without (0), on the same files and prompts, in turns of TOKENS tokens;
medians over the rounds of the seconds, and of (turn without : turn). Their tokens must agree. A
model with random weights (scripts/random_packed.py) will do.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

from moeserve.environment import tune_native_libraries

tune_native_libraries()

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig  # noqa: E402
from moeserve.core import EngineRequest, SamplingParams  # noqa: E402
from moeserve.cpu_backend.machine import cpu_model  # noqa: E402
from moeserve.engine.engine import Engine  # noqa: E402
from moeserve.planner.lookup import find_shape  # noqa: E402

PROMPT = 24
TOKENS = 48


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="PACKED")
    parser.add_argument("--share", type=int, default=50, help="percent of the experts in memory")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--spin-us", type=int, nargs="+", default=[20_000])
    args = parser.parse_args()
    shape = find_shape(EngineConfig(model=ModelConfig(model=str(args.model))))
    num_slots = max(2, shape.num_experts * args.share // 100)
    engines = {us: start(args.model, num_slots, us) for us in (0, *args.spin_us)}
    rng = random.Random(0)
    seconds: dict[int, list[float]] = {us: [] for us in engines}
    for number in range(args.rounds + 1):
        prompt = [rng.randrange(1, 1000) for _ in range(PROMPT)]
        tokens = set()
        for us in sorted(engines, reverse=number % 2 == 1):
            took_s, answer = turn(engines[us], prompt)
            seconds[us].append(took_s)
            tokens.add(answer)
        assert len(tokens) == 1, "the same model answers differently"
    report: dict[str, object] = {
        "benchmark": "stall_spin",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "share": args.share,
    }
    for us, times in seconds.items():
        timed, without = times[1:], seconds[0][1:]  # the first round fills the slots
        rate = TOKENS / statistics.median(timed)
        gain = statistics.median(b / a for a, b in zip(timed, without, strict=True))
        report[f"{us} us"] = {"tokens_per_s": rate, "speed_up": gain}
        print(f"spinning {us:6d} us of a wait: {rate:7.2f} tokens/s, {gain:.3f} of none")
    print(json.dumps(report))
    for engine in engines.values():
        engine.close()
    return 0


def start(model: Path, num_slots: int, stall_spin_us: int) -> Engine:
    return Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model), context_tokens=1024),
            kv=KvConfig(num_blocks=64, prefix_reuse=False),
            experts=ExpertConfig(
                cpu_backend="native", host_slots=num_slots, stall_spin_us=stall_spin_us
            ),
        )
    )


def turn(engine: Engine, prompt: list[int]) -> tuple[float, tuple[int, ...]]:
    """Seconds from the first token to the last, and the tokens."""
    params = SamplingParams(max_tokens=TOKENS + 1, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id="turn", token_ids=prompt, params=params))
    tokens: list[int] = []
    begun_s = 0.0
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.token_ids
        if not begun_s and tokens:
            begun_s = time.perf_counter()
    return time.perf_counter() - begun_s, tuple(tokens)


if __name__ == "__main__":
    sys.exit(main())
