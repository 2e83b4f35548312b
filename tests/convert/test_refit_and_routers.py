"""Closed forms against float64 solvers that take another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeserve.convert.methods import LayerSample
from moeserve.convert.refit import RIDGE, refit_down
from moeserve.convert.routers import agreement, expert_norms, least_squares
from moeserve.convert.run_layers import DenseFfn


@pytest.fixture
def sample(seed: int) -> LayerSample:
    torch.manual_seed(seed)
    ffn = DenseFfn(torch.randn(24, 10), torch.randn(24, 10), torch.randn(10, 24), "silu")
    normed = torch.randn(600, 10) + 0.5
    return LayerSample.of(ffn, normed, ffn.activations(normed))


def test_the_fitted_matrix_is_the_best_one(sample: LayerSample) -> None:
    weights = (torch.rand(600, 24) > 0.4).float()
    found = refit_down(sample, weights)
    working = (sample.activations * weights).double()
    down = sample.ffn.down.double()
    missing = (sample.activations.double() - working) @ down.T
    penalty = RIDGE * float(working.square().sum(0).mean())
    # Rows that make plain least squares a ridge regression.
    rows = torch.cat((working, penalty**0.5 * torch.eye(24, dtype=torch.float64))).numpy()
    targets = torch.cat((missing, torch.zeros(24, 10, dtype=torch.float64))).numpy()
    best = np.linalg.lstsq(rows, targets, rcond=None)[0]
    assert torch.allclose(found.double(), down + torch.from_numpy(best).T, atol=1e-4)
    before = missing.square().sum()
    after = (sample.activations.double() @ down.T - working @ found.double().T).square().sum()
    assert after < before


def test_nothing_is_fitted_where_nothing_is_left_out(sample: LayerSample) -> None:
    found = refit_down(sample, torch.ones(600, 24))
    assert torch.equal(found, sample.ffn.down)


def test_the_router_is_the_regression_of_the_norms(sample: LayerSample) -> None:
    experts = torch.randperm(24).view(4, 6)
    norms = expert_norms(sample, experts)
    for expert, own in enumerate(experts):
        output = torch.zeros(600, 24)
        output[:, own] = sample.activations[:, own]
        expected = (output @ sample.ffn.down.T).norm(dim=1)
        assert torch.allclose(norms[:, expert], expected, rtol=1e-4)
    router = least_squares(sample, experts, norms)
    x = torch.cat((sample.normed, torch.ones(600, 1)), dim=1).double().numpy()
    centred = (norms - norms.mean(1, keepdim=True)).double().numpy()
    plain = x @ np.linalg.lstsq(x, centred, rcond=None)[0]
    error = np.abs(router.scores(sample.normed).double().numpy() - plain).max()
    assert error < 0.02 * np.abs(plain).max(), "more than the ridge explains"


def test_agreement_counts_names_in_common() -> None:
    norms = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    scores = torch.tensor([[9.0, 8, 0, 0], [9, 0, 8, 0]])
    assert agreement(scores, norms, 2) == pytest.approx(0.75)
    assert agreement(norms, norms, 3) == 1.0
