"""Slots that a layer keeps against the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import Numbers
from moeserve.cache.policies.base import Policy


def victims_above_floor(
    policy: Policy,
    candidates: Numbers,
    count: int,
    rank: NDArray[np.int64],
    spare: NDArray[np.int64],
    incoming: Numbers | None,
) -> list[int]:
    """What the policy gives up, none beyond what its layer can spare.

    rank: [N], the layer of each expert, as its place. spare: [L], by that place; it is used up.
    """
    chosen: list[int] = []
    while len(chosen) < count:
        asked = count - len(chosen)
        waiting = None if incoming is None else incoming[len(chosen) :]
        picks = policy.victims(candidates, asked, waiting)
        for number in picks:
            if spare[rank[number]] > 0:
                spare[rank[number]] -= 1
                chosen.append(number)
        if len(picks) < asked or len(chosen) == count:
            break
        rest: Numbers = np.setdiff1d(candidates, picks)
        candidates = rest[spare[rank[rest]] > 0]
    return chosen
