"""`KLPattern`: an ordering of functionals and the nonzeros of the inverse factor, from geometry."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from operators import LinearOperator
from solvers.kernel.maximin import RATIO, maximin
from solvers.solution import StructureError

Array = npt.NDArray[Any]
Ordering = Literal["derivatives-last", "follow"]

# Distances that are equal but for rounding, as on a grid, are equal.
SLACK = 1 + 1e-9
# Supernodes of which the rows are looked for at once, and rows of one size padded to a multiple.
SEARCHED, PADDED = 20_000, 8


class Batch(NamedTuple):
    """Supernodes of nearly one size, as padded arrays; what is padding repeats a true index.

    Parameters
    ----------
    rows
        ``(B, s)``: functionals, in the order of their places.
    valid
        ``(B, s)``: which of them are no padding.
    last
        ``(B, m)``: where in `rows` each column has its diagonal.
    entries
        ``(B, m, s)``: which entries of the columns are stored.
    sorting
        ``(B, s)``: a permutation of each of the rows by differential order; None where they are in
        that order.
    cuts
        Where rows that are so sorted may be cut, ends included: pieces of one differential order,
        and in between some that are mixed.
    first, end
        Where their values are among all.
    """

    rows: Array
    valid: Array
    last: Array
    entries: Array
    sorting: Array | None
    cuts: list[int]
    first: int
    end: int


@dataclass(frozen=True, eq=False)
class KLPattern:
    """Places, and nonzeros of an upper triangular U with ``A^-1 ~ U U^T``, for n functionals.

    The geometry alone decides: a pattern serves all matrices of one set of functionals, whatever
    the hyperparameters of the kernel. Made by `of`; immutable.

    Parameters
    ----------
    order
        ``(n,)``: the functional in each place, from coarse to fine.
    lengths, orders
        ``(n,)``: length scale, and differential order, of each place.
    rows, row_starts
        Places in each supernode, ascending, one after the other; ``(S + 1,)`` where each begins.
    columns, column_starts
        Likewise the places of the columns that each supernode is made for.
    last
        ``(n,)``: for each entry of `columns`, where among the rows of its supernode it is.
    rho, supernodes, neighbours, ordering
        As for `of`.
    """

    order: Array
    lengths: Array
    orders: Array
    rows: Array
    row_starts: Array
    columns: Array
    column_starts: Array
    last: Array
    rho: float
    supernodes: float
    neighbours: int
    ordering: Ordering

    @classmethod
    def of(
        cls,
        points: Any,
        orders: Any = None,
        *,
        rho: float = 3.0,
        supernodes: float = 1.5,
        neighbours: int = 3,
        ordering: Ordering = "derivatives-last",
    ) -> KLPattern:
        """The pattern of functionals that sit at points.

        Parameters
        ----------
        points
            Tensor or array ``(n, d)``: where each functional sits. Points may coincide.
        orders
            ``(n,)``: differential order of each functional; 0 for a value. By default zeros.
        rho
            A functional enters a column of length l where it sits within ``rho l``. Error falls,
            and cost grows, with rho: nonzeros as ``n rho^d``, time as ``n rho^(2d)``.
        supernodes
            Columns that lie near each other, with lengths that differ by at most this factor, share
            their rows: those in a ball at most this factor wider. 1 for a set of rows of its own
            for each column.
        neighbours
            Length of a point is the distance to so many points before it: with 3 rather than 1 the
            columns of a scattered cloud are more alike in size, and more accurate.
        ordering
            Where two functionals sit at one point, the one of lower order takes part in the
            ordering of points. ``"derivatives-last"`` puts the others behind all of these, at the
            finest scale: length is the distance to the (d + 1)-th nearest other point, the spacing
            if the points are a grid. ``"follow"`` puts them right behind the first one, with its
            length.

        Raises
        ------
        ValueError
            A shape does not fit, a point is not finite, or a setting is out of range.

        Notes
        -----
        Points are ordered by `solvers.kernel.maximin`: first those with a value, then those with
        derivatives alone. Costs O(n log n) and ``O(n rho^d)`` numbers. Schaefer, Katzfuss and
        Owhadi (2021, arXiv:2004.14455: KL-optimal factor, supernodes); derivatives:
        Chen, Owhadi and Schaefer (2023, arXiv:2304.01294, section 3). There the finest scale is the
        smallest length of all, which on a scattered cloud is far below the spacing elsewhere.

        While a pattern is in use, the same points and settings give the same object: so matrices of
        one set of functionals share one, also where a preconditioner is made anew.

        Examples
        --------
        >>> import torch
        >>> line = torch.linspace(0, 1, 50)[:, None]
        >>> KLPattern.of(line, rho=2.0)
        KLPattern(50 functionals, rho=2, 404 nonzeros, 32 supernodes)
        """
        places = np.ascontiguousarray(_array(points), dtype=np.float64)
        if places.ndim != 2 or places.shape[1] < 1:
            raise ValueError(f"points has shape {places.shape}; expected (n, d)")
        if not np.isfinite(places).all():
            raise ValueError("points holds NaN or infinite entries; expected finite numbers")
        n = len(places)
        order_of = np.zeros(n, np.int64) if orders is None else _array(orders)
        if order_of.shape != (n,):
            raise ValueError(f"orders has shape {order_of.shape}; expected ({n},)")
        check_settings("KLPattern", rho, supernodes, neighbours, ordering)
        settings = (rho, supernodes, neighbours, ordering)
        digest = hashlib.blake2b(places.tobytes())
        digest.update(order_of.astype(np.int64).tobytes())
        key = (digest.digest(), places.shape, *settings)
        known = _KNOWN.get(key)
        if known is not None:
            return known
        ranked = _rank(places, order_of, neighbours, ordering)
        placed = order_of[ranked.order]
        parts = _supernodes(places[ranked.order], placed, ranked, rho, supernodes)
        made = cls(ranked.order, ranked.lengths, placed, *parts, *settings)
        _KNOWN[key] = made
        return made

    @classmethod
    def of_operator(cls, A: LinearOperator, **settings: Any) -> KLPattern:
        """The pattern of an operator that has `points`, and `orders`; or an operand of it has.

        Raises
        ------
        StructureError
            None has.
        """
        found = _geometry(A)
        if found is None:
            raise StructureError(
                f"{A!r} does not say where its functionals sit (points, orders); hand over a "
                "pattern: KLPattern.of(points, orders)"
            )
        return cls.of(*found, **settings)

    @property
    def size(self) -> int:
        """Number of functionals n."""
        return len(self.order)

    @property
    def nnz(self) -> int:
        """Nonzeros of U."""
        return int(self.last.sum()) + len(self.last)

    @property
    def evaluated(self) -> int:
        """Entries of A that a factorisation evaluates."""
        return int(np.square(np.diff(self.row_starts)).sum())

    @cached_property
    def inverse_order(self) -> Array:
        """``(n,)``: the place of each functional."""
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(self.size)
        return inverse

    @cached_property
    def pointers(self) -> Array:
        """``(n + 1,)``: where the values of each entry of `columns` begin."""
        return np.concatenate([[0], np.cumsum(self.last + 1)])

    @cached_property
    def indices(self) -> Array:
        """``(nnz,)``: the row of each value; int32 where that is enough."""
        first = np.repeat(self.row_starts[:-1], np.diff(self.column_starts))
        shift = np.repeat(first - self.pointers[:-1], self.last + 1)
        shift += np.arange(self.nnz)
        return self.rows[shift]

    @cached_property
    def diagonal(self) -> Array:
        """``(n,)``: where among the values the diagonal of each entry of `columns` is."""
        return self.pointers[1:] - 1

    def batches(self, entries: int) -> Iterator[Batch]:
        """Supernodes in batches with so many matrix entries each, or one supernode."""
        sizes, counts = np.diff(self.row_starts), np.diff(self.column_starts)
        start, total = 0, len(sizes)
        while start < total:
            # Sizes ascend up to the padding, so the last one of a batch is its width.
            width = -(-int(sizes[start]) // PADDED) * PADDED
            allowed = max(1, entries // (width * width))
            same = np.searchsorted(sizes[start : start + allowed], width, side="right")
            end = start + max(1, int(same))
            yield self._batch(start, end, sizes[start:end], counts[start:end])
            start = end

    def _batch(self, start: int, end: int, sizes: Array, counts: Array) -> Batch:
        along = np.arange(sizes.max())
        valid = along < sizes[:, None]
        rows = self.rows[self.row_starts[start:end, None] + np.minimum(along, sizes[:, None] - 1)]
        orders, sorting = self.orders[rows], None
        if (orders[:, 1:] < orders[:, :-1]).any():
            sorting = np.argsort(orders, axis=1, kind="stable")
            orders = np.take_along_axis(orders, sorting, axis=1)
        kinds = np.where(orders.min(0) == orders.max(0), orders[0], -1)
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(along)]
        across = np.arange(counts.max())
        filled = across < counts[:, None]
        begins = self.column_starts[start:end, None]
        last = self.last[begins + np.where(filled, across, 0)]
        entries = (along <= last[:, :, None]) & filled[:, :, None]
        first, final = self.pointers[self.column_starts[[start, end]]]
        return Batch(self.order[rows], valid, last, entries, sorting, cuts, int(first), int(final))

    def __repr__(self) -> str:
        return (
            f"KLPattern({self.size} functionals, rho={self.rho:g}, {self.nnz} nonzeros, "
            f"{len(self.row_starts) - 1} supernodes)"
        )


# Patterns that something still holds, by what they were made of.
_KNOWN: weakref.WeakValueDictionary[tuple[Any, ...], KLPattern] = weakref.WeakValueDictionary()


def check_settings(
    name: str, rho: float, supernodes: float, neighbours: int, ordering: str
) -> None:
    """Settings as of `KLPattern.of`.

    Raises
    ------
    ValueError
        One is out of range.
    """
    if not 0 < rho < float("inf"):
        raise ValueError(f"{name}: rho={rho}; expected a number > 0")
    if not 1 <= supernodes < float("inf"):
        raise ValueError(f"{name}: supernodes={supernodes}; expected a number >= 1")
    if neighbours < 1:
        raise ValueError(f"{name}: neighbours={neighbours}; expected at least 1")
    if ordering not in get_args(Ordering):
        raise ValueError(f"{name}: ordering={ordering!r}; expected one of {get_args(Ordering)}")


def _array(values: Any) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _geometry(A: LinearOperator) -> tuple[Tensor, Tensor | None] | None:
    """Points and orders of A, or of the first operand that has them."""
    points = getattr(A, "points", None)
    if isinstance(points, Tensor) and points.ndim == 2 and len(points) == A.shape[0]:
        return points, getattr(A, "orders", None)
    for operand in A.operands:
        if operand.shape == A.shape and (found := _geometry(operand)) is not None:
            return found
    return None


class _Ranked(NamedTuple):
    """Functionals in order, their lengths, and which of the phases of the ordering each is from."""

    order: Array
    lengths: Array
    phase: Array


def _rank(points: Array, orders: Array, neighbours: int, ordering: Ordering) -> _Ranked:
    if not len(points):
        none = np.zeros(0, np.int64)
        return _Ranked(none, np.zeros(0), none)
    sites, site_of = np.unique(points, axis=0, return_inverse=True)
    site_of = site_of.reshape(-1)
    # At each site the functional of lowest order leads.
    sorted_by_site = np.lexsort((orders, site_of))
    leads = np.ones(len(points), bool)
    leads[1:] = site_of[sorted_by_site][1:] != site_of[sorted_by_site][:-1]
    leaders, others = sorted_by_site[leads], sorted_by_site[~leads]  # leaders: site by site
    box = float(np.linalg.norm(sites.max(0) - sites.min(0)))

    ranked, lengths, phases = [], [], []
    before = np.zeros((0, sites.shape[1]))
    for phase, group in enumerate((orders[leaders] == 0, orders[leaders] != 0)):
        members = np.flatnonzero(group)
        place, length = maximin(sites[members], before)
        if neighbours > 1:
            length = _kth_lengths(sites[members[place]], before, neighbours, box)
        ranked.append(members[place])
        lengths.append(length)
        phases.append(np.full(len(members), phase))
        before = sites[members]
    rank = np.concatenate(ranked)  # sites in order
    length, phase_of = np.concatenate(lengths), np.concatenate(phases)
    at = np.empty(len(sites), np.int64)
    at[rank] = np.arange(len(sites))

    where = at[site_of[others]]
    if ordering == "follow":
        whole = np.concatenate([leaders[rank], others])
        key = np.concatenate([np.arange(len(sites)), where])
        merged = np.argsort(key, kind="stable")  # the others of a site stay by order
        return _Ranked(whole[merged], length[key[merged]], phase_of[key[merged]])
    spacing = _spacing(sites, box)
    behind = np.lexsort((where, orders[others]))
    order = np.concatenate([leaders[rank], others[behind]])
    length = np.concatenate([length, spacing[site_of[others[behind]]]])
    phase_of = np.concatenate([phase_of, np.full(len(others), 2)])
    return _Ranked(order, length, phase_of)


def _spacing(sites: Array, box: float) -> Array:
    """Distance of each site to its (d + 1)-th nearest other."""
    wanted = min(sites.shape[1] + 1, len(sites) - 1)
    if wanted == 0:
        return np.full(len(sites), box)
    near = cKDTree(sites).query(sites, k=[wanted + 1])[0]
    return np.asarray(near)[:, 0]


def _kth_lengths(points: Array, before: Array, k: int, box: float) -> Array:
    """Distance of each point to the k-th nearest before it, from above; `box` for fewer.

    Points are taken by blocks that are a part ``1 - RATIO`` of those before, and the neighbours of
    a block are looked for before the block: fewer of them, so no length is too small.
    """
    whole = np.concatenate([before, points])
    lengths = np.full(len(points), box)
    start = len(before)
    while start < len(whole):
        end = min(len(whole), start + 1 + int((1 - RATIO) * start))
        if start >= k:
            near = cKDTree(whole[:start]).query(whole[start:end], k=[k])[0]
            lengths[start - len(before) : end - len(before)] = np.asarray(near)[:, 0]
        start = end
    return lengths


def _supernodes(
    points: Array, orders: Array, ranked: _Ranked, rho: float, ratio: float
) -> tuple[Array, Array, Array, Array, Array]:
    """Rows and columns of each supernode, for points in order; smaller supernodes first."""
    n, lengths = len(points), ranked.lengths
    small = np.int32 if n < 2**31 else np.int64
    if not n:
        none, start = np.zeros(0, small), np.zeros(1, np.int64)
        return none, start, none, start, none
    # Bands of columns of one phase with lengths within the ratio; zero is the length of a lone
    # point.
    positive = np.where(lengths > 0, lengths, 1.0)
    level = np.floor(np.log(positive / positive.min()) / np.log(max(ratio, 1.25)) + 1e-9)
    band_key = ranked.phase * (level.max() + 1) + level
    bands, band = np.unique(band_key, return_inverse=True)
    band = band.reshape(-1)
    if ratio == 1:
        member = np.arange(n)
        group = member
    else:
        # A cube whose half diagonal R has rho l + R <= ratio rho l.
        shortest = np.full(len(bands), np.inf)
        np.minimum.at(shortest, band, positive)
        side = 2 * (ratio - 1) * rho * shortest / points.shape[1] ** 0.5
        cells = np.floor((points - points.min(0)) / side[band, None])
        keys = np.concatenate([band[:, None], cells], axis=1)
        # In the order of the columns within each.
        member = np.lexsort((np.arange(n), *keys.T[::-1]))
        changes = (keys[member][1:] != keys[member][:-1]).any(1)
        group = np.concatenate([[0], np.cumsum(changes)])
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    low = np.minimum.reduceat(points[member], starts)
    high = np.maximum.reduceat(points[member], starts)
    centres = (low + high) / 2
    reach = np.linalg.norm(points[member] - centres[group], axis=1) + rho * lengths[member]
    radius = np.maximum.reduceat(reach, starts) * SLACK
    final = np.maximum.reduceat(member, starts)

    found, sizes = [], np.zeros(len(starts), np.int64)
    band_of = band[member[starts]]
    for one in range(len(bands)):
        own = np.flatnonzero(band_of == one)
        tree = cKDTree(points[: final[own].max() + 1])
        for some in np.array_split(own, -(-len(own) // SEARCHED)):
            near = cKDTree(centres[some]).sparse_distance_matrix(
                tree, radius[some].max(), output_type="ndarray"
            )
            node, place, gap = some[near["i"]], near["j"], near["v"]
            kept = (gap <= radius[node]) & (place <= final[node])
            key = np.sort(node[kept] * n + place[kept])
            sizes += np.bincount(key // n, minlength=len(sizes))
            found.append(key)
    # Bands hold supernodes in any order: all keys are sorted once more only where they must be.
    key = np.concatenate(found)
    if (key[1:] < key[:-1]).any():
        key = np.sort(key)

    counts = np.diff(np.append(starts, n))
    position = np.searchsorted(key, group * n + member)
    first = np.concatenate([[0], np.cumsum(sizes)])
    last = position - first[group]
    rows = (key % n).astype(small)
    # Those of one padded size follow each other; within it those with as many values among them.
    values = np.add.reduceat((orders[rows] == 0).astype(np.int64), first[:-1])
    by_size = np.lexsort((counts, values, -(-sizes // PADDED)))
    rows, row_starts = _regrouped(rows, first[:-1], sizes, by_size)
    columns, column_starts = _regrouped(member.astype(small), starts, counts, by_size)
    last, _ = _regrouped(last.astype(small), starts, counts, by_size)
    return rows, row_starts, columns, column_starts, last


def _regrouped(values: Array, first: Array, counts: Array, chosen: Array) -> tuple[Array, Array]:
    """Groups of consecutive values in another order, and where each begins."""
    counts = counts[chosen]
    starts = np.concatenate([[0], np.cumsum(counts)])
    index = np.repeat(first[chosen] - starts[:-1], counts) + np.arange(starts[-1])
    return values[index], starts


def pattern_tensor(values: Array, device: torch.device) -> Tensor:
    """An array of indices as a tensor that torch can index with."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)
