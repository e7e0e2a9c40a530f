"""A batch of systems as the columns of one block: `Members`."""

from __future__ import annotations

import torch
from torch import Tensor

from operators import LinearOperator, Stacked
from operators.space import Space


class Members(LinearOperator):
    """The members ``A_1, ..., A_B`` of a `Stacked` operator, side by side.

    A block ``(n, B k)`` has k columns for each member, those of the first one first; a product
    takes the columns of member b through ``A_b``. A solver that knows its operator by products with
    whole blocks alone thereby solves B systems at once, each column to its own convergence.
    """

    _parameters = ("stack",)

    def __init__(self, stack: Stacked) -> None:
        member = stack.batched
        n, m = member.shape[1], member.shape[0]
        super().__init__(
            Space.flat(n, stack.dtype, stack.device),
            Space.flat(m, stack.dtype, stack.device),
            stack.structure,
        )
        self.stack = stack

    def __len__(self) -> int:
        return len(self.stack)

    def member(self, index: int) -> LinearOperator:
        """``A_b``."""
        return self.stack[index]

    def matrices(self) -> Tensor:
        """``(B, m, n)``."""
        self.check_claims()
        dense: Tensor = self.stack._each(lambda A: A.to_dense())
        return dense

    def batch(self, block: Tensor) -> Tensor:
        """``(B, n, k)`` of a block ``(n, B k)``."""
        columns = block.shape[1] // max(len(self), 1)
        return block.reshape(block.shape[0], len(self), columns).movedim(1, 0)

    def block(self, batch: Tensor) -> Tensor:
        """``(n, B k)`` of ``(B, n, k)``."""
        return batch.movedim(0, 1).reshape(batch.shape[1], batch.shape[0] * batch.shape[2])

    def _matvec(self, v: Tensor) -> Tensor:
        raise TypeError(f"{self!r} multiplies blocks with columns for each of its members")

    def _matmat(self, block: Tensor) -> Tensor:
        return self.block(self.stack._each(lambda A, x: A._matmat(x), self.batch(block)))

    def _transpose(self) -> LinearOperator:
        transposed = self.stack.T
        assert isinstance(transposed, Stacked)
        return Members(transposed)

    def _exact_diagonal(self) -> Tensor | None:
        return None

    def __repr__(self) -> str:
        return f"{len(self)} of {self.stack.batched!r}"


def matrices_of(A: LinearOperator) -> Tensor:
    """The matrix ``(m, n)`` of an operator, or ``(B, m, n)`` of its members."""
    return A.matrices() if isinstance(A, Members) else A.to_dense()


def batch_of(A: LinearOperator, block: Tensor) -> Tensor:
    """A block as the batched algebra of torch wants it beside `matrices_of`."""
    return A.batch(block) if isinstance(A, Members) else block


def block_of(A: LinearOperator, batch: Tensor) -> Tensor:
    """What `batch_of` took apart, put together again."""
    return A.block(batch) if isinstance(A, Members) else batch


def worst(values: Tensor) -> int:
    """Largest of what a batched factorisation reports of each member."""
    return int(torch.as_tensor(values).max()) if torch.as_tensor(values).numel() else 0
