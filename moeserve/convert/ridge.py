"""Normal equations that have a solution whatever was seen."""

from __future__ import annotations

import torch
from torch import Tensor


def add_ridge(gram: Tensor, share: float) -> None:
    """gram: [N, N], a sum of outer products. Its mean diagonal, times share, is added to it.

    Where all that was seen is zero (a layer whose FFN gives nothing), the least number there is:
    the solution is zero then, and exists.
    """
    diagonal = gram.diagonal()
    diagonal.add_((share * diagonal.mean()).clamp_min(torch.finfo(gram.dtype).tiny))
