"""The triangular part of a matrix, solved with: `Splitting`, for SOR, SSOR and their sweeps."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from operators import LinearOperator, Sparse
from solvers.dense.matrix import finite_dense
from solvers.preconditioners.entries import csr_of, on_arrays
from solvers.solution import SingularError, StructureError
from solvers.sparse.substitution import Substitution


class Splitting:
    """``M = D / omega + L`` of ``A = L + D + U``: diagonal, and what is strictly below and above.

    `forward` applies ``M^-1``, one sweep over the unknowns from first to last; `backward` applies
    ``M^-T``, which for a symmetric A is the sweep from last to first. For another A the latter is
    ``upper.backward``.

    Parameters
    ----------
    A
        Square operator. `Sparse` is taken by its nonzeros; others are formed as a dense matrix, at
        n products.
    omega
        Relaxation factor, not 0.

    Attributes
    ----------
    diagonal
        ``D``, of shape ``(n,)``.

    Raises
    ------
    StructureError
        A is not square.
    SingularError
        D has zeros, and M no inverse.
    ValueError
        A holds NaN or infinite entries.
    TypeError
        A has a dtype that the back-end does not take.

    Notes
    -----
    A sweep costs as many flops as a product with M; for `Sparse` it is a `Substitution` (CPU).

    Examples
    --------
    >>> import torch, operators as ops
    >>> split = Splitting(ops.Dense(torch.tensor([[2.0, 8.0], [4.0, 2.0]])))
    >>> split.forward(torch.tensor([[2.0], [6.0]])).T
    tensor([[1., 1.]])
    """

    def __init__(self, A: LinearOperator, omega: float = 1.0) -> None:
        if A.shape[0] != A.shape[1]:
            raise StructureError(f"a splitting needs a square operator; got {A!r}")
        self.A, self.omega = A, omega
        self._dense: Tensor | None = None
        if isinstance(A, Sparse):
            if A.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{A!r} is {A.dtype}; expected float32 or float64, which scipy calculates in"
                )
            self._csr = csr_of(A, "Splitting")
            diagonal = A._exact_diagonal()
            assert diagonal is not None
            self.diagonal = _nonzero(diagonal, A)
            self.backend = "SciPy"
        else:
            matrix = finite_dense(A, "Splitting")
            self.diagonal = _nonzero(matrix.diagonal(), A)
            self._dense = matrix.tril(-1) + torch.diag(self.diagonal / omega)
            self.backend = "torch"

    @cached_property
    def upper(self) -> Splitting:
        """That of ``A^T``, whose M is ``D / omega + U^T``; itself where A is symmetric."""
        return self if self.A.symmetric else Splitting(self.A.T, self.omega)

    def forward(self, block: Tensor) -> Tensor:
        """``M^-1 V`` of a block ``(n, k)``."""
        if self._dense is not None:
            return torch.linalg.solve_triangular(self._dense, block, upper=False)
        return on_arrays(self._forward, block)

    def backward(self, block: Tensor) -> Tensor:
        """``M^-T V`` of a block ``(n, k)``."""
        if self._dense is not None:
            return torch.linalg.solve_triangular(self._dense.mT, block, upper=True)
        return on_arrays(self._backward, block)

    @cached_property
    def _forward(self) -> Substitution:
        return Substitution(self._csr, lower=True, scale=1 / self.omega)

    @cached_property
    def _backward(self) -> Substitution:
        turned = self._csr if self.A.symmetric else self._csr.T.tocsr()
        return Substitution(turned, lower=False, scale=1 / self.omega)


def _nonzero(diagonal: Tensor, A: LinearOperator) -> Tensor:
    zeros = (diagonal == 0).nonzero().flatten().tolist()
    if zeros:
        raise SingularError(
            f"entry {zeros[0]} on the diagonal of {A!r} is zero ({len(zeros)} in all), and a sweep "
            "divides by it; reorder the unknowns, or use a direct or Krylov solver"
        )
    return diagonal
