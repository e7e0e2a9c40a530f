"""The stabilised biconjugate gradients (van der Vorst, 1992), for blocks of independent columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import PreconditionedSolver
from solvers.krylov.restarted import BROKEN, RestartedIteration, dots, norm, norms
from solvers.linear_solver import PreparedSolver, Progress
from solvers.members import Members

VANISHED = (
    "breakdown",
    "the shadow residual or <A s, s> vanished, twice: use GMRES",
)


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
        eps = torch.finfo(x.dtype).eps
        retried = torch.zeros_like(active)
        sound = torch.ones_like(active)
        if len(active) == 1 and not isinstance(self.A, Members):
            if not self._sweep_one(x[:, 0], residual[:, 0], float(targets), progress):
                sound.fill_(False)
            return sound
        r, shadow, p = residual.clone(), residual.clone(), residual.clone()
        shadow_size = size = norms(r)
        goal = torch.maximum(targets, eps * size)
        rho = dots(shadow, r)
        while bool(active.any()):
            if progress.iterations >= progress.limit and self._spent(
                progress, float((size / goal).max())
            ):
                break
            # A column that has stopped keeps its iterate.
            p = torch.where(active, p, 0.0)
            y = self._precondition(p)
            v = self._product(y)
            progress.iterations += 1
            progress.products += 2 * x.shape[1]
            along = dots(shadow, v)
            tiny = eps * shadow_size * norms(v)
            bad = active & ~torch.isfinite(tiny)
            if bool(bad.any()):
                progress.stopped(*BROKEN)
                active, sound = active & ~bad, sound & ~bad
                y, v = torch.where(bad, 0.0, y), torch.where(bad, 0.0, v)
            broken = active & ~(along.abs() > tiny)
            going = active & ~broken
            alpha = torch.where(going, rho / along, 0.0)
            x.addcmul_(y, alpha)
            r.addcmul_(v, alpha, value=-1)
            size = norms(r)
            going = going & (size > goal)
            s = torch.where(going, r, 0.0)
            z = self._precondition(s)
            t = self._product(z)
            ts, tt = dots(t, s), dots(t, t)
            stuck = going & ~((tt > 0) & (ts.abs() > eps * tt.sqrt() * size))
            going = going & ~stuck
            omega = torch.where(going, ts / tt, 0.0)
            x.addcmul_(z, omega)
            r.addcmul_(t, omega, value=-1)
            size = norms(r)
            active = active & ~(size <= goal)
            previous, rho = rho, dots(shadow, r)
            broken = active & (broken | stuck | ~(rho.abs() > eps * shadow_size * size))
            beta = (rho / previous) * (alpha / omega)
            p = r + beta * (p - omega * v)
            if bool(broken.any()):
                lost = broken & retried
                if bool(lost.any()):
                    progress.stopped(*VANISHED)
                    active, sound = active & ~lost, sound & ~lost
                retried = retried | broken
                # On from the residual, with another shadow.
                shadow = torch.where(broken, _drawn(r), shadow)
                shadow_size = norms(shadow)
                p = torch.where(broken, r, p)
                rho = torch.where(broken, dots(shadow, r), rho)
        return sound

    def _sweep_one(self, x: Tensor, residual: Tensor, target: float, progress: Progress) -> bool:
        """The same for one vector: plain numbers, and no masks."""
        multiply, P = self._vector_product, self.preconditioner
        eps, retried = torch.finfo(x.dtype).eps, False
        r, shadow, p = residual.clone(), residual, residual.clone()
        shadow_size = size = norm(r)
        goal, rho = max(target, eps * size), size * size
        while size > goal:
            if progress.iterations >= progress.limit and self._spent(progress, size / goal):
                break
            y = p if P is None else P._matvec(p)
            v = multiply(y)
            progress.iterations += 1
            progress.products += 2
            along, tiny = float(torch.dot(shadow, v)), eps * shadow_size * norm(v)
            if not math.isfinite(tiny):
                progress.stopped(*BROKEN)
                return False
            broken = not abs(along) > tiny
            if not broken:
                alpha = rho / along
                x.add_(y, alpha=alpha)
                r.add_(v, alpha=-alpha)
                size = norm(r)
                if not size > goal:
                    break
                z = r if P is None else P._matvec(r)
                t = multiply(z)
                ts, tt = float(torch.dot(t, r)), float(torch.dot(t, t))
                broken = not (tt > 0 and abs(ts) > eps * math.sqrt(tt) * size)
            if not broken:
                omega = ts / tt
                x.add_(z, alpha=omega)
                r.add_(t, alpha=-omega)
                size = norm(r)
                previous, rho = rho, float(torch.dot(shadow, r))
                broken = not abs(rho) > eps * shadow_size * size
            if not broken:
                p.add_(v, alpha=-omega)
                torch.add(r, p, alpha=(rho / previous) * (alpha / omega), out=p)
            elif size > goal:
                if retried:
                    progress.stopped(*VANISHED)
                    return False
                # On from the residual, with another shadow.
                retried, shadow, p = True, _drawn(r[:, None])[:, 0], r.clone()
                shadow_size, rho = norm(shadow), float(torch.dot(shadow, r))
        return True


def _drawn(r: Tensor) -> Tensor:
    """A column of about unit norm, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(r.shape[0], 1, generator=generator, dtype=torch.float64)
    return drawn.to(r.dtype).to(r.device) / r.shape[0] ** 0.5
