"""Equations of MoE-Lens (Yuan, Ma and Talati, arXiv:2504.09345), section 5.1 and 5.2.

They hold for weights that cross a slow link once per step, whatever the step computes: from host
memory to a device, from memory to a processor's cores, from disk to memory. Then the tokens that
are computed together are all that counts, and kv is what limits them.
"""

from __future__ import annotations


def tokens_to_saturate(
    ops_per_s: float, link_bytes_per_s: float, weight_bytes: float, ops_per_token: float
) -> float:
    """Tokens in one step at which computing takes as long as the weights take to arrive.

    weight_bytes: that cross the link in a step. ops_per_token: a multiply-add is two.
    """
    return ops_per_s / ops_per_token * weight_bytes / link_bytes_per_s


def expert_tokens_to_saturate(
    ops_per_s: float, link_bytes_per_s: float, num_experts: int, top_k: int, number_bytes: float
) -> float:
    """The same for routed experts alone, whose size then cancels out: all of them cross the link,
    and each token is multiplied with top_k of them, two operations for a number."""
    return tokens_to_saturate(ops_per_s, link_bytes_per_s, num_experts * number_bytes, 2 * top_k)


def parallelism_memory_efficiency(prompt_tokens: int, output_tokens: int) -> float:
    """Equation 3: tokens that a sequence lets be computed, for each token of kv that it holds.

    Over its life it is computed p + g tokens, and holds p + j tokens of kv in each of its g steps:

        PME = (p + g) / sum over j of (p + j) = 2 (p + g) / ((2 p + g) g)

    for the sum as an integral from 0 to g.
    """
    p, g = prompt_tokens, output_tokens
    return 2 * (p + g) / ((2 * p + g) * g)


def sequences_in_step(prompt_tokens: int, output_tokens: int, kv_tokens: float) -> float:
    """Sequences that kv has room for when they are at all stages of their outputs at once: each
    holds its prompt and half of its output. In lock step, all at their ends, it is p + g each."""
    return kv_tokens / (prompt_tokens + output_tokens / 2)
