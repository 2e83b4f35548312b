"""Fresh random input for every run, with the seed on standard output: pytest shows it on failure.

MOESERVE_TEST_SEED repeats a run.
"""

from __future__ import annotations

import os
import random

import torch


def fresh_seed() -> int:
    given = os.environ.get("MOESERVE_TEST_SEED")
    seed = int(given) if given else random.SystemRandom().randrange(2**31)
    print(f"MOESERVE_TEST_SEED={seed}")
    return seed


def fresh_generators() -> tuple[random.Random, torch.Generator]:
    """For choices and for tensors, from one seed."""
    seed = fresh_seed()
    return random.Random(seed), torch.Generator().manual_seed(seed)
