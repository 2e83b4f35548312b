"""Writes the weights of every engine, in a process of its own so that its memory is given back."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from random_checkpoint import Qwen3MoeShape

from peers.traffic import FILE_BITS
from peers.weights import (
    CHECKPOINT,
    QUANTISED,
    gguf_path,
    quantise_gguf,
    write_checkpoint,
    write_gguf,
)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: data, shape, seed, gguf (names), threads. Seconds by what was written or found."""
    folder = Path(settings["data"])
    _check_space(folder, Qwen3MoeShape(**settings["shape"]), settings["gguf"])
    seconds = {}

    def timed(name: str, started_s: float) -> None:
        seconds[name] = round(time.perf_counter() - started_s, 1)
        print(f"{name}: {seconds[name]} s", flush=True)

    started_s = time.perf_counter()
    checkpoint = write_checkpoint(folder, Qwen3MoeShape(**settings["shape"]), settings["seed"])
    timed(CHECKPOINT, started_s)
    for name in settings["gguf"]:
        started_s = time.perf_counter()
        write_gguf(checkpoint, gguf_path(folder, "bf16"))
        if name != "bf16":
            source = gguf_path(folder, "bf16")
            quantise_gguf(source, gguf_path(folder, name), QUANTISED[name], settings["threads"])
        timed(name, started_s)
    return {"seconds": seconds, "checkpoint": str(checkpoint)}


def _check_space(folder: Path, shape: Qwen3MoeShape, names: list[str]) -> None:
    """Raises OSError before hours of writing, not after."""
    files = {"bf16", *names} if names else set()  # the others are made from the bf16 one
    wanted = [gguf_path(folder, name) for name in files] + [folder / CHECKPOINT]
    missing = [path for path in wanted if not path.exists()]
    bits = sum(FILE_BITS.get(path.stem, 16.0) for path in missing)
    num_bytes = shape.num_parameters * bits / 8
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        what = ", ".join(path.name for path in missing)
        raise OSError(
            f"{folder}: {what} need {num_bytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; "
            "give another --data, fewer --layers or fewer --engines"
        )
