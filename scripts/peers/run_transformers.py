"""transformers in bfloat16, each figure with the faster of its expert implementations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from peers.measure import DecodeRun, Workload, measure, read_into_page_cache

IMPLEMENTATIONS = ("eager", "grouped_mm")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: checkpoint (directory), threads, workload, count_experts."""
    torch.set_num_threads(settings["threads"])
    work = Workload(**settings["workload"])
    path = Path(settings["checkpoint"])
    read_s = read_into_page_cache(path)
    started_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    load_s = time.perf_counter() - started_s
    engine = Transformers(model)
    results = {}
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        results[implementation] = measure(engine, work)
    first = results[IMPLEMENTATIONS[0]]
    rates = {name: result["rates"] for name, result in results.items()}
    fastest = {
        key: max(IMPLEMENTATIONS, key=lambda name: rates[name][key]) for key in rates["eager"]
    }
    report = {
        **first,
        "load_s": load_s,
        "rates": {key: rates[name][key] for key, name in fastest.items()},
        "other_load": max(result["other_load"] for result in results.values()),
        "notes": {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "rates_by_implementation": rates,
            "read_files_s": round(read_s, 2),
        },
    }
    if settings["count_experts"]:
        report["experts_per_step"] = count_experts(model, engine, work)
    return report


class Transformers:
    """Greedy decoding by hand: `generate` would add its own bookkeeping to every step."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], num_steps: int) -> DecodeRun:
        kv = DynamicCache(config=self.model.config)
        chosen = [self._forward(torch.tensor(prompts), kv)]
        started_s = time.perf_counter()
        for _ in range(num_steps):
            chosen.append(self._forward(chosen[-1], kv))
        seconds = time.perf_counter() - started_s
        return DecodeRun(seconds, num_steps * len(prompts), torch.cat(chosen, dim=1).tolist())

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        self._forward(torch.tensor([prompt]), DynamicCache(config=self.model.config))
        return time.perf_counter() - started_s

    def _forward(self, ids: Tensor, kv: DynamicCache) -> Tensor:
        """[B, T] token ids to the greedy next token of each row, [B, 1]."""
        output = self.model(input_ids=ids, past_key_values=kv, use_cache=True, logits_to_keep=1)
        chosen: Tensor = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        return chosen


def count_experts(model: Any, engine: Transformers, work: Workload) -> dict[str, float]:
    """Distinct experts per layer and decode step, counted in the routers' own output (untimed)."""
    counts: dict[int, list[int]] = {}

    def note(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ids = output[2]  # [T, K]
        counts.setdefault(len(ids), []).append(len(ids.unique()))

    routers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    assert routers, "transformers has renamed its router"
    hooks = [router.register_forward_hook(note) for router in routers]
    for num_streams in (1, work.num_streams):
        prompts = work.prompts("streams", num_streams, work.prompt_tokens)
        engine.decode(prompts, work.stream_steps)
    for hook in hooks:
        hook.remove()
    return {str(rows): sum(counts[rows]) / len(counts[rows]) for rows in (1, work.num_streams)}
