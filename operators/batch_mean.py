"""The mean of an operator over a batch, chunk by chunk: `BatchMean`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from operators.cost import Cost
from operators.linear_operator import LinearOperator
from operators.space import Tree


class BatchMean(LinearOperator):
    """``A = (1/N) sum_c n_c A_c`` over chunks of a batch of N samples, one in memory at a time.

    What is a mean over samples, as the Hessian of a mean loss is, is the weighted mean of the same
    thing over chunks. Memory is that of one chunk; a product costs what it did in one piece. The
    operator of each chunk is made once at the start, to learn what facts they share, and then for
    each product.

    Parameters
    ----------
    operator_of
        ``operator_of(chunk, *args)``: the operator of a chunk, a mean over its samples.
    batch
        Tensor or nested structure of tensors with a leading axis of length N.
    *args
        What else it depends on (the point, outer variables). Tensors handed over here are
        parameters of the operator, as those of `batch` are.
    chunk_size
        Samples in a chunk; the last one may be smaller, and counts for less.

    Raises
    ------
    ValueError
        `chunk_size` is not positive, the leaves of batch have no common, positive length, or the
        operators of two chunks act between different spaces.
    TypeError
        ``operator_of`` does not return an operator.

    Examples
    --------
    >>> import torch, operators as ops
    >>> def loss(y, x):
    ...     return ((x @ y) ** 2).mean() / 2
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.zeros(2)
    >>> A = BatchMean(lambda chunk, y: ops.Hessian(loss, y, chunk), x, y, chunk_size=2)
    >>> bool(torch.allclose(A.to_dense(), ops.Hessian(loss, y, x).to_dense()))
    True
    """

    _parameters = ("batch", "args")

    def __init__(
        self,
        operator_of: Callable[..., LinearOperator],
        batch: Tree,
        *args: Any,
        chunk_size: int,
    ) -> None:
        leaves = pytree.tree_leaves(batch)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
            raise ValueError("batch holds no tensor, or one without axes; expected (N, ...)")
        sizes = {leaf.shape[0] for leaf in leaves}
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(
                f"the leaves of batch have lengths {sorted(sizes)}; expected one N > 0"
            )
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}; expected at least 1")
        self.operator_of, self.batch, self.args = operator_of, batch, args
        self.count, self.chunk_size = sizes.pop(), chunk_size
        chunks = self._chunks()
        _, first = next(chunks)
        # A convex combination keeps every fact that its terms share.
        structure, self._promised = first.structure, first._promises()
        for _, A in chunks:
            structure = structure.meet(A.structure)
            self._promised = self._promised or A._promises()
        super().__init__(first.domain, first.codomain, structure)
        self._chunk_cost = first.cost

    def _try_claims(self) -> bool:
        return not self._promised or all(A.check_claims() for _, A in self._chunks())

    def _chunks(self) -> Iterator[tuple[float, LinearOperator]]:
        first: LinearOperator | None = None
        for start in range(0, self.count, self.chunk_size):
            stop = min(start + self.chunk_size, self.count)
            chunk = pytree.tree_map(lambda leaf, i=start, j=stop: leaf[i:j], self.batch)
            A = self.operator_of(chunk, *self.args)
            if not isinstance(A, LinearOperator):
                raise TypeError(
                    f"operator_of returned a {type(A).__name__} for samples {start} to {stop}; "
                    "expected an operator"
                )
            first = A if first is None else first
            if (A.domain, A.codomain) != (first.domain, first.codomain):
                raise ValueError(
                    f"operator_of returned {A!r} for samples {start} to {stop}, but {first!r} for "
                    "the first chunk; expected means over samples, between the same spaces"
                )
            yield (stop - start) / self.count, A

    def _matvec(self, v: Tensor) -> Tensor:
        return _total(weight * A._matvec(v) for weight, A in self._chunks())

    def _matmat(self, block: Tensor) -> Tensor:
        return _total(weight * A._matmat(block) for weight, A in self._chunks())

    def _rmatvec(self, v: Tensor) -> Tensor:
        return _total(weight * A.T._matvec(v) for weight, A in self._chunks())

    def _exact_diagonal(self) -> Tensor | None:
        diagonals = []
        for weight, A in self._chunks():
            diagonal = A._exact_diagonal()
            if diagonal is None:
                return None
            diagonals.append(weight * diagonal)
        return _total(iter(diagonals))

    def _cost(self) -> Cost:
        # Evaluations are of the whole batch; arithmetic outside the user's function is per chunk.
        chunks = -(-self.count // self.chunk_size)
        return Cost(
            chunks * self._chunk_cost.flops, self._chunk_cost.evaluations, self._chunk_cost.solves
        )

    def _describe(self) -> str:
        return f"mean over {self.count} samples in chunks of {self.chunk_size}"


def _total(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total
