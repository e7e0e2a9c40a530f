"""Smoothers of a multigrid cycle: what damps the rough part of an error, on one level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from solvers.preconditioners.entries import Array
from solvers.sparse.substitution import Substitution


class Smoother(ABC):
    """``M^-1`` of a scipy CSR matrix; that of ``A^T`` is ``M^-T``.

    Symmetric where A is. Where A is positive definite, too, so is M, and ``x + M^-1 (b - A x)``
    converges: which keeps a cycle between such smoothers positive definite.
    """

    @abstractmethod
    def __call__(self, r: Array) -> Array:
        """``M^-1 r`` for ``(n,)`` or ``(n, k)``."""


class GaussSeidel(Smoother):
    """A sweep forward and one back: ``M = (D + L) (I + D^-1 U)``."""

    def __init__(self, A: Any) -> None:
        self.forward = Substitution(A, lower=True)
        self.backward = Substitution(A, lower=False)

    def __call__(self, r: Array) -> Array:
        """``M^-1 r``."""
        return self.backward.unit(self.forward(r))


class Jacobi(Smoother):
    """``M = rho D / omega``, with ``rho`` the spectral radius of ``D^-1 A`` and omega = 4/3."""

    def __init__(self, A: Any, radius: float, omega: float = 4 / 3) -> None:
        self.weights = omega / radius * _inverse_diagonal(A)

    def __call__(self, r: Array) -> Array:
        """``M^-1 r``."""
        return _rows(self.weights, r) * r


class Chebyshev(Smoother):
    """``M^-1 = q(D^-1 A) D^-1`` with ``1 - t q(t)`` the least on ``rho (1/30, 1.1)`` for a degree.

    By the recurrence of Chebyshev iteration (Saad, 2003, Algorithm 12.1), as a smoother Adams,
    Brezina, Hu and Tuminaro (2003, doi:10.1016/S0021-9991(03)00194-3).
    """

    def __init__(self, A: Any, radius: float, degree: int) -> None:
        self.A, self.inverse, self.degree = A, _inverse_diagonal(A), degree
        low, high = radius / 30, 1.1 * radius
        self.centre, self.half = A.dtype.type((high + low) / 2), A.dtype.type((high - low) / 2)

    def __call__(self, r: Array) -> Array:
        """``M^-1 r``."""
        inverse = _rows(self.inverse, r)
        step = inverse * r / self.centre
        x, ratio = step, self.half / self.centre
        for _ in range(self.degree - 1):
            r = r - self.A @ step
            following = 1 / (2 * self.centre / self.half - ratio)
            step = following * ratio * step + 2 * following / self.half * (inverse * r)
            x, ratio = x + step, following
        return x


def _rows(d: Array, r: Array) -> Array:
    return d if r.ndim == 1 else d[:, None]


def _inverse_diagonal(A: Any) -> Array:
    """``D^-1``, zero in rows that are zero: those of coarse levels that stand for nothing."""
    diagonal = A.diagonal()
    return np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal != 0)
