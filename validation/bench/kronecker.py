"""Products with Kronecker products: reshapes by hand, einsum, linear_operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import operators as ops
from validation.bench import limits
from validation.bench.timing import Bench


def by_hand(factors: list[Tensor], n: int) -> Callable[[Tensor], Tensor]:
    """One matrix product a factor, as one would write it for these shapes."""

    def two(v: Tensor) -> Tensor:
        A, B = factors
        if v.ndim == 1:
            return (A @ v.reshape(n, n) @ B.T).reshape(-1)
        return (B @ (A @ v.reshape(n, -1)).reshape(n, n, -1)).reshape(v.shape)

    def three(v: Tensor) -> Tensor:
        A, B, C = factors
        x = B @ (A @ v.reshape(n, -1)).reshape(n, n, -1)
        if v.ndim == 1:
            return (x.reshape(n * n, n) @ C.T).reshape(-1)
        return (C @ x.reshape(n * n, n, -1)).reshape(v.shape)

    return two if len(factors) == 2 else three


def by_einsum(factors: list[Tensor], n: int) -> Callable[[Tensor], Tensor]:
    equation = {2: "ai,bj,ijk->abk", 3: "ai,bj,cl,ijlk->abck"}[len(factors)]
    sizes = [n] * len(factors)
    return lambda v: torch.einsum(equation, *factors, v.reshape(*sizes, -1)).reshape(v.shape)


def product(bench: Bench) -> None:
    """``(A (x) B) v`` and ``(A (x) B (x) C) v``, vectors and blocks of 16."""
    theirs = bench.optional("linear_operator")
    for count, n in ((2, 300), (3, 60)):
        for columns in (1, 16):
            product_of(bench, count, n, columns, theirs)


def product_of(bench: Bench, count: int, n: int, columns: int, linear_operator: Any) -> None:
    """The product of so many factors n x n with so many columns."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [draw(n, n) for _ in range(count)]
    v = draw(n**count) if columns == 1 else draw(n**count, columns)
    A = ops.Kronecker(*map(ops.Dense, factors))
    hand, einsum = by_hand(factors, n), by_einsum(factors, n)
    rivals: dict[str, Callable[[], object]] = {
        "Kronecker": lambda: A @ v,
        "reshapes by hand": lambda: hand(v),
        "torch.einsum": lambda: einsum(v),
    }
    if linear_operator:
        theirs = linear_operator.operators.KroneckerProductLinearOperator(*factors)
        rivals["linear_operator"] = lambda: theirs @ v
    flops = columns * A.cost.flops
    limit = "one matrix product of as many flops"
    bench.compare(
        f"Kronecker product of {count} matrices {n} x {n}, "
        f"{'a vector' if columns == 1 else f'a block of {columns}'}, float64",
        rivals,
        lambda medians: (
            f"{flops / 1e9:.2f} Gflop; ours runs at {flops / 1e9 / medians['Kronecker']:.0f} "
            f"Gflop/s, one matrix product at {flops / 1e9 / medians[limit]:.0f}."
        ),
        tolerance=1e-12,
        beside={limit: limits.matrix_product(flops, torch.float64)},
    )
