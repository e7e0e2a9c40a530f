"""Gram matrices of values and Laplacians by closed forms that the library does not share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from operators import LinearOperator, Space, Structure

# (k, Lap k, Lap Lap k) of the distance r, for length a in dimension d.
Forms = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def rbf(r: Tensor, a: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    K = torch.exp(-(r**2) / (2 * a**2))
    first = (r**2 - d * a**2) / a**4 * K
    second = (d * (d + 2) * a**4 - 2 * (d + 2) * a**2 * r**2 + r**4) / a**8 * K
    return K, first, second


def matern52(r: Tensor, a: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    s = math.sqrt(5)
    e = torch.exp(-s * r / a)
    K = (1 + s * r / a + 5 * r**2 / (3 * a**2)) * e
    first = -5 * (d * a**2 + s * d * a * r - 5 * r**2) / (3 * a**4) * e
    second = 25 * (d * (d + 2) * a**2 - (3 + 2 * d) * s * a * r + 5 * r**2) / (3 * a**6) * e
    return K, first, second


def matern72(r: Tensor, a: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    s = math.sqrt(7)
    e = torch.exp(-s * r / a)
    x = s * r / a
    K = (1 + x + 2 * x**2 / 5 + x**3 / 15) * e
    first = (
        -7
        * (3 * d * a**3 + 3 * s * d * a**2 * r + 7 * (d - 1) * a * r**2 - 7 * s * r**3)
        / (15 * a**5)
        * e
    )
    second = (
        49
        * (d * (d + 2) * a**3 + d * (d + 2) * s * a**2 * r - 14 * (d + 2) * a * r**2 + 7 * s * r**3)
        / (15 * a**7)
        * e
    )
    return K, first, second


class PointGram(LinearOperator):
    """``L_i L_j k`` for values (order 0) and Laplacians (order 2), times an amplitude."""

    _parameters = ("points", "length", "amplitude")

    def __init__(
        self,
        forms: Forms,
        points: Tensor,
        orders: Tensor,
        length: Tensor | float,
        amplitude: Tensor | float = 1.0,
    ) -> None:
        space = Space.flat(len(points), points.dtype, points.device)
        super().__init__(space, space, Structure(positive_definite=True))
        self.forms, self.points, self.orders = forms, points, orders
        self.length = torch.as_tensor(length, dtype=points.dtype)
        self.amplitude = torch.as_tensor(amplitude, dtype=points.dtype)

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        x, y = self.points[rows], self.points[columns]
        square = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
        # The root has no derivative at zero, where the forms need none.
        r = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
        zero, first, second = self.forms(r, self.length, self.points.shape[1])
        many = (self.orders[rows] > 0).long()[..., :, None] + (self.orders[columns] > 0).long()[
            ..., None, :
        ]
        entries = torch.where(many == 0, zero, torch.where(many == 1, first, second))
        return self.amplitude * entries

    def _exact_diagonal(self) -> Tensor:
        index = torch.arange(self.shape[0])[:, None]
        return self.submatrix(index, index)[:, 0, 0]

    def _matvec(self, v: Tensor) -> Tensor:
        return self.to_dense() @ v

    def _matmat(self, block: Tensor) -> Tensor:
        return self.to_dense() @ block

    def to_dense(self) -> Tensor:
        index = torch.arange(self.shape[0])
        return self.submatrix(index, index)


def grid(side: int, d: int = 2) -> Tensor:
    axis = torch.linspace(0, 1, side, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * d).reshape(-1, d)


def cloud(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_and_laplacians(points: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([points, points]), torch.tensor([0, 2]).repeat_interleave(len(points))
