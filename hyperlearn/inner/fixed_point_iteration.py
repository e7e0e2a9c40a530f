"""The fixed-point iteration, plain and with Anderson's acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import InnerMethod, State, solved, wide


@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(InnerMethod):
    """``y <- y - step_size F(y, x)``: for ``F = y - T(y, x)`` and step 1 it is ``y <- T(y, x)``.

    Converges where ``I - step_size A`` contracts. For other conditions than those of a fixed point
    it is Richardson's iteration, of a loss the gradient method.

    Parameters
    ----------
    step_size
        In (0, 1) it damps.
    rtol, atol, maxiter, strict
        As for `InnerMethod`.
    """

    maxiter: int = 5000
    step_size: float = 1.0

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F at the first points."""
        return {"y": Y, "F": equation.residual(Y)}

    def advance(self, equation: Equation, state: State) -> State:
        """One step."""
        Y = state["y"] - self.step_size * state["F"]
        return {"y": Y, "F": equation.residual(Y)}


@dataclass(frozen=True, kw_only=True)
class Anderson(InnerMethod):
    """The fixed-point iteration on the best affine combination of the last points.

    With ``G = -F`` and differences ``dy_i, dG_i`` of the last `memory` steps,

        gamma = argmin |G - sum_i gamma_i dG_i|^2 + ridge |gamma|^2 ,
        y <- y + beta G - sum_i gamma_i (dy_i + beta dG_i) ,

    the residuals scaled to unit norm for the ridge. On a linear problem it is GMRES in disguise
    (Walker & Ni). Where the residual has grown ten times over the least so far, the history is
    dropped.

    Parameters
    ----------
    memory
        Differences that are kept.
    beta
        Step of the underlying iteration.
    ridge
        Relative to the squared largest difference; the least squares of nearly parallel differences
        would amplify rounding.
    rtol, atol, maxiter, strict
        As for `InnerMethod`.

    Notes
    -----
    A step costs one F, and ``O(n memory + memory^3)``. Source: Walker & Ni, SIAM J. Numer. Anal. 49
    (2011), the form with gamma; Bai, Kolter & Koltun (2019), arXiv:1909.01377, use it for
    equilibrium models.
    """

    memory: int = 5
    beta: float = 1.0
    ridge: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("memory", self.memory >= 1, "at least 1")
        self._require("ridge", self.ridge >= 0, "a number >= 0")

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F at the first points, and no differences."""
        F = equation.residual(Y)
        empty = Y.new_zeros(Y.shape[0], self.memory, Y.shape[1])
        least = torch.linalg.vector_norm(wide(F), dim=1)
        return {"y": Y, "F": F, "dy": empty, "dG": empty, "least": least}

    def advance(self, equation: Equation, state: State) -> State:
        """One accelerated step."""
        Y, G, dy, dG = state["y"], -state["F"], state["dy"], state["dG"]
        D = wide(dG)  # (B, m, n); rows of zeros where there is no history
        gram = D @ D.mT
        largest = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        # Zero rows of the history get a one on the diagonal, and gamma = 0 there.
        used = gram.diagonal(dim1=1, dim2=2) > 0
        eps = torch.finfo(D.dtype).eps
        regular = torch.diag_embed(torch.where(used, (max(self.ridge, eps) * largest)[..., 0], 1.0))
        gamma = solved(gram + regular, D @ wide(G)[..., None]).to(Y.dtype)
        # A constant for derivatives: any combination whose weights sum to 1 has the fixed point,
        # and the derivative of this one goes through a matrix that is singular at convergence.
        gamma = torch.where(torch.isfinite(gamma), gamma, 0.0).detach()
        step = self.beta * G - ((dy + self.beta * dG).mT @ gamma)[..., 0]
        following = Y + step
        F = equation.residual(following)
        norm = torch.linalg.vector_norm(wide(F), dim=1)
        kept = (norm <= 10 * state["least"])[:, None, None]
        moved, changed = (following - Y)[:, None], (-F - G)[:, None]
        return {
            "y": following,
            "F": F,
            "dy": torch.where(kept, torch.cat([moved, dy[:, :-1]], 1), 0.0),
            "dG": torch.where(kept, torch.cat([changed, dG[:, :-1]], 1), 0.0),
            "least": torch.minimum(norm, state["least"]),
        }
