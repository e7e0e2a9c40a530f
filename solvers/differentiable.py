"""`solve`: the differentiable solution of a linear system, by any solver."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from operators import LinearOperator
from operators.solve_rule import Factor, apply_inverse
from solvers.auto.automatic import Auto
from solvers.least_squares_rule import apply_least_squares
from solvers.linear_solver import LinearSolver
from solvers.matrix import as_operator
from solvers.solution import Info, Solution


@overload
def solve(
    A: Any, b: Any, solver: LinearSolver = ..., *, return_info: Literal[False] = ...
) -> Any: ...
@overload
def solve(
    A: Any, b: Any, solver: LinearSolver = ..., *, return_info: Literal[True]
) -> Solution: ...
def solve(A: Any, b: Any, solver: LinearSolver = Auto(), *, return_info: bool = False) -> Any:
    """``x`` with ``A x = b``, differentiable with respect to b and the tensors of A.

    Parameters
    ----------
    A
        Operator, tensor ``(m, n)`` or ``(..., m, n)``, or sparse matrix of torch or scipy. Where it
        is rectangular, or the solver one of least squares, x minimises ``|b - A x|``, and ``|x|``
        among those that do.
    b
        ``(m,)``, ``(m, k)``, or a nested structure of ``A.codomain``; ``()`` for a system of size
        one. For a batch of matrices ``(..., m)`` or ``(..., m, k)``.
    solver
        Settings of any solver; `Auto` chooses (see `explain`).
    return_info
        Return ``(x, info)``.

    Returns
    -------
    x
        Like b. With `return_info` a `Solution`, whose `Info` is that of the worst solve where there
        was more than one.

    Raises
    ------
    TypeError, ValueError
        A or b is no such thing, or they do not fit; or A is an operator of a function that closes
        over a tensor which is being differentiated (hand it over as an argument).
    StructureError
        A lacks a structure that the solver needs; or a derivative of a least-squares solution is
        asked for where A does not have full rank.
    NotConvergedError
        With a `strict` solver, in derivatives too.
    NotImplementedError
        Under forward over forward mode; use forward over reverse.

    Warns
    -----
    ConvergenceWarning
        The tolerance was not met.

    Notes
    -----
    Every transform of torch.func composes. With ``x = A^-1 b``

        x' = A^-1 (b' - A' x) ,     b_bar = A^-T x_bar ,     A_bar = -b_bar x^T ,

    by the factorisation and the preconditioner of the forward solve, transposed; A_bar is taken at
    the nonzeros of a sparse matrix alone, at ``O(nnz)``. Least squares go through the augmented
    system (see `solvers.least_squares_rule`). Derivatives are as accurate as their solves; the
    right-hand side of each is scaled to unit norm first. A batch of matrices is factorised as one
    where the solver can.

    For many right-hand sides use ``solver.prepare(A)``, whose `solve` is differentiable as well and
    factorises once.

    Examples
    --------
    >>> import torch, solvers
    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([5.0, 4.0], dtype=torch.float64)
    >>> solvers.solve(A, b)
    tensor([1.0000, 1.0000], dtype=torch.float64)
    >>> gradient = torch.func.grad(lambda A: solvers.solve(A, b, solver=solvers.CG()).sum())(A)
    >>> torch.allclose(
    ...     gradient, -torch.linalg.solve(A, torch.ones(2).double()).outer(torch.ones(2))
    ... )
    True
    """
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"solver is {solver!r}; expected settings of a solver, as solvers.CG()")
    if isinstance(A, Tensor) and A.ndim > 2:
        return _batched(A, b, solver, return_info)
    operator = as_operator(A)
    log: list[Info] = []
    value = _solved(operator, b, solver, log)
    return Solution(value, _worst(log)) if return_info else value


def _solved(A: LinearOperator, b: Any, solver: LinearSolver, log: list[Info]) -> Any:
    space = A.codomain
    nested = space.nests(b)
    scalar = isinstance(b, Tensor) and b.ndim == 0 and not nested and A.shape == (1, 1)
    flat = space.ravel(b, "b") if nested else b.reshape(1) if scalar else b
    _check(flat, A)
    rule = apply_least_squares if solver.minimises(A) else apply_inverse
    value = rule(A, flat, Factor(solver, log))
    if nested:
        return A.domain.unravel(value)
    return value.reshape(()) if scalar else value


def _check(b: Tensor, A: LinearOperator) -> None:
    m = A.shape[0]
    if b.ndim not in (1, 2) or b.shape[0] != m:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; expected ({m},), ({m}, k), or the nested structure "
            f"{A.codomain} for {A!r}"
        )
    if b.dtype != A.dtype or b.device != A.device:
        raise TypeError(f"b is {b.dtype} on {b.device}; expected {A.dtype} on {A.device}")


def _batched(A: Tensor, b: Any, solver: LinearSolver, return_info: bool) -> Any:
    batch, (m, _) = A.shape[:-2], A.shape[-2:]
    single = isinstance(b, Tensor) and b.shape == (*batch, m)
    if not isinstance(b, Tensor) or not (single or b.shape[:-1] == (*batch, m)):
        came = tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b is {came}; expected {(*batch, m)}, or that and columns, for a batch")
    if A.layout != torch.strided:
        raise TypeError(
            f"A is a batch {tuple(A.shape)} of layout {A.layout}; expected a strided tensor, or an "
            "ops.Sparse with values (batch, nnz) under torch.func.vmap"
        )
    log: list[Info] = []
    count = math.prod(batch)
    if not count:
        empty = A.new_zeros(*batch, A.shape[-1], *b.shape[len(batch) + 1 :])
        why = "a batch without members"
        none = Info(True, 0, 0.0, repr(solver), status="converged", reason=why, products=0)
        return Solution(empty, none) if return_info else empty

    def one(matrix: Tensor, b: Tensor) -> Any:
        return _solved(as_operator(matrix), b, solver, log)

    flat_b = b.reshape(count, *b.shape[len(batch) :])
    value = torch.func.vmap(one)(A.reshape(count, *A.shape[-2:]), flat_b)
    value = value.reshape(*batch, *value.shape[1:])
    return Solution(value, _worst(log)) if return_info else value


def _worst(log: list[Info]) -> Info:
    return max(log, key=lambda info: (not info.converged, info.residual))
