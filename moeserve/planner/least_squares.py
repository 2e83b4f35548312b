"""Costs that add up to what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]


def fit_costs(
    features: Sequence[Sequence[float] | Costs],
    us: Sequence[float],
    weights: Sequence[float] | None = None,
) -> Costs:
    """Costs >= 0 of each feature [F], by least squares of relative errors. features: [N, F].
    weights: of the errors in microseconds; None: one over `us`.

    A feature whose cost comes out negative is left out and the others are fitted again: with as few
    as here that is the constrained optimum, or close to it.
    """
    matrix, wanted = np.asarray(features, np.float64), np.asarray(us, np.float64)
    scale = 1 / np.maximum(np.abs(wanted), 1.0) if weights is None else np.asarray(weights)
    costs = np.zeros(matrix.shape[1])
    kept = list(range(matrix.shape[1]))
    while kept:
        weighted = matrix[:, kept] * scale[:, None]
        solution = np.linalg.lstsq(weighted, wanted * scale, rcond=None)[0]
        if (solution >= 0).all():
            costs[kept] = solution
            break
        del kept[int(solution.argmin())]
    return costs
