"""Trains pregate on the choices that a model's routers made over a text.

Every output is a yes-or-no question, whether the token's router in that layer chooses the expert,
so the loss is the cross entropy of those. Read-ME (arXiv:2410.19123) trains one choice for all
layers; what that costs is in docs/conversion.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, dropout, pad, silu

from moeserve.predictors.gate_residual import unit_state
from moeserve.predictors.pregate import NOBODY, PregateShape, PregateWeights

#: tokens of a step of the optimiser, at most
BATCH_TOKENS = 2048
RATE, WARM_UP_SHARE, WEIGHT_DECAY = 1e-2, 0.2, 0.1
#: passes over the text: more the less of it there is, so that there are that many steps
STEPS, MAX_EPOCHS = 600, 30
#: scores of the places that heads look at first
FIRST_LOOK = 3.0
#: of the state's numbers, so many are left out of a training step
DROPPED = 0.1
#: rows of the vocabulary that are projected together
TABLE_ROWS = 8192


@dataclass(frozen=True)
class PregateText:
    """windows: [N, W] token ids. choices: by MoE layer, [N * W, K] expert ids of its router.
    embedding: [V, H], the model's, in any float dtype."""

    windows: Tensor
    choices: Sequence[Tensor]
    embedding: Tensor
    num_experts: int


class Block(torch.nn.Module):
    """The block of `moeserve.predictors.pregate`, differentiable, on windows of embeddings."""

    def __init__(self, shape: PregateShape, hidden: int, num_outputs: int) -> None:
        super().__init__()
        rank, units = shape.rank, shape.units
        self.shape = shape
        self.project = torch.nn.Linear(hidden, 4 * rank, bias=False)  # query, own, key, value
        # Each head begins with a token of its own to look at, the last before this one first.
        behind = shape.window - 2 - torch.arange(shape.heads)
        place = FIRST_LOOK * torch.nn.functional.one_hot(behind % shape.window, shape.window)
        self.place = torch.nn.Parameter(place)
        self.hidden_in = torch.nn.Linear(rank, units)
        self.hidden_out = torch.nn.Linear(units, num_outputs)
        self.direct = torch.nn.Linear(rank, num_outputs, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """states: [N, W, H] unit embeddings of whole windows, to logits [N, W, O]."""
        window, heads = self.shape.window, self.shape.heads
        query, own, key, value = self.project(states).chunk(4, dim=-1)
        query = query.unflatten(-1, (heads, -1))
        keys, values = (
            pad(each, (0, 0, window - 1, 0)).unfold(1, window, 1).unflatten(2, (heads, -1))
            for each in (key, value)
        )  # [N, W, A, R / A, window]
        scores = torch.einsum("nthr,nthrw->nthw", query, keys) + self.place
        place, behind = torch.arange(states.shape[1])[:, None], torch.arange(window)
        before = place + behind < window - 1  # of the text
        scores = scores.masked_fill(before[:, None], float(NOBODY))
        state = own + torch.einsum("nthw,nthrw->nthr", scores.softmax(-1), values).flatten(2)
        state = dropout(state, DROPPED, self.training)
        logits: Tensor = self.direct(state) + self.hidden_out(silu(self.hidden_in(state)))
        return logits


def train_pregate(
    text: PregateText,
    shape: PregateShape,
    seed: int,
    progress: Callable[[float], None],
) -> PregateWeights:
    """The same text and seed give the same weights."""
    num_outputs = len(text.choices) * text.num_experts
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        block = Block(shape, text.embedding.shape[1], num_outputs)
        shares = [_wanted(text, layer, slice(None)).mean(0) for layer in range(len(text.choices))]
        chances = torch.cat(shares).clamp(1e-4, 1 - 1e-4)
        block.hidden_out.bias.data.copy_(chances.logit())
        _fit(block, text, generator, progress)
    return weights_of(block.eval(), text.embedding)


def _fit(
    block: Block,
    text: PregateText,
    generator: torch.Generator,
    progress: Callable[[float], None],
) -> None:
    count, length = text.windows.shape
    together = max(1, BATCH_TOKENS // length)
    per_epoch = math.ceil(count / together)
    epochs = min(MAX_EPOCHS, math.ceil(STEPS / per_epoch))
    total = epochs * per_epoch
    optimiser = torch.optim.AdamW(block.parameters(), RATE, (0.9, 0.99), weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total, pct_start=WARM_UP_SHARE)
    rows_of = torch.arange(count * length).view(count, length)
    done = 0
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=generator).split(together):
            states = unit_state(text.embedding[text.windows[chosen]])
            logits = block(states).flatten(0, 1)
            rows = rows_of[chosen].flatten()
            wanted = [_wanted(text, layer, rows) for layer in range(len(text.choices))]
            loss = binary_cross_entropy_with_logits(logits, torch.cat(wanted, dim=1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
            done += 1
            progress(done / total)


def _wanted(text: PregateText, layer: int, rows: Tensor | slice) -> Tensor:
    """[T, E]: 1 for the experts that were chosen."""
    ids = text.choices[layer][rows].long()
    return torch.zeros(len(ids), text.num_experts).scatter_(1, ids, 1.0)


def weights_of(block: Block, embedding: Tensor) -> PregateWeights:
    """What the predictor computes with, the projections done for all of the vocabulary [V, H]."""
    with torch.inference_mode():
        pieces = embedding.split(TABLE_ROWS)
        table = torch.cat([block.project(unit_state(rows)).half() for rows in pieces]).numpy()
        rank = block.shape.rank
        return PregateWeights(
            own=table[:, : 2 * rank].copy(),
            context=table[:, 2 * rank :].copy(),
            place=block.place.detach().numpy(),
            hidden_in=block.hidden_in.weight.T.contiguous().numpy(),
            hidden_bias=block.hidden_in.bias.numpy(),
            hidden_out=block.hidden_out.weight.T.contiguous().numpy(),
            direct=block.direct.weight.T.contiguous().numpy(),
            bias=block.hidden_out.bias.numpy(),
        )
