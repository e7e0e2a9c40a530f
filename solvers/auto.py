"""`Auto`: the solver that suits an operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from operators import LinearOperator
from solvers.dense.cholesky import DenseCholesky
from solvers.dense.lu import DenseLU
from solvers.linear_solver import LinearSolver, PreparedSolver


@dataclass(frozen=True, kw_only=True)
class Auto(LinearSolver):
    """A dense factorisation."""

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        settings: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "strict": self.strict}
        if A.positive_definite:
            return DenseCholesky(**settings)._prepared(A)
        return DenseLU(**settings)._prepared(A)
