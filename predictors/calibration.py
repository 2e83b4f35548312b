"""From scores to probabilities: how often was an expert with such a score chosen?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.predictors.base import Chances

Scores = NDArray[np.float32]
Bins = NDArray[np.intp]

NUM_BINS = 64
#: bins per unit of the margin; the outer ones hold all that is farther away
BINS_PER_UNIT = 8
#: tokens of one layer's routing after which an observation counts half
HALF_LIFE_TOKENS = 2048
#: observations' worth of belief in the first guess, per bin
PRIOR = 8.0
LEAST_CHANCE = 1e-4
#: a bin hardly seen leans on its neighbours: the share of each in what is said of it
NEIGHBOUR = 0.1
#: score of an expert that the row cannot choose, instead of -inf, which has no margin to -inf
OUT_OF_REACH = np.float32(-1e30)


def spread_of(scores: Scores) -> float:
    """The unit of margins: the standard deviation of scores [..., E] within their rows, of those in
    reach."""
    finite = np.where(scores > OUT_OF_REACH, scores, np.nan)
    return float(np.nanmean(np.nanstd(finite, axis=-1))) + 1e-12


def margins(scores: Scores, top_k: int, unit: float | Scores) -> Scores:
    """[..., E] scores to how far each stands above the border between the k chosen and the others,
    in units. All finite; see OUT_OF_REACH."""
    border = scores.shape[-1] - top_k
    if border == 0:
        return np.full_like(scores, np.inf)
    parted = np.partition(scores, (border - 1, border), axis=-1)
    middle = (parted[..., border - 1 : border] + parted[..., border : border + 1]) * np.float32(0.5)
    result: Scores = (scores - middle) / unit
    return result


def bins_of(scores: Scores, top_k: int, unit: float | Scores) -> Bins:
    """[..., E] scores to the number of the bin that their margin falls in."""
    place = margins(scores, top_k, unit)
    place *= BINS_PER_UNIT
    place += NUM_BINS // 2
    bounded = np.minimum(np.maximum(place, 0, out=place), NUM_BINS - 1, out=place)
    return bounded.astype(np.intp)


class Calibration:
    """P(chosen | bin) of one layer as seen from another, from what was really chosen."""

    def __init__(self, hits: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
        """hits, counts: [NUM_BINS] what is known or believed at the start."""
        self.hits = hits.astype(np.float64)
        self.counts = counts.astype(np.float64)
        self._table: Chances = np.zeros(NUM_BINS, np.float32)
        self._refresh()

    @classmethod
    def guessed(cls) -> Calibration:
        """Before any observation: a soft step at the border."""
        centre = (np.arange(NUM_BINS) + 0.5 - NUM_BINS // 2) / BINS_PER_UNIT
        counts = np.full(NUM_BINS, PRIOR)
        return cls(counts / (1 + np.exp(-2 * centre)), counts)

    def add(self, bins: Bins, ids: NDArray[np.int64]) -> None:
        """bins: [T, E] that the scores of T rows fell in; ids: [T, K] that the rows then chose."""
        fade = 0.5 ** (len(bins) / HALF_LIFE_TOKENS)
        chosen = np.take_along_axis(bins, ids, axis=1)
        self.hits = self.hits * fade + np.bincount(chosen.ravel(), minlength=NUM_BINS)
        self.counts = self.counts * fade + np.bincount(bins.ravel(), minlength=NUM_BINS)
        self._refresh()

    def _refresh(self) -> None:
        kernel = np.array((NEIGHBOUR, 1 - 2 * NEIGHBOUR, NEIGHBOUR))
        hits = np.convolve(np.pad(self.hits, 1, "edge"), kernel, "valid")
        counts = np.convolve(np.pad(self.counts, 1, "edge"), kernel, "valid")
        chances = np.clip(hits / np.maximum(counts, 1e-9), LEAST_CHANCE, 1 - LEAST_CHANCE)
        self._table = chances.astype(np.float32)

    def chances(self, bins: Bins) -> Chances:
        """[T, E] bins to P(chosen) by row."""
        return self._table[bins]
