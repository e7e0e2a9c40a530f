"""Solvers inside a solver: `Part`, and the refinement of what parts put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.columns import units
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress

# Corrections of a solution at most; each must halve the residual to count.
CORRECTIONS = 5


class Part:
    """The inverse of a part of an operator, by a solver of its own.

    Parameters
    ----------
    prepared
        That solver, bound to the part.
    """

    def __init__(self, prepared: PreparedSolver) -> None:
        self.prepared = prepared

    @classmethod
    def of(
        cls, A: LinearOperator, solver: LinearSolver | None, outer: LinearSolver, solves: int = 2
    ) -> Part:
        """The part A; without a solver by `Auto`, for so many solves to the outer tolerance."""
        if solver is None:
            from solvers.auto.automatic import Auto  # which chooses among the solvers of this room

            solver = Auto(rtol=outer.rtol, solves=solves)
        return cls(solver._prepared(A))

    def update(self, A: LinearOperator) -> Part:
        """The same for another operator of its kind."""
        return Part(self.prepared._update(A))

    def solve(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool = False
    ) -> Tensor:
        """``A^-1 B``, or ``A^-T B``, for columns of any size; `progress` takes in what it took.

        `targets` are relative to the norm of each column.
        """
        if not block.numel():
            return block
        unit, scale, norm = units(block)
        x, part = self.prepared._answer(unit, targets, transpose=transpose)
        progress.iterations += part.iterations
        progress.stopped(part.status, f"{self.prepared.A!r}: {part.detail or part.status}")
        return x * norm * scale


class PreparedByParts(PreparedSolver):
    """A solver put together from solvers of parts."""

    def __init__(self, solver: LinearSolver, A: LinearOperator, parts: Sequence[Part]) -> None:
        super().__init__(solver, A)
        self.parts = list(parts)
        prepared = [part.prepared for part in self.parts]
        self.backend = ", ".join(dict.fromkeys(one.backend for one in prepared)) or self.backend
        nonzeros = [one.factor_nonzeros for one in prepared if one.factor_nonzeros is not None]
        self.factor_nonzeros = sum(nonzeros) if nonzeros else None

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        """``A^-1 B``, or ``A^-T B``, as accurate as the parts make it."""
        raise NotImplementedError

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._refined(block, targets, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._refined(block, targets, transpose=True)

    def _refined(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        progress = Progress()

        def inverse(block: Tensor) -> Tensor:
            return self._apply(block, targets, progress, transpose=transpose)

        x = refined(self.A.T if transpose else self.A, inverse, block, targets, progress)
        return x, progress


def refined(
    operator: LinearOperator,
    inverse: Callable[[Tensor], Tensor],
    block: Tensor,
    targets: Tensor,
    progress: Progress,
) -> Tensor:
    """``X = P B``, corrected by ``X + P (B - A X)`` where a column misses its target.

    Parameters
    ----------
    operator, inverse
        A, and the product with P, which is close to ``A^-1``.
    block, targets
        As for `PreparedSolver._solve`.
    progress
        Takes the residual and the products with A.
    """
    x = inverse(block)
    residual = block - operator._matmat(x)
    size = torch.linalg.vector_norm(residual, dim=0)
    progress.products += block.shape[1]
    for _ in range(CORRECTIONS):
        wanting = size > targets
        if not bool(wanting.any()):
            break
        candidate = x + inverse(residual)
        left = block - operator._matmat(candidate)
        progress.products += block.shape[1]
        better = wanting & (torch.linalg.vector_norm(left, dim=0) < 0.5 * size)
        if not bool(better.any()):
            break
        x, residual = torch.where(better, candidate, x), torch.where(better, left, residual)
        size = torch.linalg.vector_norm(residual, dim=0)
    progress.residual = residual
    return x
