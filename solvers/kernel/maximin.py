"""Points from coarse to fine: `maximin`, each as far as possible from those before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

Array = npt.NDArray[Any]

# A point is taken while its distance to those before it is at least this part of the largest. The
# exact ordering, with 1, takes one point at a time; with less, a whole level is taken at once.
RATIO = 0.8


def maximin(
    points: Array, before: Array | None = None, ratio: float = RATIO
) -> tuple[Array, Array]:
    """An order of points from coarse to fine, and the distance of each to those before it.

    Parameters
    ----------
    points
        ``(n, d)``, no two alike.
    before
        ``(m, d)``: points that come first and are in no need of an order.
    ratio
        How far a level of the ordering reaches down; see Notes.

    Returns
    -------
    order
        ``(n,)``: the point in each place.
    lengths
        ``(n,)``, in that order: distance to the nearest point of an earlier pass or of `before`.
        For a first point with none before it, the diagonal of the bounding box.

    Notes
    -----
    The maximin ordering (Guinness, 2018, arXiv:1609.05372; Schaefer, Sullivan and Owhadi, 2021,
    arXiv:1706.02205, section 3) takes the point that is farthest from all points before it. Taken
    exactly this is a loop over a heap with a visit of the neighbours of each point, which an
    interpreter does too slowly. Here a level takes many points: all candidates with a distance of
    at least ``r = ratio * max_i dist_i`` are thinned, by random priorities (Luby, 1986,
    doi:10.1137/0215074), to a set in which no two are closer than r and of which every candidate
    left is closer than r to a point taken. So for each place j

        lengths_j >= dist_j >= ratio * max_{i >= j} dist_i ,       lengths_j <= dist_j / ratio ,

    with ``dist_j`` the distance to *all* points before j: the ordering is the exact one up to the
    factor `ratio`, and balls of radius ``rho * lengths_j`` hold what the exact ones hold.

    Costs O(n log n) for each level, of which there are ``log(n^(1/d)) / log(1 / ratio)``; the
    candidates of a level are found by a k-d tree, in bulk.

    Examples
    --------
    >>> import numpy as np
    >>> order, lengths = maximin(np.array([[0.0], [1.0], [2.0], [3.0], [4.0]]))
    >>> int(order[0]), sorted(order[1:3].tolist()), lengths.tolist()
    (2, [0, 4], [4.0, 2.0, 2.0, 1.0, 1.0])
    """
    n = len(points)
    generator = np.random.default_rng(0)
    distance = np.full(n, np.inf)
    taken: list[Array] = []
    lengths: list[Array] = []
    left = np.arange(n)
    if before is not None and len(before) and n:
        distance = np.asarray(cKDTree(before).query(points)[0])
    elif n:
        centre = (points.min(0) + points.max(0)) / 2
        first = np.array([np.argmin(np.square(points - centre).sum(1))])
        taken.append(first)
        lengths.append(np.array([np.linalg.norm(points.max(0) - points.min(0))]))
        left = np.delete(left, first[0])
        distance[left] = np.linalg.norm(points[left] - points[first], axis=1)
    while len(left):
        widest = distance[left].max()
        r = ratio * widest
        level: list[Array] = []
        candidates = left[distance[left] >= r]
        while len(candidates):
            picked = _separated(points, distance, candidates, r, generator)
            # Farthest first, as in the exact ordering.
            picked = picked[np.argsort(-distance[picked], kind="stable")]
            level.append(picked)
            lengths.append(distance[picked].copy())
            distance[picked] = 0.0
            candidates = candidates[distance[candidates] > 0]
            _approach(points, distance, candidates, picked, widest)
            candidates = candidates[distance[candidates] >= r]
        taken += level
        left = left[distance[left] > 0]
        _approach(points, distance, left, np.concatenate(level), widest)
    empty = np.zeros(0)
    order = np.concatenate(taken) if taken else empty.astype(np.int64)
    return order, np.concatenate(lengths) if lengths else empty


def _approach(points: Array, distance: Array, which: Array, picked: Array, widest: float) -> None:
    """Distances of some points, in place, now that others are taken; none grows."""
    if len(which):
        # No distance is larger than `widest`, so no tree is searched farther.
        near = cKDTree(points[picked]).query(
            points[which], distance_upper_bound=widest * (1 + 1e-12)
        )[0]
        distance[which] = np.minimum(distance[which], near)


def _separated(
    points: Array, distance: Array, candidates: Array, r: float, generator: np.random.Generator
) -> Array:
    """Some of the candidates, no two of them closer than r.

    Every candidate that is left is closer than r to one of them, or shares a cell with one that is;
    the caller asks again until none is left.
    """
    # One of each cell of diameter r: of dense candidates all pairs would be too many. Two cells
    # with the same hash only put one of them off.
    side = r / points.shape[1] ** 0.5
    cells = np.floor((points[candidates] - points[candidates].min(0)) / side).astype(np.int64)
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
    keys = np.zeros(len(cells), np.uint64)
    for axis in range(cells.shape[1]):
        mixed = keys ^ cells[:, axis].astype(np.uint64)
        keys = mixed * factors[axis % 3] + np.uint64(axis)
        keys ^= keys >> np.uint64(29)
    # Within a level the farther ones come first, by quarters of it; chance decides the rest, so
    # that the rounds below are few.
    rough = np.floor(4 * np.log(distance[candidates] / r) / np.log(1 / RATIO) + 1e-9)
    chance = generator.permutation(len(candidates))
    ranked = np.lexsort((chance, -rough))
    firsts = np.unique(keys[ranked], return_index=True)[1]
    firsts.sort()
    kept = candidates[ranked[firsts]]  # in the order of their priorities

    # The nearest float below r: a distance of r is far enough.
    pairs = cKDTree(points[kept]).query_pairs(np.nextafter(r, 0), output_type="ndarray")
    chosen = np.zeros(len(kept), bool)
    alive = np.ones(len(kept), bool)
    while alive.any():
        low, high = pairs.min(1), pairs.max(1)
        beaten = np.zeros(len(kept), bool)
        beaten[high] = True
        winners = alive & ~beaten
        chosen |= winners
        alive &= ~winners
        alive[high[winners[low]]] = False
        pairs = pairs[alive[low] & alive[high]]
    return kept[chosen]
