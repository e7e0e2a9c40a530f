"""Gradient steps on the quadratic whose minimiser solves ``A x = b``: `QuadraticSGD`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import IterativeSolver, applied
from solvers.linear_solver import PreparedSolver, Progress
from solvers.solution import StructureError
from solvers.stationary.sampling import PreparedSampling, SampledSolver
from solvers.stationary.step_size import StepSize


@dataclass(frozen=True, kw_only=True)
class QuadraticSGD(IterativeSolver, SampledSolver):
    """Gradient descent, stochastic or not, on ``<x, A x> / 2 - <b, x>`` or on ``|A x - b|^2 / 2``.

    ``x <- x - alpha (H x - b)`` with H a sample of A, drawn for each step; with `normal`,
    ``x <- x - alpha H'^T (H x - b)`` with H and H' drawn independently, without which the
    expectation would not be the gradient. The solver of AmIGO (Arbel and Mairal, 2022,
    arXiv:2111.14580), which starts each time from the last solution: ``solve(b, guess=...)``.

    Parameters
    ----------
    normal
        Minimise ``|A x - b|^2 / 2``: for operators that are not positive definite or not symmetric,
        at two products a step and the squared condition number.
    step_size
        ``alpha``. None estimates ``1 / L``, L being the largest eigenvalue of A, with `normal` that
        of ``A^T A``.
    operators, seed
        Samples of A, and the stream of random numbers; see `SampledSolver`. Without them this is
        `Richardson`'s plain iteration.
    estimation_steps
        As for `SampledSolver`, with `normal` at two products each.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`. With `operators` all of the `maxiter` steps are done, as no
        residual is at hand on the way.

    Notes
    -----
    The expectation of the k-th iterate is that of gradient descent. With samples and a constant
    step the iterates go on moving about it, with a variance of order ``alpha``: a residual that no
    number of steps lowers. From a guess the steps are taken on ``A (x - guess) = b - A guess``,
    whose right-hand side takes one product with A itself: the noise then is that of
    ``H (x - guess)`` instead of ``H x``, and small where the guess is near.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 0.5], dtype=torch.float64))
    >>> solver = QuadraticSGD(step_size=1.0, maxiter=3, stop_at_maxiter=True)
    >>> solver.prepare(A).solve(torch.ones(2, dtype=torch.float64)).value
    tensor([1.0000, 1.7500], dtype=torch.float64)
    """

    normal: bool = False

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A, and estimate the step size where none is given.

        Raises
        ------
        StructureError
            A is not known to be symmetric, and `normal` is False.
        """
        return _PreparedSGD(self, A)


class _PreparedSGD(PreparedSampling):
    solver: QuadraticSGD

    def __init__(self, solver: QuadraticSGD, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if not (A.symmetric or solver.normal):
            raise StructureError(
                f"QuadraticSGD needs a symmetric operator; {A!r} does not claim to be: claim it, "
                "or take normal=True"
            )
        self.step = StepSize.of(A.T @ A if solver.normal else A, solver)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._descent(block, targets, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._descent(block, targets, transpose=True)

    def _descent(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        sampled = self.solver.operators is not None
        alpha, limit = self.step.columns(block), self.solver.limit(block.shape[0])
        progress = Progress(detail=self.step.source)
        # The residual of a sampled operator tells nothing of how near x is.
        x, residual = torch.zeros_like(block), block
        active = torch.linalg.vector_norm(block, dim=0) > (0.0 if sampled else targets)
        while bool(active.any()):
            if progress.iterations >= limit:
                progress.stopped("maxiter")
                break
            step = residual
            if self.solver.normal:
                step = applied(self._draw(transpose=transpose).T, residual)
                progress.products += block.shape[1]
            x = x + torch.where(active, alpha * step, 0.0)
            progress.iterations += 1
            if sampled and progress.iterations == limit:
                continue  # no further step would use a sample
            H = self._draw(transpose=transpose)
            residual = torch.where(active, block - applied(H, x), residual)
            progress.products += block.shape[1]
            size = torch.linalg.vector_norm(residual, dim=0)
            grown = active & ~(size <= 10.0)  # NaN lands here too
            if bool(grown.any()):
                progress.status = "diverged"
                progress.detail = self.step.doubt or (
                    f"the residual grows tenfold: {self.step.source} exceeds 2 / L, or A is not "
                    "positive definite: take a smaller one, or normal=True"
                )
            active = active & ~grown
            if not sampled:
                active = active & (size > targets)
        if not sampled:
            progress.residual = residual
        return x, progress
