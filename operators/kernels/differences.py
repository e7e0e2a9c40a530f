"""Coordinates of ``x - y``, and its square, at all pairs of points."""

from __future__ import annotations

import torch
from torch import Tensor


def differences(x: Tensor, y: Tensor) -> list[Tensor]:
    """``x_a - y_a``, ``(..., n, m)`` for each coordinate a of ``(..., n, d)`` and ``(..., m, d)``.

    The entries of a row are neighbours in memory: of points as they are, d apart, it takes several
    times as long.
    """
    columns, rows = x.mT.contiguous(), y.mT.contiguous()
    return [columns[..., a, :, None] - rows[..., a, None, :] for a in range(x.shape[-1])]


def half_squares(p: list[Tensor]) -> Tensor:
    """``|x - y|^2 / 2`` of `differences`: exact at coincident points."""
    s = p[0].square()
    for component in p[1:]:
        s = torch.addcmul(s, component, component)
    return 0.5 * s
