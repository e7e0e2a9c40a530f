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

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from operators import Identity, LinearOperator, Saddle
from operators.solve_rule import Factor, Given, Prepared, Solver, apply_inverse
from solvers.solution import StructureError


class Augmented(NamedTuple):
    """A solver of augmented systems, by one of least squares."""

    solver: Solver
    tall: bool

    def prepare(self, K: Any) -> PreparedAugmented:
        """Prepare the least-squares solver for A."""
        return PreparedAugmented(self.solver.prepare(K.G.T if self.tall else K.G), self.tall)


class Augmentation(NamedTuple):
    """A solution of the augmented system, and the least-squares solver's word on it."""

    value: Tensor
    info: Any


@dataclass(frozen=True)
class PreparedAugmented:
    """``K^-1`` by products with ``A^+`` and ``(A^+)^T``; of ``A^T`` with `transpose`."""

    prepared: Any
    tall: bool
    transpose: bool = False

    def solve(self, rhs: Tensor) -> Augmentation:
        """``K^-1 (f, g)``.

        Tall: ``x = A^+ (f - z)``, ``r = f - A x`` with ``z = (A^+)^T g``. Wide:
        ``y = (A^+)^T (f - A^+ g)``, ``x = f - A^T y``, computed as ``A^+ g + (f - A^+ A f)``.
        """
        A = self.prepared.A.T if self.transpose else self.prepared.A
        m, n = A.shape
        f, g = rhs[: max(m, n)], rhs[max(m, n) :]
        solve, solve_transpose = self.prepared.solve, self.prepared.solve_transpose
        if self.transpose:
            solve, solve_transpose = solve_transpose, solve
        derivative = bool(g.any()) if self.tall else bool(f.any())
        if derivative and self.prepared.rank is not None and self.prepared.rank < min(m, n):
            raise StructureError(
                f"{A!r} has rank {self.prepared.rank}: its least-squares solution has a "
                f"derivative only at full rank {min(m, n)}; add damping, as rows sqrt(l) I"
            )
        product = A._matvec if rhs.ndim == 1 else A._matmat
        if self.tall:
            if bool(g.any()):
                f = f - solve_transpose(g).value
            x, info = solve(f)
            # With g the residual of the first equation is that of the f it started from.
            return Augmentation(torch.cat([rhs[:m] - product(x), x]), info)
        shortest, info = solve(g)
        if not bool(f.any()):
            return Augmentation(torch.cat([shortest, -solve_transpose(shortest).value]), info)
        y = solve_transpose(f - shortest).value
        back = A.T._matvec if rhs.ndim == 1 else A.T._matmat
        return Augmentation(torch.cat([f - back(y), y]), info)

    def solve_transpose(self, rhs: Tensor) -> Augmentation:
        """As `solve`: K is symmetric."""
        return self.solve(rhs)


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
        Something is differentiated, and A is found not to have full rank.
    """
    target = A.T if transpose else A
    m, n = target.shape
    tall = m >= n
    K = Saddle(Identity(max(m, n), A.dtype, A.device), target.T if tall else target)
    if isinstance(factor, Given):
        prepared: Prepared = PreparedAugmented(factor.prepared, tall, transpose)
        whole: Factor = Given(prepared, factor.solver, factor.log)
    else:
        whole = Factor(Augmented(factor.solver, tall), factor.log)
    zeros = b.new_zeros(min(m, n) if tall else max(m, n), *b.shape[1:])
    rhs = torch.cat([b, zeros] if tall else [zeros, b])
    solution = apply_inverse(K, rhs, whole)
    return solution[m:] if tall else solution[:n]
