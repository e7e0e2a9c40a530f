"""Small PDEs whose solutions are known, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hyperlearn as hl
from hyperlearn.experiments.references import elliptic, points

SQUARE = points.UNIT_SQUARE


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(x: Tensor) -> Tensor:
    """A smooth solution with a nonzero mean."""
    return torch.sin(torch.pi * x[:, 0]) * torch.sin(torch.pi * x[:, 1])


def source(x: Tensor) -> Tensor:
    u = exact(x)
    return 2 * torch.pi**2 * u + u**3


def residual(u: Tensor, lap_u: Tensor, data: Tensor) -> Tensor:
    return -lap_u + u**3 - data


def elliptic_pde(
    interior: int = 120, boundary: int = 48, held: int = 60, seed: int = 0
) -> tuple[hl.PDE, hl.Equation]:
    """``-Lap u + u^3 = f`` and its equation at validation points."""
    g = generator(seed)
    inside = points.uniform_interior(interior, SQUARE, g)
    edge = points.uniform_boundary(boundary, SQUARE, g)
    other = points.uniform_interior(held, SQUARE, g)
    equation = hl.Equation(residual, inside, source(inside), name="interior")
    pde = hl.PDE([equation, hl.Equation(lambda u: u, edge, name="boundary")])
    return pde, equation.at(other, source(other))


def case_a(seed: int = 0, sizes: tuple[int, int, int] = (900, 300, 900)) -> dict[str, Any]:
    """Case A of arXiv 2510.05568."""
    g = generator(seed)
    inside = points.uniform_interior(sizes[0], SQUARE, g)
    edge = points.uniform_boundary(sizes[1], SQUARE, g)
    other = points.uniform_interior(sizes[2], SQUARE, g)
    equation = hl.Equation(residual, inside, elliptic.source(inside))
    return {
        "pde": hl.PDE([equation, hl.Equation(lambda u: u, edge)]),
        "held": equation.at(other, elliptic.source(other)),
    }
