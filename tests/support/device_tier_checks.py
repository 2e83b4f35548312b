"""What a device tier must do on any device that torch has: a GPU, or the CPU in its place."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity_cases import DRAW, VOCAB, draw_config, make_reference, reference_greedy, save
from support.engine_answers import Answers, answers, make_engine, make_requests
from support.model_runner import Runner
from support.settled import reference_logits, relative_error, settled_prompt

from moeserve.cache.policies.registry import POLICIES
from moeserve.config import BUNDLED_MODEL, ExpertConfig, ModelConfig
from moeserve.experts.device_supply import DeviceSupply
from moeserve.models.registry import LoadedModel, load_model

PROMPT_TOKENS, NEW_TOKENS = 30, 16
TOLERANCE = 1e-4
LOGPROB_TOLERANCE = 2e-3
DENSE = ("llama", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = tuple(name for name in DRAW if name not in DENSE)
PREDICTORS = ("none", "frequency", "markov", "gate_lookahead")


def draw_settings(rng: random.Random, most_slots: int) -> dict[str, Any]:
    """Slots, policy and predictor."""
    predictor = rng.choice(PREDICTORS)
    return {
        "device_slots": rng.randint(1, most_slots),
        "policy": rng.choice(sorted(set(POLICIES) - {"resident"})),
        "predictor": predictor,
        "prefetch_depth": None if predictor == "none" else rng.randint(1, 3),
    }


def supply_of(loaded: LoadedModel) -> DeviceSupply:
    supply = loaded.runtime.supply
    assert isinstance(supply, DeviceSupply)
    return supply


def check_family(model_type: str, device: str, rng: random.Random, tmp_path: Path) -> float:
    """Logits and greedy tokens of a random model are transformers'. Returns the relative error."""
    config = draw_config(model_type, rng.randrange(1 << 30))
    if model_type == "gpt_oss":  # as in tests/gpu: transformers clamps at 7 whatever is stated
        config["swiglu_limit"] = 7.0
    model = make_reference(config, model_type, rng.randrange(1 << 30))
    save(model, tmp_path, packed=rng.random() < 0.5, old_style=False)
    settings = draw_settings(rng, 12)
    print(device, settings)
    loaded = load_model(
        ModelConfig(model=str(tmp_path), dtype="float32", device=device), ExpertConfig(**settings)
    )
    try:
        greedy = partial(reference_greedy, model, num_tokens=NEW_TOKENS)
        prompt, answer = settled_prompt(model, rng, VOCAB, PROMPT_TOKENS, greedy)
        tokens = prompt + answer
        error = relative_error(Runner(loaded).logits(tokens), reference_logits(model, tokens))
        assert error <= TOLERANCE, error
        assert Runner(loaded).greedy(prompt, NEW_TOKENS) == answer
        loaded.runtime.check_integrity()
    finally:
        loaded.close()
    return error


def check_engine(device: str, rng: random.Random, path: Path = BUNDLED_MODEL, **more: Any) -> None:
    """Requests that join each other: log-probabilities are those of the CPU alone, in float32, as
    far as the same tokens were chosen. path: of a model that computes in float32, if packed."""
    dtype = "float32" if path == BUNDLED_MODEL else "auto"
    plain = make_engine(path, dtype=dtype)
    requests = make_requests(rng, plain.info.vocab_size)
    expected = answers(plain, requests)
    total = plain.loaded.runtime.num_experts
    plain.close()
    settings = draw_settings(rng, total) | more
    print(device, settings)
    engine = make_engine(path, rng.choice((3, 24, 200)), device, dtype, **settings)
    try:
        found = answers(engine, requests)
        near(found, expected)
        supply = supply_of(engine.loaded)
        stats = engine.loaded.runtime.stats()
        assert len(stats.caches) == (2 if more else 1)
        assert supply.cache.tier.value == "device"
    finally:
        engine.close()


def near(found: Answers, expected: Answers) -> None:
    """Each answer up to the first token that differs, where both choices must have been close."""
    assert found.keys() == expected.keys()
    for name, tokens in expected.items():
        assert len(found[name]) == len(tokens)
        for (token, logprob), (other, other_logprob) in zip(tokens, found[name], strict=True):
            off = abs(logprob - other_logprob)
            assert off < LOGPROB_TOLERANCE, (name, token, logprob, other, other_logprob)
            if token != other:
                break


def name_of(device: torch.device) -> str:
    """The CPU stands in for a GPU under a name of its own."""
    return "dry-run" if device.type == "cpu" else str(device)
