"""The FFN that tuning learns, beside what it relaxes and what it is told beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from moeserve.convert.routers import LinearRouter
from moeserve.convert.tune_ffn import CutFfn, TunedFfn


def random_cut(num_parts: int) -> CutFfn:
    """Parts of 3 neurons on 6 inputs; the first one is shared, the others are routed."""
    gate, up = torch.randn(num_parts, 3, 6), torch.randn(num_parts, 3, 6)
    down = torch.randn(num_parts, 6, 3)
    router = LinearRouter(torch.randn(num_parts - 1, 6), torch.randn(num_parts - 1))
    return CutFfn(gate, up, down, router, 1)


def test_the_choice_has_the_derivative_of_its_relaxation(seed: int) -> None:
    """Against a difference quotient of the soft choice, at the output that the hard one gives."""
    torch.manual_seed(seed)
    written = random_cut(5)
    ffn = TunedFfn(written, 3, torch.nn.functional.silu, torch.Generator().manual_seed(seed))
    normed, toward = torch.randn(7, 6), torch.randn(7, 6)
    worked = ffn(normed)
    (worked.output * toward).sum().backward()
    bias = ffn.parameters["router.bias"]
    hidden = torch.nn.functional.silu(normed @ written.gate.flatten(0, 1).T)
    hidden = (hidden * (normed @ written.up.flatten(0, 1).T)).view(7, 5, 3)
    given = torch.einsum("tpm,phm->tph", hidden, written.down)  # [T, P, H]
    chosen = torch.cat((torch.ones(7, 1), (worked.margin > 0).float()), 1)
    assert chosen.sum(1).tolist() == [3.0] * 7
    expected = (given * chosen[:, :, None]).sum(1)
    assert torch.allclose(worked.output, expected, atol=1e-5)
    worth = (given[:, 1:] * toward[:, None]).sum(2)
    slope = worked.margin.sigmoid() * (1 - worked.margin.sigmoid())
    assert bias.grad is not None
    assert torch.allclose(bias.grad, (worth * slope).sum(0), atol=1e-4)
    assert torch.allclose(worked.norms, given[:, 1:].norm(dim=2), atol=1e-4)


def test_the_prior_names_the_experts_with_the_largest_outputs(seed: int) -> None:
    """By hand, over all experts of one token after the other."""
    torch.manual_seed(seed)
    written = random_cut(4)
    ffn = TunedFfn(written, 2, torch.nn.functional.silu, torch.Generator().manual_seed(seed))
    worked = ffn(torch.randn(9, 6))
    total, agreed = 0.0, 0
    for margin, norms in zip(worked.margin.tolist(), worked.norms.tolist(), strict=True):
        best = max(range(3), key=lambda expert: norms[expert])
        for expert in range(3):
            sign = 1 if expert == best else -1
            total += math.log1p(math.exp(-sign * margin[expert]))
        agreed += margin[best] > 0
    assert float(ffn.prior_loss(worked).detach()) == pytest.approx(total / 27, rel=1e-4)
    assert ffn.agreement(worked) == pytest.approx(agreed / 9)
