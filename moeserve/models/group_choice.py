"""How many inputs share a scale in each int4 matrix: the finest that its numbers ask for.

After FineQuant (Kim, Henry, Fahim, Awadalla 2023, arXiv:2308.09723), which chooses the granularity
of each matrix from its weights alone: coarse groups unless outliers make a finer one pay. The rule
here, in full:

    A group of numbers that spans a range r is rounded in steps of r / 15, so that its error is
    about r / (15 sqrt(12)) whatever the numbers are. R(g), the root mean square of the ranges of
    all groups of g inputs, therefore stands for the error of the whole matrix. Start with groups of
    128 (or of what divides the inputs as well as 32 does) and halve them, down to 32, as long as
    R(g / 2) < ALPHA * R(g).

Halving the groups of normally distributed numbers takes 8 to 10 % off R and of numbers with one
outlier among many up to 29 %, for 1.5 % (128 to 64) and 3 % (64 to 32) more bytes, with zero points
4 and 9. ALPHA asks for more than the former. The matrices of all experts of a layer are one: they
share a format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from moeserve.models.checkpoint import Checkpoint
from moeserve.models.loader import pieces
from moeserve.models.weight_formats import INT4_GROUPS, ChooseForm
from moeserve.models.weight_map import WeightRule

ALPHA = 0.88
CPU = torch.device("cpu")
STAGE = "choosing groups"
#: numbers that are looked at together: float32 copies of 16 MiB
STEP_NUMBERS = 1 << 22


def choose_groups(
    checkpoint: Checkpoint,
    rules: Sequence[WeightRule],
    choose: ChooseForm,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, int]:
    """The group of each target that `choose` makes int4. Reads all of their weights once."""
    wanted = [rule for rule in rules if rule.use.is_matrix and choose(rule).name == "int4"]
    groups: dict[str, int] = {}
    for number, rule in enumerate(wanted):
        if progress is not None:
            progress(STAGE, number / len(wanted))
        squares = dict.fromkeys(INT4_GROUPS, 0.0)
        for part in rule.parts:
            for _, piece, _ in pieces(checkpoint, part, rule, CPU):
                add_squares(piece.reshape(-1, rule.shape[-1]), choose(rule).zero_points, squares)
                del piece
                for name in part.names:
                    checkpoint.release(name)
        groups[rule.target] = finest_that_pays(rule.shape[-1], squares)
    return groups


def add_squares(rows: Tensor, zero_points: bool, squares: dict[int, float]) -> None:
    """rows [N, K]: adds the squared range of every group, times its size, to each group size."""
    num_cols = rows.shape[-1]
    for some in rows.split(max(1, STEP_NUMBERS // num_cols)):
        numbers = some.float()
        smallest = min(squares)
        padded = functional.pad(numbers, (0, -num_cols % max(squares)))
        finest = padded.unflatten(-1, (-1, smallest))  # [n, groups, smallest]
        high, low = finest.amax(-1).clamp(min=0), finest.amin(-1).clamp(max=0)
        for group in squares:
            count = group // smallest
            top = high.unflatten(-1, (-1, count)).amax(-1)
            bottom = low.unflatten(-1, (-1, count)).amin(-1)
            ranges = top - bottom if zero_points else 2 * torch.maximum(top, -bottom)
            squares[group] += float(ranges.double().square().sum()) * group


def finest_that_pays(num_cols: int, squares: dict[int, float]) -> int:
    """The rule above. squares: from `add_squares`, of one matrix."""
    padded = {group: -(-num_cols // group) * group for group in squares}
    least = padded[min(squares)]
    group = max(group for group in squares if padded[group] == least)
    while group // 2 in squares and math.sqrt(squares[group // 2]) < ALPHA * math.sqrt(
        squares[group]
    ):
        group //= 2
    return group
