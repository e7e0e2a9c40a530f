"""`Circulant`: a division in the Fourier basis; `CirculantPreconditioner` of Toeplitz systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators import Circulant as CirculantOperator
from operators import LinearOperator
from operators import Toeplitz as ToeplitzOperator
from operators.circulant import vanishing
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.preconditioner import Preconditioner
from solvers.solution import SingularError, StructureError


@dataclass(frozen=True, kw_only=True)
class Circulant(LinearSolver):
    """``x = F^-1 (F b / F c)`` for the circulant operator of the column c, F the Fourier transform.

    Two real transforms a right-hand side, ``O(n log n)``; backward stable, as F is unitary up to a
    factor.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Circulant(torch.tensor([2.0, 1.0, 0.0]))
    >>> Circulant().prepare(A).solve(torch.tensor([2.0, 1.0, 0.0])).value.round(decimals=5).abs()
    tensor([1., 0., 0.])
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Transform the column.

        Raises
        ------
        StructureError
            A is not an `operators.Circulant`.
        SingularError
            An eigenvalue is zero to working precision.
        """
        return _PreparedCirculant(self, A)


class _PreparedCirculant(PreparedSolver):
    def __init__(self, solver: Circulant, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if not isinstance(A, CirculantOperator):
            raise StructureError(f"Circulant needs an operators.Circulant; got {A!r}")
        self.eigenvalues = A.eigenvalues()
        _check(self.eigenvalues, A)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._divided(block, self.eigenvalues), Progress()

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._divided(block, self.eigenvalues.conj()), Progress()

    def _divided(self, block: Tensor, eigenvalues: Tensor) -> Tensor:
        if block.shape[1] == 0:
            return block
        rows = block.T.to(eigenvalues.real.dtype).contiguous()
        quotient = torch.fft.rfft(rows) / eigenvalues
        return torch.fft.irfft(quotient, n=block.shape[0]).T.to(block.dtype)


def _check(eigenvalues: Tensor, A: LinearOperator) -> None:
    if vanishing(eigenvalues):
        size = eigenvalues.abs()
        raise SingularError(
            f"{A!r} is singular to working precision: its eigenvalues lie between "
            f"{float(size.min()):.3g} and {float(size.max()):.3g} in size; add damping, e.g. "
            "A + 1e-3 * Identity"
        )


@dataclass(frozen=True, kw_only=True)
class CirculantPreconditioner(Preconditioner):
    """The inverse of a circulant matrix C that is close to a Toeplitz matrix T.

    Parameters
    ----------
    kind
        ``"optimal"``: the C that is nearest in the Frobenius norm,
        ``c_j = ((n - j) t_j + j t_(j-n)) / n`` (T. Chan, 1988, doi:10.1137/0909051); definite where
        T is, since its eigenvalues are Rayleigh quotients of T. ``"strang"``: the C that copies the
        central diagonals of T, ``c_j = t_j`` for ``j <= n / 2`` and ``t_(j-n)`` beyond (Strang,
        1986, doi:10.1002/sapm1986742171); nearer for smooth positive symbols, but not definite for
        every definite T.

    Notes
    -----
    A product costs two real transforms. For a symbol (the function with Fourier coefficients t)
    that is continuous and positive, all but a bounded number of the eigenvalues of ``C^-1 T`` lie
    near 1, so that the iterations of conjugate gradients do not grow with n (Chan and Ng, 1996,
    doi:10.1137/S0036144594276474).

    Examples
    --------
    >>> import torch, operators as ops
    >>> T = ops.Toeplitz(torch.tensor([2.0, 0.5, 0.0]))
    >>> P = CirculantPreconditioner().prepare(T)
    >>> torch.linalg.inv(P.to_dense()).round(decimals=4)[:, 0]
    tensor([2.0000, 0.3333, 0.3333])
    """

    kind: Literal["optimal", "strang"] = "optimal"

    def __post_init__(self) -> None:
        if self.kind not in ("optimal", "strang"):
            raise ValueError(
                f"CirculantPreconditioner: kind={self.kind!r}; expected 'optimal' or 'strang'"
            )

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """``C^-1``, as a circulant operator.

        Raises
        ------
        StructureError
            A is not a square `operators.Toeplitz` (or a Circulant, whose inverse it then is).
        SingularError
            C is singular to working precision.
        """
        if isinstance(A, CirculantOperator):
            C = A
        elif isinstance(A, ToeplitzOperator) and A.shape[0] == A.shape[1]:
            C = self._circulant(A)
        else:
            raise StructureError(
                f"CirculantPreconditioner needs a square operators.Toeplitz; got {A!r}"
            )
        _check(C.eigenvalues(), C)
        return C.inverse()

    def _circulant(self, T: ToeplitzOperator) -> CirculantOperator:
        n = T.shape[0]
        j = torch.arange(n, device=T.device)
        below, above = T.column, T.first_row[-j % n]  # t_j and t_(j-n)
        if self.kind == "optimal":
            return CirculantOperator(
                ((n - j) * below + j * above) / n,
                symmetric=T.symmetric,
                positive_definite=T.positive_definite,
            )
        return CirculantOperator(torch.where(2 * j <= n, below, above), symmetric=T.symmetric)
