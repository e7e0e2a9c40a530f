"""The cubic elliptic equation with a solution of limited smoothness.

    -Lap u + u^3 = f   in (0, 1)^2,     u = 0   on the boundary,

    u = sum_{k=1}^{K} k^-p sin(k pi x) sin(k pi y),     K = 600, p = 6.

Source of the task: Chen, Owhadi and Schaefer (2023), arXiv:2304.01294.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperlearn.experiments.references.points import UNIT_SQUARE, in_slabs

BOX = UNIT_SQUARE
# Two tables of sines of 1024 x 600 float64 numbers stay near the cache.
_ROWS = 1024


def solution(x: Tensor, *, terms: int = 600, decay: float = 6.0) -> Tensor:
    """``u = sum_k k^-p sin(k pi x) sin(k pi y)``.

    Parameters
    ----------
    x
        Points ``(..., 2)``.
    terms
        K; at least 1.
    decay
        p.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    ValueError
        `terms` is not positive.

    Notes
    -----
    Costs ``2 K`` sines a point; the points pass in slabs, so that memory does not grow with them.

    Examples
    --------
    >>> x = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    >>> solution(x, terms=3) * 3**6  # 1 + 0 + 3^-6
    tensor([730.], dtype=torch.float64)
    """
    return _series(x, _wave_numbers(x, terms) ** -decay)


def source(x: Tensor, *, terms: int = 600, decay: float = 6.0) -> Tensor:
    """``f = -Lap u + u^3`` of `solution`, with the same arguments and errors."""
    k = _wave_numbers(x, terms)
    both = _series(x, torch.stack([k**-decay, 2 * math.pi**2 * k ** (2 - decay)], dim=1))
    return both[..., 1] + both[..., 0] ** 3


def _wave_numbers(x: Tensor, terms: int) -> Tensor:
    if terms < 1:
        raise ValueError(f"terms={terms}; expected at least 1")
    return torch.arange(1, terms + 1, dtype=x.dtype, device=x.device)


def _series(x: Tensor, coefficients: Tensor) -> Tensor:
    """Sums with the coefficients ``(K,)`` or ``(K, m)``: ``(...)`` or ``(..., m)``."""
    angle = math.pi * _wave_numbers(x, len(coefficients))

    def value(first: Tensor, second: Tensor) -> Tensor:
        return (
            torch.sin(first[:, None] * angle) * torch.sin(second[:, None] * angle)
        ) @ coefficients

    return in_slabs(value, x, _ROWS)
