"""An inner problem as a method sees it: one, or a batch of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.conditions import Conditions
from operators.tracing import tracked
from solvers import Auto, LinearSolver, PreparedSolver, solve

Tree = Any
# What one vmap maps over in the tensors of x: an axis of each, or None.
Axes = tuple[int | None, ...]

# Unknowns up to which A is formed: n sweeps back at once, and a factorisation of O(n^3).
DENSE = 256


class Equation:
    """``F(y_b, x_b) = 0`` for members b = 1, ..., B; points are blocks ``(B, n)``.

    Parameters
    ----------
    conditions
        Of each member.
    tree
        ``tensors of x -> x``.
    tensors
        Of x, with the axes of the batch.
    sizes, axes
        Lengths of the nested batches, outermost first, and the axes that each maps over; empty for
        a single problem, a batch of one that nothing is mapped over.
    linear_solver
        For the systems of a method; None forms A up to n = 256 and takes `solvers.Auto` beyond.
    """

    def __init__(
        self,
        conditions: Conditions,
        tree: Callable[[Sequence[Tensor]], Tree],
        tensors: Sequence[Tensor],
        sizes: Sequence[int] = (),
        axes: Sequence[Axes] = (),
        linear_solver: LinearSolver | None = None,
    ) -> None:
        self.conditions, self.linear_solver = conditions, linear_solver
        self.tree, self.tensors, self.sizes, self.axes = tree, tuple(tensors), tuple(sizes), axes
        # The last factorisation of a single problem: its structure serves the next one, and the
        # adjoint system after it.
        self.prepared: PreparedSolver | None = None
        self.evaluations = 0
        # What a method that works in place carries along.
        self.carried: Any = None

    @property
    def dense(self) -> bool:
        """Whether A is formed."""
        small = self.conditions.space.size <= DENSE
        return small and self.linear_solver is None and not self.conditions.given

    def each(self, function: Callable[..., Any], Y: Tensor, *more: Tensor) -> Any:
        """``function(y_b, x_b, *more_b)`` for every member, stacked."""
        if not self.sizes:
            value = function(Y[0], self.tree(self.tensors), *(item[0] for item in more))
            return pytree.tree_map(lambda leaf: leaf[None], value)
        mapped = batched(function, self.tree, self.axes)
        blocks = [item.unflatten(0, self.sizes) for item in (Y, *more)]
        value = mapped(blocks[0], self.tensors, *blocks[1:])
        return pytree.tree_map(lambda leaf: leaf.flatten(0, len(self.sizes) - 1), value)

    def member(self, index: int) -> Equation:
        """One member by itself, counted from 0."""
        tensors: list[Tensor] = list(self.tensors)
        places = np.unravel_index(index, self.sizes) if self.sizes else ()
        for axes, place in zip(self.axes, map(int, places), strict=True):
            tensors = [
                tensor if axis is None else tensor.select(axis, place)
                for tensor, axis in zip(tensors, axes, strict=True)
            ]
        return Equation(self.conditions, self.tree, tensors, linear_solver=self.linear_solver)

    def residual(self, Y: Tensor) -> Tensor:
        """``F``, ``(B, n)``."""
        self.evaluations += 1
        result: Tensor = self.each(self.conditions.residual, Y)
        return result

    def value(self, Y: Tensor) -> Tensor:
        """The loss, or ``|F|^2 / 2``, ``(B,)``."""
        result: Tensor = self.each(self.conditions.value, Y)
        return result

    def product(self, Y: Tensor, V: Tensor) -> Tensor:
        """``A V``, ``(B, n)``."""

        # Two sweeps back: a jvp could not be begun where the caller's own forward mode is on.
        def along(y: Tensor, x: Tree, v: Tensor) -> Tensor:
            pull = torch.func.vjp(lambda y: self.conditions.residual(y, x), y)[1]
            pushed: Tensor = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(v))[1](v)[0]
            return pushed

        result: Tensor = self.each(along, Y, V)
        return result

    def transposed_product(self, Y: Tensor, U: Tensor) -> Tensor:
        """``A^T U``, ``(B, n)``: with ``U = F`` the gradient of ``|F|^2 / 2``."""

        def back(y: Tensor, x: Tree, u: Tensor) -> Tensor:
            pulled: Tensor = torch.func.vjp(lambda y: self.conditions.residual(y, x), y)[1](u)[0]
            return pulled

        result: Tensor = self.each(back, Y, U)
        return result

    def matrix(self, Y: Tensor) -> Tensor:
        """``A`` in full, ``(B, n, n)``."""
        result: Tensor = self.each(self.conditions.dense, Y)
        return result

    def solve(self, Y: Tensor, R: Tensor) -> Tensor:
        """``A^-1 R`` by the linear solver, ``(B, n)``."""
        solver = self.linear_solver or Auto()
        if self.sizes or any(tracked(tensor) for tensor in (Y, R, *self.tensors)):

            def one(y: Tensor, x: Tree, r: Tensor) -> Tensor:
                solution: Tensor = solve(self.conditions.operator(y, x), r, solver)
                return solution

            result: Tensor = self.each(one, Y, R)
            return result
        A = self.conditions.operator(Y[0], self.tree(self.tensors))
        # The structure is that of the last step: an analysis is kept.
        self.prepared = solver.prepare(A) if self.prepared is None else self.prepared.update(A)
        value: Tensor = self.prepared.solve(R[0]).value
        return value[None]


def batched(
    function: Callable[..., Any], tree: Callable[[Sequence[Tensor]], Tree], axes: Sequence[Axes]
) -> Callable[..., Any]:
    """``(y, tensors of x, *more) -> function(y, x, *more)`` mapped over nested batches."""

    def single(y: Tensor, tensors: Sequence[Tensor], *more: Tensor) -> Any:
        return function(y, tree(tensors), *more)

    mapped: Callable[..., Any] = single
    for level in reversed(axes):
        mapped = _over(mapped, level)
    return mapped


def _over(function: Callable[..., Any], level: Axes) -> Callable[..., Any]:
    def mapped(y: Tensor, tensors: Sequence[Tensor], *more: Tensor) -> Any:
        in_dims = (0, level, *(0 for _ in more))
        return torch.func.vmap(function, in_dims=in_dims)(y, tuple(tensors), *more)

    return mapped
