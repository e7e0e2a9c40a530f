"""The semilinear elliptic equation with a cubic term.

    -Lap u + u^3 = f   in (0, 1)^2,     u = 0   on the boundary.

The exact solution has one slow and one fast mode, max|u| about 4.9. Source of the task: Chen et
al. (2021), arXiv:2103.12959, there with a fast mode of half the height.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperlearn.experiments.references.points import UNIT_SQUARE, coordinates

BOX = UNIT_SQUARE


def solution(x: Tensor, *, amplitude: float = 4.0, frequency: int = 4) -> Tensor:
    """``u = sin(pi x) sin(pi y) + A sin(k pi x) sin(k pi y)``.

    Parameters
    ----------
    x
        Points ``(..., 2)``.
    amplitude
        A, of the fast mode.
    frequency
        k, of the fast mode.

    Returns
    -------
    Tensor
        ``(...)``.

    Examples
    --------
    >>> solution(torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    tensor([1.], dtype=torch.float64)
    """
    slow, fast = _modes(x, amplitude, frequency)
    return slow + fast


def source(x: Tensor, *, amplitude: float = 4.0, frequency: int = 4) -> Tensor:
    """``f = -Lap u + u^3`` of `solution`; points ``(..., 2)``, result ``(...)``."""
    slow, fast = _modes(x, amplitude, frequency)
    return 2 * math.pi**2 * (slow + frequency**2 * fast) + (slow + fast) ** 3


def _modes(x: Tensor, amplitude: float, frequency: int) -> tuple[Tensor, Tensor]:
    first, second = (math.pi * c for c in coordinates(x))
    slow = torch.sin(first) * torch.sin(second)
    return slow, amplitude * torch.sin(frequency * first) * torch.sin(frequency * second)
