"""What is measured of every engine, in the same way: one workload, one clock, one result.

The rates are of the engine alone: prompts are token ids, sampling is greedy, and decoding is timed
from the first token on, so that no prefill is in it.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FIRST_PROMPT_TOKENS = 8
READ_BYTES = 16 << 20
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Skip(Exception):
    """What a run needs is not there. The report names the row and the reason."""


@dataclass(frozen=True)
class Workload:
    """Sizes of the timed parts. Contexts grow from prompt_tokens by the steps of decoding."""

    vocab_size: int
    num_streams: int = 16
    prompt_tokens: int = 64
    decode_steps: int = 32
    stream_steps: int = 16  # decode steps of the num_streams together
    prefill_tokens: int = 512

    def prompts(self, name: str, num_streams: int, num_tokens: int) -> list[list[int]]:
        """Random token ids, the same in every engine and run; other names, other ids."""
        draw = random.Random(name)
        return [
            [draw.randrange(self.vocab_size) for _ in range(num_tokens)] for _ in range(num_streams)
        ]


@dataclass(frozen=True)
class DecodeRun:
    """seconds: of the steps after the first token. token_ids: per stream, first token included."""

    seconds: float
    num_tokens: int
    token_ids: list[list[int]]


class EngineUnderTest(Protocol):
    """What a runner gives. Both calls start from empty kv."""

    def decode(self, prompts: list[list[int]], num_steps: int) -> DecodeRun:
        """Prefills all prompts (not timed), then decodes num_steps tokens of each together."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""


#: what the machine can do at this moment, by name
Limits = dict[str, float]


def measure(
    engine: EngineUnderTest, work: Workload, limits: Callable[[], Limits] = dict
) -> dict[str, Any]:
    """Rates in tokens/s and the greedy tokens, after a warm-up that touches every weight.

    limits: asked for before and after each timed part; the mean of both stands beside its rate. A
    machine that is shared gives more in one minute than in the next.
    """
    started_s = time.perf_counter()
    engine.prefill(*work.prompts("first", 1, FIRST_PROMPT_TOKENS))
    first_token_s = time.perf_counter() - started_s
    engine.decode(work.prompts("warm", work.num_streams, work.prompt_tokens), 2)
    engine.prefill(*work.prompts("warm prefill", 1, work.prefill_tokens))
    with OtherLoad() as others:
        at = [limits()]
        single = engine.decode(work.prompts("single", 1, work.prompt_tokens), work.decode_steps)
        at.append(limits())
        prompts = work.prompts("streams", work.num_streams, work.prompt_tokens)
        streams = engine.decode(prompts, work.stream_steps)
        at.append(limits())
        prefill_s = engine.prefill(*work.prompts("prefill", 1, work.prefill_tokens))
        at.append(limits())
    around = [
        {name: (before[name] + after[name]) / 2 for name in before}
        for before, after in itertools.pairwise(at)
    ]
    return {
        "first_token_s": first_token_s,
        "rates": {
            "decode_1": single.num_tokens / single.seconds,
            "decode_streams": streams.num_tokens / streams.seconds,
            "prefill": work.prefill_tokens / prefill_s,
        },
        "limits": dict(zip(("decode_1", "decode_streams", "prefill"), around, strict=True)),
        "token_ids": single.token_ids + streams.token_ids,
        "other_load": others.share,
    }


class OtherLoad:
    """Share of the machine's CPU time that other processes took, 0 to 1, while it was open.

    A figure taken beside other work is no figure: the report names the largest share.
    """

    share = 0.0

    def __enter__(self) -> OtherLoad:
        self._started = (time.perf_counter(), _machine_cpu_s(), _own_cpu_s())
        return self

    def __exit__(self, *exc_info: object) -> None:
        wall_s, machine_s, own_s = (
            after - before
            for after, before in zip(
                (time.perf_counter(), _machine_cpu_s(), _own_cpu_s()), self._started, strict=True
            )
        )
        self.share = max(0.0, (machine_s - own_s) / (wall_s * (os.cpu_count() or 1)))


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _machine_cpu_s() -> float:
    """User, nice, system, interrupts and stolen time of all cores (proc(5), /proc/stat)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS


def read_into_page_cache(path: Path) -> float:
    """Reads a file, or all files of a directory, once. Returns the seconds it took.

    From the disk, after the system has forgotten this and all other models beside it: the pages are
    then what Linux makes of a file while memory is free (huge ones, on file systems that have
    them), not what other work has left of it. Decoding differs by a tenth and more.
    """
    for file in path.parent.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started_s = time.perf_counter()
    buffer = bytearray(READ_BYTES)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    return time.perf_counter() - started_s
