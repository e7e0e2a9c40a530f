"""The Monge-Ampere equation with a smooth convex solution.

    det D^2 u = f   in (0, 1)^2,     u = g   on the boundary,     u convex.

The exact solution is the smooth radial one on which solvers of this equation are usually tried
first, for example in Benamou, Froese and Oberman (2010), M2AN 44(4), and, with its centre in the
middle of the square, in Chen, Owhadi and Schaefer (2023), arXiv:2304.01294; g is its trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperlearn.experiments.references.points import UNIT_SQUARE, coordinates

BOX = UNIT_SQUARE


def solution(x: Tensor, *, center: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """``u = exp(r^2 / 2)``, r the distance from the centre; also the boundary values g.

    Parameters
    ----------
    x
        Points ``(..., 2)``.
    center
        Where u is least; ``(0.5, 0.5)`` makes the problem symmetric.

    Returns
    -------
    Tensor
        ``(...)``.

    Examples
    --------
    >>> solution(torch.zeros(1, 2, dtype=torch.float64))
    tensor([1.], dtype=torch.float64)
    """
    return torch.exp(_squared_radius(x, center) / 2)


def source(x: Tensor, *, center: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """``f = (1 + r^2) exp(r^2)``; points ``(..., 2)``, result ``(...)``."""
    squared = _squared_radius(x, center)
    return (1 + squared) * torch.exp(squared)


def _squared_radius(x: Tensor, center: tuple[float, float]) -> Tensor:
    first, second = coordinates(x)
    return (first - center[0]) ** 2 + (second - center[1]) ** 2
