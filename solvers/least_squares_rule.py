"""The derivative rule of least squares: `apply_least_squares`, by the augmented system.

The minimiser of ``|b - A x|`` for a tall A of full rank solves, with its residual ``r = b - A x``,

    [ I   A ] [ r ]   [ b ]
    [ A^T 0 ] [ x ] = [ 0 ] ,

and the shortest solution of ``A x = b`` for a wide A of full rank, with a multiplier y,

    [ I   A^T ] [ x ]   [ 0 ]
    [ A   0   ] [ y ] = [ b ] .

Both are square, and applying their inverse takes products with the pseudo-inverse alone: the rule
for square systems then gives every derivative (Golub and Pereyra, 1973, doi:10.1137/0710036).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from operators import Identity, LinearOperator, Saddle, Stacked
from operators.closures import hidden
from operators.solve_rule import Factor, Given, Prepared, Solver, apply_inverse
from operators.tracing import tracked
from solvers.members import Members
from solvers.solution import StructureError

# What a solver that knows no rank may leave of an equation that has a solution, in tolerances.
MISSED = 1e3


class Augmented(NamedTuple):
    """A solver of augmented systems, by one of least squares.

    `moving`: A itself is differentiated or mapped over, not b alone.
    """

    solver: Solver
    tall: bool
    moving: bool

    @property
    def stacks(self) -> bool:
        """As the least-squares solver."""
        return bool(getattr(self.solver, "stacks", False))

    def prepare(self, K: Any) -> PreparedAugmented:
        """Prepare the least-squares solver for A, or for all of a batch."""
        one: Any = K.batched if isinstance(K, Stacked) else K
        G = Stacked.of(one.G) if isinstance(K, Stacked) else one.G
        prepared: Any = self.solver.prepare(G.T if self.tall else G)
        return PreparedAugmented(prepared, self.tall, self.moving)


class Augmentation(NamedTuple):
    """A solution of the augmented system, and what the least-squares solver says of its worst."""

    value: Tensor
    info: Any


@dataclass(frozen=True)
class PreparedAugmented:
    """``K^-1`` by products with ``A^+`` and ``(A^+)^T``; of ``A^T`` with `transpose`."""

    prepared: Any
    tall: bool
    moving: bool
    transpose: bool = False

    def solve(self, rhs: Tensor) -> Augmentation:
        """``K^-1 (f, g)``.

        Tall: ``x = A^+ (f - z)`` and ``r = f - A x``, with ``z = (A^+)^T g``. Wide:
        ``y = (A^+)^T (f - A^+ g)`` and ``x = f - A^T y``, which is ``A^+ g`` where f is zero.
        """
        A = self.prepared.A
        A = A.stack if isinstance(A, Members) else A
        A = A.T if self.transpose else A
        m, n = A.shape
        f, g = rhs[: max(m, n)], rhs[max(m, n) :]
        pseudo_inverse, its_transpose = self.prepared.solve, self.prepared.solve_transpose
        if self.transpose:
            pseudo_inverse, its_transpose = its_transpose, pseudo_inverse
        infos: list[Any] = []

        def applied(solve: Callable[[Tensor], Any], b: Tensor) -> Tensor:
            solution = solve(b)
            infos.append(solution.info)
            value: Tensor = solution.value
            return value

        def refuse_missed(B: LinearOperator, x: Tensor, b: Tensor) -> None:
            """Without a known rank: ``B x = b`` has a solution for every b if A has full rank."""
            if self.moving and self.prepared.rank is None:
                self._refuse_missed(b - (B._matvec(x) if single else B._matmat(x)), b)

        single = rhs.ndim == 1
        # What is asked for itself has zeros there, its derivatives have not.
        derivative = bool((g if self.tall else f).any())
        if derivative and self.moving:
            self._refuse_low_rank()
        if self.tall:
            right = f
            if derivative:
                z = applied(its_transpose, g)
                refuse_missed(A.T, z, g)
                right = f - z
            x = applied(pseudo_inverse, right)
            parts = [f - (A._matvec(x) if single else A._matmat(x)), x]
        else:
            x = applied(pseudo_inverse, g)
            y = torch.zeros_like(g)
            if derivative or self.moving:
                y = applied(its_transpose, f - x)
            if derivative:
                refuse_missed(A, x, g)
                x = f - (A.T._matvec(y) if single else A.T._matmat(y))
            parts = [x, y]
        worst = max(infos, key=lambda info: (not info.converged, info.residual))
        return Augmentation(torch.cat(parts), worst)

    @property
    def relative(self) -> PreparedAugmented:
        """The same without an absolute tolerance."""
        prepared = getattr(self.prepared, "relative", self.prepared)
        return replace(self, prepared=prepared)

    def solve_transpose(self, rhs: Tensor) -> Augmentation:
        """As `solve`: K is symmetric."""
        return self.solve(rhs)

    def _refuse_low_rank(self) -> None:
        A, rank = self.prepared.A, self.prepared.rank
        full = min(A.shape)
        if rank is not None and rank < full:
            raise StructureError(
                f"{type(self.prepared.solver).__name__} solves {A!r} at rank {rank}: the "
                f"least-squares solution has a derivative by A only at full rank {full}, kept in "
                "full; add damping, as rows sqrt(l) I, or differentiate by b alone"
            )

    def _refuse_missed(self, residual: Tensor, b: Tensor) -> None:
        size = torch.linalg.vector_norm(b, dim=0)
        share = torch.linalg.vector_norm(residual, dim=0) / torch.where(size > 0, size, 1.0)
        allowed = MISSED * self.prepared.solver.tolerance(b.dtype)
        if bool((share > allowed).any()):
            raise StructureError(
                f"{type(self.prepared.solver).__name__} leaves {float(share.max()):.2g} of the "
                f"right-hand side of a derivative by {self.prepared.A!r}, which seems not to have "
                "full rank, or is too ill-conditioned for it: the least-squares solution then has "
                "no derivative that can be trusted; add damping, or differentiate by b alone"
            )


def apply_least_squares(
    A: LinearOperator, b: Tensor, factor: Factor, *, transpose: bool = False
) -> Tensor:
    """``A^+ b``, or ``(A^T)^+ b``, differentiable with respect to b and the tensors of A.

    Parameters
    ----------
    A, b, factor, transpose
        As for `operators.solve_rule.apply_inverse`; A of any shape.

    Raises
    ------
    StructureError
        A is differentiated, and found not to have full rank, or the solver cuts its rank off.

    Notes
    -----
    A derivative takes one product with ``A^+`` and one with its transpose. Where nothing is
    differentiated or mapped over, it is the solver alone that runs.
    """
    target = A.T if transpose else A
    m, n = target.shape
    tall = m >= n
    moving = any(map(tracked, (*target.tensors, *hidden(target))))
    if not moving and not tracked(b):
        return factor.solve(A, b, transpose)
    if getattr(factor.solver, "damping", 0.0):
        # The least squares of the rows [A; d I], which have full rank.
        rows, solver = factor.solver.undamped(target)  # type: ignore[attr-defined]
        below = b.new_zeros(n, *b.shape[1:])
        return apply_least_squares(rows, torch.cat([b, below]), Factor(solver, factor.log))
    K = Saddle(Identity(max(m, n), A.dtype, A.device), target.T if tall else target)
    if isinstance(factor, Given):
        prepared: Prepared = PreparedAugmented(factor.prepared, tall, moving, transpose)
        whole: Factor = Given(prepared, factor.solver, factor.log)
    else:
        whole = Factor(Augmented(factor.solver, tall, moving), factor.log)
    zeros = b.new_zeros(min(m, n) if tall else max(m, n), *b.shape[1:])
    rhs = torch.cat([b, zeros] if tall else [zeros, b])
    solution = apply_inverse(K, rhs, whole)
    return solution[m:] if tall else solution[:n]
