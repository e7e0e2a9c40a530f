"""Test problems of nonlinear solvers, with what is known of their solutions.

Systems are of Moré, Garbow & Hillstrom, ACM TOMS 7 (1981), by their numbers there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperlearn.conditions import Conditions
from hyperlearn.implicit_function import Outer
from hyperlearn.inner import Equation
from operators import Space

FLOAT64 = torch.float64


def equation(kind: type[Conditions], function: Callable[..., Any], y0: Tensor, x: Any) -> Equation:
    """A single problem, as a method sees it."""
    outer, tensors = Outer.of(x)
    return Equation(kind(function, Space.of(y0)), outer, tensors)


def helical_valley(y: Tensor, x: Any = None) -> Tensor:
    """Number 7; root (1, 0, 0) from (-1, 0, 0)."""
    theta = torch.atan2(y[1], y[0]) / (2 * math.pi)
    radius = (y[0] ** 2 + y[1] ** 2).sqrt()
    return torch.stack([10 * (y[2] - 10 * theta), 10 * (radius - 1), y[2]])


def powell_singular(y: Tensor, x: Any = None) -> Tensor:
    """Number 13; root 0, where the Jacobian is singular, from (3, -1, 0, 1)."""
    return torch.stack(
        [
            y[0] + 10 * y[1],
            5**0.5 * (y[2] - y[3]),
            (y[1] - 2 * y[2]) ** 2,
            10**0.5 * (y[0] - y[3]) ** 2,
        ]
    )


def powell_badly_scaled(y: Tensor, x: Any = None) -> Tensor:
    """Number 3; root (1.098e-5, 9.106) from (0, 1)."""
    return torch.stack([1e4 * y[0] * y[1] - 1, (-y[0]).exp() + (-y[1]).exp() - 1.0001])


def trigonometric(y: Tensor, x: Any = None) -> Tensor:
    """Number 26 from 1/n: y_i = 0 is a root."""
    n = len(y)
    i = torch.arange(1, n + 1, dtype=y.dtype)
    return n - torch.cos(y).sum() + i * (1 - torch.cos(y)) - torch.sin(y)


def broyden_tridiagonal(y: Tensor, x: Any = None) -> Tensor:
    """Number 30, from -1."""
    left = torch.nn.functional.pad(y[:-1], (1, 0))
    right = torch.nn.functional.pad(y[1:], (0, 1))
    return (3 - 2 * y) * y - left - 2 * right + 1


def brown_almost_linear(y: Tensor, x: Any = None) -> Tensor:
    """Number 27, from 1/2."""
    n = len(y)
    head = y[:-1] + y.sum() - (n + 1)
    return torch.cat([head, y.prod()[None] - 1])


def rosenbrock_residuals(y: Tensor, x: Any = None) -> Tensor:
    """Number 1; (1, 1) from (-1.2, 1)."""
    return torch.stack([10 * (y[1] - y[0] ** 2), 1 - y[0]])


def rosenbrock(y: Tensor, x: Any = None) -> Tensor:
    return rosenbrock_residuals(y).square().sum()


def at(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=FLOAT64)


SYSTEMS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "helical valley": (helical_valley, at(-1, 0, 0)),
    "trigonometric": (trigonometric, torch.full((5,), 0.2, dtype=FLOAT64)),
    "broyden tridiagonal": (broyden_tridiagonal, -torch.ones(12, dtype=FLOAT64)),
    "brown almost linear": (brown_almost_linear, torch.full((5,), 0.5, dtype=FLOAT64)),
    "powell badly scaled": (powell_badly_scaled, at(0, 1)),
}
