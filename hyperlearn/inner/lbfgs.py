"""L-BFGS: a quasi-Newton method of limited memory for losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlearn.conditions import Stationary
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import InnerMethod, State, finite, row_norm, spread


@dataclass(frozen=True, kw_only=True)
class LBFGS(InnerMethod):
    """``y <- y - t H g``, H from the last `memory` steps s and changes c of the gradient.

    H is that of the two-loop recursion with ``H_0 = (s.c / c.c) I``; t meets the conditions of
    Wolfe by bisection and doubling,

        f(y + t d) <= f(y) + c1 t g.d ,     g(y + t d).d >= c2 g.d ,

    so that ``s.c > 0`` and H stays positive definite. Where rounding hides the decrease of f, the
    slope decides: ``(2 c1 - 1) g.d >= g(y + t d).d`` (the approximate condition of Hager & Zhang).

    Parameters
    ----------
    memory
        Pairs that are kept.
    c1, c2
        As above, ``0 < c1 < 1/2 < c2 < 1``.
    rtol, atol, maxiter, strict
        As for `InnerMethod`.

    Notes
    -----
    A step costs one or two gradients and ``4 n memory`` flops. The members of a batch are searched
    side by side. Source: Nocedal, Math. Comp. 35 (1980); Nocedal & Wright (2006), algorithm 7.5;
    Lewis & Overton, Math. Program. 141 (2013), algorithm 2.6, for the bisection; Hager & Zhang,
    SIAM J. Optim. 16 (2005), eq. 4.
    """

    maxiter: int = 2000
    memory: int = 20
    c1: float = 1e-4
    c2: float = 0.9

    solves = (Stationary,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("memory", self.memory >= 1, "at least 1")
        self._require("c1", 0 < self.c1 < 0.5, "a number in (0, 1/2)")
        self._require("c2", 0.5 < self.c2 < 1, "a number in (1/2, 1)")

    @property
    def unrollable(self) -> str:
        """Never."""
        return "its line search is not differentiable: take GradientDescent(step_size=...)"

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """Loss and gradient at the first points, and no pairs."""
        empty = Y.new_zeros(Y.shape[0], self.memory, Y.shape[1])
        return {
            "y": Y,
            "F": equation.residual(Y),
            "value": equation.value(Y),
            "s": empty,
            "c": empty,
            "stuck": torch.zeros(Y.shape[0], dtype=torch.bool, device=Y.device),
        }

    def advance(self, equation: Equation, state: State) -> State:
        """One direction and one line search."""
        Y, g, value, s, c = (state[name] for name in ("y", "F", "value", "s", "c"))
        d = -_two_loops(g, s, c)
        slope = (g * d).sum(1)
        downhill = (slope < 0) & finite(d)
        d = torch.where(spread(downhill, d), d, -g)
        slope = torch.where(downhill, slope, -g.square().sum(1))
        # Without pairs the scale is unknown: the first trial is of unit length.
        unscaled = (s[:, 0].square().sum(1) == 0) | ~downhill
        first = torch.where(unscaled, 1 / row_norm(d).to(d.dtype).clamp_min(1.0), 1.0)
        new_y, new_g, new_value, moved = self._search(equation, Y, d, value, slope, first, state)
        step, change = new_y - Y, new_g - g
        # s.c > 0 by Wolfe's second condition; in rounding it may fail, and the pair is left out.
        curved = (step * change).sum(1)
        eps = torch.finfo(Y.dtype).eps
        keep = moved & (curved > eps * row_norm(step) * row_norm(change))
        restart = ~moved & ~unscaled
        pairs = {}
        for name, latest, old in (("s", step, s), ("c", change, c)):
            pushed = torch.cat([latest[:, None], old[:, :-1]], 1)
            kept = torch.where(spread(keep, old), pushed, old)
            pairs[name] = torch.where(spread(restart, old), 0.0, kept)
        # Only where steepest descent itself has failed is there nothing left to try.
        return {"y": new_y, "F": new_g, "value": new_value, "stuck": ~moved & unscaled} | pairs

    def _search(
        self,
        equation: Equation,
        Y: Tensor,
        d: Tensor,
        value: Tensor,
        slope: Tensor,
        t: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
        searching = torch.ones_like(t, dtype=torch.bool)
        best_y, best_g, best_value = Y, state["F"], value
        # Below this, differences of f say nothing: its rounding, which is that of its terms and may
        # be many units in its own last place.
        rounding = torch.finfo(Y.dtype).eps ** (2 / 3) * value.abs()
        for _ in range(40):
            trial = Y + spread(t, Y) * d
            g, f = equation.residual(trial), equation.value(trial)
            along = (g * d).sum(1)
            armijo = f <= value + self.c1 * t * slope
            approximate = (f <= value + rounding) & (along <= (2 * self.c1 - 1) * slope)
            low_enough = (armijo | approximate) & finite(g) & torch.isfinite(f)
            done = low_enough & (along >= self.c2 * slope)
            # The best so far is kept: where the search ends early it is still a step downhill.
            better = searching & low_enough
            best_y = torch.where(spread(better, Y), trial, best_y)
            best_g = torch.where(spread(better, Y), g, best_g)
            best_value = torch.where(better, f, best_value)
            searching = searching & ~done
            if not bool(searching.any()):
                break
            high = torch.where(searching & ~low_enough, t, high)
            low = torch.where(searching & low_enough, t, low)
            middle = torch.where(torch.isinf(high), 2 * t, (low + high) / 2)
            t = torch.where(searching, middle, t)
        moved = (best_y != Y).any(1)
        return best_y, best_g, best_value, moved


def _two_loops(g: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """``H g``; pairs are newest first, and zero where there is none."""
    curved = (s * c).sum(2)  # (B, m)
    rho = torch.where(curved > 0, 1 / torch.where(curved > 0, curved, 1.0), 0.0)
    q, alphas = g, []
    for i in range(s.shape[1]):
        alpha = rho[:, i] * (s[:, i] * q).sum(1)
        q = q - alpha[:, None] * c[:, i]
        alphas.append(alpha)
    length = c[:, 0].square().sum(1)
    gamma = torch.where(length > 0, curved[:, 0] / torch.where(length > 0, length, 1.0), 1.0)
    q = gamma[:, None] * q
    for i in reversed(range(s.shape[1])):
        beta = rho[:, i] * (c[:, i] * q).sum(1)
        q = q + (alphas[i] - beta)[:, None] * s[:, i]
    return q
