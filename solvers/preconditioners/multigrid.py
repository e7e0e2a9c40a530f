"""The multigrid cycle over a hierarchy of matrices, for blocks, and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from solvers.preconditioners.entries import Array
from solvers.preconditioners.smoothers import Smoother
from solvers.solution import SingularError
from solvers.threads import one_blas_thread

Kind = Literal["V", "W", "F"]

# Cycles on the next level that one on this level makes, in their order. An F-cycle is followed by a
# V-cycle, and preceded by it in the transpose.
VISITS: dict[Kind, tuple[Kind, ...]] = {"V": ("V",), "W": ("W", "W"), "F": ("F", "V")}

# Unknowns up to which the coarsest system is inverted as a dense matrix.
DENSE = 1000


@dataclass(frozen=True)
class Level:
    """``A`` of a level, the way down ``R`` and up again ``P``, as scipy CSR, and the smoother."""

    A: Any
    R: Any
    P: Any
    smoother: Smoother


class Cycle:
    """``x = B b``: one cycle from zero, for arrays ``(n,)`` or ``(n, k)``.

    On each level, with the smoother M and B' the cycle (or cycles) on the next level,

        x = M^-1 b ,   x += P B' R (b - A x) ,   x += M^-1 (b - A x) .

    Parameters
    ----------
    levels
        From the finest on; the last but one system.
    coarsest
        What solves the last one.
    kind
        ``"V"``, ``"W"`` or ``"F"``.
    sweeps
        Smoothing steps before and after the correction.
    backwards
        Visit the next level in the reverse order, as the transpose does.

    Notes
    -----
    The transposed cycle is that of ``A^T`` with P and R in each other's place. B is symmetric where
    A is and ``R = P^T``, but for an F-cycle.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        coarsest: Callable[[Array], Array],
        kind: Kind,
        sweeps: int,
        *,
        backwards: bool = False,
    ) -> None:
        self.levels, self.coarsest, self.kind, self.sweeps = levels, coarsest, kind, sweeps
        self.step = -1 if backwards else 1

    def __call__(self, b: Array) -> Array:
        """``B b``."""
        return self._cycle(0, b, self.kind)

    def _cycle(self, depth: int, b: Array, kind: Kind) -> Array:
        if depth == len(self.levels):
            return self.coarsest(b)
        level = self.levels[depth]
        x = np.ascontiguousarray(level.smoother(b))
        for _ in range(self.sweeps - 1):
            x += level.smoother(_residual(level.A, x, b))
        x += level.P @ self._correction(depth + 1, level.R @ _residual(level.A, x, b), kind)
        for _ in range(self.sweeps):
            x += level.smoother(_residual(level.A, x, b))
        return x

    def _correction(self, depth: int, r: Array, kind: Kind) -> Array:
        visits = VISITS[kind] if depth < len(self.levels) else ("V",)
        first, *others = visits[:: self.step]
        x = self._cycle(depth, r, first)
        for other in others:
            x += self._cycle(depth, _residual(self.levels[depth].A, x, r), other)
        return x


def _residual(A: Any, x: Array, b: Array) -> Array:
    """``b - A x``, without a copy more than that."""
    r = A @ x
    return np.subtract(b, r, out=r)


def coarsest_solver(A: Any, *, symmetric: bool) -> Callable[[Array], Array]:
    """``A^+ b`` by a dense pseudo-inverse up to `DENSE` unknowns; beyond, ``A^-1 b`` by SuperLU.

    Raises
    ------
    SingularError
        A is larger, and singular.
    """
    if A.shape[0] <= DENSE:
        # Threads of BLAS that worked on something so small are in the way of others for 30 ms.
        with one_blas_thread():
            inverse = (scipy.linalg.pinvh if symmetric else scipy.linalg.pinv)(A.toarray())

        def applied(b: Array) -> Array:
            with one_blas_thread():
                product: Array = inverse @ b
            return product

        return applied
    try:
        factor = scipy.sparse.linalg.splu(A.tocsc())
    except RuntimeError as error:
        raise SingularError(
            f"AMG: the coarsest system, of {A.shape[0]} unknowns, is singular; raise max_levels, "
            "so that it is small enough for a pseudo-inverse"
        ) from error
    return lambda b: factor.solve(np.asarray(b))
