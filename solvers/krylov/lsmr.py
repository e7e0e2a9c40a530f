"""LSMR (Fong and Saunders, 2011): least squares by products with A and ``A^T``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from operators import Block, Identity, LinearOperator, Product
from operators.solve_rule import Given
from solvers.iterative import PreconditionedSolver, PreparedIteration, applied
from solvers.krylov.products import vector_product
from solvers.krylov.restarted import BROKEN, norm, norms
from solvers.least_squares_rule import apply_least_squares
from solvers.linear_solver import PreparedSolver, Progress, _Plain
from solvers.members import Members
from solvers.preconditioner import as_preconditioner
from solvers.solution import Info, Solution, StructureError


@dataclass(frozen=True, kw_only=True)
class LSMR(PreconditionedSolver):
    """The shortest minimiser of ``|b - A x|`` for any shape, by Golub-Kahan bidiagonalisation.

    After k iterations x minimises ``|A^T (b - A x)|`` over ``K_k(A^T A, A^T b)``: in exact
    arithmetic MINRES on the normal equations, without the square of the condition number in the
    rounding. Each iteration is a product with A, one with ``A^T`` and ``8 m + 10 n`` flops; 2
    vectors of length m and 4 of length n a column are held.

    A column has converged where ``|r| <= max(rtol |b|, atol)``, or ``|A^T r| <= rtol |A| |r|`` with
    ``r = b - A x``. The recurrences say when; then both are measured, and the iteration goes on
    from the true residual as long as that pays. Source: Fong and Saunders, 2011, arXiv:1006.0758.

    Parameters
    ----------
    preconditioner
        P of shape ``(n, l)`` on the right: y minimises ``|b - A P y|``, and ``x = P y``. A has to
        have full column rank, where x does not depend on P. Settings, an operator, a solver or a
        prepared solver that stand for a matrix of that shape; its transpose is used too.
    damping
        d: x minimises ``|b - A x|^2 + d^2 |x|^2``, the least squares of the rows ``[A; d I]`` with
        zeros below b. They are what is judged: ``info.residual`` is
        ``(|b - A x|^2 + d^2 |x|^2)^(1/2) / |b|``, and convergence is by their normal equations.
    maxiter
        Limit on the iterations. None means ten times the smaller of m and n.
    stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    >>> b = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    >>> x, info = LSMR(rtol=1e-12).prepare(A).solve(b)
    >>> x, info.converged
    (tensor([0.5000, 0.5000], dtype=torch.float64), True)
    """

    damping: float = 0.0

    least_squares: ClassVar[bool] = True
    takes_guess: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"LSMR: damping={self.damping}; expected a number >= 0")

    @property
    def columnwise(self) -> bool:
        """Where there is no preconditioner and no damping."""
        return super().columnwise and not self.damping

    def undamped(self, A: LinearOperator) -> tuple[LinearOperator, LSMR]:
        """``[A; d I]``, and settings for its least squares."""
        rows = Block([[A], [self.damping * Identity(A.shape[1], A.dtype, A.device)]])
        return rows, replace(self, damping=0.0)

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A and P; there is nothing to factorise.

        Raises
        ------
        StructureError
            There is a preconditioner, and A has fewer rows than columns.
        """
        if self.damping:
            return _PreparedDamped(self, A)
        if self.preconditioner is not None and A.shape[0] < A.shape[1]:
            raise StructureError(
                f"LSMR: a preconditioner on the right of {A!r} changes which solution is the "
                "shortest; leave it out, or use solve_transpose of the solver prepared for A.T"
            )
        return _PreparedLSMR(self, A)


class _PreparedDamped(PreparedSolver):
    """Least squares with the rows d I; the residual and its judge are those of all rows."""

    solver: LSMR

    def __init__(self, solver: LSMR, A: LinearOperator) -> None:
        super().__init__(solver, A)
        rows, undamped = solver.undamped(A)
        self.rows = undamped._prepare(rows)
        self.backend = self.rows.backend

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        below = block.new_zeros(self.A.shape[1], block.shape[1])
        return self.rows._answer(torch.cat([block, below]), targets, transpose=False)

    def _normal_residual(self, operator: LinearOperator, progress: Progress) -> Tensor:
        one = self if operator is self.A else self._transposed
        assert isinstance(one, _PreparedDamped)
        return one.rows._normal_residual(one.rows.A, progress)

    def _differentiable(self, b: Any, guess: Any, transpose: bool) -> Solution:
        one = self._transposed if transpose and not self.A.symmetric else self
        assert isinstance(one, _PreparedDamped)
        A = self.given.T if transpose else self.given
        nested = A.codomain.nests(b)
        flat = A.codomain.ravel(b, "b") if nested else b
        rows, undamped = self.solver.undamped(A)
        log: list[Info] = []
        factor = Given(_Plain(one.rows, None, False), undamped, log)
        below = flat.new_zeros(A.shape[1], *flat.shape[1:])
        value = apply_least_squares(rows, torch.cat([flat, below]), factor)
        return Solution(A.domain.unravel(value) if nested else value, log[0])


