"""Products with a symmetric dense matrix, as its symmetry allows them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from scipy.linalg.blas import get_blas_funcs
from torch import Tensor

from operators import Dense, LinearOperator

# Bytes of a matrix from which on one triangle pays: smaller ones are read from the cache.
LARGE = 1 << 23


def vector_product(A: LinearOperator) -> Callable[[Tensor], Tensor]:
    """``v -> A v`` for plain vectors ``(n,)``, from one triangle where that is known to be faster.

    Parameters
    ----------
    A
        Any operator; of most it is the product that they bring.

    Notes
    -----
    The product with a dense matrix is bound by memory. BLAS' symv reads half of a symmetric one,
    and takes half the time; torch does not have it, scipy does, for matrices on the CPU. It runs on
    one thread, as the threads of OpenBLAS's symv wait for one another: that takes threadpoolctl,
    without which, and for small matrices, the product stays torch's.

    Examples
    --------
    >>> import torch, operators as ops
    >>> product = vector_product(ops.Dense(torch.eye(2), symmetric=True))
    >>> product(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    controller = _threads()
    if not (isinstance(A, Dense) and A.symmetric and controller is not None):
        return A._matvec
    # BLAS numbers entries by columns; of a symmetric matrix rows are columns.
    M = A.matrix if A.matrix.is_contiguous() else A.matrix.T
    known = M.device.type == "cpu" and M.dtype in (torch.float32, torch.float64)
    if not (known and M.is_contiguous() and M.numel() * M.element_size() >= LARGE):
        return A._matvec
    array = M.detach().numpy().T
    symv = get_blas_funcs("symv", (array,))

    def product(v: Tensor) -> Tensor:
        with controller.limit(limits=1, user_api="blas"):
            return torch.from_numpy(symv(1.0, array, v.numpy(), lower=1))

    return product


def block_product(A: LinearOperator) -> Callable[[Tensor], Tensor]:
    """``V -> A V`` for plain blocks ``(n, k)``.

    Of a symmetric matrix as ``(V^T A)^T``, which BLAS does up to twice as fast for a few columns
    that are numbered by rows.

    Examples
    --------
    >>> import torch, operators as ops
    >>> block_product(ops.Dense(torch.eye(2), symmetric=True))(torch.ones(2, 1))
    tensor([[1.],
            [1.]])
    """
    if not (isinstance(A, Dense) and A.symmetric):
        return A._matmat
    M = A.matrix
    return lambda block: (block.T @ M).T


@functools.cache
def _threads() -> Any:
    """What sets the threads of BLAS: threadpoolctl, where it is installed."""
    with contextlib.suppress(ImportError):
        make: Callable[[], Any] = importlib.import_module("threadpoolctl").ThreadpoolController
        return make()
    return None
