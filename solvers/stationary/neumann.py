"""The Neumann series ``A^-1 = alpha sum_j (I - alpha A)^j``, summed as Richardson's iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import IterativeSolver, applied
from solvers.linear_solver import PreparedSolver, Progress
from solvers.stationary.step_size import SteppedSolver, StepSize


@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeSolver, SteppedSolver):
    """Truncated Neumann series of an operator whose eigenvalues lie in ``(0, 2 / alpha)``.

    With K = `maxiter` products the result is ``alpha sum_{j=0..K} (I - alpha A)^j b``, whose
    relative error is at most ``(1 - alpha mu)^(K+1)`` for ``alpha <= 1/L`` and eigenvalues in
    ``[mu, L]``. It stops early once the residual, which is the next term of the series, meets the
    tolerance; where the terms grow tenfold over the first one, it stops with status ``"diverged"``.
    Source: Lorraine, Vicol and Duvenaud (2020), arXiv:1911.02590, algorithm 3.

    Parameters
    ----------
    step_size
        ``alpha``. None estimates it at `prepare`, for each member of a batch by itself: ``1 / L``
        of a symmetric A, of another one a step for which ``I - alpha A`` contracts (see
        `solvers.stationary.spectrum`).
    estimation_steps
        Products for that estimate; the vector they start from is drawn from a fixed seed.
    smallest_eigenvalue
        ``mu > 0``, where it is known: a lower bound of the eigenvalues of A, or of
        ``(A + A^T) / 2`` where A is not symmetric (the damping, of a Hessian that is positive
        semidefinite). `Info.reason` then states the bound of the truncation error.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Notes
    -----
    Each iteration is one product with A and ``4 n`` flops; 3 vectors a column are held. Of an A
    that is not symmetric, with ``alpha A^T A <= (A + A^T) / 2``, the error is at most
    ``(1 - alpha mu)^((K+1)/2)``. Where mu is not given, it is estimated along with L: a Ritz value
    that has converged is taken for mu, as `Info.reason` says; one that has not is at least as large
    as mu, and bounds the error of the worst b from below.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 0.5], dtype=torch.float64))
    >>> solver = Neumann(step_size=1.0, maxiter=2, stop_at_maxiter=True)
    >>> x, info = solver.prepare(A).solve(torch.ones(2, dtype=torch.float64))
    >>> x, info.converged  # 1 + 1/2 + 1/4 of 2
    (tensor([1.0000, 1.7500], dtype=torch.float64), False)
    """

    smallest_eigenvalue: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        mu = self.smallest_eigenvalue
        if mu is not None and not 0 < mu < float("inf"):
            raise ValueError(
                f"Neumann: smallest_eigenvalue={mu}; expected a positive number, or None"
            )

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A, and estimate the step size where none is given."""
        return _PreparedNeumann(self, A)


class _PreparedNeumann(PreparedSolver):
    solver: Neumann

    def __init__(self, solver: Neumann, A: LinearOperator) -> None:
        super().__init__(solver, A)
        self.step = StepSize.of(A, solver)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._summed(self.A, block, targets)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        # |I - alpha A^T| = |I - alpha A|, and the eigenvalues are the same: so is the step.
        return self._summed(self.A.T, block, targets)

    def _summed(self, A: LinearOperator, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        alpha, limit = self.step.columns(block), self.solver.limit(block.shape[0])
        progress = Progress(detail=self.step.source)
        # term_j = (I - alpha A)^j b = b - A x_j; a column that stops keeps its sum and its term.
        x, term = torch.zeros_like(block), block
        active = torch.ones_like(targets, dtype=torch.bool)
        while True:
            # x_{j+1} = x_j + alpha term_j, and the new residual is the next term.
            x = torch.where(active, x + alpha * term, x)
            size = torch.linalg.vector_norm(term, dim=0)
            grown = active & ~(size <= 10.0)  # NaN lands here too
            if bool(grown.any()):
                progress.status = "diverged"
                progress.detail = self._why(bool(torch.isfinite(size[grown]).all()))
            active = active & (size > targets) & ~grown
            if not bool(active.any()):
                break
            if progress.iterations >= limit:
                progress.stopped("maxiter")
                break
            term = torch.where(active, term - alpha * applied(A, term), term)
            progress.iterations += 1
            progress.products += block.shape[1]
        if progress.status != "diverged":
            progress.detail += self._bound(progress.iterations)
        return x, progress

    def _why(self, finite: bool) -> str:
        if not finite:
            return "a product with A is not finite"
        if self.step.doubt:
            return f"the terms grow, and {self.step.doubt}"
        return (
            f"the terms grow: {self.step.source} exceeds 2 / L, or A is not positive definite; "
            "take a smaller one, or another solver"
        )

    def _bound(self, products: int) -> str:
        """What is known beforehand of the truncation error, in words."""
        alpha, given, ends = self.step.values, self.solver.smallest_eigenvalue, self.step.ends
        if given is not None:
            mu, known = torch.full_like(alpha, given), True
        elif ends is not None and bool((ends.smallest > 0).all()):
            # A Ritz value is no lower bound; one that has converged is as good as one.
            mu, known = ends.smallest, bool((ends.slack <= 0.01 * ends.smallest).all())
        else:
            return ""
        power = 1.0 if self.A.symmetric else 0.5
        factor = float(((1 - alpha * mu).clamp_min(0) ** power).max())
        size, least = f"{factor ** (products + 1):.2g}", f"{float(mu.min()):.3g}"
        if not known:
            return f"; an eigenvalue <= {least}: |error| >= {size} |x| for the worst b"
        text = f"; |error| <= {size} |x| for eigenvalues >= {least}"
        if given is None:
            return text + " as estimated"
        return text if self.solver.step_size is None else text + ", if step_size <= 1 / L"
