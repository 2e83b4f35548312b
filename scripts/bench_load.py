"""How long a model takes to start: from a packed directory, or packed while its weights are read.

Theory. Packing reads every byte of the checkpoint, converts it and writes it to memory: at best the
speed of packing, a few hundred MB/s per core. A packed directory is mapped. Nothing is read but
headers; pages come from the page cache when a kernel first touches them, 64 KiB per fault, and the
first token pays for that. So the start takes as long as imports do, whatever the model's size, and
`first_token_s`, the time to the first token of a one-token prompt after it, shows the rest.

Every start is a process of its own, with the files in the page cache (each is read once before).
`start_s` counts from the first import of moeserve to a model that is ready; `import_s` is the part
of it that imports take.

    python scripts/bench_load.py [--checkpoint DIR] [--layers 8] [--quantize int8] [--repeats 5]

Without --checkpoint, a random one in the shape of Qwen3-30B-A3B with that many layers is written to
a temporary directory (about 2.4 GiB for each 2 layers). Last line printed: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from random_checkpoint import Qwen3MoeShape, write_random_checkpoint

from moeserve.config import ModelConfig
from moeserve.models.pack import pack_model

START = """
import json, sys, time
begin = time.perf_counter()
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine
imported = time.perf_counter()
settings = json.loads(sys.argv[1])
threads = settings.pop("num_threads")
engine = Engine.from_config(EngineConfig(
    model=ModelConfig(**settings),
    kv=KvConfig(num_blocks=64),
    experts=ExpertConfig(cpu_backend="native", num_threads=threads),
))
ready = time.perf_counter()
engine.add(EngineRequest(
    request_id="a", token_ids=[7], params=SamplingParams(max_tokens=1, temperature=0.0)
))
while not engine.step():
    pass
first = time.perf_counter()
print(json.dumps({
    "start_s": ready - begin, "import_s": imported - begin, "first_token_s": first - ready
}))
"""


def start(model: Path, quantize: str, num_threads: int | None) -> dict[str, float]:
    """One start, in a process of its own."""
    settings = {"model": str(model), "quantize": quantize, "num_threads": num_threads}
    run = subprocess.run(
        [sys.executable, "-c", START, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise SystemExit(run.stderr)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def read_once(path: Path) -> float:
    """Brings the weights into the page cache. Returns GiB."""
    num_bytes = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                num_bytes += len(piece)
    return num_bytes / 2**30


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, object]:
    checkpoint = args.checkpoint
    if checkpoint is None:
        checkpoint = scratch / "checkpoint"
        shape = Qwen3MoeShape(args.layers, vocab_size=32_000)
        write_random_checkpoint(checkpoint, shape, torch.device("cpu"))
    packed = scratch / "packed"
    config = ModelConfig(model=str(checkpoint), quantize=args.quantize)
    pack_model(config, packed, args.num_threads)
    figures: dict[str, object] = {}
    for name, path, quantize in (
        ("mapped", packed, "none"),
        ("packed while loading", checkpoint, args.quantize),
    ):
        size = read_once(path)
        count = args.repeats if name == "mapped" else max(1, args.repeats // 2)
        found = medians([start(path, quantize, args.num_threads) for _ in range(count)])
        beyond = found["start_s"] - found["import_s"]
        figures[name] = {**found, "gib": size, "seconds_per_gib": beyond / size}
        print(name, figures[name], file=sys.stderr, flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to start from a packed directory.")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--quantize", default="int8", choices=("none", "int8", "int4"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(args, Path(scratch))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
