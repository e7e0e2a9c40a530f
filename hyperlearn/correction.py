"""A better hypergradient next to the one at hand: what is between them estimates the error.

One step of Newton from y, one refinement of the adjoint, and the hypergradient from there. Near a
solution Newton's error is the square of the one before, so that the difference is the error up to a
factor close to 1 (the theorem of Newton and Kantorovich in Deuflhard's affine-invariant form:
*Newton Methods for Nonlinear Problems*, 2011, section 2.1). No Lipschitz constant enters.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperlearn.inner.curvature import ends as spectral_ends
from hyperlearn.inner.equation import DENSE
from hyperlearn.inner.method import wide
from hyperlearn.oracles import Oracles
from operators import Dense, LinearOperator
from solvers import (
    Auto,
    ConvergenceWarning,
    DenseLU,
    LinearSolver,
    NotPositiveDefiniteError,
    PreparedSolver,
    SingularError,
)
from solvers.stationary.spectrum import spectrum

Tree = Any

# Twice: the reference has an error of its own, at most the contraction times this one.
SAFETY = 2.0
# Steps are compared with what rounding makes of F: this many units in the last place of |A| |y|.
ROUNDING = 32.0


@dataclass(frozen=True)
class Correction:
    """A better point, adjoint and hypergradient.

    Parameters
    ----------
    y, q, gradient
        After one Newton step in two halves, and one refinement of the adjoint.
    distance
        Estimate of ``|y - y*|`` at the point at hand: ``|d| / (1 - contraction)`` of the step d.
    contraction
        Length of the second step by that of the first; 0 where F is at the level of rounding.
    smallest, largest
        Curvature: ends of the spectrum of the Hessian at y, estimated beyond 256 unknowns.
    error
        Estimate of ``|gradient at hand - exact|``; infinite where there is none.
    detail
        Why it is infinite, or what limits it.
    """

    y: Tensor
    q: Tensor
    gradient: Tensor
    distance: float
    contraction: float
    smallest: float
    largest: float
    error: float
    detail: str = ""


def correction(
    oracles: Oracles,
    y: Tensor,
    x: Tensor,
    q: Tensor,
    gradient: Tensor,
    *,
    inner_batch: Tree,
    outer_batch: Tree,
    solver: LinearSolver,
) -> Correction:
    """The hypergradient after one more step of Newton for y and for the adjoint q.

    Costs three solves with the exact Hessian, three gradients and one cross product; up to 256
    unknowns the Hessian is formed, twice.
    """
    eps = torch.finfo(y.dtype).eps
    H = _Curvature(oracles.hessian(y, x, inner_batch), solver)
    noise = ROUNDING * eps * H.largest * norm(y)
    F = oracles.inner_gradient(y, x, inner_batch)
    step = -H.solve(F)
    between = y + step
    rest = oracles.inner_gradient(between, x, inner_batch)
    further = -H.solve(rest)
    at_rounding = min(norm(F), norm(rest)) <= noise
    contraction = 0.0 if at_rounding or not norm(step) else norm(further) / norm(step)
    better = between + further
    detail = H.detail
    if not bool(torch.isfinite(better).all()):
        inf, detail = math.inf, detail or "Newton's step leads to no finite gradient"
        return Correction(y, q, gradient, inf, inf, H.smallest, H.largest, inf, detail)
    if not contraction < 0.5:
        detail = (
            f"Newton's steps shrink by {contraction:.2g} only: y is too far from a solution for an "
            "estimate"
        )
    elif norm(F) > noise and norm(rest) > noise:
        # A step across a jump of the curvature lands on the wrong side, however short it is.
        left = norm(oracles.inner_gradient(better, x, inner_batch))
        if left > max(noise, norm(rest) / 2):
            detail = (
                f"a further step leaves {left / norm(rest):.2g} of the gradient: the curvature "
                "jumps near y"
            )
    b, direct = oracles.outer_gradients(better, x, outer_batch)
    H_better = _Curvature(oracles.hessian(better, x, inner_batch), solver, ends=False)
    refined = q + H_better.solve(b - H_better.A @ q)
    detail = detail or H_better.detail
    implicit = oracles.cross(better, x, inner_batch) @ refined
    improved = direct - implicit
    error = math.inf
    if not detail and bool(torch.isfinite(improved).all()):
        # The Hessian itself is known to eps |H|: cond(H) eps of the adjoint.
        condition = H.largest / H.smallest if H.smallest > 0 else 1.0
        floor = eps * (ROUNDING * (norm(direct) + norm(implicit)) + condition * norm(implicit))
        error = SAFETY * norm(improved - gradient) / (1 - contraction) + floor
    return Correction(
        better,
        refined,
        improved,
        norm(step) / (1 - contraction) if contraction < 1 else math.inf,
        contraction,
        H.smallest,
        H.largest,
        error,
        detail,
    )


class _Curvature:
    """A Hessian, its inverse, and how its solves went."""

    def __init__(self, A: LinearOperator, solver: LinearSolver, *, ends: bool = True) -> None:
        self.A, self.detail = A, ""
        self.smallest = self.largest = math.nan
        if A.shape[0] <= DENSE:
            dense = wide(A.to_dense())
            if ends:
                smallest, largest = spectral_ends(dense)
                self.smallest, self.largest = float(smallest), float(largest)
            solver, A = DenseLU(), Dense(dense)
        elif ends:
            found = spectrum(A, 20)
            self.smallest, self.largest = float(found.smallest), float(found.largest.abs())
        if solver.truncated:
            # What stops early on purpose is no reference.
            solver = Auto()
        self._dtype = A.dtype
        self._prepared: PreparedSolver | None = None
        try:
            self._prepared = solver.prepare(A)
        except SingularError:
            self.detail = "the Hessian is singular"

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``; NaN where there is none."""
        nothing = torch.full_like(b, math.nan)
        if self._prepared is None or not bool(torch.isfinite(b).all()):
            return nothing
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the detail
                value, info = self._prepared.solve(b.to(self._dtype))
        except (NotPositiveDefiniteError, SingularError) as error:
            self.detail = f"a solve for the estimate failed: {error}"
            return nothing
        if not info.converged:
            self.detail = f"a solve for the estimate did not converge: {info.reason}"
        return value.to(b.dtype)


def norm(vector: Tensor) -> float:
    """2-norm as a number."""
    return float(torch.linalg.vector_norm(vector))
