"""Time and peak memory of `moeserve convert`, and what of the memory is neither layer nor text.

    python scripts/random_dense.py /tmp/dense1b
    python scripts/bench_conversion_cost.py /tmp/dense1b --text TEXT [--tokens 4096] [--threads 1]

The conversion runs as a process of its own, as a user starts it. The kernel keeps how much memory
it had at most (VmHWM; not ru_maxrss, which begins with that of the process it was started from),
and is asked every 20 ms, also how much of it are pages of mapped files, which it may take back at
any time. `import` is the same for a process that only imports what a conversion
imports. One layer is its weights in float32. Activations are those that a layer needs for the text:
four of [T, I] and eight of [T, H] in float32, T tokens, I neurons, H the hidden size. What is left
of the peak must be below 1 GiB.

OUT is removed at the end, if --keep does not say otherwise. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from moeserve.models.safetensors_file import SafetensorsFile

MIB, GIB = 1 << 20, 1 << 30
SAMPLE_S = 0.02
IMPORTS = "import torch, moeserve.cli, moeserve.convert.command, moeserve.convert.run"


@dataclass(frozen=True)
class Use:
    """Of one process. files_bytes: the most that was mapped files at any sample."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    anonymous_bytes: int
    files_bytes: int


@dataclass(frozen=True)
class Sizes:
    """Of a dense checkpoint. layer_bytes: the largest layer in float32."""

    parameters: int
    layer_bytes: int
    hidden: int
    inner: int


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dense", type=Path, help="directory")
    add("--text", type=Path, nargs="+", required=True, help="calibration text")
    add("--tokens", type=int, default=4096, help="of the text (%(default)s)")
    add("--experts", type=int, default=16, help="(%(default)s)")
    add("--active", type=int, default=12, help="(%(default)s)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--keep", type=Path, help="where to leave OUT")
    return parser.parse_args()


def run(command: list[str], environment: dict[str, str]) -> Use:
    """Raises CalledProcessError."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    peak = anonymous = files = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        now = memory_of(process.pid)
        peak = max(peak, now.get("VmHWM", 0))
        anonymous = max(anonymous, now.get("RssAnon", 0))
        files = max(files, now.get("RssFile", 0))
        time.sleep(SAMPLE_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Use(
        wall_s=time.monotonic() - started,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak,
        anonymous_bytes=anonymous,
        files_bytes=files,
    )


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc; a process that has ended has none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("Rss", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def sizes_of(dense: Path) -> Sizes:
    parameters = 0
    by_layer: dict[str, int] = {}
    for file in sorted(dense.glob("*.safetensors")):
        for name, entry in SafetensorsFile(file).entries.items():
            numbers = prod(entry.shape)
            parameters += numbers
            if name.startswith("model.layers."):
                layer = name.split(".")[2]
                by_layer[layer] = by_layer.get(layer, 0) + 4 * numbers
    config = json.loads((dense / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return Sizes(parameters, max(by_layer.values()), hidden, inner)


def convert(args: argparse.Namespace, out: Path) -> Use:
    command = [sys.executable, "-m", "moeserve.cli", "convert", str(args.dense), str(out), "--text"]
    command += [*map(str, args.text), "--tokens", str(args.tokens)]
    command += ["--experts", str(args.experts), "--active", str(args.active)]
    command += ["--num-threads", str(args.threads)]
    return run(command, os.environ | {"OMP_NUM_THREADS": str(args.threads)})


def main() -> None:
    args = parse_args()
    sizes = sizes_of(args.dense)
    imported = run([sys.executable, "-c", IMPORTS], dict(os.environ))
    with tempfile.TemporaryDirectory(dir=args.dense.parent) as folder:
        out = args.keep or Path(folder) / "out"
        used = convert(args, out)
        out_bytes = sum(file.stat().st_size for file in out.iterdir())
        if args.keep is None:
            shutil.rmtree(out)
    activations = 4 * args.tokens * (4 * sizes.inner + 8 * sizes.hidden)
    rest = used.peak_bytes - imported.peak_bytes - sizes.layer_bytes - activations
    billions = sizes.parameters / 1e9
    print(f"{billions:.3f} billion parameters, {args.tokens} tokens of text, OUT {out_bytes} bytes")
    print(f"time                {used.wall_s:8.0f} s, of processors {used.cpu_s:.0f} s")
    print(f"  per billion       {used.wall_s / billions:8.0f} s, {used.cpu_s / billions:.0f} s")
    print(f"peak memory         {used.peak_bytes / MIB:8.0f} MiB")
    print(f"  at most anonymous {used.anonymous_bytes / MIB:8.0f} MiB")
    print(f"  at most of files  {used.files_bytes / MIB:8.0f} MiB")
    print(f"import              {imported.peak_bytes / MIB:8.0f} MiB")
    print(f"one layer, float32  {sizes.layer_bytes / MIB:8.0f} MiB")
    print(f"activations         {activations / MIB:8.0f} MiB")
    print(f"beside these        {rest / MIB:8.0f} MiB, {'below' if rest < GIB else 'ABOVE'} 1 GiB")
    figures = {**asdict(sizes), "tokens": args.tokens, "out_bytes": out_bytes}
    figures |= {"convert": asdict(used), "import": asdict(imported)}
    print(json.dumps(figures | {"activation_bytes": activations, "rest_bytes": rest}))


if __name__ == "__main__":
    main()
