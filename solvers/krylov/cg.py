"""Conjugate gradients (Hestenes and Stiefel, 1952), for blocks of independent columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import IterativeSolver
from solvers.linear_solver import PreparedSolver, Progress
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class CG(IterativeSolver):
    """Conjugate gradients for a symmetric positive definite operator.

    After k iterations the error in the A-norm is at most
    ``2 ((sqrt(kappa)-1) / (sqrt(kappa)+1))^k`` of the first, and zero after n in exact arithmetic.
    Each iteration is one product with A and ``10 n`` flops; 4 vectors a column are held.

    A direction of curvature ``<p, A p> <= 0`` shows that A is not positive definite: the column
    stops there, and ``info.status`` is ``"indefinite"``. Apparent convergence is checked against
    the true residual, and the iteration is restarted from it where rounding had parted the two.

    Parameters
    ----------
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    >>> x, info = CG(rtol=1e-12).prepare(A).solve(torch.ones(3, dtype=torch.float64))
    >>> x, info.iterations
    (tensor([1.0000, 0.5000, 0.2000], dtype=torch.float64), 3)
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A; there is nothing to factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric.
        """
        if not A.symmetric:
            raise StructureError(
                f"CG needs a symmetric operator; {A!r} does not claim to be: claim it, or use "
                "DenseLU"
            )
        return _PreparedCG(self, A)


class _PreparedCG(PreparedSolver):
    solver: CG

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        progress = Progress()
        x, residual = torch.zeros_like(block), block
        size = torch.linalg.vector_norm(block, dim=0)
        active = size > targets
        while bool(active.any()):
            x, sound = self._sweep(x, residual, active, targets, progress)
            # Rounding may part the recurrence from b - A x: measure, and go on from the truth
            # as long as that pays.
            residual = block - self.A._matmat(x)
            progress.products += block.shape[1]
            previous, size = size, torch.linalg.vector_norm(residual, dim=0)
            active = active & sound & (size > targets) & (size < 0.5 * previous)
            if progress.status == "maxiter":
                break
        progress.residual = residual
        return x, progress

    def _sweep(
        self, x: Tensor, r: Tensor, active: Tensor, targets: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """CG from x with residual r on the active columns; returns x and which stayed sound."""
        limit = self.solver.limit(x.shape[0])
        sound = torch.ones_like(active)
        p, rr = r, (r * r).sum(0)
        while bool(active.any()):
            if progress.iterations >= limit:
                progress.status = "maxiter"
                break
            Ap = self.A._matmat(p)
            progress.iterations += 1
            progress.products += x.shape[1]
            curvature = (p * Ap).sum(0)
            broken = active & ~torch.isfinite(curvature)
            if bool(broken.any()):
                progress.status = "breakdown"
                progress.detail = "a product with A, or its size, is not finite"
                sound, active = sound & ~broken, active & ~broken
            indefinite = active & (curvature <= 0)
            if bool(indefinite.any()):
                progress.status = "indefinite"
                progress.detail = "met <p, A p> <= 0: A is not positive definite; use DenseLU"
                sound, active = sound & ~indefinite, active & ~indefinite
            # A column that stopped keeps its iterate, its residual and its direction.
            step = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)
            x = x + step * p
            r = r - step * Ap
            previous, rr = rr, (r * r).sum(0)
            active = active & (rr > targets**2)
            p = torch.where(active, r + (rr / previous) * p, p)
        return x, sound
