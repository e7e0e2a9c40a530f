"""Who solves with a Gram matrix: dense Cholesky, preconditioned CG, sparse Cholesky; and which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from operators import KernelGram, Representers
from solvers.dense.factor import CholeskyFactor


class Factor(Protocol):
    """What stands for ``A = K + D``; all of it differentiable."""

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``(n,)`` or ``(n, k)``."""

    def product(self, v: Tensor) -> Tensor:
        """``A v``, in the entries of A themselves."""

    def logdet(self) -> Tensor:
        """``log det A``."""

    def inverse(self) -> Tensor:
        """``A^-1``, dense."""


@dataclass(frozen=True)
class Backend(ABC):
    """Settings of a way to solve."""

    @abstractmethod
    def factor(self, rows: Representers, diagonal: Tensor) -> Factor:
        """For ``A = K + diag(diagonal)`` with the Gram matrix K of the rows."""

    def part(self, rows: Representers, diagonal: Tensor, factor: Factor, index: Tensor) -> Tensor:
        """Rows and columns of A with these indices, dense."""
        part = KernelGram(rows).submatrix(index, index)
        return _with_diagonal(part, diagonal[index])


@dataclass(frozen=True)
class Dense(Backend):
    """Dense Cholesky: ``n^3 / 3`` flops, ``8 n^2`` bytes twice in float64. Exact."""

    def factor(self, rows: Representers, diagonal: Tensor) -> Factor:  # noqa: D102
        return _DenseFactor(rows, diagonal)

    def part(  # noqa: D102
        self, rows: Representers, diagonal: Tensor, factor: Factor, index: Tensor
    ) -> Tensor:
        assert isinstance(factor, _DenseFactor)
        return factor.matrix[index][:, index]


class _DenseFactor:
    def __init__(self, rows: Representers, diagonal: Tensor) -> None:
        matrix = KernelGram(rows).to_dense()
        self.matrix = _with_diagonal(matrix, diagonal)
        self.cholesky = CholeskyFactor(self.matrix)

    def solve(self, b: Tensor) -> Tensor:
        return self.cholesky.solve(b)

    def product(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def logdet(self) -> Tensor:
        return self.cholesky.logdet()

    def inverse(self) -> Tensor:
        return self.cholesky.inverse()


def _with_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (matrix.requires_grad or diagonal.requires_grad):
        return _AddDiagonal.apply(matrix, diagonal)
    matrix.diagonal().add_(diagonal)
    return matrix


class _AddDiagonal(torch.autograd.Function):
    """``K + diag(d)``, written into K: nothing else reads it."""

    @staticmethod
    def forward(ctx, matrix: Tensor, diagonal: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        matrix.diagonal().add_(diagonal)
        ctx.mark_dirty(matrix)
        return matrix

    @staticmethod
    def backward(ctx, matrix_bar: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        return matrix_bar, matrix_bar.diagonal()
