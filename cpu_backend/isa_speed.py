"""Is the instruction for products of bf16 pairs faster than widening and float32? Not everywhere.

AMD's Zen 4 and 5 make up to twice as many products of pairs as of float32 in a cycle, Intel's
Emerald Rapids half as many: there the level below is the faster one.
"""

from __future__ import annotations

import time
from functools import cache

from moeserve.cpu_backend import _native

#: the level that is VDPBF16PS and nothing else beside the level below
PAIRS_LEVEL = "avx512_bf16"
#: half way between what processors do: half as many, as many, twice as many
LEAST_GAIN = 0.75
#: some 50 us each: in turns and so short that several are not interrupted, whatever else runs
ROUNDS, TURNS = 4000, 40
#: between turns: who else uses the core may keep the units of one kind busy for milliseconds
PAUSE_S = 0.0005


@cache
def pair_gain(name: str) -> float:
    """Products of bf16 per second over those of float32, of the level called `name`, in registers.

    Measured once by a process, in which all are to choose the same level.
    """
    runtime = _native.Runtime(name, 1)
    pairs, singles = [], []
    for _ in range(TURNS):
        time.sleep(PAUSE_S)
        pairs.append(runtime.measure_dot_peak("bf16", 1, ROUNDS))
        singles.append(runtime.measure_dot_peak("f32", 1, ROUNDS))
    return max(pairs) / max(singles)


def slow_pairs(name: str) -> str | None:
    """Why the level below is the faster one, in words; None where it is not."""
    if name != PAIRS_LEVEL:
        return None
    gain = pair_gain(name)
    if gain >= LEAST_GAIN:
        return None
    return f"{name} makes {100 * gain:.0f} % as many products of bf16 as of float32"
