"""`GramCG`: conjugate gradients that know when rounding is what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers import CG, PreparedSolver
from solvers.krylov.cg import _PreparedCG
from solvers.linear_solver import Progress


@dataclass(frozen=True, kw_only=True)
class GramCG(CG):
    """`solvers.CG`, whose tolerance is never below what backward stability can give.

    With a nugget of 1e-10, ``|x|`` may be ``1e8 |b|``, and then no solver, Cholesky among them,
    reaches ``|b - A x| <= 1e-10 |b|``. Where the residual has stopped falling it counts as
    converged if ``|b - A x| <= eps n |x|``: for rows of unit variance ``|A| <= n``, so x is the
    solution for a matrix that differs by rounding. Adjoint systems are of this kind.
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        prepared = super()._prepare(A)
        assert isinstance(prepared, _PreparedCG)
        return _PreparedGramCG(self, A, prepared.preconditioner)


class _PreparedGramCG(_PreparedCG):
    def _answer(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        x, progress = super()._answer(block, targets, transpose=transpose)
        if progress.status == "stagnated":
            rounding = len(block) * torch.finfo(block.dtype).eps * x.norm(dim=0)
            # The solver judges by these.
            torch.maximum(targets, rounding, out=targets)
        return x, progress
