"""The matrix of an operator, looked at before it is factorised."""

from __future__ import annotations

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.members import matrices_of


def finite_dense(A: LinearOperator, solver: str) -> Tensor:
    """The matrix ``(m, n)`` of A, or ``(B, m, n)`` of the members of a batch.

    Raises
    ------
    ValueError
        It holds NaN or infinite entries.
    """
    matrix = matrices_of(A)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{solver}: the matrix of {A!r} holds NaN or infinite entries")
    return matrix
