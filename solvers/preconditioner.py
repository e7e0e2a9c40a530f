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
from solvers.columns import units
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.matrix import as_operator, numbers
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class Preconditioner(ABC):
    """Settings of an approximation ``P`` of ``A^-1``; immutable, comparable, cheap to copy."""

    def prepare(self, A: Any) -> LinearOperator:
        """``P`` as an operator: linear, with its transpose; symmetric where A is.

        Parameters
        ----------
        A
            As for `LinearSolver.prepare`, square.

        Raises
        ------
        StructureError
            A lacks a structure that this preconditioner needs, or is not square.
        TypeError, ValueError
            A is neither an operator nor a matrix.
        """
        operator = A if isinstance(A, LinearOperator) else as_operator(A)
        if operator.shape[0] != operator.shape[1]:
            raise StructureError(f"{type(self).__name__} needs a square operator; got {operator!r}")
        return self._prepare(operator)

    @abstractmethod
    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """`prepare` for a square operator."""


# What the iterative solvers take: settings; an operator or a prepared solver that stands for A^-1;
# a solver, which is prepared for A; or a function v -> P v.
PreconditionerLike = (
    Preconditioner | LinearOperator | LinearSolver | PreparedSolver | Callable[[Tree], Tree]
)


def as_preconditioner(
    choice: Any, A: LinearOperator, *, right: bool = False
) -> LinearOperator | None:
    """The operator ``P`` that a choice of preconditioner makes of A; None for none.

    Parameters
    ----------
    choice
        Settings, which are prepared for A; an operator; a solver, which is prepared for A; a
        prepared solver; or a function ``v -> P v``. No derivative is taken with respect to it.
    A
        What it is for.
    right
        Take any P that ``A P`` is defined for, as for least squares, in place of one that has the
        shape of ``A^-1``.

    Raises
    ------
    TypeError
        It is no such thing, or has another dtype or device than A.
    ValueError
        It has another shape than ``A^T``; or holds a tensor that ``torch.func.vmap`` maps over.
    StructureError
        A lacks a structure that it needs.
    operators.FalseClaimError
        A claim about it is false.
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
        P = numbers(choice, "preconditioner")
        P.check_claims()
    elif callable(choice) and not isinstance(choice, type):
        P = CallableOperator(choice, A)
    else:
        came = f"the class {choice.__name__}" if isinstance(choice, type) else f"{choice!r:.80}"
        raise TypeError(
            f"preconditioner is {came}; expected settings (as solvers.Jacobi()), an operator "
            "that stands for the inverse of A (a matrix M: ops.Dense(M)), a solver, or a function "
            "v -> P v"
        )
    if right and P.shape[0] != A.shape[1]:
        raise ValueError(f"preconditioner {P!r} on the right of {A!r}: expected {A.shape[1]} rows")
    if not right and P.shape != A.shape[::-1]:
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

    def __init__(self, prepared: PreparedSolver, *, transpose: bool = False) -> None:
        A = prepared.A.T if transpose else prepared.A
        super().__init__(A.codomain, A.domain, A.structure.inverse())
        self.prepared, self.transpose = prepared, transpose
        self.backend, self.factor_nonzeros = prepared.backend, prepared.factor_nonzeros
        self.operator_complexity = prepared.operator_complexity

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        # Solvers want columns of unit norm.
        solve = self.prepared._solve_transpose if self.transpose else self.prepared._solve
        targets = block.new_full((block.shape[1],), self.prepared.solver.tolerance(block.dtype))
        unit, scale, norm = units(block)
        return solve(unit, targets)[0] * norm * scale

    def _transpose(self) -> LinearOperator:
        return SolveOperator(self.prepared, transpose=not self.transpose)

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
        # A copy: the function may work in place, and v is the residual itself.
        image = self.function(self.domain.unravel(v.clone()))
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
