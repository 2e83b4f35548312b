"""llama.cpp through its C API (llama-cpp-python's ctypes layer, none of its Python sampling)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from peers.measure import DecodeRun, Workload, measure, read_into_page_cache

CONTEXT_TOKENS = 1024  # of one stream
UBATCH_TOKENS = 512  # llama.cpp's default
LOG_LEVEL_WARN = 3  # ggml_log_level


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: gguf (path), threads, workload."""
    work = Workload(**settings["workload"])
    path = Path(settings["gguf"])
    llama_cpp.llama_log_set(_log_warnings, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    read_s = read_into_page_cache(path)
    started_s = time.perf_counter()
    engine = LlamaCpp(path, settings["threads"])
    load_s = time.perf_counter() - started_s
    return {
        "load_s": load_s,
        **measure(engine, work),
        "notes": {
            "version": llama_cpp.__version__,
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
            "file_bytes": path.stat().st_size,
            "read_file_s": round(read_s, 2),
        },
    }


@llama_cpp.llama_log_callback
def _log_warnings(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level >= LOG_LEVEL_WARN:
        print(text.decode(errors="replace").rstrip(), flush=True)


class LlamaCpp:
    """A loaded model. Its default settings are kept but for threads: mmap, weights repacked where
    llama.cpp has a faster layout, flash attention where it chooses to."""

    def __init__(self, path: Path, threads: int) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}; its messages are above")
        self.threads = threads
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )

    def decode(self, prompts: list[list[int]], num_steps: int) -> DecodeRun:
        with self._context(len(prompts)) as context:
            outputs = [[token] for token in context.extend(prompts)]
            started_s = time.perf_counter()
            for _ in range(num_steps):
                for output, token in zip(
                    outputs, context.extend([output[-1:] for output in outputs]), strict=True
                ):
                    output.append(token)
            seconds = time.perf_counter() - started_s
        return DecodeRun(seconds, num_steps * len(prompts), outputs)

    def prefill(self, prompt: list[int]) -> float:
        with self._context(1) as context:
            started_s = time.perf_counter()
            context.extend([prompt])
            return time.perf_counter() - started_s

    @contextmanager
    def _context(self, num_streams: int) -> Iterator[Context]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT_TOKENS * num_streams
        params.n_batch = CONTEXT_TOKENS * num_streams
        params.n_ubatch = UBATCH_TOKENS
        params.n_seq_max = num_streams
        params.n_threads = params.n_threads_batch = self.threads
        handle = llama_cpp.llama_init_from_model(self.model, params)
        if not handle:
            raise RuntimeError("llama.cpp made no context; its messages are above")
        try:
            yield Context(handle, num_streams, self.vocab_size)
        finally:
            llama_cpp.llama_free(handle)


class Context:
    """The kv of some streams, each with its position."""

    def __init__(self, handle: Any, num_streams: int, vocab_size: int) -> None:
        self.handle = handle
        self.vocab_size = vocab_size
        self.positions = [0] * num_streams

    def extend(self, new_tokens: list[list[int]]) -> list[int]:
        """Adds tokens to every stream in one batch; the greedy next token of each."""
        num_tokens = sum(map(len, new_tokens))
        batch = llama_cpp.llama_batch_init(num_tokens, 0, 1)
        last_rows = []
        row = 0
        for stream, tokens in enumerate(new_tokens):
            for token in tokens:
                batch.token[row] = token
                batch.pos[row] = self.positions[stream]
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = stream
                batch.logits[row] = 0
                self.positions[stream] += 1
                row += 1
            batch.logits[row - 1] = 1
            last_rows.append(row - 1)
        batch.n_tokens = num_tokens
        status = llama_cpp.llama_decode(self.handle, batch)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {num_tokens} tokens returned {status}")
        return [self._greedy(last) for last in last_rows]

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.handle, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())
