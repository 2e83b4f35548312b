"""Every family against transformers: logits, greedy tokens, and the same tokens however batched.

Configs, weights and prompts are drawn afresh in every run; a failure prints the seed, and
MOESERVE_PARITY_SEED repeats it.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from parity_cases import (
    CONTEXT,
    DRAW,
    VOCAB,
    draw_config,
    make_reference,
    reference_greedy,
    save,
)
from support.model_runner import BlockSequence, Runner
from support.settled import is_settled, reference_logits, relative_error
from torch import Tensor
from transformers import PreTrainedModel

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.models.families import FAMILIES
from moeserve.models.registry import LoadedModel, load_model

pytestmark = pytest.mark.usefixtures("quiet")

FIRST_SEED = int(os.environ.get("MOESERVE_PARITY_SEED", random.SystemRandom().randrange(10**6)))
NUM_CASES = 3
NUM_GREEDY = 64
PROMPT_TOKENS = 40
#: (one tensor per expert or packed, config.json as transformers 5 or as the hub has it)
LAYOUTS = [(False, False), (True, False), (False, True)]


@dataclass(frozen=True)
class Case:
    """A reference model, a prompt, and what transformers says follows."""

    model_type: str
    seed: int
    reference: PreTrainedModel
    prompt: list[int]
    greedy: list[int]
    logits: Tensor  # of prompt and greedy tokens

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.greedy


def draw_case(model_type: str, index: int) -> Case:
    """The first case from a seed on whose tokens do not hang on the last bit of a float32."""
    for attempt in range(20):
        seed = FIRST_SEED + 1000 * index + attempt
        print(f"{model_type}: seed {seed} (MOESERVE_PARITY_SEED={FIRST_SEED})")
        reference = make_reference(draw_config(model_type, seed), model_type, seed)
        rng = random.Random(seed)
        prompt = [rng.randrange(VOCAB) for _ in range(PROMPT_TOKENS)]
        greedy = reference_greedy(reference, prompt, NUM_GREEDY)
        logits = reference_logits(reference, prompt + greedy)
        if is_settled(reference, prompt + greedy, logits):
            return Case(model_type, seed, reference, prompt, greedy, logits)
    raise AssertionError(f"{model_type}: no settled case from seed {FIRST_SEED} on")


def load(case: Case, path: Path, *, packed: bool, old_style: bool, **config: str) -> LoadedModel:
    save(case.reference, path, packed=packed, old_style=old_style)
    return load_model(ModelConfig(model=str(path), **config), ExpertConfig())


def test_every_family_is_tried() -> None:
    assert set(DRAW) == set(FAMILIES)


@pytest.mark.parametrize("index", range(NUM_CASES))
@pytest.mark.parametrize("model_type", list(DRAW))
def test_logits_and_greedy_tokens(model_type: str, index: int, tmp_path: Path) -> None:
    case = draw_case(model_type, index)
    for packed, old_style in LAYOUTS:
        path = tmp_path / f"packed-{packed}-old-{old_style}"
        runner = Runner(load(case, path, packed=packed, old_style=old_style))
        error = relative_error(runner.logits(case.token_ids), case.logits)
        assert error < 1e-4, f"packed={packed} old_style={old_style}: {error:.1e}"
    assert runner.greedy(case.prompt, NUM_GREEDY) == case.greedy


@pytest.mark.parametrize("model_type", list(DRAW))
def test_same_tokens_however_they_are_batched(model_type: str, tmp_path: Path) -> None:
    """Chunked prefill beside decodes of other lengths, then a prefix whose kv is shared."""
    case = draw_case(model_type, NUM_CASES)
    runner = Runner(load(case, tmp_path, packed=False, old_style=False))
    rng = random.Random(case.seed)
    first = BlockSequence(list(case.prompt))
    others = [
        BlockSequence([rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]) for _ in range(3)
    ]
    while len(first.token_ids) < len(case.token_ids):
        pending = len(first.token_ids) - first.num_computed
        work = [(first, rng.randint(1, min(pending, 9)))]
        for other in others:
            left = len(other.token_ids) - other.num_computed
            if rng.random() < 0.8 and len(other.token_ids) < CONTEXT:
                work.append((other, rng.randint(1, left)))
        rng.shuffle(work)
        for (sequence, _), logits in zip(work, runner.step(work), strict=True):
            if sequence.num_computed == len(sequence.token_ids):
                runner.extend(sequence, logits)
    assert first.token_ids == case.token_ids

    shared_tokens = rng.randrange(runner.block_tokens, PROMPT_TOKENS, runner.block_tokens)
    shared_blocks = first.block_ids[: shared_tokens // runner.block_tokens]
    reuser = BlockSequence(list(case.prompt), list(shared_blocks), shared_tokens)
    while len(reuser.token_ids) < len(case.token_ids):
        left = len(reuser.token_ids) - reuser.num_computed
        runner.extend(reuser, runner.step([(reuser, left)])[0])
    assert reuser.token_ids == case.token_ids


@pytest.mark.parametrize("model_type", list(DRAW))
def test_bfloat16_is_as_near_as_transformers(model_type: str, tmp_path: Path) -> None:
    """Our bfloat16 is as far from float32 as transformers' own is on the same draw.

    Rounding may send a token to another expert, and how often depends on the draw, so no fixed
    bound fits all. The tenth of the tokens that came through best had no such luck to need: there
    the ratio was at most 1.7 in 144 draws. Of the medians, where it strikes, at most 3.9.
    """
    case = draw_case(model_type, NUM_CASES + 1)
    runner = Runner(load(case, tmp_path, packed=True, old_style=False, dtype="bfloat16"))
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        experts_implementation="eager",  # grouped_mm wants rows of multiples of 16 bytes
    ).eval()
    ours = error_per_token(runner.logits(case.token_ids), case.logits)
    theirs = error_per_token(reference_logits(peer, case.token_ids), case.logits)
    assert float(ours.quantile(0.1)) < 2.5 * float(theirs.quantile(0.1))
    assert float(ours.median()) < 6 * float(theirs.median())


def error_per_token(logits: Tensor, expected: Tensor) -> Tensor:
    """[T, V] and [T, V] to [T]: the largest difference, relative to the largest logit of all."""
    return (logits - expected).abs().amax(-1) / expected.abs().amax()
