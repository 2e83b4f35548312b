"""What an engine's process takes beside its model: Python, torch, threads, what they allocate.

    python -m moeserve.planner.process_memory

runs the bundled model in a process of its own and prints the memory that this process took, as
JSON. Of that, what `memory.py` knows is taken off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from moeserve.cache.expert_cache import Tier
from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, ErrorCode, MoeserveError, SamplingParams
from moeserve.cpu_backend.machine import PROC, huge_page_mode
from moeserve.cpu_backend.native_runtime import choose_isa
from moeserve.environment import tune_native_libraries
from moeserve.experts.schedule.profile import Figure
from moeserve.planner.memory import Room, memory_plan
from moeserve.planner.model_shape import read_shape

PROMPT_TOKENS, OUTPUT_TOKENS, THREADS = 64, 8, 2
LONGEST_S = 120.0


def measure_process_bytes(times: int = 2) -> Figure:
    """The smallest of a few processes: others only make it more. Raises MoeserveError."""
    found = sorted(_one_process() for _ in range(times))
    spread = (found[-1] - found[0]) / found[0]
    return Figure(value=found[0] - _known_bytes(), spread=spread)


def _one_process() -> int:
    command = [sys.executable, "-m", "moeserve.planner.process_memory"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MoeserveError(
            f"the process that measures memory took longer than {LONGEST_S:.0f} s",
            code=ErrorCode.UNAVAILABLE,
            hint="measure when nothing else runs",
        ) from error
    if done.returncode:
        raise MoeserveError(
            f"the process that measures memory ended with {done.returncode}: {done.stderr[-500:]}",
            code=ErrorCode.UNAVAILABLE,
        )
    return int(json.loads(done.stdout)["bytes"])


def _known_bytes() -> int:
    shape = read_shape(ModelConfig(), BUNDLED_MODEL)
    num_blocks = -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // 16)
    room = Room(
        base_bytes=0,
        num_kv_blocks=num_blocks,
        used_blocks=num_blocks,
        block_tokens=16,
        host_slots=None,
        device_slots=None,
        max_rows=PROMPT_TOKENS,
        sampled_rows=1,
        num_threads=THREADS,
        huge_pages=uses_huge_pages(),
        isa=choose_isa("auto")[0],
    )
    return memory_plan(shape, room, {}).steady_bytes(Tier.HOST)


def uses_huge_pages() -> bool:
    """Whether this machine gives memory in huge pages where that is asked for."""
    return huge_page_mode() in ("always", "madvise")


def resident_bytes(pid: int | None = None, proc: Path = PROC) -> int:
    """Of a process, this one by default: its resident set."""
    status = (proc / str(pid or "self") / "status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, "Linux tells the resident set of every process"
    return int(found[1]) * 1024


def main() -> int:
    tune_native_libraries()
    from moeserve.engine.engine import Engine  # what takes the memory that is measured

    config = EngineConfig(
        model=ModelConfig(),
        scheduler=SchedulerConfig(max_batch_tokens=PROMPT_TOKENS),
        experts=ExpertConfig(cpu_backend="native", num_threads=THREADS),
    )
    engine = Engine.from_config(config)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id="0", token_ids=[5] * PROMPT_TOKENS, params=params))
    while engine.has_work:
        engine.step()
    print(json.dumps({"bytes": resident_bytes()}))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
