"""LongRoPE against transformers: one set of factors up to the original context, another beyond.

What counts is transformers' forward of the whole sequence at once. Its `generate` keeps kv of the
short factors when an output grows beyond the original context, except for Phi-3, which computes
everything anew; so does the engine here, for every family.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import VOCAB, draw_config, make_reference, save
from support.model_runner import BlockSequence, Runner
from support.settled import is_settled, reference_logits, relative_error
from transformers import PreTrainedModel

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.models.registry import load_model

pytestmark = pytest.mark.usefixtures("quiet")

ORIGINAL = 24
FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "glm4_moe"]


def draw_model(model_type: str, seed: int) -> PreTrainedModel:
    rng = random.Random(seed)
    config = draw_config(model_type, seed)
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    dim = config.get("qk_rope_head_dim") or config.get("head_dim")
    dim = dim or config["hidden_size"] // config["num_attention_heads"]
    if model_type == "glm4_moe":
        rope["partial_rotary_factor"] = 0.5
        dim //= 2
    rope["short_factor"] = [rng.uniform(1, 1.5) for _ in range(dim // 2)]
    rope["long_factor"] = [rng.uniform(2, 8) for _ in range(dim // 2)]
    rope |= rng.choice([{}, {"factor": 4.0}, {"attention_factor": 1.2}])
    return make_reference(config | {"rope_parameters": rope}, model_type, seed)


def draw_settled(model_type: str, seed: int, num_prompt: int) -> tuple[PreTrainedModel, list[int]]:
    """A model and tokens that it takes for greedy, none of which hangs on rounding."""
    for attempt in range(30):
        reference = draw_model(model_type, seed + attempt)
        rng = random.Random(seed + attempt)
        tokens = [rng.randrange(VOCAB) for _ in range(num_prompt)]
        settled = True
        while settled and len(tokens) < 2 * ORIGINAL:
            logits = reference_logits(reference, tokens)
            first, second = logits[-1].topk(2).values.tolist()
            settled = first - second > 1e-3 * float(logits.abs().max())
            tokens.append(int(logits[-1].argmax()))
        for length in (ORIGINAL, len(tokens)):
            part = tokens[:length]
            settled = settled and is_settled(reference, part, reference_logits(reference, part))
        if settled:
            return reference, tokens
    raise AssertionError(f"{model_type}: no settled case from seed {seed} on")


@pytest.mark.parametrize(
    ("model_type", "backend"), [*((family, "native") for family in FAMILIES), ("llama", "torch")]
)
def test_logits(model_type: str, backend: str, seed: int, tmp_path: Path) -> None:
    """At the lengths around the switch, whole and in chunks beside a sequence on its other side."""
    reference, tokens = draw_settled(model_type, seed, 10)
    save(reference, tmp_path, packed=False, old_style=seed % 2 == 0)
    loaded = load_model(ModelConfig(model=str(tmp_path)), ExpertConfig(cpu_backend=backend))
    for length in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, len(tokens)):
        expected = reference_logits(reference, tokens[:length])
        runner = Runner(loaded)
        assert relative_error(runner.logits(tokens[:length]), expected) < 1e-4, length
        one, other = BlockSequence(tokens[:length]), BlockSequence(tokens[: ORIGINAL - 3])
        if length <= ORIGINAL:
            other = BlockSequence(tokens[: ORIGINAL + 5])
        first, _ = runner.step([(one, 7), (other, 9)])
        second, _ = runner.step([(one, length - 7), (other, 2)])
        assert relative_error(torch.cat((first, second)), expected) < 1e-4, length


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_tokens_across_the_switch(model_type: str, seed: int, tmp_path: Path) -> None:
    """In the engine: prompts on both sides of it share prefixes, kv is short and is preempted."""
    reference, tokens = draw_settled(model_type, seed, 10)
    save(reference, tmp_path, packed=False, old_style=seed % 2 == 0)
    rng = random.Random(seed)
    loaded = load_model(ModelConfig(model=str(tmp_path)), ExpertConfig(cpu_backend="native"))
    config = EngineConfig(
        model=ModelConfig(model=str(tmp_path)),
        kv=KvConfig(num_blocks=rng.randint(14, 60), block_tokens=4),
        scheduler=SchedulerConfig(
            max_batch_tokens=rng.randint(5, 40),
            admission=rng.choice(["past_future", "aggressive"]),
        ),
    )
    engine = Engine(config, loaded)
    starts = [10, 10, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL - 4, 17]
    found: dict[str, list[int]] = {}
    for number, start in enumerate(starts):
        params = SamplingParams(max_tokens=len(tokens) - start, temperature=0, ignore_eos=True)
        found[str(number)] = tokens[:start]
        engine.add(EngineRequest(request_id=str(number), token_ids=tokens[:start], params=params))
        for delta in engine.step():
            found[delta.request_id] = found[delta.request_id] + delta.token_ids
        engine.check_integrity()
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] = found[delta.request_id] + delta.token_ids
        engine.check_integrity()
    engine.close()
    assert [found[str(number)] for number in range(len(starts))] == [tokens] * len(starts)
