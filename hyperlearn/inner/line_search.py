"""Step lengths that lower a merit function: backtracking, each member of a block by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import finite, row_norm, spread


def backtracking(
    equation: Equation,
    Y: Tensor,
    F: Tensor,
    step: Tensor,
    merit: Tensor,
    slope: Tensor,
    *,
    decrease: float,
    loss: bool,
    rounding: Tensor | None = None,
    halvings: int = 40,
) -> tuple[Tensor, Tensor, Tensor]:
    """``Y + t step`` with the first t of 1, 1/2, 1/4, ... that is accepted.

    Accepted is ``merit(Y + t step) <= merit(Y) + decrease t slope`` (Armijo, 1966). Near the
    solution a loss stops telling points apart at ``sqrt(eps)`` of the distance; so a point whose
    loss is the same up to rounding is accepted too if its gradient is half as long (the purpose of
    Hager & Zhang, 2005, eq. 4); where no gradient is, rounding is all that is left.

    Parameters
    ----------
    equation, Y, F, step
        Problem; points, F there and directions, ``(B, n)``.
    merit, slope
        At Y, ``(B,)``; slope is that of merit along the step.
    decrease
        Share of the slope that is asked for.
    loss
        Whether merit is the loss of `equation`, and not ``|F|^2 / 2``.
    rounding
        Of a loss: how far rounding may have moved it, ``(B,)``; None for a few units in its last
        place, too few where its terms cancel.

    Returns
    -------
    Y, F, stuck
        New points, F there, and which members found none (they stay).
    """
    if rounding is None:
        rounding = 8 * torch.finfo(Y.dtype).eps * merit.abs()
    t, norms = torch.ones_like(merit), row_norm(F)
    best, residual = Y, F
    searching = finite(step) & (slope < 0)
    stuck = ~searching
    for _ in range(halvings):
        trial = torch.where(spread(searching, Y), Y + spread(t, Y) * step, best)
        found = equation.residual(trial)
        if loss:
            value = equation.value(trial)
            same = ((value - merit).abs() <= rounding) & (row_norm(found) <= norms / 2)
        else:
            value = found.square().sum(1) / 2
            same = torch.zeros_like(searching)
        good = (value <= merit + decrease * t * slope) & finite(found) | same
        good = good & searching
        best = torch.where(spread(good, Y), trial, best)
        residual = torch.where(spread(good, Y), found, residual)
        searching = searching & ~good
        if not bool(searching.any()):
            break
        t = torch.where(searching, t / 2, t)
    return best, residual, stuck | searching


def rounding_of(merit: Tensor, Y: Tensor, A: Tensor | None) -> Tensor:
    """How far rounding may have moved a loss, ``(B,)``: ``8 eps (|f| + |y|^T |A| |y|)``.

    Those are the terms of ``y^T A y / 2``. They may cancel, and then the loss says less of itself.
    """
    terms = merit.abs()
    if A is not None:
        sizes = Y.abs().to(A.dtype)
        terms = terms + (sizes * (A.abs() @ sizes[..., None])[..., 0]).sum(1).to(merit.dtype)
    return 8 * torch.finfo(Y.dtype).eps * terms
