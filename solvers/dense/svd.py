"""`SVD`: the pseudo-inverse, of full or of truncated rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.dense.matrix import finite_dense
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import batch_of, block_of


@dataclass(frozen=True, kw_only=True)
class SVD(LinearSolver):
    """``x = A^+ b``, the shortest of the minimisers of ``|b - A x|``, for any A.

    With ``A = U diag(s) V^T`` and the singular values that are kept,

        A^+ b = sum_i v_i <u_i, b> / s_i ,     (A^+)^T c = sum_i u_i <v_i, c> / s_i .

    A is formed as a dense matrix. With m rows and n columns, ``m >= n``, it costs n products with
    A, about ``6 m n^2 + 20 n^3`` flops and ``m n + n^2`` numbers once; ``2 (m + n) n`` flops a
    solve, transposed or not. A batch is factorised in one call.

    Parameters
    ----------
    rank_rtol
        Singular values above this fraction of the largest are kept. None means ``max(m, n) eps``,
        up to which rounding makes them: what is cut off then is zero to working precision.
    rank
        Keep at most so many, the largest.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    With `rank_rtol` or `rank` given x belongs to the nearest matrix of that rank (Eckart and Young,
    1936), a regularised solution, and minimises ``|b - A x|`` itself only if b has nothing along
    the ``u_i`` that were cut off. Where it has more than the tolerance, ``info.converged`` is False
    and ``info.status`` ``"truncated"``: there is no warning, since that is the method, and
    ``info.reason`` says what was kept. With ``strict=True`` it raises.

    Singular values are right up to eps times the largest: small ones have few right digits, and
    so has x along them. Of a derivative with respect to A, see `solvers.least_squares_rule`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))  # singular
    >>> pseudo_inverse = SVD().prepare(A)
    >>> x, info = pseudo_inverse.solve(torch.tensor([1.0, 3.0]))
    >>> x.round(decimals=5), info.converged, pseudo_inverse.rank
    (tensor([1., 1.]), True, 1)
    """

    rank_rtol: float | None = None
    rank: int | None = None

    least_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_rtol is not None and not 0 <= self.rank_rtol < 1:
            raise ValueError(
                f"SVD: rank_rtol={self.rank_rtol}; expected a number in [0, 1), or None"
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"SVD: rank={self.rank}; expected at least 1, or None")

    @property
    def truncated(self) -> bool:
        """Whether a rank, or where to cut, was given."""
        return self.rank is not None or self.rank_rtol is not None

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Decompose."""
        return _PreparedSVD(self, A)


class _PreparedSVD(PreparedSolver):
    solver: SVD

    def __init__(self, solver: SVD, A: LinearOperator) -> None:
        super().__init__(solver, A)
        matrix = finite_dense(A, "SVD")
        self.U, self.singular_values, self.Vt = torch.linalg.svd(matrix, full_matrices=False)
        if min(A.shape):
            self._norms = self.singular_values[..., 0].reshape(-1)
        self._kept = self._keep()
        self.rank = int(self._kept.sum(-1).min())
        self._detail = "" if self.rank == min(A.shape) else self._what_was_cut_off()

    def _keep(self) -> Tensor:
        """Which singular values are kept, ``(..., min(m, n))``."""
        values, solver = self.singular_values, self.solver
        cut = solver.rank_rtol
        if cut is None:
            cut = max(self.A.shape) * torch.finfo(values.dtype).eps
        kept = values > cut * values[..., :1]
        if solver.rank is not None:
            kept[..., solver.rank :] = False
        return kept

    def _what_was_cut_off(self) -> str:
        values, largest = self.singular_values, self.singular_values[..., :1]
        cut = torch.where(self._kept, 0.0, values) / torch.where(largest > 0, largest, 1.0)
        return (
            f"kept {self.rank} of {min(self.A.shape)} singular values, and cut off up to "
            f"{float(cut.max()):.3g} of the largest: x is the shortest minimiser for the nearest "
            "matrix of that rank; for more of A raise rank or lower rank_rtol"
        )

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._applied(block, self.U, self.Vt.mT)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._applied(block, self.Vt.mT, self.U)

    def _applied(self, block: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Progress]:
        """``sum_i r_i <l_i, b> / s_i``."""
        kept, values = self._kept[..., None], self.singular_values[..., None]
        coefficients = left.mT @ batch_of(self.A, block)
        coefficients = torch.where(kept, coefficients / torch.where(kept, values, 1.0), 0.0)
        status = "truncated" if self._detail else "converged"
        return block_of(self.A, right @ coefficients), Progress(status=status, detail=self._detail)
