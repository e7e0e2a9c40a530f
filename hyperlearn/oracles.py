"""The derivatives of a bilevel problem, each call counted: the currency that papers compare in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.regularizer import L2
from operators import BatchMean, CrossDerivative, Hessian, Identity, LinearOperator, Space
from operators.layout import called_by_columns

Tree = Any
Loss = Callable[..., Tensor]


@dataclass
class OracleCount:
    """Calls so far: gradients, Hessian-vector products, cross products; and samples touched.

    One call works on a batch; `samples` adds up the batch sizes over all calls, so that methods
    with batches of different sizes can be compared.
    """

    gradients: int = 0
    hessian_products: int = 0
    cross_products: int = 0
    samples: int = 0

    @property
    def calls(self) -> int:
        """All calls."""
        return self.gradients + self.hessian_products + self.cross_products


def batch_length(batch: Tree) -> int:
    """Number of samples of a batch: the common leading axis; 1 without data."""
    return 1 if batch is None else int(pytree.tree_leaves(batch)[0].shape[0])


class Oracles:
    """Derivatives of ``G(y, x) = inner_loss + regularizer`` and ``g(y, x) = outer_loss``.

    Works on flat vectors; the spaces carry the nesting. Results are plain tensors unless a loss
    closes over a tensor that requires grad: run such a loss under `torch.no_grad`, as
    `hypergradient` and `minimize` do, or its graph is kept.

    Parameters
    ----------
    inner_loss, outer_loss
        ``f(y, x)``, or ``f(y, x, batch)`` where a batch is given.
    y_space, x_space
        Layout of the two variables.
    regularizer
        L2 penalty of the inner problem, kept apart from the likelihood.
    chunk_size
        Work through a batch so many samples at a time, and add up: memory is that of a chunk. The
        losses are means, so chunks count by their length. None: all at once.
    """

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss,
        y_space: Space,
        x_space: Space,
        regularizer: L2 | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.chunk_size = chunk_size
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        self.y_space, self.x_space = y_space, x_space
        self.regularizer = regularizer or L2(0.0)
        self.count = OracleCount()
        self._counting = True

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within this context nothing is counted: for diagnostics, which are no method's cost."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def _evaluate(self, loss: Loss, name: str, y: Tensor, x: Tensor, batch: Tree) -> Tensor:
        outer = self.x_space.unravel(x)

        def of(inner: Tree) -> Tensor:
            return loss(inner, outer) if batch is None else loss(inner, outer, batch)

        value = called_by_columns(of, self.y_space.unravel(y))
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} returned {got}; expected a scalar tensor, a mean over the batch"
            )
        return value

    def outer(self, y: Tensor, x: Tensor, batch: Tree) -> Tensor:
        """``g(y, x)``, not counted."""
        return self._evaluate(self.outer_loss, "outer_loss", y, x, batch)

    def inner(self, y: Tensor, x: Tensor, batch: Tree) -> Tensor:
        """``G(y, x)`` with the regulariser, not counted."""
        value = self._evaluate(self.inner_loss, "inner_loss", y, x, batch)
        return value + self.regularizer(y)

    def score(self, y: Tensor, x: Tensor, batch: Tree, loss: Loss | None = None) -> Tensor:
        """``d_y inner_loss``, without the regulariser; one gradient."""
        self.charge("gradients", batch)
        loss = loss or self.inner_loss

        def of(chunk: Tree) -> Tensor:
            return torch.func.grad(lambda v: self._evaluate(loss, "inner_loss", v, x, chunk))(y)

        found: Tensor = self._mean(batch, of)
        return found

    def inner_gradient(self, y: Tensor, x: Tensor, batch: Tree) -> Tensor:
        """``d_y G``; one gradient."""
        return self.score(y, x, batch) + self.regularizer.gradient(y)

    def outer_gradients(self, y: Tensor, x: Tensor, batch: Tree) -> tuple[Tensor, Tensor]:
        """``(d_y g, d_x g)``; one gradient."""
        self.charge("gradients", batch)

        def of(chunk: Tree) -> tuple[Tensor, Tensor]:
            return torch.func.grad(lambda v, u: self.outer(v, u, chunk), argnums=(0, 1))(y, x)

        found: tuple[Tensor, Tensor] = self._mean(batch, of)
        return found

    def hessian(self, y: Tensor, x: Tensor, batch: Tree, damping: float = 0.0) -> LinearOperator:
        """``d_yy G + damping I``; its products are counted."""

        def of(chunk: Tree) -> LinearOperator:
            return Hessian(lambda v: self.inner(v, x, chunk), y)

        counted = _Counted(self._operator(batch, of), self, "hessian_products", batch)
        if damping == 0.0:
            return counted
        return counted + damping * Identity(counted.domain)

    def cross(self, y: Tensor, x: Tensor, batch: Tree) -> LinearOperator:
        """``C = d_x d_y G``, (dim x, dim y); its products are counted."""

        def of(chunk: Tree) -> LinearOperator:
            return CrossDerivative(lambda v, u: self.inner(v, u, chunk), y, x)

        return _Counted(self._operator(batch, of), self, "cross_products", batch)

    def adjoint_products(
        self, y: Tensor, x: Tensor, q: Tensor, batch: Tree, *, hessian: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``d_y G``, ``C q`` and, if asked for, ``d_yy G q``: one sweep back through one gradient.

        Counted as the products that it makes; the gradient, which they need, comes with them.
        """
        self.charge("cross_products", batch)
        if hessian:
            self.charge("hessian_products", batch)

        def of(chunk: Tree) -> tuple[Tensor, Tensor, Tensor | None]:
            gradient = torch.func.grad(lambda v, u: self.inner(v, u, chunk))
            if not hessian:
                value, pullback = torch.func.vjp(lambda u: gradient(y, u), x)[:2]
                return value, pullback(q)[0], None
            value, pullback = torch.func.vjp(gradient, y, x)[:2]
            curved, crossed = pullback(q)
            return value, crossed, curved

        found: tuple[Tensor, Tensor, Tensor | None] = self._mean(batch, of)
        return found

    def _chunked(self, batch: Tree) -> int | None:
        """Length of a chunk where the batch has more than one."""
        size = self.chunk_size
        return None if batch is None or size is None or size >= batch_length(batch) else size

    def _mean(self, batch: Tree, of: Callable[[Tree], Any]) -> Any:
        """Of a mean over the batch: its chunks', each by its length."""
        size = self._chunked(batch)
        if size is None:
            return of(batch)
        length, total = batch_length(batch), None
        for first in range(0, length, size):
            chunk = pytree.tree_map(lambda leaf, i=first: leaf[i : i + size], batch)
            share = batch_length(chunk) / length
            part = pytree.tree_map(
                lambda leaf, s=share: None if leaf is None else s * leaf, of(chunk)
            )
            total = part if total is None else pytree.tree_map(_sum, total, part)
        return total

    def _operator(self, batch: Tree, of: Callable[[Tree], LinearOperator]) -> LinearOperator:
        size = self._chunked(batch)
        return of(batch) if size is None else BatchMean(of, batch, chunk_size=size)

    def step_pullback(
        self, step: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor, u: Tensor, batch: Tree
    ) -> tuple[Tensor, Tensor]:
        """``((d_y S)^T u, (d_x S)^T u)`` of one inner step S: a Hessian and a cross product."""
        self.charge("hessian_products", batch)
        self.charge("cross_products", batch)
        pullback = torch.func.vjp(step, y, x)[1]
        through_y, through_x = pullback(u)
        return through_y, through_x

    def charge(self, kind: str, batch: Tree, calls: int = 1) -> None:
        """Count calls of a kind (a field of `OracleCount`) on a batch."""
        if not self._counting:
            return
        setattr(self.count, kind, getattr(self.count, kind) + calls)
        self.count.samples += calls * batch_length(batch)


def _sum(a: Any, b: Any) -> Any:
    return None if a is None else a + b


class _Counted(LinearOperator):
    """The same operator, its products counted."""

    def __init__(self, operator: LinearOperator, oracles: Oracles, kind: str, batch: Tree) -> None:
        super().__init__(operator.domain, operator.codomain, operator.structure)
        self.operator, self.oracles, self.kind, self.batch = operator, oracles, kind, batch

    def _matvec(self, v: Tensor) -> Tensor:
        self.oracles.charge(self.kind, self.batch)
        return self.operator @ v

    def _matmat(self, block: Tensor) -> Tensor:
        self.oracles.charge(self.kind, self.batch, calls=block.shape[1])
        return self.operator @ block

    def _transpose(self) -> LinearOperator:
        return _Counted(self.operator.T, self.oracles, self.kind, self.batch)

    def __repr__(self) -> str:
        return repr(self.operator)
