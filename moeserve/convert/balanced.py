"""Items into clusters of equal size at the least cost, and k-means with that assignment.

The assignment is a transportation problem with few sinks. It is solved exactly by successive
shortest paths (Ahuja, Magnanti, Orlin: Network Flows, section 9.7) on a graph whose nodes are the
clusters. Every item starts in the cluster that is cheapest for it after each cluster has put a
price on itself; whatever the prices, that is the best assignment for the sizes that come out (what
is paid in prices is the same however items stand). Then the cheapest chain of moves takes one item
at a time from a cluster that is too large to one that is too small. No such chain leaves a negative
cycle, so the sizes are right at the end and the cost is the least one. With good prices there are
few moves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_ROUNDS = 25
PRICE_ROUNDS = 60


def balanced_assignment(cost: Floats) -> Ints:
    """cost: [N, E], finite, of item i in cluster e; E divides N. Returns [N], N / E items each.

    The sum of the costs is the least one that is possible.
    """
    num_items, num_clusters = cost.shape
    assert num_items % num_clusters == 0, f"{num_items} items, {num_clusters} clusters"
    assert np.isfinite(cost).all(), "costs that are not finite have no least sum"
    capacity = num_items // num_clusters
    cluster = _by_prices(cost, capacity)
    excess = np.bincount(cluster, minlength=num_clusters) - capacity
    moves = _Moves(cost, cluster)
    for _ in range(excess.clip(min=0).sum()):  # each chain takes one item from what is too large
        for start, stop in moves.cheapest_chain(excess):
            moves.apply(start, stop)
            excess[start] -= 1
            excess[stop] += 1
    assert not excess.any(), "every chain of moves begins where there is too much"
    return cluster


def _by_prices(cost: Floats, capacity: int) -> Ints:
    """Items where they are cheapest, at prices that rise where there are too many of them."""
    prices = np.zeros(cost.shape[1])
    best: Ints = cost.argmin(axis=1)
    least = np.inf
    step = float(np.ptp(cost, axis=1).mean())
    for _ in range(PRICE_ROUNDS):
        cluster = (cost + prices).argmin(axis=1)
        excess = np.bincount(cluster, minlength=len(prices)) - capacity
        wrong = np.abs(excess).sum()
        if wrong < least:
            least, best = wrong, cluster
        else:
            step *= 0.8
        if wrong == 0:
            break
        prices += step * excess / capacity
    return best


class _Moves:
    """The cheapest move between any two clusters, kept up to date."""

    def __init__(self, cost: Floats, cluster: Ints) -> None:
        """cluster: [N], changed in place by `apply`."""
        self._cost = cost
        self._cluster = cluster
        num_clusters = cost.shape[1]
        # A way is shorter only by more than rounding: a cycle of moves that costs nothing could
        # look like one that gains, and the way back along it would have no end.
        self._rounding = 8 * num_clusters * np.finfo(np.float64).eps * np.abs(cost).max(initial=0.0)
        #: [E, E] what the cheapest item costs more in the second cluster than in the first
        self._price = np.full((num_clusters, num_clusters), np.inf)
        self._item = np.zeros((num_clusters, num_clusters), np.int64)
        for each in range(num_clusters):
            self._update(each)

    def apply(self, start: int, stop: int) -> None:
        """Moves the cheapest item."""
        self._cluster[self._item[start, stop]] = stop
        self._update(start)
        self._update(stop)

    def cheapest_chain(self, excess: Ints) -> list[tuple[int, int]]:
        """Moves from a cluster with too many items to one with too few, last move first, so that
        the item of a move is still where the search saw it (Bellman-Ford)."""
        far = np.where(excess > 0, 0.0, np.inf)
        before = np.full(len(far), -1)
        for _ in range(len(far)):
            through = far[:, None] + self._price
            best = through.argmin(axis=0)
            shorter = through[best, np.arange(len(far))]
            better = shorter < far - self._rounding
            if not better.any():
                break
            far[better], before[better] = shorter[better], best[better]
        stop = int(np.where(excess < 0, far, np.inf).argmin())
        chain = []
        for _ in range(len(far)):
            if excess[stop] > 0:
                break
            chain.append((int(before[stop]), stop))
            stop = int(before[stop])
        return chain

    def _update(self, cluster: int) -> None:
        members = np.flatnonzero(self._cluster == cluster)
        if len(members) == 0:
            self._price[cluster] = np.inf
            return
        more = self._cost[members] - self._cost[members, cluster][:, None]
        place = more.argmin(axis=0)
        self._price[cluster] = more[place, np.arange(more.shape[1])]
        self._price[cluster, cluster] = np.inf
        self._item[cluster] = members[place]


def balanced_kmeans(points: Floats, num_clusters: int, seed: int) -> Ints:
    """points: [N, D]. Returns [N], N / num_clusters points per cluster.

    Lloyd's iteration with the balanced assignment from k-means++ seeds (Arthur, Vassilvitskii
    2007): neither step raises the sum of squared distances, so it ends.
    """
    rng = np.random.default_rng(seed)
    centres = points[_seeds(points, num_clusters, rng)]
    cluster = balanced_assignment(_distances(points, centres))
    for _ in range(MAX_ROUNDS):
        centres = np.stack([points[cluster == each].mean(axis=0) for each in range(num_clusters)])
        found = balanced_assignment(_distances(points, centres))
        if (found == cluster).all():
            break
        cluster = found
    return cluster


def _distances(points: Floats, centres: Floats) -> Floats:
    """[N, E] squared distances, less what an item adds to all of its row."""
    squares: Floats = (centres**2).sum(axis=1) - 2 * points @ centres.T
    return squares


def _seeds(points: Floats, count: int, rng: np.random.Generator) -> list[int]:
    """k-means++: each next seed is drawn by its squared distance to those there are."""
    chosen = [int(rng.integers(len(points)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        total = nearest.sum()
        share = nearest / total if total > 0 else None  # all points equal: any will do
        chosen.append(int(rng.choice(len(points), p=share)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen
