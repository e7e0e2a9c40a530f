"""An operator that does not tell what it is made of, and counts what is asked of it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from operators import LinearOperator, Space, Structure


class Opaque(LinearOperator):
    """A matrix without any exact answer; `count` holds the number of columns multiplied."""

    _parameters: ClassVar[tuple[str, ...]] = ("matrix",)

    def __init__(
        self, matrix: Tensor, structure: Structure | None = None, space: Space | None = None
    ) -> None:
        m, n = matrix.shape
        spaces = [space or Space.flat(k, matrix.dtype, matrix.device) for k in (n, m)]
        super().__init__(*spaces, structure)
        self.matrix = matrix
        self.count = [0]

    def _matvec(self, v: Tensor) -> Tensor:
        self.count[0] += 1
        return self.matrix @ v

    def _matmat(self, block: Tensor) -> Tensor:
        self.count[0] += block.shape[1]
        return self.matrix @ block

    def _rmatvec(self, v: Tensor) -> Tensor:
        self.count[0] += 1
        return self.matrix.T @ v


def symmetric(matrix: Tensor, definite: bool = False) -> Opaque:
    """Opaque operator known to be symmetric, or positive definite."""
    return Opaque(matrix, Structure(symmetric=True, positive_definite=definite))


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Symmetric matrix of these eigenvalues in a random orthonormal basis."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=eigenvalues.dtype)).Q
    matrix = basis * eigenvalues @ basis.T
    return (matrix + matrix.T) / 2
