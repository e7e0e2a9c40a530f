"""Solves with ``S (x) A + l I`` by the eigenvectors of S and A: `Eigenbases`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from operators.precision import in_single

if TYPE_CHECKING:
    from operators.curvature.kfac import KFAC


class Solution(NamedTuple):
    """What `operators.Inverse` takes from a solver."""

    value: Tensor


@dataclass(frozen=True)
class Eigenbases:
    """Solver for `operators.Inverse`: ``S X A + l X = V`` for the matrix of every layer.

    With ``S = U diag(s) U^T`` and ``A = W diag(a) W^T``, ``X = U ((U^T V W) / (s a^T + l)) W^T``:
    twice the flops of a product, after ``O(p^3 + d^3)`` once for each layer.
    """

    def prepare(self, A: KFAC) -> Diagonalised:
        """Eigenvalues and eigenvectors of every factor."""
        return Diagonalised(A)


class Diagonalised:
    """`Eigenbases` bound to an operator."""

    def __init__(self, A: KFAC) -> None:
        self.operator = A
        self.bases = {
            name: [in_single(torch.linalg.eigh, factor) for factor in pair]
            for name, pair in A.factors.items()
        }

    def solve(self, b: Tensor) -> Solution:
        """``x`` with ``A x = b``, for a vector or a block of columns."""
        x = self.operator._by_layer(b.T if b.ndim == 2 else b, self._solve)
        return Solution(x.T if b.ndim == 2 else x)

    # A is symmetric.
    solve_transpose = solve

    def _solve(self, name: str, V: Tensor) -> Tensor:
        (s, U), (a, W) = self.bases[name]
        # What rounding leaves below zero is clamped, so that no sum is below the damping.
        spectrum = s.clamp_min(0)[..., :, None] * a.clamp_min(0)[..., None, :]
        return U @ ((U.mT @ V @ W) / (spectrum + self.operator.damping)) @ W.mT