class _PreparedLSMR(PreparedIteration):
    solver: LSMR

    def _made(self) -> LinearOperator | None:
        return as_preconditioner(self.solver.preconditioner, self.A, right=True)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        P = self.preconditioner
        if P is None:
            return self._minimise(self.A, self.A, block, targets)
        return self._minimise(self.A, Product(self.A, P), block, targets, after=P)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        P = self.preconditioner
        if P is None:
            return self._minimise(self.A.T, self.A.T, block, targets)
        # The shortest x with P^T A^T x = P^T b is that with A^T x = b.
        return self._minimise(self.A.T, Product(self.A, P).T, block, targets, before=P.T)

    def _minimise(
        self,
        A: LinearOperator,
        B: LinearOperator,
        block: Tensor,
        targets: Tensor,
        *,
        before: LinearOperator | None = None,
        after: LinearOperator | None = None,
    ) -> tuple[Tensor, Progress]:
        """``x = after y`` with ``B y = before b``, by sweeps that start from the true residual."""
        progress, AT, BT = self._begun(min(B.shape)), A.T, B.T
        eps = torch.finfo(block.dtype).eps
        size_of_A = self._norms.repeat_interleave(block.shape[1] // len(self._norms))
        x, residual = block.new_zeros(A.shape[1], block.shape[1]), block
        size = norms(block)
        slope, strict = torch.full_like(size, torch.inf), torch.ones_like(size)
        active = size > targets
        while bool(active.any()):
            right = residual if before is None else applied(before, residual)
            # A sweep cannot gain more than the precision: then it is time for the truth.
            share, goal = (targets / size).clamp_min(eps), (targets * strict).clamp_min(eps)
            y = self._sweep(
                B, BT, right, active, share, goal, size_of_A if B is A else None, progress
            )
            better = x + (y if after is None else applied(after, y))
            left = block - applied(A, better)
            finite = torch.isfinite(norms(left))
            if not bool(finite.all()):
                progress.stopped(*BROKEN)
                active = active & finite
                better, left = torch.where(finite, better, x), torch.where(finite, left, residual)
            x, residual = better, left
            # |A^T r| / (|A| |r|), which is what the sweep went by for B.
            old_size, size = size, norms(residual)
            gradient = norms(applied(AT, residual))
            old_slope, slope = slope, torch.where(gradient == 0, 0.0, gradient / (size_of_A * size))
            progress.products += 2 * block.shape[1]
            active = active & ~((size <= targets) | (slope <= targets))
            if progress.status == "maxiter":
                break
            lost = active & ~((size < 0.5 * old_size) | (slope < 0.5 * old_slope))
            if bool(lost.any()):
                progress.stopped(
                    "stagnated",
                    "rounding keeps |A^T r| from falling further: loosen rtol, or use QR",
                )
                active = active & ~lost
            strict = torch.where(active, strict * (0.5 * targets / slope).clamp(max=0.5), strict)
        progress.residual = residual
        return x, progress

    def _sweep(
        self,
        B: LinearOperator,
        BT: LinearOperator,
        right: Tensor,
        active: Tensor,
        share: Tensor,
        goal: Tensor,
        size_of_B: Tensor | None,
        progress: Progress,
    ) -> Tensor:
        """The y that minimises ``|right - B y|``.

        It ends where that is at most `share` of ``|right|``, or ``|B^T r| <= goal |B| |r|``.
        """
        if len(active) == 1 and not isinstance(self.A, Members):
            known = None if size_of_B is None else float(size_of_B)
            y = self._sweep_one(B, BT, right[:, 0], float(share), float(goal), known, progress)
            return y[:, None]
        u, beta = _unit(right)
        v, alpha = _unit(applied(BT, u))
        progress.products += right.shape[1]
        y, h_bar, h = torch.zeros_like(v), torch.zeros_like(v), v
        # Names as in the paper, section 2.8; `left` and `slope` are |r| and |B^T r|.
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar = alpha, alpha * beta, one, one, one, zero
        zeta, beta_dd, beta_d, rho_d, tau, theta = zero, beta, zero, one, zero, zero
        left, slope, share = beta, alpha * beta, share * beta
        size = alpha if size_of_B is None else size_of_B
        while True:
            active = active & (left > share) & (slope > goal * size * left)  # false for NaN
            if not bool(active.any()):
                break
            if progress.iterations >= progress.limit:
                distances = torch.minimum(left / share, slope / (goal * size * left))
                if self._spent(progress, float(distances.max())):
                    break
            u, beta = _unit(applied(B, v) - alpha * u)
            v, alpha = _unit(applied(BT, u) - beta * v)
            progress.iterations += 1
            progress.products += 2 * right.shape[1]
            if size_of_B is None:
                size = torch.maximum(size, torch.hypot(alpha, beta))
            rho_old, (c, s, rho) = rho, _rotation(alpha_bar, beta)
            theta_new, alpha_bar = s * alpha, c * alpha
            rho_bar_old, zeta_old = rho_bar, zeta
            theta_bar = s_bar * rho
            c_bar, s_bar, rho_bar = _rotation(c_bar * rho, theta_new)
            zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
            h_bar = h - (theta_bar * rho / (rho_old * rho_bar_old)) * h_bar
            step = torch.where(active, zeta / (rho * rho_bar), 0.0)
            y = y + step * torch.where(active, h_bar, 0.0)
            h = v - (theta_new / rho) * h
            beta_hat, beta_dd = c * beta_dd, -s * beta_dd
            c_tilde, s_tilde, rho_tilde = _rotation(rho_d, theta_bar)
            theta_old, theta, rho_d = theta, s_tilde * rho_bar, c_tilde * rho_bar
            beta_d = c_tilde * beta_hat - s_tilde * beta_d
            tau = (zeta_old - theta_old * tau) / rho_tilde
            left = torch.hypot(beta_d - (zeta - theta * tau) / rho_d, beta_dd)
            slope = zeta_bar.abs()
        return y

    def _sweep_one(
        self,
        B: LinearOperator,
        BT: LinearOperator,
        right: Tensor,
        share: float,
        goal: float,
        size_of_B: float | None,
        progress: Progress,
    ) -> Tensor:
        """The same for one vector: plain numbers, and no masks."""
        multiply, back = vector_product(B), vector_product(BT)
        u, beta = _unit_of_one(right)
        v, alpha = _unit_of_one(back(u))
        progress.products += 1
        y, h_bar, h = torch.zeros_like(v), torch.zeros_like(v), v.clone()
        alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar = alpha, alpha * beta, 1.0, 1.0, 1.0, 0.0
        zeta, beta_dd, beta_d, rho_d, tau, theta = 0.0, beta, 0.0, 1.0, 0.0, 0.0
        left, slope, share = beta, alpha * beta, share * beta
        size = alpha if size_of_B is None else size_of_B
        while left > share and slope > goal * size * left:  # false for NaN
            if progress.iterations >= progress.limit and self._spent(
                progress, min(left / share, slope / (goal * size * left))
            ):
                break
            u, beta = _unit_of_one(torch.sub(multiply(v), u, alpha=alpha))
            v, alpha = _unit_of_one(torch.sub(back(u), v, alpha=beta))
            progress.iterations += 1
            progress.products += 2
            if size_of_B is None:
                size = max(size, math.hypot(alpha, beta))
            rho_old, (c, s, rho) = rho, _rotation_of_one(alpha_bar, beta)
            theta_new, alpha_bar = s * alpha, c * alpha
            rho_bar_old, zeta_old = rho_bar, zeta
            theta_bar = s_bar * rho
            c_bar, s_bar, rho_bar = _rotation_of_one(c_bar * rho, theta_new)
            if not (rho > 0 and rho_bar > 0):  # or NaN: the truth is measured next
                break
            zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
            torch.sub(h, h_bar, alpha=theta_bar * rho / (rho_old * rho_bar_old), out=h_bar)
            y.add_(h_bar, alpha=zeta / (rho * rho_bar))
            torch.sub(v, h, alpha=theta_new / rho, out=h)
            beta_hat, beta_dd = c * beta_dd, -s * beta_dd
            c_tilde, s_tilde, rho_tilde = _rotation_of_one(rho_d, theta_bar)
            theta_old, theta, rho_d = theta, s_tilde * rho_bar, c_tilde * rho_bar
            beta_d = c_tilde * beta_hat - s_tilde * beta_d
            tau = (zeta_old - theta_old * tau) / rho_tilde
            left = math.hypot(beta_d - (zeta - theta * tau) / rho_d, beta_dd)
            slope = abs(zeta_bar)
        return y


def _unit_of_one(v: Tensor) -> tuple[Tensor, float]:
    size = norm(v)
    return (v / size if size > 0 else v), size


def _rotation_of_one(a: float, b: float) -> tuple[float, float, float]:
    r = math.hypot(a, b)
    return (a / r, b / r, r) if r > 0 else (1.0, b, r)


def _unit(block: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit norm, or zero, and their norms."""
    size = norms(block)
    return block / torch.where(size > 0, size, 1.0), size


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(c, s, r)`` with ``c a + s b = r`` and ``s a = c b``."""
    r = torch.hypot(a, b)
    safe = torch.where(r > 0, r, 1.0)
    return torch.where(r > 0, a / safe, 1.0), b / safe, r
