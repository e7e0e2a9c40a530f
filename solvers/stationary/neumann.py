"""The Neumann series ``A^-1 = alpha sum_j (I - alpha A)^j``, summed as Richardson's iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import IterativeSolver
from solvers.linear_solver import PreparedSolver, Progress


@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeSolver):
    """Truncated Neumann series of an operator whose eigenvalues lie in ``(0, 2 / alpha)``.

    With K = `maxiter` products the result is ``alpha sum_{j=0..K} (I - alpha A)^j b``, whose
    relative error is at most ``(1 - alpha mu)^(K+1)`` for ``alpha <= 1/L`` and eigenvalues in
    ``[mu, L]``. It stops early once the residual, which is the next term of the series, meets the
    tolerance; where the terms grow tenfold over the first one, it stops with status ``"diverged"``.
    Source: Lorraine, Vicol and Duvenaud (2020), arXiv:1911.02590, algorithm 3.

    Parameters
    ----------
    step_size
        ``alpha``. None estimates ``alpha = 1 / L`` by `power_iterations` products at
        `prepare`: a power iteration bounds L from below, so it is divided by 0.9.
    power_iterations
        Products for that estimate; the start vector is drawn from a fixed seed.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 0.5], dtype=torch.float64))
    >>> solver = Neumann(step_size=1.0, maxiter=2, stop_at_maxiter=True)
    >>> x, info = solver.prepare(A).solve(torch.ones(2, dtype=torch.float64))
    >>> x, info.converged  # 1 + 1/2 + 1/4 of 2
    (tensor([1.0000, 1.7500], dtype=torch.float64), False)
    """

    step_size: float | None = None
    power_iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"Neumann: step_size={self.step_size}; expected a positive number")
        if self.power_iterations < 1:
            raise ValueError(f"Neumann: power_iterations={self.power_iterations}; expected >= 1")

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A, and estimate the step size where none is given."""
        return _PreparedNeumann(self, A)


class _PreparedNeumann(PreparedSolver):
    solver: Neumann

    def __init__(self, solver: Neumann, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if solver.step_size is None:
            largest = spectral_radius(A, solver.power_iterations)
            if not math.isfinite(largest):
                raise ValueError(f"Neumann: products with {A!r} are not finite; check its inputs")
            self.step_size = 0.9 / largest if largest > 0 else 1.0
        else:
            self.step_size = solver.step_size

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        alpha, limit = self.step_size, self.solver.limit(block.shape[0])
        progress = Progress()
        x, term = torch.zeros_like(block), block  # term_j = (I - alpha A)^j b = b - A x_j
        while True:
            # x_{j+1} = x_j + alpha term_j, and the new residual is the next term.
            x = x + alpha * term
            size = torch.linalg.vector_norm(term, dim=0)
            if bool((size <= targets).all()):
                break
            if not bool((size <= 10.0).all()):  # NaN lands here too
                progress.status = "diverged"
                progress.detail = (
                    f"the terms grow: step_size {alpha:.3g} exceeds 2 / L, "
                    "or A is not positive definite"
                    if bool(torch.isfinite(size).all())
                    else "a product with A is not finite"
                )
                break
            if progress.iterations >= limit:
                progress.status = "maxiter"
                break
            term = term - alpha * self.A._matmat(term)
            progress.iterations += 1
            progress.products += block.shape[1]
        return x, progress


def spectral_radius(A: LinearOperator, iterations: int, seed: int = 0) -> float:
    """Lower estimate of ``max |lambda|`` of a symmetric operator by power iteration.

    Costs `iterations` products. The start vector comes from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(A.shape[1], generator=generator, dtype=A.dtype).to(A.device)
    size = 0.0
    for _ in range(iterations):
        v = A._matvec(v / torch.linalg.vector_norm(v))
        size = float(torch.linalg.vector_norm(v))
        if size == 0.0:
            break
    return size
