"""Sweeps over the unknowns: `SOR`, `SymmetricSOR` and `optimal_omega`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import IterativeSolver, applied
from solvers.linear_solver import PreparedSolver, Progress
from solvers.stationary.splitting import Splitting

Sweep = Callable[[Tensor], Tensor]


def optimal_omega(jacobi_radius: float) -> float:
    """``1 + (beta / (1 + sqrt(1 - beta^2)))^2``, the omega for which SOR converges fastest.

    Parameters
    ----------
    jacobi_radius
        ``beta``, the spectral radius of ``I - D^-1 A``, in ``[0, 1)``.

    Raises
    ------
    ValueError
        It is outside of that.

    Notes
    -----
    For consistently ordered A (as tridiagonal and block tridiagonal ones, and the five-point
    Laplacian by rows) with real Jacobi eigenvalues; the spectral radius of SOR is then
    ``omega - 1``, from there on up to 2, and the error falls by ``1 - O(h)`` a sweep instead of
    ``1 - O(h^2)``. Young (1954, doi:10.1090/S0002-9947-1954-0059635-7).

    Examples
    --------
    >>> round(optimal_omega(math.cos(math.pi / 11)), 4)  # the Laplacian of 10 x 10 points
    1.5604
    """
    beta = jacobi_radius
    if not 0 <= beta < 1:
        raise ValueError(f"jacobi_radius={beta}; expected a number in [0, 1)")
    return 1 + (beta / (1 + math.sqrt(1 - beta**2))) ** 2


@dataclass(frozen=True, kw_only=True)
class Relaxation(IterativeSolver):
    """Settings of a solver that sweeps over the unknowns, setting each by its own equation.

    Parameters
    ----------
    omega
        Relaxation factor, in ``(0, 2)``; 1 is the method of Gauss and Seidel.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.
    """

    omega: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.omega < 2:
            raise ValueError(
                f"{type(self).__name__}: omega={self.omega}; expected 0 < omega < 2, outside of "
                "which no sweep converges (Kahan, 1958)"
            )

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Split A.

        Raises
        ------
        SingularError
            The diagonal of A has zeros.
        ValueError
            A holds NaN or infinite entries.
        """
        return _PreparedRelaxation(self, A)

    @abstractmethod
    def _sweeps(self, split: Splitting) -> list[tuple[Sweep, Sweep]]:
        """Each ``M^-1`` of an iteration, and its ``M^-T``."""


@dataclass(frozen=True, kw_only=True)
class SOR(Relaxation):
    """``x <- x + M^-1 (b - A x)`` with ``M = D / omega + L``, D and L being parts of A.

    Converges for every symmetric positive definite A (Ostrowski, 1954, and Reich, 1949), fast where
    omega is near its optimum, which is known for consistently ordered A: `optimal_omega`. For other
    A it may diverge; then the residual grows tenfold over the first one, and ``info.status`` is
    ``"diverged"``.

    Parameters
    ----------
    omega
        Relaxation factor, in ``(0, 2)``; 1 is the method of Gauss and Seidel.
    sweep
        ``"forward"``, from the first unknown to the last; or ``"backward"``, with the upper
        triangle in place of L.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`; an iteration is one sweep.

    Notes
    -----
    An iteration costs a product with A, for the true residual, and the solution of a triangular
    system, of about the same cost; see `Splitting`. The transposed system is swept by ``M^-T``,
    which converges as fast.

    Source: Young (1954, doi:10.1090/S0002-9947-1954-0059635-7).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), positive_definite=True)
    >>> solver = SOR(omega=optimal_omega(0.5), maxiter=50)
    >>> solver.prepare(A).solve(torch.tensor([1.0, 1.0])).value.round(decimals=3)
    tensor([1., 1.])
    """

    sweep: Literal["forward", "backward"] = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweep not in ("forward", "backward"):
            raise ValueError(
                f"SOR: sweep={self.sweep!r}; expected 'forward' or 'backward' (both: SymmetricSOR)"
            )

    def _sweeps(self, split: Splitting) -> list[tuple[Sweep, Sweep]]:
        if self.sweep == "forward":
            return [(split.forward, split.backward)]
        return [(split.upper.backward, split.upper.forward)]


@dataclass(frozen=True, kw_only=True)
class SymmetricSOR(Relaxation):
    """A forward sweep of `SOR` and a backward one; for a symmetric A a symmetric iteration.

    ``x <- x + M^-1 (b - A x)`` with ``M = D / omega + L``, then with ``M = D / omega + U``. For a
    symmetric positive definite A the error falls monotonically in the A-norm. It is less sensitive
    to omega than `SOR`, and slower at its best; its worth is as a preconditioner (`SSOR`).

    Parameters
    ----------
    omega, maxiter, stop_at_maxiter, rtol, atol, strict
        As for `SOR`; an iteration is two sweeps, and two products with A.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), positive_definite=True)
    >>> SymmetricSOR(maxiter=50).prepare(A).solve(torch.tensor([1.0, 1.0])).value.round(decimals=3)
    tensor([1., 1.])
    """

    def _sweeps(self, split: Splitting) -> list[tuple[Sweep, Sweep]]:
        return [(split.forward, split.backward), (split.upper.backward, split.upper.forward)]


class _PreparedRelaxation(PreparedSolver):
    solver: Relaxation

    def __init__(self, solver: Relaxation, A: LinearOperator) -> None:
        super().__init__(solver, A)
        split = Splitting(A, solver.omega)
        self.backend = split.backend
        self.sweeps = solver._sweeps(split)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._swept(self.A, [sweep for sweep, _ in self.sweeps], block, targets)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        # Transposed and in reverse order, which has the same spectrum.
        sweeps = [transposed for _, transposed in reversed(self.sweeps)]
        return self._swept(self.A.T, sweeps, block, targets)

    def _swept(
        self, A: LinearOperator, sweeps: list[Sweep], block: Tensor, targets: Tensor
    ) -> tuple[Tensor, Progress]:
        limit, progress = self.solver.limit(block.shape[0]), Progress()
        x, residual = torch.zeros_like(block), block
        active = torch.linalg.vector_norm(block, dim=0) > targets
        while bool(active.any()):
            if progress.iterations >= limit:
                progress.stopped("maxiter")
                break
            for sweep in sweeps:
                x = torch.where(active, x + sweep(residual), x)
                residual = torch.where(active, block - applied(A, x), residual)
                progress.products += block.shape[1]
            progress.iterations += 1
            size = torch.linalg.vector_norm(residual, dim=0)
            grown = active & ~(size <= 10.0)  # NaN lands here too
            if bool(grown.any()):
                progress.status = "diverged"
                progress.detail = (
                    "the residual grows: the sweeps converge for symmetric positive definite and "
                    "for diagonally dominant operators; take a smaller omega, or another solver"
                    if bool(torch.isfinite(size[grown]).all())
                    else "a product with A is not finite"
                )
            active = active & (size > targets) & ~grown
        progress.residual = residual
        return x, progress
