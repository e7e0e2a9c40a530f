"""Inner problems beside their solutions, and derivatives by central differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperlearn.projections import Box
from hyperlearn.proximal import L1
from hyperlearn.solutions import argmin, fixed_point, least_squares, root

FLOAT64 = torch.float64
N = 3


def sampled(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype)


def spd(n: int, condition: float = 10.0, seed: int = 0) -> Tensor:
    """Eigenvalues from 1 to `condition`, geometrically."""
    basis, _ = torch.linalg.qr(sampled(n, n, seed=seed))
    values = torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=FLOAT64)
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def contraction(n: int, factor: float = 0.5, seed: int = 0) -> Tensor:
    """A nonsymmetric matrix of 2-norm `factor`."""
    matrix = sampled(n, n, seed=seed)
    return factor * matrix / torch.linalg.matrix_norm(matrix, 2)


def differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-3) -> Tensor:
    """Jacobian ``(*y, *x)`` by central differences of order four; f returns plain numbers."""
    columns = []
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=x.dtype)
        e[i] = step
        e = e.reshape(x.shape)
        with torch.no_grad():
            near, far = f(x + e) - f(x - e), f(x + 2 * e) - f(x - 2 * e)
        columns.append((8 * near - far) / (12 * step))
    stacked = torch.stack(columns, -1)
    return stacked.reshape(*stacked.shape[:-1], *x.shape)


def nested(vector: Tensor) -> Any:
    return {"a": vector[:2].reshape(1, 2), "b": (vector[2:],)}


def flat(tree: Any) -> Tensor:
    return torch.cat([tree["a"].reshape(-1), tree["b"][0]])


def central(f: Callable[[Tensor], Tensor], y: Tensor, step: float = 1e-6) -> Tensor:
    """Jacobian by central differences, columns along the last axis."""
    columns = [
        (f(y + step * e.reshape(y.shape)) - f(y - step * e.reshape(y.shape))) / (2 * step)
        for e in torch.eye(y.numel(), dtype=y.dtype)
    ]
    return torch.stack(columns, -1).reshape(*columns[0].shape, *y.shape)


@dataclass(frozen=True)
class Known:
    """`solve(x, **options)` beside `closed(x)`, plain torch code; x is ``(3,)``, positive.

    The inverse is formed, because the forward mode of `torch.linalg.solve` is wrong under vmap for
    a vector (torch 2.13).
    """

    solve: Callable[..., Any]
    closed: Callable[[Tensor], Tensor]


M = contraction(N, 0.5, seed=1)
A = sampled(5, N, seed=2)
B = sampled(5, N, seed=3)


def ridge(y: Tensor, x: Tensor) -> Tensor:
    return ((A @ y - B @ x) ** 2).sum() / 2 + x[0].exp() * (y @ y) / 2


def ridge_closed(x: Tensor) -> Tensor:
    return torch.linalg.inv(A.T @ A + x[0].exp() * torch.eye(N, dtype=x.dtype)) @ (A.T @ (B @ x))


def start(x: Tensor) -> Tensor:
    return torch.ones(N, dtype=x.dtype)


KNOWN: dict[str, Known] = {
    "square root": Known(
        lambda x, **options: root(lambda y, x: y**2 - x, start(x), x, **options),
        lambda x: x.sqrt(),
    ),
    "nonsymmetric linear": Known(
        lambda x, **options: root(
            lambda y, x: M @ y + 2 * x * y - torch.sin(x), start(x), x, **options
        ),
        lambda x: torch.linalg.inv(M + torch.diag(2 * x)) @ torch.sin(x),
    ),
    "fixed point": Known(
        lambda x, **options: fixed_point(
            lambda y, x: torch.cos(x) * (M @ y) + x**2, start(x), x, **options
        ),
        lambda x: torch.linalg.inv(torch.eye(N, dtype=x.dtype) - x.cos()[:, None] * M) @ x**2,
    ),
    "ridge": Known(
        lambda x, **options: argmin(ridge, torch.zeros_like(start(x)), x, **options), ridge_closed
    ),
    "logarithm": Known(
        lambda x, **options: argmin(lambda y, x: (y.exp() - x * y).sum(), start(x), x, **options),
        lambda x: x.log(),
    ),
    "least squares": Known(
        lambda x, **options: least_squares(
            lambda y, x: {"a": y - x**2, "b": 2 * (y - x**3)}, start(x), x, **options
        ),
        lambda x: (x**2 + 4 * x**3) / 5,
    ),
    "box": Known(
        lambda x, **options: argmin(
            lambda y, x: ((y - x**2) ** 2).sum(),
            start(x),
            x,
            constraint=Box(0.0, lambda x: 1.5 * x[0]),
            **options,
        ),
        lambda x: torch.minimum(x**2, 1.5 * x[0]),
    ),
    "lasso": Known(
        lambda x, **options: argmin(
            lambda y, x: ((y - x**3) ** 2).sum() / 2,
            start(x),
            x,
            penalty=L1(lambda x: x[0]),
            **options,
        ),
        lambda x: torch.relu(x**3 - x[0]),
    ),
    "equality": Known(
        lambda x, **options: argmin(
            lambda y, x: ((y - x**2) ** 2).sum() / 2,
            start(x),
            x,
            equality=lambda y, x: y.sum() - x[0] * x[1],
            **options,
        ),
        lambda x: x**2 - ((x**2).sum() - x[0] * x[1]) / N,
    ),
    "inequality": Known(
        lambda x, **options: argmin(
            lambda y, x: ((y - x**2) ** 2).sum() / 2,
            start(x),
            x,
            inequality=lambda y, x: y - 1.5 * x[0],
            **options,
        ),
        lambda x: torch.minimum(x**2, 1.5 * x[0]),
    ),
}

# A point, and four of them: each on the same side of every kink with room.
POINT = torch.tensor([0.8, 1.3, 0.6], dtype=FLOAT64)
POINTS = torch.tensor(
    [[0.8, 1.3, 0.6], [0.9, 1.5, 0.5], [0.7, 1.4, 0.55], [1.1, 1.6, 0.9]], dtype=FLOAT64
)
