"""Index arithmetic of compressed sparse rows: sort, transpose, repeat, pair up; no values.

Everything here is plain int64 tensors, made outside of whatever torch.func or autograd is doing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch._C import _functorch

from operators.tracing import plainly

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

Shape = tuple[int, int]

# Pairs of nonzeros that a symbolic product sorts at once.
GROUP = 1 << 20


def plain(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a function `plainly`."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with plainly():
            return function(*args, **kwargs)

    return wrapped


def unwrapped(indices: Tensor) -> Tensor:
    """What torch.func has wrapped: an index made under `grad` or `jvp` is one all the same.

    Raises
    ------
    ValueError
        It is mapped over by vmap.
    """
    while _functorch.is_functorch_wrapped_tensor(indices):
        if _functorch.is_batchedtensor(indices):
            raise ValueError("indices differ between the items of a vmap; a pattern is one for all")
        indices = _functorch.get_unwrapped(indices)
    return indices


@plain
def pointers_of(rows: Tensor, m: int) -> Tensor:
    """Where each row begins, and nnz, ``(m + 1,)``, of rows ``(nnz,)`` in any order."""
    pointers = rows.new_zeros(m + 1)
    pointers[1:] = torch.bincount(rows, minlength=m).cumsum(0)
    return pointers


@plain
def rows_of(pointers: Tensor) -> Tensor:
    """Row of each nonzero: the inverse of `pointers_of`."""
    steps = torch.arange(len(pointers) - 1, device=pointers.device)
    return torch.repeat_interleave(steps, pointers.diff(), output_size=int(pointers[-1]))


@plain
def rises(columns: Tensor, pointers: Tensor) -> bool:
    """Whether the columns rise within each row: they may fall where a row begins."""
    begins = torch.zeros(len(columns) + 1, dtype=torch.bool, device=columns.device)
    begins[pointers] = True
    return bool((columns.diff() > 0).logical_or_(begins[1 : len(columns)]).all())


@plain
def counted(keys: Tensor, size: int) -> Tensor:
    """Stable order that sorts keys from 0 to size - 1, in ``O(size + len(keys))``."""
    if keys.device.type != "cpu":
        return torch.argsort(keys, stable=True)
    # A matrix of one row, with the keys as columns: scipy makes CSC of it by a counting sort, which
    # takes an eighth of the time of torch's.
    narrow = np.int32 if max(len(keys), size) < 2**31 else np.int64
    ends = np.array([0, len(keys)], dtype=narrow)
    held: Any = (np.arange(len(keys), dtype=narrow), keys.numpy().astype(narrow), ends)
    order = scipy.sparse.csr_array(held, shape=(1, size)).tocsc().data
    return torch.from_numpy(order.astype(np.int64))


@plain
def ordered(rows: Tensor, columns: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns sorted and without duplicates, and where each of those given went.

    Costs two counting sorts, none where they are in order.
    """
    m, n = shape
    keys = rows * n + columns
    if bool((keys.diff() > 0).all()):
        # Copies: the caller may write into what was given.
        return rows.clone(), columns.clone(), torch.arange(len(keys), device=keys.device)
    order = counted(columns, n)
    order = order.index_select(0, counted(rows.index_select(0, order), m))
    keys = keys.index_select(0, order)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    where = torch.empty_like(order)
    where[order] = first.cumsum(0).sub_(1)
    kept = keys[first]
    rows = torch.div(kept, n, rounding_mode="floor")
    return rows, kept - rows * n, where


@plain
def transposed(rows: Tensor, columns: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and row pointers of the transpose, and the order in which it takes the values."""
    order = counted(columns, shape[1])
    return rows.index_select(0, order), pointers_of(columns, shape[1]), order


@plain
def repeated(
    rows: Tensor, columns: Tensor, pointers: Tensor, shape: Shape, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and pointers of `count` copies along a diagonal."""
    steps = torch.arange(count, device=columns.device)[:, None]
    (m, n), nnz = shape, len(columns)
    starts = (pointers[:-1] + nnz * steps).reshape(-1)
    end = starts.new_full((1,), count * nnz)
    return (
        (rows + m * steps).reshape(-1),
        (columns + n * steps).reshape(-1),
        torch.cat([starts, end]),
    )


@plain
def multiplied(
    pointers: Tensor, columns: Tensor, other_pointers: Tensor, other_columns: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns of ``A B``, and the pairs: left, right, and where they are summed.

    Nonzero (i, k) of A meets each nonzero of row k of B. The rows of A are taken in groups of about
    `GROUP` pairs, so that what is sorted stays in the cache.

    Parameters
    ----------
    pointers, columns
        Of A.
    other_pointers, other_columns
        Of B.
    n
        Columns of B.
    """
    device = columns.device
    starts = other_pointers.index_select(0, columns)
    counts = other_pointers.diff().index_select(0, columns)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shifts = starts - ends[:-1]
    before = ends.index_select(0, pointers)  # pairs before each row
    goals = torch.arange(0, int(ends[-1]), GROUP, device=device)
    cuts = torch.searchsorted(before, goals, right=True) - 1
    cuts = torch.cat([cuts, cuts.new_full((1,), len(pointers) - 1)]).unique().tolist()
    groups: list[tuple[Tensor, ...]] = []
    count = 0
    for top, bottom in pairwise(cuts):
        held = slice(int(pointers[top]), int(pointers[bottom]))
        local = torch.arange(held.start, held.stop, device=device)
        left = torch.repeat_interleave(local, counts[held])
        offsets = shifts[held].index_select(0, left - held.start)
        right = torch.arange(int(before[top]), int(before[bottom]), device=device) + offsets
        lengths = before[top + 1 : bottom + 1] - before[top:bottom]
        rows = torch.repeat_interleave(torch.arange(bottom - top, device=device), lengths)
        shape = (bottom - top, n)
        rows, found, where = ordered(rows, other_columns.index_select(0, right), shape)
        groups.append((rows + top, found, left, right, where + count))
        count += len(found)
    if not groups:
        empty = columns.new_zeros(0)
        return empty, empty, empty, empty, empty
    rows, found, left, right, where = (torch.cat(parts) for parts in zip(*groups, strict=True))
    return rows, found, left, right, where
