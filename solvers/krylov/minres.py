"""The minimal residual method (Paige and Saunders, 1975), for blocks of independent columns."""

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
from solvers.solution import StructureError

BAD_PRECONDITIONER = (
    "indefinite",
    "met <r, P r> < 0: the preconditioner is not positive definite; use another, or GMRES",
)
SINGULAR = (
    "breakdown",
    "A is singular and b not in its range: use SVD or LSMR for least squares",
)


@dataclass(frozen=True, kw_only=True)
class MINRES(PreconditionedSolver):
    """The minimal residual method for a symmetric operator, indefinite or not.

    After k iterations x minimises ``|b - A x|`` over the Krylov space ``K_k(A, b)``, or
    ``<b - A x, P (b - A x)>`` over ``P K_k(A P, b)``. Each iteration is one product with A, one
    with P, and ``25 n`` flops; 8 vectors a column are held. Eigenvalues in ``[-c, -a]`` and
    ``[b, d]`` of equal length cost about ``sqrt(c d / (a b))`` iterations a digit, the square of
    what CG takes where they have one sign. A singular A is solved where b lies in its range.

    The residual itself is carried along, so that the tolerance is on ``|b - A x|`` whatever P is;
    apparent convergence is checked against the truth, as by `CG`. Source: Paige and Saunders,
    1975, SIAM J. Numer. Anal. 12, doi:10.1137/0712047; with P as in Elman, Silvester and Wathen,
    2014, algorithm 4.1.

    Parameters
    ----------
    preconditioner
        P, symmetric positive definite though A is not, and fixed; as for `PreconditionedSolver`. A
        P that is not is found by ``<r, P r> < 0``: ``info.status`` is ``"indefinite"``.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64))
    >>> x, info = MINRES(rtol=1e-12).prepare(A).solve(torch.ones(3, dtype=torch.float64))
    >>> x, info.iterations
    (tensor([ 1.0000, -0.5000,  0.2500], dtype=torch.float64), 3)
    """

    @property
    def symmetric_preconditioner(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A and P; there is nothing to factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric, or P is not.
        """
        if not A.symmetric:
            raise StructureError(
                f"MINRES needs a symmetric operator; {A!r} does not claim to be: claim it, or use "
                "GMRES"
            )
        return _PreparedMINRES(self, A)


class _PreparedMINRES(RestartedIteration):
    solver: MINRES

    def _growth(self, dtype: torch.dtype) -> float:
        """With P it is ``<r, P r>`` that descends, and not ``|r|``."""
        return 1.0 if self.preconditioner is None else float(torch.finfo(dtype).eps) ** -0.5

    def _sweep(
        self, x: Tensor, residual: Tensor, active: Tensor, targets: Tensor, progress: Progress
    ) -> Tensor:
        eps = torch.finfo(x.dtype).eps
        sound = torch.ones_like(active)
        if len(active) == 1 and not isinstance(self.A, Members):
            if not self._sweep_one(x[:, 0], residual[:, 0], float(targets), progress):
                sound.fill_(False)
            return sound
        r = residual.clone()
        goal = torch.maximum(targets, eps * norms(r))
        # Lanczos vectors v_{j-1}, v_j and z_j = P v_j, with <v_j, z_j> = 1.
        v, z = residual, self._precondition(residual)
        size, active, sound = self._size(v, z, active, sound, progress)
        scale = torch.where(active, size, 1.0)
        v, z = v / scale, z / scale
        v_old, w_old, w = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(v)
        # The last column of Q R = T, by the rotations (c, s); `eta` is what is left of |b| e_1.
        eta, off = size, torch.zeros_like(size)
        c_old, s_old = torch.ones_like(size), torch.zeros_like(size)
        c, s = c_old, s_old
        largest = torch.zeros_like(size)
        while bool(active.any()):
            if progress.iterations >= progress.limit and self._spent(
                progress, float((norms(r) / goal).max())
            ):
                break
            Az = self._product(z)
            progress.iterations += 1
            progress.products += x.shape[1]
            diagonal = dots(z, Az)
            v_new = Az - diagonal * v - off * v_old
            z_new = self._precondition(v_new)
            size, active, sound = self._size(v_new, z_new, active, sound, progress)
            # T has the column (off, diagonal, size); what rounding leaves of an invariant space
            # is zero.
            largest = torch.maximum(largest, diagonal.abs() + off + size)
            size = torch.where(size > 10 * eps * largest, size, 0.0)
            above, first = s_old * off, c_old * off
            first, second = c * first + s * diagonal, c * diagonal - s * first
            pivot = torch.hypot(second, size)
            singular = active & ~(pivot > eps * largest)
            if bool(singular.any()):
                progress.stopped(*SINGULAR)
                active, sound = active & ~singular, sound & ~singular
            if not bool(active.any()):
                break
            pivot = torch.where(active, pivot, 1.0)
            c_old, s_old, c, s = c, s, second / pivot, size / pivot
            w_old, w = w, (z - above * w_old - first * w) / pivot
            # A column that has stopped keeps its iterate.
            x += torch.where(active, c * eta * w, 0.0)
            eta = -s * eta
            scale = torch.where(size > 0, size, 1.0)
            v_old, v, z, off = v, v_new / scale, z_new / scale, size
            r = s * s * r + c * eta * v
            active = active & (norms(r) > goal)
        return sound

    def _size(
        self, v: Tensor, z: Tensor, active: Tensor, sound: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``<v, P v>^(1/2)``, and the columns where it is none taken off the active and sound."""
        square = dots(v, z)
        bad = active & ~((square >= 0) & (square < torch.inf))
        if bool(bad.any()):
            finite = bool(torch.isfinite(square[bad]).all())
            progress.stopped(*(BAD_PRECONDITIONER if finite else BROKEN))
        return square.clamp_min(0).sqrt(), active & ~bad, sound & ~bad

    def _sweep_one(self, x: Tensor, residual: Tensor, target: float, progress: Progress) -> bool:
        """The same for one vector: plain numbers, and no masks."""
        multiply, P = self._vector_product, self.preconditioner
        eps = torch.finfo(x.dtype).eps
        r, left = residual, norm(residual)
        goal = max(target, eps * left)
        z = residual if P is None else P._matvec(residual)
        size = _root(residual, z, progress)
        if size is None:
            return False
        v = residual / size
        z = v if P is None else z / size
        v_old = w_old = w = torch.zeros_like(v)
        eta, off, c_old, s_old, c, s, largest = size, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0
        while left > goal:
            if progress.iterations >= progress.limit and self._spent(progress, left / goal):
                break
            Az = multiply(z)
            progress.iterations += 1
            progress.products += 1
            diagonal = float(torch.dot(z, Az))
            v_new = torch.add(Az, v, alpha=-diagonal).add_(v_old, alpha=-off)
            z_new = v_new if P is None else P._matvec(v_new)
            size = _root(v_new, z_new, progress)
            if size is None:
                return False
            largest = max(largest, abs(diagonal) + off + size)
            size = size if size > 10 * eps * largest else 0.0
            above, first = s_old * off, c_old * off
            first, second = c * first + s * diagonal, c * diagonal - s * first
            pivot = math.hypot(second, size)
            if not pivot > eps * largest:
                progress.stopped(*SINGULAR)
                return False
            c_old, s_old, c, s = c, s, second / pivot, size / pivot
            w_new = torch.add(z, w_old, alpha=-above).add_(w, alpha=-first).div_(pivot)
            w_old, w = w, w_new
            x.add_(w, alpha=c * eta)
            eta = -s * eta
            scale = size if size > 0 else 1.0
            v_old, v, off = v, v_new / scale, size
            if P is None:
                z, left = v, abs(eta)
            else:
                z, r = z_new / scale, (s * s * r).add_(v, alpha=c * eta)
                left = norm(r)
        return True


def _root(v: Tensor, z: Tensor, progress: Progress) -> float | None:
    """``<v, P v>^(1/2)``; None, and a report, where it is none."""
    square = float(torch.dot(v, z))
    if 0 <= square < math.inf:
        return math.sqrt(square)
    progress.stopped(*(BAD_PRECONDITIONER if math.isfinite(square) else BROKEN))
    return None
