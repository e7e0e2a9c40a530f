"""The generalised minimal residual method (Saad and Schultz, 1986), for blocks of columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators import LinearOperator
from operators.precision import in_single
from solvers.iterative import PreconditionedSolver, varies
from solvers.krylov.restarted import BROKEN, RestartedIteration, norm, norms
from solvers.linear_solver import PreparedSolver, Progress
from solvers.members import Members

# Gram-Schmidt is repeated where it left less than this of a vector.
AGAIN = 0.1
SINGULAR = (
    "breakdown",
    "A is singular on the Krylov space: use LSMR or SVD for least squares",
)


@dataclass(frozen=True, kw_only=True)
class GMRES(PreconditionedSolver):
    """The generalised minimal residual method for any square operator, restarted.

    After j iterations of a cycle x minimises ``|b - A x|`` over ``x_0 + P K_j(A P, r_0)``. An
    iteration is one product with A, one with P, and ``4 j n`` to ``8 j n`` flops;
    ``restart + 1`` vectors a column are held, twice as many where P varies.

    P stands on the right, ``A P y = b`` and ``x = P y``, so that what is minimised is the residual
    of x. Where P is a function or an inner iteration, which may be another map at each product, the
    vectors ``P v_j`` are kept (flexible GMRES: Saad, 1993, doi:10.1137/0914028). The basis is made
    by classical Gram-Schmidt, a second time where the first left less than a tenth of a vector
    (Daniel, Gragg, Kaufman and Stewart, 1976): two or four products of matrices with vectors.

    Each cycle starts from the true residual. One that does not lower it by a thousandth is the
    last: ``info.status`` is ``"stagnated"``. Source: Saad and Schultz, 1986, SIAM J. Sci. Stat.
    Comput. 7, doi:10.1137/0907058.

    Parameters
    ----------
    restart
        Iterations of a cycle, at most n of them.
    preconditioner
        P, as for `PreconditionedSolver`.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`; `maxiter` counts iterations, not cycles.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64))
    >>> x, info = GMRES(rtol=1e-12).prepare(A).solve(torch.ones(2, dtype=torch.float64))
    >>> x.round(decimals=6), info.iterations
    (tensor([0.5000, 1.0000], dtype=torch.float64), 2)
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.restart, int):
            raise TypeError(f"GMRES: restart={self.restart!r}; expected an integer")
        if self.restart < 1:
            raise ValueError(f"GMRES: restart={self.restart}; expected at least 1")

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A and P; there is nothing to factorise."""
        return _PreparedGMRES(self, A)


class _PreparedGMRES(RestartedIteration):
    solver: GMRES
    worthwhile: ClassVar[float] = 0.999
    stagnation: ClassVar[str] = (
        "a cycle did not lower the residual: take a longer restart or a preconditioner, or loosen "
        "rtol if this is rounding"
    )

    def _sweep(
        self, x: Tensor, residual: Tensor, active: Tensor, targets: Tensor, progress: Progress
    ) -> Tensor:
        """One cycle."""
        if len(active) == 1 and not isinstance(self.A, Members):
            return self._cycle_of_one(x[:, 0], residual[:, 0], active, float(targets), progress)
        n, k = x.shape
        eps = torch.finfo(x.dtype).eps
        longest = min(self.solver.restart, n, progress.limit - progress.iterations)
        flexible = varies(self.preconditioner)
        sound = torch.ones_like(active)
        start = left = norms(residual)
        goal = torch.maximum(targets, eps * start)
        # Per column: the basis V, with rows v_j; A P V = V H, and Q H = [R; 0] with Q orthogonal,
        # so that the first column of Q, times |r|, is the rotated right-hand side.
        V = x.new_empty(k, longest + 1, n)
        Z = x.new_empty(k, longest, n) if flexible else V
        R = x.new_zeros(k, longest, longest)
        Q = torch.eye(longest + 1, dtype=x.dtype, device=x.device).repeat(k, 1, 1)
        steps = torch.zeros_like(active, dtype=torch.long)
        V[:, 0] = (residual / torch.where(start > 0, start, 1.0)).T
        j = 0
        while bool(active.any()):
            if j == longest:
                if progress.iterations >= progress.limit:
                    self._spent(progress, float((left / goal).max()))
                break
            z = self._precondition(V[:, j].T)
            if flexible:
                Z[:, j] = z.T
            w = self._product(z).T
            progress.iterations += 1
            progress.products += k
            before = torch.linalg.vector_norm(w, dim=1)
            w, h = _orthogonal(w, V[:, : j + 1], before, active)
            below = torch.linalg.vector_norm(w, dim=1)
            # What rounding leaves of an invariant space is zero.
            below = torch.where(below > 10 * eps * before, below, 0.0)
            # The new column of H by the rotations so far, and one that takes away `below`.
            column = (Q[:, : j + 1, : j + 1] @ h[:, :, None])[:, :, 0]
            pivot = torch.hypot(column[:, j], below)
            broken = active & ~((pivot > eps * before) & (before < torch.inf))
            if bool(broken.any()):
                finite = bool(torch.isfinite(before[broken]).all())
                progress.stopped(*(SINGULAR if finite else BROKEN))
                active, sound = active & ~broken, sound & ~broken
            # A column that has stopped takes the rest of its basis with coefficients zero.
            pivot = torch.where(active, pivot, 1.0)
            w, column = torch.where(active, w.T, 0.0).T, torch.where(active, column.T, 0.0).T
            below = torch.where(active, below, 0.0)
            c, s = column[:, j] / pivot, below / pivot
            upper, lower = Q[:, j].clone(), Q[:, j + 1].clone()
            Q[:, j] = c[:, None] * upper + s[:, None] * lower
            Q[:, j + 1] = c[:, None] * lower - s[:, None] * upper
            R[:, :j, j], R[:, j, j] = column[:, :j], pivot
            V[:, j + 1] = w / torch.where(below > 0, below, 1.0)[:, None]
            j += 1
            steps = torch.where(active, j, steps)
            left = start * Q[:, j, 0].abs()
            active = active & (left > goal)
        y = torch.where(
            torch.arange(j, device=x.device) < steps[:, None], start[:, None] * Q[:, :j, 0], 0.0
        )
        y = in_single(torch.linalg.solve_triangular, R[:, :j, :j], y[:, :, None], upper=True)
        change = (Z[:, :j].mT @ y)[:, :, 0].T
        x += change if flexible else self._precondition(change)
        return sound

    def _cycle_of_one(
        self, x: Tensor, residual: Tensor, active: Tensor, target: float, progress: Progress
    ) -> Tensor:
        """The same for one vector: plain numbers, and no masks."""
        multiply, P = self._vector_product, self.preconditioner
        longest = min(self.solver.restart, len(x), progress.limit - progress.iterations)
        flexible, eps = varies(P), torch.finfo(x.dtype).eps
        start = norm(residual)
        goal = max(target, eps * start)
        V = x.new_empty(longest + 1, len(x))
        torch.div(residual, start, out=V[0])
        kept: list[Tensor] = []
        # The columns of R, the rotations that made them of those of H, and the rotated |r| e_1.
        R: list[list[float]] = []
        rotations: list[tuple[float, float]] = []
        rotated = [start]
        while abs(rotated[-1]) > goal:
            j = len(R)
            if j == longest:
                if progress.iterations >= progress.limit:
                    self._spent(progress, abs(rotated[-1]) / goal)
                break
            z = V[j] if P is None else P._matvec(V[j])
            if flexible:
                kept.append(z)
            w = multiply(z)
            progress.iterations += 1
            progress.products += 1
            before = norm(w)
            basis = V[: j + 1]
            h = basis @ w
            w = torch.addmv(w, basis.T, h, alpha=-1)
            below = norm(w)
            if not below > AGAIN * before:
                again = basis @ w
                w = torch.addmv(w, basis.T, again, alpha=-1)
                h = h + again
                below = norm(w)
            below = below if below > 10 * eps * before else 0.0
            column = [*h.tolist(), below]
            for i, (c, s) in enumerate(rotations):
                upper, lower = column[i], column[i + 1]
                column[i], column[i + 1] = c * upper + s * lower, c * lower - s * upper
            pivot = math.hypot(column[j], below)
            if not (pivot > eps * before and before < math.inf):
                progress.stopped(*(SINGULAR if math.isfinite(before) else BROKEN))
                active = torch.zeros_like(active)
                break
            c, s = column[j] / pivot, below / pivot
            rotations.append((c, s))
            R.append([*column[:j], pivot])
            rotated[j:] = [c * rotated[j], -s * rotated[j]]
            if below > 0:
                torch.div(w, below, out=V[j + 1])
        y = rotated[: len(R)]
        for j in reversed(range(len(R))):
            y[j] /= R[j][j]
            for i in range(j):
                y[i] -= R[j][i] * y[j]
        weights = torch.tensor(y, dtype=x.dtype, device=x.device)
        if R and flexible:
            x += torch.stack(kept[: len(R)], 1) @ weights
        elif R:
            change = weights @ V[: len(R)]
            x += change if P is None else P._matvec(change)
        return active


def _orthogonal(w: Tensor, basis: Tensor, before: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """``w - V^T V w`` and ``V w``, for rows V that are orthonormal; all that of each column."""
    h = (basis @ w[:, :, None])[:, :, 0]
    w = w - (h[:, None, :] @ basis)[:, 0]
    after = torch.linalg.vector_norm(w, dim=1)
    if bool((active & ~(after > AGAIN * before)).any()):
        again = (basis @ w[:, :, None])[:, :, 0]
        w = w - (again[:, None, :] @ basis)[:, 0]
        h = h + again
    return w, h
