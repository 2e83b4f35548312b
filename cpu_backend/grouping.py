"""Tokens grouped by expert, and the sum that undoes the grouping. Works on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def run_grouped(
    x: Tensor,
    ids: Tensor,
    experts: tuple[int, ...] | None,
    run_expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Calls run_expert(expert, its rows [M, H]) -> [M, H] for every expert that a token chose.

    x: [T, H]. ids: [T, K]. experts: those to run, None for all. Returns [T, K, H]: what each
    token's k-th choice gave, zero where it was not run. Reads the ids back to the host once.
    """
    num_tokens, top_k = ids.shape
    chosen = None if experts is None else frozenset(experts)
    pairs = ids.flatten()  # pair t*K + k is token t's k-th choice
    order = pairs.argsort(stable=True)  # pairs by expert
    counts: list[int] = pairs.bincount().tolist()
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))  # [T*K, H]
    outs = [
        run_expert(expert, group) if chosen is None or expert in chosen else torch.zeros_like(group)
        for expert, group in enumerate(rows.split_with_sizes(counts))
        if counts[expert]
    ]
    grouped = torch.cat((rows[:0], *outs))  # [T*K, H]
    return (
        torch.empty_like(grouped).index_copy_(0, order, grouped).view(num_tokens, top_k, x.shape[1])
    )


def weighted_sum(pair_out: Tensor, weights: Tensor) -> Tensor:
    """pair_out [T, K, H] and weights [T, K] float32 to [T, H] float32."""
    return (pair_out * weights.unsqueeze(-1)).sum(dim=1)
