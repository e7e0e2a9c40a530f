"""What stands for ``A^-1`` inside an iteration: `Preconditioner` and `as_preconditioner`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from operators import LinearOperator
from operators.space import Tree
from operators.structure import Structure
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class Preconditioner(ABC):
    """Settings of an approximation ``P`` of ``A^-1``; immutable, comparable, cheap to copy."""

    @abstractmethod
    def prepare(self, A: LinearOperator) -> LinearOperator:
        """``P`` as an operator: linear, with its transpose; symmetric where A is.

        Raises
        ------
        StructureError
            A lacks a structure that this preconditioner needs.
        """


# What the iterative solvers take: settings; an operator or a prepared solver that stands for A^-1;
# a solver, which is prepared for A; or a function v -> P v.
PreconditionerLike = (
    Preconditioner | LinearOperator | LinearSolver | PreparedSolver | Callable[[Tree], Tree]
)


def as_preconditioner(choice: Any, A: LinearOperator) -> LinearOperator | None:
    """The operator ``P`` that a choice of preconditioner makes of A; None for none.

    Raises
    ------
    TypeError
        It is no such thing, or has another dtype or device than A.
    ValueError
        It has another shape than ``A^T``.
    """
    if choice is None:
        return None
    if isinstance(choice, Preconditioner):
        P = choice.prepare(A)
    elif isinstance(choice, LinearSolver):
        P = SolveOperator(choice._prepared(A))
    elif isinstance(choice, PreparedSolver):
        P = SolveOperator(choice)
    elif isinstance(choice, LinearOperator):
        P = choice
    elif callable(choice) and not isinstance(choice, type):
        P = CallableOperator(choice, A)
    else:
        raise TypeError(
            f"preconditioner is {choice!r}; expected settings (as solvers.Jacobi()), an operator "
            "that stands for the inverse of A, a solver, or a function v -> P v"
        )
    if P.shape != A.shape[::-1]:
        raise ValueError(
            f"preconditioner {P!r} for {A!r}: expected shape {A.shape[::-1]}; it stands for the "
            "inverse"
        )
    if (P.dtype, P.device) != (A.dtype, A.device):
        raise TypeError(
            f"preconditioner {P!r} is {P.dtype} on {P.device}; expected {A.dtype} on {A.device}"
        )
    return P


class SolveOperator(LinearOperator):
    """The inverse that a prepared solver applies, as accurate as it happens to be."""

    def __init__(self, prepared: PreparedSolver) -> None:
        A = prepared.A
        super().__init__(A.codomain, A.domain, A.structure.inverse())
        self.prepared = prepared

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        targets = block.new_full((block.shape[1],), self.prepared.solver.tolerance(block.dtype))
        return self._scaled(block, lambda unit: self.prepared._solve(unit, targets)[0])

    def _rmatvec(self, v: Tensor) -> Tensor:
        targets = v.new_full((1,), self.prepared.solver.tolerance(v.dtype))
        solve = self.prepared._solve_transpose
        return self._scaled(v[:, None], lambda unit: solve(unit, targets)[0])[:, 0]

    def _scaled(self, block: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        """Solvers want columns of unit norm."""
        size = torch.linalg.vector_norm(block, dim=0)
        size = torch.where(size > 0, size, 1.0)
        return solve(block / size) * size

    def _describe(self) -> str:
        return f"by {self.prepared.solver}"


class CallableOperator(LinearOperator):
    """A function ``v -> P v`` of the user's; taken at its word, column by column.

    It need not be linear, nor made of torch operations: then it is for a flexible method.
    """

    def __init__(self, function: Callable[[Tree], Tree], A: LinearOperator) -> None:
        super().__init__(A.codomain, A.domain, Structure(symmetric=A.symmetric))
        self.function = function

    def _matvec(self, v: Tensor) -> Tensor:
        image = self.function(self.domain.unravel(v))
        return self.codomain.ravel(image, "preconditioner(v)")

    def _matmat(self, block: Tensor) -> Tensor:
        if block.shape[1] == 0:
            return block.new_zeros(self.shape[0], 0)
        return torch.stack([self._matvec(column) for column in block.unbind(1)], 1)

    def _rmatvec(self, v: Tensor) -> Tensor:
        raise StructureError(
            "the transposed system (as for a gradient) needs the transposed preconditioner, which "
            "a function lacks: give an operator, as ops.FunctionOperator(f, y, rmatvec=f_t)"
        )
