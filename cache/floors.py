"""Slots that a layer keeps against the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import Numbers
from moeserve.cache.policies.base import Policy
from moeserve.core import ConfigError


def check_floor(floor: int, num_layers: int, num_slots: int) -> None:
    """ConfigError where the floors of all layers together are more than there are slots."""
    if floor * num_layers > num_slots:
        raise ConfigError(
            f"layer_floor: {floor} experts of each of {num_layers} layers are"
            f" {floor * num_layers}, and there is room for {num_slots}",
            field="layer_floor",
            hint=f"{num_slots // num_layers} at most, or give more memory to the experts",
        )


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
