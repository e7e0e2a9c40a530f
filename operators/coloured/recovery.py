"""Nonzeros from the products with coloured vectors: which to read, and how to substitute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.sparse import csgraph
from torch import Tensor

from operators.coloured.colouring import Colouring, check_colouring
from operators.coloured.symmetric_colouring import check_symmetric, trees
from operators.sparse.pattern import Pattern

# Numbers in one block of products, unless the caller says how many products to take at once. More
# run out of the cache: a million unknowns take half the time one sweep after the other.
BLOCK = 2**19


@dataclass(frozen=True, eq=False)
class Recovery:
    """``values[k] = s[where[k]]``, where s are entries of the products after substitution.

    Parameters
    ----------
    colours, count
        Colour of each coordinate of the vectors, and their number.
    index
        Where in the table of products, ``(count, m)`` flattened, each number that is needed is:
        ``(q,)``.
    where
        For each nonzero the number that it is: ``(nnz,)``, or None where they are in order.
    signs
        Of each number; None where none are substituted.
    rounds
        Of the substitution: number ``rounds[k][0]`` is added to number ``rounds[k][1]``.

    Notes
    -----
    In a tree of two colours the product at vertex u is the sum of the nonzeros on the edges at u,
    so that the nonzero on the edge from u to its parent is the alternating sum of the products over
    the subtree of u. It is summed by doubling: round k adds to each vertex the sums of those that
    are ``2^k`` below it, so that a tree of depth D takes ``log2 D`` rounds, and rounding errors
    grow as with substitution along the tree (Powell and Toint, 1979).
    """

    colours: Tensor
    count: int
    index: Tensor
    where: Tensor | None = None
    signs: Tensor | None = None
    rounds: tuple[tuple[Tensor, Tensor], ...] = ()

    def values(
        self,
        push: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        chunk_size: int | None,
        further: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """All nonzeros, from products ``push(v)``, `chunk_size` at a time; and ``push(further)``.

        The latter goes along with the last of them, for little more than they cost.
        """
        numbers, image = self._read(push, dtype, chunk_size, further)
        if self.signs is not None:
            signs = self.signs.to(dtype)
            numbers = signs * numbers
            for source, target in self.rounds:
                numbers = numbers.index_add(0, target, numbers.index_select(0, source))
            numbers = signs * numbers
        if self.where is not None:
            numbers = numbers.index_select(0, self.where)
        return numbers, image

    def _read(
        self,
        push: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        chunk_size: int | None,
        further: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        device = self.colours.device
        chunk = chunk_size or max(1, BLOCK // max(len(self.colours), 1))
        pieces: list[Tensor] = []
        positions = []
        image = push(further) if further is not None and not self.count else None
        for start in range(0, self.count, chunk):
            ranks = torch.arange(start, min(start + chunk, self.count), device=device)
            seeds = (self.colours == ranks[:, None]).to(dtype)
            along = further is not None and start + chunk >= self.count
            if further is not None and along:
                seeds = torch.cat([seeds, further[None]])
            products = push(seeds[0])[None] if len(seeds) == 1 else torch.func.vmap(push)(seeds)
            if along:
                image, products, seeds = products[-1], products[:-1], seeds[:-1]
            height = products.shape[1]
            if height * self.count <= 4 * len(self.index):
                # The whole table is small: read it once, at the end.
                pieces.append(products)
                continue
            mine = (self.index >= start * height) & (self.index < (start + len(seeds)) * height)
            positions.append(mine.nonzero()[:, 0])
            at = self.index[mine] - start * height
            pieces.append(products.reshape(-1).index_select(0, at))
        if not pieces:
            return torch.zeros(0, dtype=dtype, device=device), image
        read = torch.cat(pieces)
        if not positions:
            return read.reshape(-1).index_select(0, self.index), image
        return read.index_select(0, torch.argsort(torch.cat(positions))), image


def jacobian_recovery(pattern: Pattern, colouring: Colouring) -> Recovery:
    """Plan for a Jacobian: each nonzero stands alone in a product.

    Raises
    ------
    ColouringError
        The colouring is not valid for the pattern.
    """
    check_colouring(pattern, colouring)
    forward = colouring.kind == "column"
    coloured, place, height = pattern.columns, pattern.rows, pattern.shape[0]
    if not forward:
        coloured, place, height = place, coloured, pattern.shape[1]
    colours = colouring.colours.to(pattern.device)
    return Recovery(colours, colouring.count, colours[coloured] * height + place)


def symmetric_recovery(pattern: Pattern, colouring: Colouring) -> Recovery:
    """Plan for a symmetric matrix: every tree of two colours from its leaves to its root.

    Raises
    ------
    ColouringError
        The colouring is not valid for the pattern.
    ValueError
        The pattern is not symmetric.
    """
    graph = check_symmetric(pattern, colouring)
    device, size = pattern.device, len(graph.vertex)
    colours = colouring.colours.cpu().numpy()
    # The root of a tree is a vertex of the greatest degree: of a star the centre.
    number, label = trees(graph)
    ranked = np.lexsort((-graph.degree, label))
    roots = ranked[np.r_[True, np.diff(label[ranked]) > 0]] if size else ranked
    links = scipy.sparse.coo_array(
        (
            np.ones(len(graph.head) + number, bool),
            (
                np.concatenate([graph.head, np.full(number, size)]),
                np.concatenate([graph.tail, roots]),
            ),
        ),
        (size + 1, size + 1),
    )
    parent = csgraph.breadth_first_order(links.tocsr(), size)[1].astype(np.int64)
    parent[size] = size
    # Depth below the root, and the nodes 2^k above each.
    depth = (parent != size).astype(np.int64)
    above, ancestors = parent, [parent]
    while (above[:size] != size).any():
        depth = depth + depth[above]
        above = above[above]
        ancestors.append(above)
    depth = depth[:size]
    rounds = []
    for k, up in enumerate(ancestors):
        source = np.flatnonzero(depth > 2**k)
        if len(source):
            rounds.append((source, up[source]))
    # An edge is known by the end that is below the other.
    edge = np.where(parent[graph.head] == graph.tail, graph.head, graph.tail)
    diagonal = pattern.diagonal_positions.cpu().numpy()
    on_diagonal = pattern.rows.cpu().numpy()[diagonal]
    number_of = np.empty(pattern.nnz, np.int64)
    off = np.ones(pattern.nnz, bool)
    off[diagonal] = False
    number_of[off] = edge
    number_of[diagonal] = size + np.arange(len(diagonal))
    colour = np.concatenate([graph.partner, colours[on_diagonal]])
    place = np.concatenate([graph.vertex, on_diagonal])
    signs = np.concatenate([1 - 2 * (depth % 2), np.ones(len(diagonal), np.int64)])
    index = colour * pattern.shape[0] + place
    if not rounds:
        # Only what is read at once is needed: of a star, its leaves.
        index = index[number_of]

    def held(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.int64)).to(device)

    return Recovery(
        colouring.colours.to(device),
        colouring.count,
        held(index),
        held(number_of) if rounds else None,
        held(signs) if rounds else None,
        tuple((held(source), held(target)) for source, target in rounds),
    )
