"""`IncompleteLU`: a sparse factorisation that drops what is small."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import scipy.sparse.linalg
from torch import Tensor

from operators import Cost, LinearOperator, Structure
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.preconditioners.entries import csr_of, on_arrays
from solvers.solution import SingularError


@dataclass(frozen=True, kw_only=True)
class IncompleteLU(Preconditioner):
    """``P = (L U)^-1`` with sparse factors ``L U ~ A``, by SuperLU with thresholds.

    Not symmetric even where A is, so not for CG or MINRES: there `IncompleteCholesky` or `AMG`.

    Parameters
    ----------
    drop_tol
        Entries of a column below this times its norm are dropped; 0 drops none.
    fill_factor
        Upper limit of the nonzeros of ``L + U`` over those of A.

    Notes
    -----
    With partial pivoting, columns ordered by COLAMD. A product costs ``2 nnz(L + U)`` flops a
    column. Runs on the CPU. Li and Shao (2011, doi:10.1145/1916461.1916467).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Sparse(torch.tensor([[2.0, 0.0], [1.0, 4.0]]))
    >>> IncompleteLU().prepare(A) @ torch.tensor([2.0, 9.0])
    tensor([1., 2.])
    """

    drop_tol: float = 1e-4
    fill_factor: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_tol <= 1:
            raise ValueError(f"IncompleteLU: drop_tol={self.drop_tol}; expected between 0 and 1")
        if not 1 <= self.fill_factor < float("inf"):
            raise ValueError(f"IncompleteLU: fill_factor={self.fill_factor}; expected at least 1")

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Factorise.

        Raises
        ------
        StructureError
            The entries of A are not known.
        SingularError
            A pivot is zero.
        """
        return _Factors(self, A)


class _Factors(ApproximateInverse):
    backend = "SuperLU"

    def __init__(self, settings: IncompleteLU, A: LinearOperator) -> None:
        super().__init__(settings, A, Structure())
        matrix = csr_of(A, "IncompleteLU")
        try:
            self.factors = scipy.sparse.linalg.spilu(
                matrix.tocsc(), drop_tol=settings.drop_tol, fill_factor=settings.fill_factor
            )
        except RuntimeError as error:
            if "singular" not in str(error):
                raise
            raise SingularError(
                f"IncompleteLU of {A!r} met a zero pivot; add damping, as A + 1e-3 * Identity, or "
                "lower drop_tol"
            ) from error
        self.factor_nonzeros = int(self.factors.nnz)

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        return on_arrays(partial(self.factors.solve, trans="T" if transpose else "N"), block)

    def _describe(self) -> str:
        return f"{self.factor_nonzeros} nonzeros"

    def _cost(self) -> Cost:
        return Cost(flops=2 * self.factor_nonzeros)
