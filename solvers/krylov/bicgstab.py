"""The stabilised biconjugate gradients (van der Vorst, 1992), for blocks of independent columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import PreconditionedSolver
from solvers.krylov.restarted import BROKEN, RestartedIteration, add, dots, report
from solvers.linear_solver import PreparedSolver, Progress


@dataclass(frozen=True, kw_only=True)
class BiCGStab(PreconditionedSolver):
    """Stabilised biconjugate gradients for any square operator, at constant memory.

    Each iteration is two products with A, two with P, and ``20 n`` flops; 8 vectors a column are
    held. The residual need not fall from one iteration to the next. P stands on the right,
    ``A P y = b`` and ``x = P y``, so that the residual is the one of x.

    The iteration breaks down where the shadow residual is orthogonal to the residual or to ``A p``,
    or where ``<A s, s> = 0``, as for a skew-symmetric A. A column to which this happens goes on
    once from its residual, with a shadow residual drawn from a fixed seed; if it happens again,
    ``info.status`` is ``"breakdown"``. Apparent convergence is checked against the truth, as by
    `CG`. Source: van der Vorst, 1992, SIAM J. Sci. Stat. Comput. 13, doi:10.1137/0913035.

    Parameters
    ----------
    maxiter
        Limit on the iterations. None means ``10 n``.
    preconditioner
        P, fixed and linear; as for `PreconditionedSolver`.
    stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64))
    >>> x, info = BiCGStab(rtol=1e-12).prepare(A).solve(torch.ones(2, dtype=torch.float64))
    >>> x.round(decimals=6), info.converged
    (tensor([0., 1.], dtype=torch.float64), True)
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A and P; there is nothing to factorise."""
        return _PreparedBiCGStab(self, A)


class _PreparedBiCGStab(RestartedIteration):
    solver: BiCGStab

    def _sweep(
        self, x: Tensor, residual: Tensor, active: Tensor, targets: Tensor, progress: Progress
    ) -> Tensor:
        limit, eps = self.solver.limit(x.shape[0]), torch.finfo(x.dtype).eps
        several = len(active) > 1
        retried = torch.zeros_like(active)
        sound = torch.ones_like(active)
        r, shadow, p = residual.clone(), residual.clone(), residual.clone()
        shadow_size = size = torch.linalg.vector_norm(r, dim=0)
        goal = torch.maximum(targets, eps * size)
        rho = dots(shadow, r)
        while bool(active.any()):
            if progress.iterations >= limit:
                progress.status = "maxiter"
                break
            if several:
                # A column that has stopped keeps its iterate.
                p = torch.where(active, p, 0.0)
            y = self._precondition(p)
            v = self._product(y)
            progress.iterations += 1
            progress.products += 2 * x.shape[1]
            along = dots(shadow, v)
            tiny = eps * shadow_size * torch.linalg.vector_norm(v, dim=0)
            bad = active & ~torch.isfinite(tiny)
            if bool(bad.any()):
                report(progress, *BROKEN)
                active, sound = active & ~bad, sound & ~bad
                y, v = torch.where(bad, 0.0, y), torch.where(bad, 0.0, v)
            broken = active & ~(along.abs() > tiny)
            going = active & ~broken
            alpha = torch.where(going, rho / along, 0.0)
            add(x, alpha, y)
            add(r, -alpha, v)
            size = torch.linalg.vector_norm(r, dim=0)
            going = going & (size > goal)
            s = torch.where(going, r, 0.0) if several else r
            z = self._precondition(s)
            t = self._product(z)
            ts, tt = dots(t, s), dots(t, t)
            stuck = going & ~(ts.abs() > eps * tt.sqrt() * size)
            going = going & ~stuck
            omega = torch.where(going, ts / tt, 0.0)
            add(x, omega, z)
            add(r, -omega, t)
            size = torch.linalg.vector_norm(r, dim=0)
            active = active & ~(size <= goal)
            previous, rho = rho, dots(shadow, r)
            broken = active & (broken | stuck | ~(rho.abs() > eps * shadow_size * size))
            beta = (rho / previous) * (alpha / omega)
            p = r + beta * (p - omega * v)
            if bool(broken.any()):
                lost = broken & retried
                if bool(lost.any()):
                    report(
                        progress,
                        "breakdown",
                        "the shadow residual or <A s, s> vanished, twice: use GMRES",
                    )
                    active, sound = active & ~lost, sound & ~lost
                retried = retried | broken
                # On from the residual, with another shadow.
                generator = torch.Generator().manual_seed(0)
                drawn = torch.randn(r.shape[0], 1, generator=generator, dtype=torch.float64)
                drawn = drawn.to(r.dtype).to(r.device) / r.shape[0] ** 0.5
                shadow = torch.where(broken, drawn, shadow)
                shadow_size = torch.linalg.vector_norm(shadow, dim=0)
                p = torch.where(broken, r, p)
                rho = torch.where(broken, dots(shadow, r), rho)
        return sound
