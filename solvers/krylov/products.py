"""Products inside an iteration, where the same matrix is met again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.linalg.blas import get_blas_funcs
from torch import Tensor

from operators import Dense, LinearOperator, Sparse
from solvers.threads import one_blas_thread

# Bytes of a matrix from which on one triangle pays: smaller ones are read from the cache.
LARGE = 1 << 23


def vector_product(A: LinearOperator) -> Callable[[Tensor], Tensor]:
    """``v -> A v`` for plain vectors ``(n,)``, as fast as the kind of A allows.

    Parameters
    ----------
    A
        Any operator; of most it is the product that they bring.

    Notes
    -----
    The product with a dense matrix is bound by memory. BLAS' symv reads half of a symmetric one,
    and takes half the time; torch does not have it, scipy does, for matrices on the CPU. It runs on
    one thread, as the threads of OpenBLAS's symv wait for one another. For small matrices the
    product stays torch's. Of a sparse matrix on the CPU the tensor that its kernel wants is made
    once, which saves half the time of a small product.

    Examples
    --------
    >>> import torch, operators as ops
    >>> product = vector_product(ops.Dense(torch.eye(2), symmetric=True))
    >>> product(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if isinstance(A, Sparse):
        return _sparse_product(A)
    if not (isinstance(A, Dense) and A.symmetric):
        return A._matvec
    # BLAS numbers entries by columns; of a symmetric matrix rows are columns.
    M = A.matrix if A.matrix.is_contiguous() else A.matrix.T
    if not (_known(M) and M.is_contiguous() and M.numel() * M.element_size() >= LARGE):
        return A._matvec
    array = M.detach().numpy().T
    symv = get_blas_funcs("symv", (array,))

    def product(v: Tensor) -> Tensor:
        with one_blas_thread():
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


def _sparse_product(A: Sparse) -> Callable[[Tensor], Tensor]:
    values, pattern = A.values.detach(), A.pattern
    if not _known(values):
        return A._matvec
    matrix = torch.sparse_csr_tensor(
        *pattern.narrow(), values, size=pattern.shape, check_invariants=False
    )

    def product(v: Tensor) -> Tensor:
        image = v.new_empty(pattern.shape[0])
        return torch.addmv(image, matrix, v, beta=0, out=image)

    return product


def _known(tensor: Tensor) -> bool:
    """Whether the libraries for the CPU take it."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
