"""Conjugate gradients (Hestenes and Stiefel, 1952), for blocks of independent columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import PreconditionedSolver, varies
from solvers.krylov.restarted import BROKEN, RestartedIteration, dots
from solvers.linear_solver import PreparedSolver, Progress
from solvers.members import Members
from solvers.solution import StructureError

INDEFINITE = (
    "indefinite",
    "met <p, A p> <= 0: A is not positive definite; use MINRES or DenseLDL",
)
DIVERGED = (
    "diverged",
    "the residual grows without bound: A is singular and b not in its range, or P is not fixed "
    "(flexible=True); use MINRES or LSMR",
)
BAD_PRECONDITIONER = (
    "indefinite",
    "met <r, P r> <= 0: the preconditioner is not positive definite; use another, or GMRES",
)


@dataclass(frozen=True, kw_only=True)
class CG(PreconditionedSolver):
    """Conjugate gradients for a symmetric positive definite operator.

    After k iterations the error in the A-norm is at most
    ``2 ((sqrt(kappa)-1) / (sqrt(kappa)+1))^k`` of the first, and zero after n in exact arithmetic;
    kappa is the condition number of ``P A``. Each iteration is one product with A, one with P, and
    ``12 n`` flops; 4 vectors a column are held.

    A direction of curvature ``<p, A p> <= 0`` shows that A is not positive definite, a residual
    with ``<r, P r> <= 0`` that P is not: the column stops there, and ``info.status`` is
    ``"indefinite"``. Apparent convergence is checked against the true residual, and the iteration
    is restarted from it where rounding had parted the two.

    Parameters
    ----------
    preconditioner
        P, symmetric positive definite; as for `PreconditionedSolver`.
    flexible
        For a P that varies, or is not linear; a function or an inner iteration, which may be such,
        is always dealt with so. Each direction is
        made conjugate to the one before it, ``beta = -<A p, z> / <p, A p>``, which is the formula
        of Polak and Ribiere; with a fixed P it gives the same iterates (Notay, 2000,
        doi:10.1137/S1064827599362314, algorithm 2.1 with one direction kept).
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    >>> b = torch.ones(3, dtype=torch.float64)
    >>> x, info = CG(rtol=1e-12).prepare(A).solve(b)
    >>> x, info.iterations
    (tensor([1.0000, 0.5000, 0.2000], dtype=torch.float64), 3)
    >>> CG(rtol=1e-12, preconditioner=lambda v: v / A.values).prepare(A).solve(b).info.iterations
    1
    """

    flexible: bool = False

    @property
    def symmetric_preconditioner(self) -> bool:
        """Unless `flexible`."""
        return not self.flexible

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A and P; there is nothing to factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric, or P is not.
        """
        if not A.symmetric:
            raise StructureError(
                f"CG needs a symmetric operator; {A!r} does not claim to be: claim it, or use GMRES"
            )
        return _PreparedCG(self, A)


class _PreparedCG(RestartedIteration):
    solver: CG

    @cached_property
    def _flexible(self) -> bool:
        return self.solver.flexible or varies(self.preconditioner)

    def _growth(self, dtype: torch.dtype) -> float:
        """The root of the condition number at most, for a definite A: the energy norm descends."""
        return float(torch.finfo(dtype).eps) ** -0.5

    def _sweep(
        self, x: Tensor, residual: Tensor, active: Tensor, targets: Tensor, progress: Progress
    ) -> Tensor:
        sound = torch.ones_like(active)
        if len(active) == 1 and not isinstance(self.A, Members):
            if not self._sweep_one(x[:, 0], residual[:, 0], float(targets), progress):
                sound.fill_(False)
            return sound
        preconditioned = self.preconditioner is not None
        r = residual.clone()
        rr = dots(r, r)
        # A sweep cannot gain more than the precision: then it is time for the truth.
        goal = torch.maximum(targets, torch.finfo(r.dtype).eps * rr.sqrt()) ** 2
        ceiling = self._growth(r.dtype) ** 2 * rr
        p, Ap, curvature = torch.zeros_like(r), torch.zeros_like(r), torch.ones_like(rr)
        rz = torch.full_like(rr, torch.inf)
        while bool(active.any()):
            if progress.iterations >= progress.limit and self._spent(
                progress, float((rr / goal).max().sqrt())
            ):
                break
            z = self._precondition(r)
            previous, rz = rz, dots(r, z) if preconditioned else rr
            if preconditioned:
                bad = active & ~(rz > 0)  # NaN lands here too
                if bool(bad.any()):
                    finite = bool(torch.isfinite(rz[bad]).all())
                    progress.stopped(*(BAD_PRECONDITIONER if finite else BROKEN))
                    active, sound = active & ~bad, sound & ~bad
            beta = -dots(Ap, z) / curvature if self._flexible else rz / previous
            p.mul_(beta).add_(z)
            # A column that has stopped keeps its iterate.
            p.masked_fill_(~active, 0.0)
            Ap = self._product(p)
            progress.iterations += 1
            progress.products += x.shape[1]
            curvature = dots(p, Ap)
            bad = active & ~((curvature > 0) & (curvature < torch.inf) & (rr < ceiling))
            if bool(bad.any()):
                first = int(bad.nonzero()[0])
                progress.stopped(
                    *_reason(float(curvature[first]), bool(rr[first] < ceiling[first]))
                )
                active, sound = active & ~bad, sound & ~bad
            step = torch.where(active, rz / curvature, 0.0)
            x.addcmul_(p, step)
            r.addcmul_(Ap, step, value=-1)
            rr = dots(r, r)
            active = active & (rr > goal)
        return sound

    def _sweep_one(self, x: Tensor, residual: Tensor, target: float, progress: Progress) -> bool:
        """The same for one vector: plain numbers, and no masks."""
        multiply, P = self._vector_product, self.preconditioner
        r = residual.clone()
        rr = float(torch.dot(r, r))
        goal = max(target, torch.finfo(r.dtype).eps * math.sqrt(rr)) ** 2
        ceiling = self._growth(r.dtype) ** 2 * rr
        p, Ap, curvature, rz = torch.zeros_like(r), torch.zeros_like(r), 1.0, math.inf
        while rr > goal:
            if progress.iterations >= progress.limit and self._spent(
                progress, math.sqrt(rr / goal)
            ):
                break
            z = r if P is None else P._matvec(r)
            previous, rz = rz, rr if P is None else float(torch.dot(r, z))
            if not rz > 0:
                progress.stopped(*(BAD_PRECONDITIONER if math.isfinite(rz) else BROKEN))
                return False
            beta = rz / previous
            if self._flexible:
                beta = -float(torch.dot(Ap, z)) / curvature
            torch.add(z, p, alpha=beta, out=p)
            Ap = multiply(p)
            progress.iterations += 1
            progress.products += 1
            curvature = float(torch.dot(p, Ap))
            if not (0 < curvature < math.inf and rr < ceiling):
                progress.stopped(*_reason(curvature, rr < ceiling))
                return False
            step = rz / curvature
            x.add_(p, alpha=step)
            r.add_(Ap, alpha=-step)
            rr = float(torch.dot(r, r))
        return True


def _reason(curvature: float, bounded: bool) -> tuple[str, str]:
    if not math.isfinite(curvature):
        return BROKEN
    return DIVERGED if curvature > 0 and not bounded else INDEFINITE
