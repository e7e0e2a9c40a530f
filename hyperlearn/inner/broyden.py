"""Broyden's method: Newton's with a secant approximation of A^-1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hyperlearn.inner.equation import Equation
from hyperlearn.inner.line_search import backtracking
from hyperlearn.inner.method import InnerMethod, State, row_norm, spread


@dataclass(frozen=True, kw_only=True)
class Broyden(InnerMethod):
    """``y <- y - t H F``, H an approximation of ``A^-1`` from the steps taken.

    ``H = H_0 + sum_i u_i v_i^T`` of the last `memory` updates. With a step s and the change c of F,

        good:  u = (s - H c) / (s^T H c),   v = H^T s ,      bad:  u = (s - H c) / |c|^2,   v = c ,

    either of which makes ``H c = s``. t is found by backtracking on ``|F|^2 / 2``; a step that is
    not accepted starts afresh from ``H_0``.

    Parameters
    ----------
    update
        ``"good"`` (the first of Broyden's methods) or ``"bad"`` (the second).
    memory
        Updates that are kept; beyond, it starts afresh.
    initial
        ``H_0 = initial I``. None: the multiple of I that is best along F at the first points,
        ``F^T A F / |A F|^2``, for one product with A; 1 where that is 0 or no number.
    rtol, atol, maxiter, strict
        As for `InnerMethod`.

    Notes
    -----
    A step costs about one F and ``O(n memory)``. Source: Broyden, Math. Comp. 19 (1965); Kelley,
    Iterative Methods for Linear and Nonlinear Equations (1995), section 7.
    """

    maxiter: int = 500
    update: Literal["good", "bad"] = "good"
    memory: int = 50
    initial: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("update", self.update in ("good", "bad"), "'good' or 'bad'")
        self._require("memory", self.memory >= 1, "at least 1")
        self._require("initial", self.initial != 0, "a number other than 0")

    @property
    def unrollable(self) -> str:
        """Never."""
        return "its line search is not differentiable: take FixedPointIteration or Anderson"

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F at the first points, and ``H_0``."""
        empty = Y.new_zeros(Y.shape[0], self.memory, Y.shape[1])
        count = torch.zeros(Y.shape[0], dtype=torch.long, device=Y.device)
        never = torch.zeros_like(count, dtype=torch.bool)
        F = equation.residual(Y)
        scale = torch.full_like(Y[:, 0], self.initial or 1.0)
        if self.initial is None:
            unit = F / row_norm(F).clamp_min(torch.finfo(F.dtype).tiny).to(F.dtype)[:, None]
            image = equation.product(Y, unit)
            best = (unit * image).sum(1) / image.square().sum(1)
            scale = torch.where(torch.isfinite(best) & (best != 0), best, scale)
        return {
            "y": Y, "F": F, "u": empty, "v": empty, "count": count, "scale": scale, "stuck": never,
        }  # fmt: skip

    def advance(self, equation: Equation, state: State) -> State:
        """One step, and one update of H."""
        Y, F, u, v, count = (state[name] for name in ("y", "F", "u", "v", "count"))
        scale = state["scale"][:, None]
        step = -_apply(scale, u, v, F)
        merit = F.square().sum(1) / 2
        # F^T A s is not known; if H were A^-1 it would be -|F|^2.
        following, residual, failed = backtracking(
            equation, Y, F, step, merit, -2 * merit, decrease=1e-4, loss=False, halvings=12
        )
        moved, change = following - Y, residual - F
        image = _apply(scale, u, v, change)
        if self.update == "good":
            row = _apply(scale, v, u, moved)  # H^T s
            weight = (moved * image).sum(1)
        else:
            row, weight = change, change.square().sum(1)
        usable = ~failed & (weight != 0) & torch.isfinite(weight)
        column = (moved - image) / torch.where(usable, weight, 1.0)[:, None]
        # A full memory, or a step that was of no use: afresh.
        fresh = failed | (count >= self.memory)
        u, v = (torch.where(spread(fresh, block), 0.0, block) for block in (u, v))
        count = torch.where(fresh, 0, count)
        slot = torch.nn.functional.one_hot(count, self.memory).to(Y.dtype)[..., None]
        slot = slot * (usable & ~fresh)[:, None, None]
        return {
            "y": following,
            "F": residual,
            "u": u + slot * column[:, None],
            "v": v + slot * row[:, None],
            "count": count + (usable & ~fresh),
            "scale": state["scale"],
            # Even H_0 did not help.
            "stuck": failed & (state["count"] == 0),
        }


def _apply(scale: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """``(H_0 + sum u v^T) w``."""
    along = v @ w[..., None]  # (B, m, 1)
    return scale * w + (u.mT @ along)[..., 0]
