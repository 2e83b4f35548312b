"""How fast each backend computes one MoE layer on this machine.

Run as a program for backends that change the process that imports them:

    python -m moeserve.cpu_backend.measurement ipex bfloat16 8

prints the milliseconds of `measure_layer_ms` as JSON, here with 8 threads.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from types import MappingProxyType

import torch

from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.backend import CpuBackend, ExpertJob

#: large enough for weights to come from memory and for fixed costs not to count, small enough to be
#: measured at a start
SPEC = ExpertSpec(num_experts=16, hidden_size=1024, intermediate_size=512)
TOP_K = 4
#: decode of one stream and of some: calls that are timed, by the number of tokens
NUM_CALLS: Mapping[int, int] = MappingProxyType({1: 8, 16: 3})
LIMIT_S = 120.0


class MeasurementFailed(Exception):
    """A backend that could not be measured, and why."""


def measure_layer_ms(backend: CpuBackend, weights: ExpertWeights) -> list[float]:
    """Milliseconds of one layer for each of NUM_CALLS: the shortest call, since whatever else runs
    can only make one longer. The layer stays in the backend."""
    generator = torch.Generator().manual_seed(0)
    backend.add_layer(0, SPEC, weights)
    times_ms = []
    for num_tokens, num_calls in NUM_CALLS.items():
        jobs = _jobs(num_tokens, weights.down.dtype, generator)
        backend.run(next(jobs))  # the first call sets up threads and kernels
        calls_ms = []
        for job in islice(jobs, num_calls):
            started_s = time.perf_counter()
            backend.run(job)
            calls_ms.append((time.perf_counter() - started_s) * 1e3)
        times_ms.append(round(min(calls_ms), 4))
    return times_ms


def score_ms(times_ms: list[float]) -> float:
    """One figure for a backend: the geometric mean, in which a ratio counts alike at every size."""
    return math.exp(statistics.fmean(map(math.log, times_ms)))


def measure_in_own_process(name: str, dtype: torch.dtype, num_threads: int) -> list[float]:
    """What `measure_layer_ms` gives there. Raises MeasurementFailed."""
    arguments = [name, str(dtype).removeprefix("torch."), str(num_threads)]
    command = [sys.executable, "-m", "moeserve.cpu_backend.measurement", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired as error:
        raise MeasurementFailed(f"{name}: nothing within {LIMIT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        raise MeasurementFailed(f"{name}: {said[-1] if said else error}") from error
    times_ms: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times_ms


def layer_weights(dtype: torch.dtype) -> ExpertWeights:
    """Every expert has the same numbers, at its own place in memory: drawing more takes longer than
    everything that is measured."""
    generator = torch.Generator().manual_seed(0)
    shape = (SPEC.intermediate_size, SPEC.hidden_size)
    numbers = (torch.randn(shape, generator=generator) / 32).to(dtype)
    copies = SPEC.num_experts
    return ExpertWeights(numbers.repeat(copies, 2, 1), numbers.T.repeat(copies, 1, 1))


def _jobs(num_tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Iterator[ExpertJob]:
    """Rows take their experts in turn from a shuffled list, so that no call finds its weights in
    the processor's caches because the one before it has used them."""
    order = torch.randperm(SPEC.num_experts, generator=generator)
    weights = torch.full((num_tokens, TOP_K), 1.0 / TOP_K)
    next_pair = 0
    while True:
        pairs = torch.arange(next_pair, next_pair + num_tokens * TOP_K) % SPEC.num_experts
        next_pair += num_tokens * TOP_K
        x = torch.randn(num_tokens, SPEC.hidden_size, generator=generator).to(dtype)
        yield ExpertJob(0, x, Routing(order[pairs].view(num_tokens, TOP_K), weights))


def main(arguments: list[str]) -> int:
    from moeserve.config import ExpertConfig
    from moeserve.cpu_backend.choice import make_backend

    name, dtype, num_threads = arguments
    torch.set_num_threads(int(num_threads))
    config = ExpertConfig(cpu_backend=name, num_threads=int(num_threads))
    weights = layer_weights(getattr(torch, dtype))
    times_ms = measure_layer_ms(make_backend(name, config).backend, weights)
    print(json.dumps(times_ms))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
