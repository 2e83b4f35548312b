"""The memory that the system counts stays within the budget while kv grows and shrinks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.randomness import fresh_seed
from transformers import Qwen3MoeConfig

from moeserve.planner.random_model import write_random_packed

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

RUN = """
import json, random, sys
import psutil
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine

path, budget_bytes, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
engine = Engine.from_config(
    EngineConfig(
        model=ModelConfig(model=path),
        kv=KvConfig(kv_bytes=32 << 20),
        scheduler=SchedulerConfig(max_batch_tokens=256),
        experts=ExpertConfig(
            cpu_backend="native", num_threads=1, host_memory_bytes=budget_bytes, disk_threads=2
        ),
    )
)


def pages():
    "Bytes that the system counts: of kv, of slots, of the process."
    found = {"kv": 0, "slots": 0}
    slots = engine.loaded.runtime.supply.slots
    starts = {layer.entries.data_ptr(): "kv" for layer in engine.runner.kv.layers}
    starts |= {slots[i].ctypes.data: "slots" for i in range(len(slots))}
    for line in open("/proc/self/smaps"):
        head = line.split()
        if "-" in head[0]:
            low, high = (int(x, 16) for x in head[0].split("-"))
            # neighbouring mappings of one kind are shown as one
            what = next((what for at, what in starts.items() if low <= at < high), None)
        elif what and head[0] == "Rss:":
            found[what] += int(head[1]) * 1024
    return found | {"process": psutil.Process().memory_info().rss}


def run(moments):
    "A crowd with long contexts, then one short request: kv grows and is given back."
    for count, longest in ((6, 900), (1, 20)):
        for number in range(count):
            tokens = [rng.randrange(1000) for _ in range(rng.randint(longest // 2, longest))]
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            engine.add(EngineRequest(request_id=f"{number}", token_ids=tokens, params=params))
        while engine.has_work:
            engine.step()
            division = engine.stats().memory
            moments.append(pages() | {name: getattr(division, name) for name in (
                "kv_bytes", "experts_bytes", "weights_bytes", "budget_bytes", "num_kv_shrunk")})


first, second = [], []
run(first)  # shows what memory is used for besides
run(second)
print(json.dumps({"first": first, "second": second}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64 experts, 56 MiB of them, with 4 KiB of kv for each token."""
    directory = tmp_path_factory.mktemp("random")
    config = Qwen3MoeConfig(
        hidden_size=512, moe_intermediate_size=512, num_experts=64, num_experts_per_tok=4,
        vocab_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64, intermediate_size=512, max_position_embeddings=1024, eos_token_id=0,
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    write_random_packed(directory / "config.json", directory / "packed", "int4", 0)
    return directory / "packed"


def test_the_system_counts_no_more_than_the_budget(model: Path) -> None:
    budget = 56 * MIB
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(model), str(budget), str(fresh_seed())],
        capture_output=True, text=True, cwd=ROOT, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["first"], found["second"]
    for moment in first + second:
        assert moment["kv"] <= moment["kv_bytes"]
        assert moment["slots"] <= moment["experts_bytes"]
        assert moment["kv"] + moment["slots"] + moment["weights_bytes"] <= budget
    assert max(moment["kv_bytes"] for moment in second) > 16 * MIB, "a crowd needs kv"
    assert max(moment["experts_bytes"] for moment in second[-5:]) > 40 * MIB, "alone it needs none"
    assert second[-1]["num_kv_shrunk"] > second[0]["num_kv_shrunk"]
    others = max(moment["process"] - moment["kv"] - moment["slots"] for moment in first)
    shared = budget - second[0]["weights_bytes"]
    assert max(moment["process"] for moment in second) <= others + shared + 8 * MIB
