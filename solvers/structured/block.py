"""Systems of blocks, one block at a time: `BlockDiagonal` and `BlockTriangular`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from operators import Block as BlockOperator
from operators import BlockDiagonal as BlockDiagonalOperator
from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import StructureError
from solvers.structured.parts import Part, PreparedByParts


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(LinearSolver):
    """``x_i = A_i^-1 b_i`` for ``A = diag(A_1, ..., A_p)``, each block by a solver of its own.

    Parameters
    ----------
    block_solver
        Solver of the blocks; by default `Auto` for each.
    rtol, atol, strict
        As for `LinearSolver`. Every block is solved to this tolerance relative to its part of b,
        which meets it for the whole.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.BlockDiagonal(ops.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), ops.Identity(1))
    >>> BlockDiagonal().prepare(A).solve(torch.tensor([3.0, 3.0, 5.0])).value.round(decimals=5)
    tensor([1., 1., 5.])
    """

    block_solver: LinearSolver | None = None

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Prepare a solver for each block.

        Raises
        ------
        StructureError
            A is not an `operators.BlockDiagonal`, or a block is not square.
        """
        if not isinstance(A, BlockDiagonalOperator):
            raise StructureError(f"BlockDiagonal needs an operators.BlockDiagonal; got {A!r}")
        _check_square(self, A, A.blocks)
        return _PreparedDiagonal(
            self, A, [Part.of(block, self.block_solver, self) for block in A.blocks]
        )


class _PreparedDiagonal(PreparedByParts):
    A: BlockDiagonalOperator

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        pieces = zip(self.parts, _split(block, self.A.blocks), strict=True)
        return torch.cat(
            [part.solve(piece, targets, progress, transpose=transpose) for part, piece in pieces]
        )

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if not isinstance(A, BlockDiagonalOperator) or _shapes(A.blocks) != _shapes(self.A.blocks):
            return super()._update(A)
        pairs = zip(self.parts, A.blocks, strict=True)
        return _PreparedDiagonal(self.solver, A, [part.update(block) for part, block in pairs])


@dataclass(frozen=True, kw_only=True)
class BlockTriangular(LinearSolver):
    """``x_i = A_ii^-1 (b_i - sum_(j<i) A_ij x_j)`` for a lower triangle of blocks.

    Backwards for an upper one. The operator is an `operators.Block` whose blocks on the other side
    of the diagonal are None, as the all-at-once matrix of a time-stepping scheme. A solve costs one
    with each diagonal block, and a product with each of the others.

    Parameters
    ----------
    block_solver
        Solver of the diagonal blocks; by default `Auto` for each.
    rtol, atol, strict
        As for `LinearSolver`. The residual is corrected, at most five times, where it misses the
        tolerance.

    Examples
    --------
    >>> import torch, operators as ops
    >>> step = ops.Identity(1)  # x_1 = 1, 2 x_2 - x_1 = 1
    >>> A = ops.Block([[step, None], [-step, 2.0 * step]])
    >>> BlockTriangular().prepare(A).solve(torch.tensor([1.0, 1.0])).value.round(decimals=5)
    tensor([1., 1.])
    """

    block_solver: LinearSolver | None = None

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Prepare a solver for each diagonal block.

        Raises
        ------
        StructureError
            A is not an `operators.Block`, or not triangular, or a diagonal block is not square.
        """
        if not isinstance(A, BlockOperator):
            raise StructureError(f"BlockTriangular needs an operators.Block; got {A!r}")
        rows = A.rows
        places = [
            (i, j) for i, row in enumerate(rows) for j, A_ij in enumerate(row) if A_ij is not None
        ]
        lower = all(i >= j for i, j in places)
        if len(rows) != len(rows[0]) or not (lower or all(i <= j for i, j in places)):
            raise StructureError(
                f"BlockTriangular needs None on one side of the diagonal; got {A!r} with blocks at "
                f"{places}"
            )
        diagonal = []
        for i, row in enumerate(rows):
            block = row[i]
            if block is None:
                raise StructureError(f"{A!r} has None as diagonal block {i}: it is singular")
            diagonal.append(block)
        _check_square(self, A, diagonal)
        parts = [Part.of(block, self.block_solver, self) for block in diagonal]
        return _PreparedTriangular(self, A, parts, diagonal, lower)


class _PreparedTriangular(PreparedByParts):
    A: BlockOperator

    def __init__(
        self,
        solver: LinearSolver,
        A: BlockOperator,
        parts: list[Part],
        diagonal: Sequence[LinearOperator],
        lower: bool,
    ) -> None:
        super().__init__(solver, A, parts)
        self.diagonal, self.lower = diagonal, lower

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        rows, right = self.A.rows, list(_split(block, self.diagonal))
        order = list(range(len(rows)))
        if self.lower == transpose:
            order.reverse()
        for position, i in enumerate(order):
            right[i] = self.parts[i].solve(right[i], targets, progress, transpose=transpose)
            for j in order[position + 1 :]:
                beside = rows[i][j] if transpose else rows[j][i]
                if beside is not None:
                    beside = beside.T if transpose else beside
                    right[j] = right[j] - beside._matmat(right[i])
        return torch.cat(right)


def _split(block: Tensor, diagonal: Sequence[LinearOperator]) -> tuple[Tensor, ...]:
    return block.split([part.shape[0] for part in diagonal])


def _shapes(blocks: Sequence[LinearOperator]) -> list[tuple[int, int]]:
    return [block.shape for block in blocks]


def _check_square(
    solver: LinearSolver, A: LinearOperator, diagonal: Sequence[LinearOperator]
) -> None:
    for i, block in enumerate(diagonal):
        if block.shape[0] != block.shape[1]:
            raise StructureError(
                f"{type(solver).__name__} needs square diagonal blocks; block {i} of {A!r} is "
                f"{block!r}"
            )
