"""Sets of unknowns that the entries of a tensor depend on, and how they move and unite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

# Matrix of ones, entries against those of the argument; None where nothing depends on it.
Reach = scipy.sparse.csr_array | None


def rows_taken(matrices: list[scipy.sparse.csr_array], numbers: Any) -> Reach:
    """Rows of stacked matrices by number, from 1; number 0 is an empty row."""
    size = sum(matrix.shape[0] for matrix in matrices)
    if len(matrices) == 1 and (not len(numbers) or numbers.min() > 0):
        if len(numbers) == size and np.array_equal(numbers, np.arange(1, size + 1)):
            return matrices[0]
        return matrices[0][numbers - 1]
    nothing = scipy.sparse.csr_array((1, matrices[0].shape[1]), dtype=bool)
    return scipy.sparse.vstack([nothing, *matrices], format="csr")[numbers]


def row_major(shape: Sequence[int]) -> Tensor:
    """Positions in a tensor of this shape, in row-major order."""
    return torch.arange(torch.Size(shape).numel()).reshape(tuple(shape))


def united(parts: Any) -> Reach:
    """Union of matrices of one shape; None counts as empty."""
    union: Reach = None
    for part in parts:
        if part is None or part is union:
            continue
        union = part if union is None else union + part
    return union


def broadcast(x: Tensor, reach: Reach, shape: Sequence[int]) -> Reach:
    """What x expanded to a shape reaches."""
    if reach is None or x.shape == torch.Size(shape):
        return reach
    return reach[row_major(x.shape).expand(tuple(shape)).reshape(-1).numpy()]


def sent(reach: Reach, at: Tensor, shape: Sequence[int]) -> Reach:
    """Rows added up at given positions of a tensor of this shape."""
    if reach is None:
        return None
    size = torch.Size(shape).numel()
    target = at.reshape(-1).numpy()
    ones = np.ones(len(target), bool)
    place = scipy.sparse.csr_array((ones, (target, np.arange(len(target)))), (size, len(target)))
    return place @ reach


def _lines(x: Tensor, dim: Any) -> Tensor:
    """Number of the line along the dimensions `dim` that each entry is on."""
    dims = range(x.ndim) if dim is None or dim == [] else dim if isinstance(dim, list) else [dim]
    dims = [d % max(x.ndim, 1) for d in dims]
    kept = [1 if d in dims else size for d, size in enumerate(x.shape)]
    return row_major(kept).expand(x.shape)


def reduced(x: Tensor, reach: Reach, dim: Any) -> Reach:
    """What a reduction over dimensions reaches: the union along them."""
    lines = _lines(x, dim)
    return sent(reach, lines, [int(lines.max()) + 1 if x.numel() else 0])


def along(x: Tensor, reach: Reach, dim: Any) -> Reach:
    """Entries that each depend on their whole line."""
    united = reduced(x, reach, dim)
    return None if united is None else united[_lines(x, dim).reshape(-1).numpy()]


def multiplied(
    left: tuple[Tensor, Reach], right: tuple[Tensor, Reach], shape: Sequence[int]
) -> Reach:
    """Entry (i, j) of a product depends on row i of the one factor and column j of the other."""
    (a, of_a), (b, of_b) = left, right
    rows, columns = reduced(a, of_a, -1), reduced(b, of_b, max(b.ndim - 2, 0))
    kept_a = a.shape[:-1] + ((1,) if b.ndim > 1 else ())
    kept_b = b.shape[:-2] + ((1,) if a.ndim > 1 and b.ndim > 1 else ()) + b.shape[b.ndim - 1 :]
    if b.ndim == 1:
        kept_b = torch.Size([1] * (a.ndim - 1))
    return united(
        broadcast(torch.empty(tuple(kept), device="meta"), reach, shape)
        for kept, reach in ((kept_a, rows), (kept_b, columns))
    )


def through(reach: Reach, window: Any, batch: int, channels: int, into: int, groups: int) -> Reach:
    """All channels of a group, through the window, into all channels of the group."""
    if reach is None:
        return None
    mix = scipy.sparse.kron(
        scipy.sparse.eye_array(batch * groups, dtype=bool),
        np.ones((into // groups, channels // groups), bool),
    )
    return (scipy.sparse.kron(mix, window, format="csr").astype(bool) @ reach).tocsr()


def everywhere(x: Tensor, reach: Reach, shape: Sequence[int]) -> Reach:
    """All that x reaches, for every entry of a tensor of this shape."""
    whole = reduced(x, reach, None)
    return None if whole is None else whole[np.zeros(torch.Size(shape).numel(), np.int64)]
