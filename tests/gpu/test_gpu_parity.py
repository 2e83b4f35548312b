"""Every family on the device under test, against transformers on the CPU, in float32.

The same configs, reference and runner as tests/models/test_parity.py. That one draws fresh configs
at every run; these are fixed, because what is new here is the device and not the config.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from parity_cases import (
    DRAW,
    VOCAB,
    draw_config,
    make_reference,
    reference_greedy,
    save,
)
from support.model_runner import BlockSequence, Runner
from support.settled import reference_logits, relative_error, settled_prompt
from transformers import PreTrainedModel

from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.models.registry import LoadedModel, load_model

pytestmark = pytest.mark.gpu

PROMPT_TOKENS = 40
NEW_TOKENS = 64
TOLERANCE = 1e-4


def load(path: Path, device: torch.device) -> LoadedModel:
    config = ModelConfig(model=str(path), dtype="float32", device=str(device))
    return load_model(config, ExpertConfig())


def fixed_model(model_type: str, seed: int) -> PreTrainedModel:
    config = draw_config(model_type, seed)
    if model_type == "gpt_oss":
        # transformers 5.17 clamps at 7 whatever config.json says; these tests take the transformers
        # that the machine has.
        config["swiglu_limit"] = 7.0
    return make_reference(config, model_type, seed)


def settled(model: PreTrainedModel, rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt and its greedy answer."""
    greedy = partial(reference_greedy, model, num_tokens=NEW_TOKENS)
    return settled_prompt(model, rng, VOCAB, PROMPT_TOKENS, greedy)


@pytest.mark.parametrize(("packed", "seed"), [(False, 1), (True, 2)], ids=["separate", "packed"])
@pytest.mark.parametrize("model_type", DRAW)
def test_logits_and_greedy_tokens(
    model_type: str,
    packed: bool,
    seed: int,
    device: torch.device,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = fixed_model(model_type, seed)
    save(model, tmp_path, packed=packed, old_style=False)
    prompt, answer = settled(model, random.Random(seed))
    tokens = prompt + answer
    loaded = load(tmp_path, device)
    error = relative_error(Runner(loaded).logits(tokens), reference_logits(model, tokens))
    record_property("max_relative_error", f"{error:.1e}")
    assert error <= TOLERANCE
    assert Runner(loaded).greedy(prompt, NEW_TOKENS) == answer
    on_cpu = load(tmp_path, torch.device("cpu"))
    assert Runner(on_cpu).greedy(prompt, NEW_TOKENS) == answer


@pytest.mark.parametrize("model_type", DRAW)
def test_chunks_and_neighbours_change_nothing(
    model_type: str, device: torch.device, tmp_path: Path
) -> None:
    """Prefill in chunks beside another sequence's decode: the logits of one pass, alone."""
    seed = 3
    rng = random.Random(seed)
    model = fixed_model(model_type, seed)
    save(model, tmp_path, packed=True, old_style=False)
    runner = Runner(load(tmp_path, device))
    prompt, _ = settled(model, rng)
    alone = reference_logits(model, prompt)
    sequence, neighbour = BlockSequence(list(prompt)), BlockSequence([rng.randrange(VOCAB)] * 30)
    runner.step([(neighbour, 13)])
    found = []
    while sequence.num_computed < len(prompt):
        chunk = min(rng.randint(1, 9), len(prompt) - sequence.num_computed)
        decode = [(neighbour, 1)] if neighbour.num_computed < 30 else []
        found.append(runner.step([*decode, (sequence, chunk)])[-1])
    error = relative_error(torch.cat(found), alone)
    assert error <= TOLERANCE


def test_the_bundled_model_says_the_same_on_both(device: torch.device) -> None:
    """The whole engine, 16 requests at once, greedy: the device's tokens are the CPU's."""
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    answers = []
    for where in (torch.device("cpu"), device):
        config = EngineConfig(
            model=ModelConfig(dtype="float32", device=str(where)),
            experts=ExpertConfig(num_threads=1),  # for a model this small more cost more
        )
        engine = Engine.from_config(config)
        rng = random.Random(0)
        for number in range(16):
            ids = [rng.randrange(engine.info.vocab_size) for _ in range(rng.randint(1, 60))]
            request = EngineRequest(request_id=str(number), token_ids=ids, params=params)
            engine.add(request)
        tokens: dict[str, list[int]] = {str(number): [] for number in range(16)}
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
        answers.append(tokens)
    assert answers[0] == answers[1]
