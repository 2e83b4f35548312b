"""Writes the weights of every engine, in a process of its own so that its memory is given back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from random_checkpoint import Qwen3MoeShape

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
