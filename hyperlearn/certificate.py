"""What is known about a hypergradient's error: the certificate that comes with each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from solvers import Info


@dataclass(frozen=True)
class Smoothness:
    """Constants under which a hypergradient's error can be bounded a posteriori.

    They must hold on a set that contains the segment from y to y*(x); all but the first are upper
    bounds.

    Parameters
    ----------
    strong_convexity
        ``mu > 0``: a *lower* bound of the eigenvalues of the inner Hessian.
    cross_norm
        ``|C|``, spectral norm of the cross derivative.
    outer_smoothness
        Lipschitz constant in y of ``d_y g``.
    direct_smoothness
        Lipschitz constant in y of ``d_x g``.
    hessian_lipschitz, cross_lipschitz
        Lipschitz constants in y of the inner Hessian and of C; zero for a quadratic inner loss.
    estimated
        Whether the constants are estimates (see `estimated_smoothness`): what is made of them is
        then called an estimate too.
    """

    strong_convexity: float
    cross_norm: float
    outer_smoothness: float = 0.0
    direct_smoothness: float = 0.0
    hessian_lipschitz: float = 0.0
    cross_lipschitz: float = 0.0
    estimated: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Smoothness: {name}={value}; expected a finite number >= 0")
        if self.strong_convexity == 0:
            raise ValueError("Smoothness: strong_convexity=0; a bound needs a positive lower bound")

    def error_bound(self, stationarity: float, residual: float, adjoint_norm: float) -> float:
        r"""Bound of ``|hypergradient - exact|``.

        With ``e = |d_y G| / mu >= |y - y*|``, the absolute residual ``r = |d_y g - H q|`` in the
        exact Hessian, and ``|q|`` the norm of the computed adjoint:

            L_a e + (|C|/mu) (L_H e |q| + r + L_b e) + L_C e |q| .

        It follows from ``H* (q - q*) = (H* - H) q - (b - H q) + (b - b*)`` and the triangle
        inequality; for a quadratic inner loss and ``L_a = 0`` it is the bound of Ehrhardt and
        Roberts (2024), arXiv:2301.04764, with ``|q|`` measured instead of estimated.
        """
        mu = self.strong_convexity
        distance = stationarity / mu
        adjoint = (
            self.hessian_lipschitz * distance * adjoint_norm
            + residual
            + self.outer_smoothness * distance
        ) / mu
        return (
            self.direct_smoothness * distance
            + self.cross_norm * adjoint
            + self.cross_lipschitz * distance * adjoint_norm
        )


@dataclass(frozen=True)
class Certificate:
    """How far a hypergradient can be trusted.

    Parameters
    ----------
    inner_stationarity
        ``|d_y G(y, x)|`` on the inner batch that was used; in a method with a projection
        ``|y - Proj(y - s d_y G)| / s``, s the inner step size. The hypergradient is that of
        the exact value function only where this is 0.
    adjoint_residual
        ``|A q - d_y g| / |d_y g|`` in the operator A that was used; measured, not the recurrence's.
    hessian_residual
        The same in the exact inner Hessian without damping: this one shows the bias of a surrogate.
        None where it was not measured (it costs one Hessian-vector product).
    converged
        Whether `adjoint_residual` meets the solver's tolerance.
    exact
        Whether A is the exact inner Hessian, undamped, on that batch.
    iterations
        Of the linear solver.
    operator, solver
        What stood for the Hessian, and what applied its inverse.
    reason
        In a sentence: how the adjoint was found and what is approximate about it.
    damping
        Multiple of the identity inside A beyond the inner loss's own curvature.
    effective_rank
        For a low-rank surrogate, ``sum s/(s + damping)`` (see `operators.EmpiricalFisher`).
    error_bound
        Bound on ``|grad - exact|`` where `Smoothness` constants were given, from the residual in
        the exact Hessian, so also for a surrogate; None where a constraint is active.
    constraint_active
        Whether the projection of the inner problem was active: the formula above then ignores it.
    bound_is_estimate
        Whether `error_bound` is an estimate: from a better hypergradient (`hyperlearn.correction`)
        or from estimated constants, and not from constants that are known to hold.
    distance
        ``|y - y*|``: at most ``|d_y G| / mu`` where mu is known, else estimated by Newton's step.
    curvature
        Smallest eigenvalue of the exact inner Hessian at y; beyond 256 unknowns the smallest Ritz
        value of 20 Lanczos steps. Negative: y is no minimum. None where it was not looked at.
    gradient_norm
        ``|grad|``, which the error is relative to.
    refinements
        How often y and the adjoint were improved on request.
    """

    inner_stationarity: float
    adjoint_residual: float
    hessian_residual: float | None
    converged: bool
    exact: bool
    iterations: int
    operator: str
    solver: str
    reason: str
    damping: float = 0.0
    effective_rank: float | None = None
    error_bound: float | None = None
    constraint_active: bool = False
    bound_is_estimate: bool = False
    distance: float | None = None
    curvature: float | None = None
    gradient_norm: float | None = None
    refinements: int = 0

    @property
    def relative_error(self) -> float | None:
        """What is claimed of ``|grad - exact| / |exact|``; None where nothing is.

        ``e / (|grad| - e)`` for the bound e, since ``|exact| >= |grad| - e``; infinite where that
        is not positive: then the exact hypergradient may be zero.
        """
        if self.error_bound is None or self.gradient_norm is None:
            return None
        if self.error_bound == 0:
            return 0.0
        least = self.gradient_norm - self.error_bound
        return self.error_bound / least if least > 0 else math.inf

    def doubt(self, rtol: float = 1e-3) -> str:
        """Why the hypergradient is not to be trusted to this relative error; empty if it is.

        Parameters
        ----------
        rtol
            Relative error that is asked for.
        """
        if self.constraint_active:
            return "a constraint of the inner problem is active, which the formula leaves out"
        if self.indefinite:
            return f"the inner Hessian has curvature {self.curvature:.3g}: y is no minimum"
        claimed = self.relative_error
        if claimed is None:
            return "no error bound: give smoothness, or ask for an estimate"
        if not claimed <= rtol:
            kind = "estimate" if self.bound_is_estimate else "bound"
            return f"the error's {kind} is {claimed:.3g} of the hypergradient; asked for {rtol:.3g}"
        return ""

    @property
    def indefinite(self) -> bool:
        """Whether negative curvature of the inner loss was seen at y."""
        return self.curvature is not None and self.curvature < 0

    def trustworthy(self, rtol: float = 1e-3) -> bool:
        """Whether the relative error is claimed to be at most `rtol`, at a minimum (see `doubt`).

        A claim that is an estimate counts (`bound_is_estimate` tells).
        """
        return not self.doubt(rtol)

    def __str__(self) -> str:
        lines = [f"{name:>20}: {value}" for name, value in vars(self).items() if value is not None]
        if self.relative_error is not None:
            lines.append(f"{'relative_error':>20}: {self.relative_error}")
        return "\n".join(lines)


class UntrustworthyError(ArithmeticError):
    """A hypergradient with ``strict=True`` whose certificate does not carry it."""

    def __init__(self, certificate: Certificate, gradient: Any, doubt: str) -> None:
        super().__init__(f"{doubt}. The certificate:\n{certificate}")
        self.certificate, self.gradient = certificate, gradient


@dataclass(frozen=True)
class Estimate:
    """A hypergradient as a method hands it over; its certificate is worked out when asked for.

    Parameters
    ----------
    gradient
        Flat, like x.
    info
        Of the linear solve; None where there was none.
    certify
        Computes the certificate. It may cost an inner gradient and a Hessian product, which is why
        a loop asks only when it records.
    adjoint
        q, where there is one.
    """

    gradient: Tensor
    info: Info | None
    certify: Callable[[], Certificate]
    adjoint: Tensor | None = None
