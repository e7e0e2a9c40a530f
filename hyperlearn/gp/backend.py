"""Who solves with a Gram matrix: `Backend`, what it makes, and `Dense`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from operators import Functionals, Kernel, KernelGram, Representers
from solvers import CholeskyFactor

# Functionals, a dictionary of them by field for each block.
Blocks = Sequence[Mapping[str, Functionals]]


@dataclass(frozen=True, eq=False)
class System:
    """``A = S K S + D``: the Gram matrix of functionals, scaled, plus a diagonal.

    Parameters
    ----------
    kernels
        By field.
    blocks
        Functionals, not scaled.
    rows
        The same, scaled and lifted.
    scale, diagonal
        ``(n,)``: S and D.
    """

    kernels: Mapping[str, Kernel]
    blocks: Blocks
    rows: Representers
    scale: Tensor
    diagonal: Tensor


class Factor(ABC):
    """What stands for A, and for the process that it is the covariance of; all differentiable.

    By default the process has the kernels' own covariances.
    """

    system: System

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``(n,)`` or ``(n, k)``."""

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """``A v``, in the entries of A themselves."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """``log det A``."""

    @abstractmethod
    def inverse(self) -> Tensor:
        """``A^-1``, dense."""

    def evaluate(self, blocks: Blocks, alpha: Tensor) -> Tensor:
        """``k(M, L) S alpha``, ``(m,)``: tile by tile, ``m n`` evaluations."""
        return self._cross(blocks) @ alpha

    def cross(self, blocks: Blocks) -> Tensor:
        """``k(M, L) S``, ``(m, n)``."""
        return self._cross(blocks).to_dense()

    def variances(self, blocks: Blocks) -> Tensor:
        """``M_i M_i k``, ``(m,)``."""
        return Representers(self.system.kernels, blocks).variances()

    def covariances(self, blocks: Blocks) -> Tensor:
        """``k(M, M)``, ``(m, m)``."""
        return KernelGram(Representers(self.system.kernels, blocks)).to_dense()

    def _cross(self, blocks: Blocks) -> KernelGram:
        return KernelGram(Representers(self.system.kernels, blocks), self.system.rows)


@dataclass(frozen=True)
class Backend(ABC):
    """Settings of a way to solve."""

    @abstractmethod
    def factor(self, system: System, previous: Factor | None = None) -> Factor:
        """For one system.

        Parameters
        ----------
        system
            ``A = S K S + D``.
        previous
            That of the same functionals with other coefficients: what does not depend on these, or
            may be a little stale, is taken from it where the kernels have the same parameters.
        """

    def part(self, rows: Representers, diagonal: Tensor, factor: Factor, index: Tensor) -> Tensor:
        """Rows and columns of A with these indices, dense."""
        part = KernelGram(rows).submatrix(index, index)
        return _with_diagonal(part, diagonal[index])


@dataclass(frozen=True)
class Dense(Backend):
    """Dense Cholesky: ``n^3 / 3`` flops, ``8 n^2`` bytes twice in float64. Exact."""

    def factor(self, system: System, previous: Factor | None = None) -> Factor:  # noqa: D102
        return _DenseFactor(system)

    def part(  # noqa: D102
        self, rows: Representers, diagonal: Tensor, factor: Factor, index: Tensor
    ) -> Tensor:
        assert isinstance(factor, _DenseFactor)
        return factor.matrix[index][:, index]


class _DenseFactor(Factor):
    def __init__(self, system: System) -> None:
        self.system = system
        self.matrix = _with_diagonal(KernelGram(system.rows).to_dense(), system.diagonal)
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
