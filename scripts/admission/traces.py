"""Windows of recorded traffic: when requests came, and how long prompts and outputs were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeserve.config import SchedulerConfig
from moeserve.engine.simulation import Arrival
from moeserve.planner.workload import MOONCAKE_BLOCK, WorkloadRequest
from moeserve.planner.workload_files import read_workload

#: the first request of each window
WINDOWS = {
    "azure-code": (5000, 6300, 7600),
    "azure-conv": (6000, 11000, 16000),
    "mooncake": (4000, 7000, 10000),
}
#: outputs before a window that the rules have seen
HISTORY = SchedulerConfig().history_requests


@dataclass(frozen=True)
class Trace:
    """A window of a trace. history: lengths of the outputs before it."""

    name: str
    rows: list[WorkloadRequest]
    history: tuple[int, ...] = ()

    @property
    def span_s(self) -> float:
        return self.rows[-1].at_s - self.rows[0].at_s

    @property
    def rate(self) -> float:
        return len(self.rows) / self.span_s

    @property
    def max_tokens(self) -> int:
        longest = max(row.num_output for row in self.rows)
        return 1 << (longest - 1).bit_length()

    @property
    def mean_prompt(self) -> float:
        return sum(row.num_prompt for row in self.rows) / len(self.rows)

    @property
    def mean_output(self) -> float:
        return sum(row.num_output for row in self.rows) / len(self.rows)

    @property
    def mean_new_prompt(self) -> float:
        """Prompt tokens per request that no earlier request had, were kv never evicted."""
        seen: set[int] = set()
        new = 0
        for row in self.rows:
            known = sum(MOONCAKE_BLOCK for hash_id in row.hash_ids if hash_id in seen)
            seen.update(row.hash_ids)
            new += max(row.num_prompt - known, 1)
        return new / len(self.rows)

    def arrivals(self, rate: float) -> Iterator[Arrival]:
        stretch, start_s = self.rate / rate, self.rows[0].at_s
        for number, row in enumerate(self.rows):
            at_s = (row.at_s - start_s) * stretch
            yield Arrival(at_s, row.tokens(number), row.num_output, self.max_tokens)


def read_window(workloads: Path, name: str, start: int, num_requests: int) -> Trace:
    first, stop = max(start - HISTORY, 0), start + num_requests
    file = f"AzureLLMInferenceTrace_{name.removeprefix('azure-')}.csv"
    if name == "mooncake":
        file = "mooncake_conversation.jsonl"
    rows = list(read_workload(workloads / file, stop).requests[first:])
    before, window = rows[: start - first], rows[start - first :]
    assert len(window) == num_requests, f"{name} has no {num_requests} requests from {start}"
    return Trace(name, window, tuple(row.num_output for row in before))
