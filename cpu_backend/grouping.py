"""Tokens grouped by expert, and the sum that undoes the grouping. Works on any device."""

from __future__ import annotations

from torch import Tensor


def group_pairs(ids: Tensor, experts: tuple[int, ...] | None) -> list[tuple[int, Tensor]]:
    """ids [T, K] to (expert, its pairs), ascending; pair t*K + k is token t's k-th choice.

    Only those in `experts`, where given. The pairs of an expert ascend too.
    """
    flat = ids.flatten()
    counts: list[int] = flat.bincount().tolist()
    groups = flat.argsort(stable=True).split_with_sizes(counts)
    wanted = range(len(counts)) if experts is None else experts
    wanted_present = (e for e in sorted(wanted) if e < len(counts) and counts[e])
    return [(e, groups[e]) for e in wanted_present]


def weighted_sum(pair_out: Tensor, weights: Tensor) -> Tensor:
    """pair_out [T, K, H] and weights [T, K] to [T, H] float32, added in the order of k."""
    total = pair_out[:, 0].float() * weights[:, :1]
    for k in range(1, weights.shape[1]):
        total += pair_out[:, k].float() * weights[:, k : k + 1]
    return total
