"""Prompts on which rounding decides nothing, so that two right implementations agree on tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float()


def is_settled(model: PreTrainedModel, token_ids: Sequence[int], logits: Tensor) -> bool:
    """Whether no choice (of a token, of an expert) hangs on the rounding of float32.

    A disturbance a hundred times that size must leave the greedy tokens alone and the logits near.
    """
    embedding = model.get_input_embeddings().weight
    original = embedding.data.clone()
    embedding.data.mul_(1 + 1e-5 * torch.randn_like(original))
    disturbed = reference_logits(model, token_ids)
    embedding.data.copy_(original)
    same = bool((disturbed.argmax(-1) == logits.argmax(-1)).all())
    return same and relative_error(disturbed, logits) < 1e-3


def settled_prompt(
    model: PreTrainedModel,
    rng: random.Random,
    vocab_size: int,
    num_prompt: int,
    answer: Callable[[list[int]], list[int]],
) -> tuple[list[int], list[int]]:
    """A prompt and its answer, neither of which hangs on the rounding of float32."""
    for _ in range(20):
        prompt = [rng.randrange(vocab_size) for _ in range(num_prompt)]
        found = answer(prompt)
        whole = prompt + found
        if is_settled(model, whole, reference_logits(model, whole)):
            return prompt, found
    raise AssertionError("no prompt of 20 has an answer that rounding cannot change")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
