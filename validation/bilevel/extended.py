"""Hypergradients in 80-bit numbers, which share no code with what they are compared with.

grad = d_x g - (d_x F)^T A^-T d_y g,   A = d_y F

F is written by hand for each problem; its derivatives and those of g are taken by the complex step,
``Im f(z + i h) / h`` with ``h = 1e-40``, exact to rounding; systems are solved by elimination with
pivots, and refined. Source of the complex step: Squire and Trapp (1998), SIAM Review 40.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
STEP = np.longdouble("1e-40")


@dataclass(frozen=True)
class Reference:
    """A solution and the hypergradient there.

    Parameters
    ----------
    z
        All unknowns of F: y, and multipliers after it.
    gradient
        The hypergradient.
    uncertainty
        Relative: what one more step of Newton and one more refinement still changed.
    condition
        2-norm condition number of A.
    curvature
        Smallest eigenvalue of the symmetric part of A.
    largest
        Largest singular value of A.
    """

    z: Array
    gradient: Array
    uncertainty: float
    condition: float
    curvature: float
    largest: float


def jacobian(function: Callable[[Array], Array], z: Array) -> Array:
    """``d function / d z``, ``(m, n)``, by the complex step."""
    columns = []
    for i in range(len(z)):
        moved = z.astype(np.clongdouble)
        moved[i] += 1j * STEP
        columns.append(np.atleast_1d(np.imag(function(moved))) / STEP)
    return np.stack(columns, -1)


def solve(A: Array, b: Array) -> Array:
    """``A^-1 b`` by elimination with partial pivoting and one refinement, in the dtype of A."""
    n = len(A)
    scale = np.abs(A).max(1)
    LU, order = A / np.where(scale == 0, 1, scale)[:, None], np.arange(n)
    for k in range(n - 1):
        pivot = k + int(np.argmax(np.abs(LU[k:, k])))
        LU[[k, pivot]], order[[k, pivot]] = LU[[pivot, k]], order[[pivot, k]]
        LU[k + 1 :, k] /= LU[k, k]
        LU[k + 1 :, k + 1 :] -= np.outer(LU[k + 1 :, k], LU[k, k + 1 :])

    def substituted(r: Array) -> Array:
        v = (r / scale)[order]
        for k in range(1, n):
            v[k] -= LU[k, :k] @ v[:k]
        for k in reversed(range(n)):
            v[k] = (v[k] - LU[k, k + 1 :] @ v[k + 1 :]) / LU[k, k]
        return v

    v = substituted(b)
    return v + substituted(b - A @ v)


def newton(F: Callable[[Array], Array], z: Array, steps: int = 100) -> Array:
    """A root of F by damped Newton steps, as exactly as rounding allows."""
    value = F(z)
    for _ in range(steps):
        step = solve(jacobian(F, z), value)
        size = np.longdouble(1.0)
        while size > 1e-6:
            tried = z - size * step
            found = F(tried)
            if np.all(np.isfinite(found)) and np.linalg.norm(found) < np.linalg.norm(value):
                break
            size /= 2
        else:
            return z
        z, value = tried, found
        if not value.any():
            break
    return z


def reference(
    F: Callable[[Array, Array], Array],
    outer: Callable[[Array, Array], Array],
    z: Array,
    x: Array,
    n: int,
) -> Reference:
    """The hypergradient of ``outer(y*(x), x)``, y being the first n unknowns of F; from z."""
    z, x = z.astype(np.longdouble), x.astype(np.longdouble)
    z = newton(lambda v: F(v, x), z)

    def at(z: Array) -> tuple[Array, Array]:
        A = jacobian(lambda v: F(v, x), z)
        C = jacobian(lambda v: F(z.astype(np.clongdouble), v), x)
        b = np.zeros(len(z), np.longdouble)
        b[:n] = jacobian(lambda v: outer(v, x.astype(np.clongdouble)), z[:n])[0]
        direct = jacobian(lambda v: outer(z[:n].astype(np.clongdouble), v), x)[0]
        return direct - C.T @ solve(A.T.copy(), b), A

    first, A = at(z)
    further = z - solve(A, F(z, x))
    gradient, A = at(further)
    with np.errstate(all="ignore"):
        changed = np.linalg.norm(gradient - first) / np.linalg.norm(gradient)
    # Scaled, so that what is tiny does not vanish in doubles.
    largest = np.abs(A).max()
    scaled = (A / largest).astype(float)
    values = np.linalg.svd(scaled, compute_uv=False)
    lowest = np.linalg.eigvalsh((scaled + scaled.T) / 2)[0]
    return Reference(
        further,
        gradient,
        float(2 * changed + 16 * np.finfo(np.longdouble).eps),
        float(values[0] / values[-1]) if values[-1] else np.inf,
        float(lowest * largest),
        float(values[0] * largest),
    )
