"""Columns C that change a factorised A to ``A + C C^T`` or ``A - C C^T``."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from operators import Dense, Gram, LinearOperator, Sparse
from solvers.sparse.matrix import csc_of


def columns_of(C: Tensor | Sparse, where: str, A: LinearOperator) -> LinearOperator:
    """C ``(n, k)`` as an operator.

    Raises
    ------
    TypeError
        It is neither a dense tensor nor a Sparse, or of another dtype or device than A.
    ValueError
        It has another number of rows than A.
    """
    if not isinstance(C, (Tensor, Sparse)) or (isinstance(C, Tensor) and C.layout != torch.strided):
        raise TypeError(
            f"{where}: C is {C.layout if isinstance(C, Tensor) else type(C).__name__}; expected a "
            "dense tensor (n, k) or an operators.Sparse"
        )
    if len(C.shape) != 2 or C.shape[0] != A.shape[0]:
        raise ValueError(f"{where}: C has shape {tuple(C.shape)}; expected ({A.shape[0]}, k)")
    if C.dtype != A.dtype or C.device != A.device:
        raise TypeError(f"{where}: C is {C.dtype} on {C.device}; expected {A.dtype} on {A.device}")
    return C if isinstance(C, Sparse) else Dense(C)


def csc_of_columns(C: LinearOperator, where: str) -> Any:
    """Scipy CSC array of what `columns_of` made, in float64; zeros of a dense C are left out.

    Raises
    ------
    ValueError
        C holds NaN or infinite entries.
    """
    if isinstance(C, Sparse):
        return csc_of(C, where, torch.float64)
    dense = C.to_dense().to(device="cpu", dtype=torch.float64).numpy()
    if not np.isfinite(dense).all():
        raise ValueError(f"{where}: C holds NaN or infinite entries; expected finite numbers")
    return scipy.sparse.csc_array(dense)


def with_gram(A: LinearOperator, C: LinearOperator, subtract: bool) -> LinearOperator:
    """``A + C C^T`` or ``A - C C^T``, not multiplied out."""
    gram = Gram(C.T)
    return A - gram if subtract else A + gram
