"""`Jacobi`: the inverse of the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from operators import Diagonal, LinearOperator
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.entries import nonzero_diagonal
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class Jacobi(Preconditioner):
    """``P = D^-1``, or ``|D|^-1``, with D the diagonal of A.

    Parameters
    ----------
    absolute
        Take absolute values, so that P is positive definite: MINRES on an indefinite A wants that.

    Notes
    -----
    Of all diagonal P it makes the condition number of ``P A`` least up to a factor of n, and for a
    matrix with at most q nonzeros in a row up to a factor of q (van der Sluis, 1969,
    doi:10.1007/BF02165096).

    Examples
    --------
    >>> import torch, operators as ops
    >>> P = Jacobi().prepare(ops.Dense(torch.tensor([[4.0, 1.0], [1.0, 2.0]])))
    >>> P @ torch.tensor([4.0, 4.0])
    tensor([1., 2.])
    """

    absolute: bool = False

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """``D^-1``.

        Raises
        ------
        StructureError
            A does not know its diagonal.
        SingularError
            There is a zero on it.
        """
        diagonal = A._exact_diagonal()
        if diagonal is None:
            raise StructureError(
                f"Jacobi: {A!r} does not know its diagonal; give its inverse, as "
                "ops.Diagonal(1 / ops.diagonal(A).value), which costs products, or the entries of "
                "A, as SparseHessian or Dense(A.to_dense())"
            )
        diagonal = nonzero_diagonal(A, diagonal, "Jacobi")
        return Diagonal(1 / (diagonal.abs() if self.absolute else diagonal), A.domain)
