"""The nonzeros of an operator, for the CPU libraries: `sparse_of`, `csc_of`, `solved`.

Inside these libraries a matrix is a scipy CSC array with indices of one type, and a block of
vectors an array of the library's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from operators import (
    Block,
    BlockDiagonal,
    Diagonal,
    Gram,
    Kronecker,
    KroneckerSum,
    LinearOperator,
    Pattern,
    Permutation,
    Product,
    Scaled,
    Sparse,
    Sum,
)
from operators.sparse.formats import to_scipy
from operators.tracing import tracked
from solvers.solution import StructureError

Array = npt.NDArray[Any]


def sparse_of(A: LinearOperator, solver: str) -> Sparse:
    """The operator as one `Sparse`; itself where it is one.

    Diagonals and permutations are, and so are sums, multiples, products, Gram, Kronecker and block
    operators of what is.

    Raises
    ------
    StructureError
        A does not know its nonzeros.
    """
    held = nonzeros_of(A)
    if held is None:
        raise StructureError(
            f"{solver} needs the nonzeros of a matrix, which {A!r} does not hold: give "
            "ops.Sparse(matrix), or ops.SparseHessian or ops.SparseJacobian of a function"
        )
    return held


def csc_of(A: Sparse, solver: str, dtype: torch.dtype, *, symmetric: bool = False) -> Any:
    """Scipy CSC array on the CPU, with values of `dtype` and indices of one type.

    Of a symmetric matrix on the CPU that has the dtype already nothing is copied: its rows are its
    columns. The arrays then belong to A and must not be written into.

    Raises
    ------
    ValueError
        A value is NaN or infinite.
    """
    values = A.values.detach().to(device="cpu", dtype=dtype).contiguous()
    if not np.isfinite(values.numpy()).all():
        count = int((~torch.isfinite(values)).sum())
        raise ValueError(
            f"{solver}: {A!r} holds {count} NaN or infinite values; expected finite numbers"
        )
    return to_scipy(values, A.pattern.to("cpu"), "csc", symmetric=symmetric)


def solved(solve: Callable[[Array], Array], block: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """A library's solution ``(rows, k)`` for a block, on the block's device and of its dtype."""
    if not (block.numel() and rows):
        return block.new_zeros(rows, block.shape[1])
    # Columns that lie in one piece would make the product that follows ten times as slow.
    x = np.ascontiguousarray(solve(block.to(device="cpu", dtype=dtype).numpy()))
    return torch.from_numpy(x).to(device=block.device, dtype=block.dtype)


def not_tracked(A: LinearOperator, what: str) -> None:
    """Refuse a number that a factorisation gives without its derivative.

    Raises
    ------
    NotImplementedError
        A tensor of A is being differentiated.
    """
    if any(tracked(tensor) for tensor in A.tensors):
        raise NotImplementedError(
            f"{what} of {A!r}, a tensor of which is being differentiated: the factorisation gives "
            "the value alone, and its derivative would be a silent zero; use operators.logdet, or "
            "torch.no_grad() for the value"
        )


def nonzeros_of(A: LinearOperator) -> Sparse | None:
    """The operator as one `Sparse`; None where it does not know its nonzeros (see `sparse_of`)."""
    if isinstance(A, Sparse):
        return A
    n = A.shape[1]
    if isinstance(A, Diagonal):
        return Sparse(A.values.expand(n), Pattern.eye(n, A.device))
    if isinstance(A, Permutation):
        ones = torch.ones(n, dtype=A.dtype, device=A.device)
        return Sparse.from_coo(torch.arange(n, device=A.device), A.order, ones, A.shape)
    if isinstance(A, Block):
        held = [[None if block is None else nonzeros_of(block) for block in row] for row in A.rows]
        if any(
            block is not None and nonzeros is None
            for row, converted in zip(A.rows, held, strict=True)
            for block, nonzeros in zip(row, converted, strict=True)
        ):
            return None
        tops, lefts = _starts(A._row_sizes), _starts(A._column_sizes)
        return _placed(
            (
                (top, left, block)
                for top, row in zip(tops, held, strict=True)
                for left, block in zip(lefts, row, strict=True)
                if block is not None
            ),
            A,
        )
    parts = [nonzeros_of(operand) for operand in A.operands]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    made: LinearOperator | None = None
    if isinstance(A, Scaled):
        made = A.factor * known[0]
    elif isinstance(A, Sum):
        made = known[0] + known[1]
    elif isinstance(A, Product):
        made = known[0] @ known[1]
    elif isinstance(A, Gram):
        weighted = known[0] if A.weight is None else known[1] @ known[0]
        made = known[0].T @ weighted
    elif isinstance(A, BlockDiagonal):
        tops, lefts = (_starts([part.shape[axis] for part in known]) for axis in (0, 1))
        made = _placed(zip(tops, lefts, known, strict=True), A)
    elif isinstance(A, Kronecker):
        made = reduce(_kron, known)
    elif isinstance(A, KroneckerSum):
        made = reduce(_kron_sum, known)
    return made if isinstance(made, Sparse) else None


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _placed(parts: Iterable[tuple[int, int, Sparse]], like: LinearOperator) -> Sparse:
    """The matrix, of the shape of `like`, with blocks that begin at (top, left)."""
    placed = [(top + S.pattern.rows, left + S.pattern.columns, S.values) for top, left, S in parts]
    rows, columns, values = (torch.cat(pieces) for pieces in zip(*placed, strict=True))
    return Sparse.from_coo(rows, columns, values, like.shape)


def _kron(A: Sparse, B: Sparse) -> Sparse:
    (m, n), (p, q) = A.shape, B.shape
    rows = A.pattern.rows[:, None] * p + B.pattern.rows
    columns = A.pattern.columns[:, None] * q + B.pattern.columns
    values = A.values[:, None] * B.values
    return Sparse.from_coo(
        rows.reshape(-1), columns.reshape(-1), values.reshape(-1), (m * p, n * q)
    )


def _kron_sum(A: Sparse, B: Sparse) -> Sparse:
    left = _kron(A, _eye(B.shape[0], B))
    right = _kron(_eye(A.shape[0], A), B)
    total = left + right
    assert isinstance(total, Sparse)
    return total


def _eye(n: int, like: Sparse) -> Sparse:
    ones = torch.ones(n, dtype=like.dtype, device=like.device)
    return Sparse(ones, Pattern.eye(n, like.device))
