"""A batch of operators of one kind, applied by one vmapped product: `Stacked`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.cost import Cost
from operators.linear_operator import LinearOperator
from operators.space import Space
from operators.structure import Structure
from operators.tracing import readable


class Stacked(LinearOperator):
    """``diag(A_1, ..., A_B)`` of operators that differ in their tensors alone.

    A vector is a batch: ``S @ V`` of ``(B, n)`` gives ``(B, m)``, row b by ``A_b``. For operators
    over nested structures each leaf has B as its leading axis.

    Parameters
    ----------
    operators
        ``A_1, ..., A_B``: of one class, with tensors of one shape, and alike in all else (the same
        function, the same pattern, the same number of terms).

    Raises
    ------
    ValueError
        There is none, or two of them differ in more than their tensors.
    FalseClaimError
        A claim of one of them is false.

    Notes
    -----
    The tensors are copied into one stack. For operators that are already stacked, as
    ``torch.func.vmap`` returns them, there is `of`. Facts are those that all of them share.

    Examples
    --------
    >>> import torch, operators as ops
    >>> S = Stacked(
    ...     [ops.Diagonal(torch.tensor([1.0, 2.0])), ops.Diagonal(torch.tensor([3.0, 4.0]))]
    ... )
    >>> S @ torch.ones(2, 2)
    tensor([[1., 2.],
            [3., 4.]])
    >>> S[1].to_dense()
    tensor([[3., 0.],
            [0., 4.]])
    """

    _parameters = ("batched",)

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        if not operators:
            raise ValueError("operators is empty; expected at least one")
        for b, operator in enumerate(operators):
            _check_alike(operators[0], operator, b)
        model = _sharing_facts(list(operators))
        batched = pytree.tree_map(lambda *leaves: torch.stack(leaves), model, *operators[1:])
        self._hold(batched, len(operators), model.structure)
        self._probed = all(operator.check_claims() for operator in operators)

    @classmethod
    def of(cls, batched: LinearOperator) -> Stacked:
        """The batch of an operator whose tensors all have a leading axis B.

        Such a one is what ``torch.func.vmap(lambda M: ops.Dense(M))(matrices)`` returns.

        Raises
        ------
        ValueError
            The tensors have no common leading axis.
        """
        sizes = {tensor.shape[:1] for tensor in batched.tensors}
        if len(sizes) != 1 or torch.Size([]) in sizes:
            raise ValueError(
                f"the tensors of batched {batched!r} have leading axes {sorted(sizes)}; "
                "expected one common axis"
            )
        stacked = object.__new__(cls)
        stacked._hold(batched, sizes.pop()[0], batched.structure)
        return stacked

    def _hold(self, batched: LinearOperator, count: int, structure: Structure) -> None:
        domain, codomain = (_times(count, s) for s in (batched.domain, batched.codomain))
        LinearOperator.__init__(self, domain, codomain, structure)
        self.batched, self.count = batched, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> LinearOperator:
        """``A_b``, counted from 0."""
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} for a stack of {self.count}")
        member: LinearOperator = pytree.tree_map(lambda tensor: tensor[index], self.batched)
        return member

    @property
    def operands(self) -> tuple[LinearOperator, ...]:
        """None: what it holds is a batch, not an operator that can be applied by itself."""
        return ()

    def _try_claims(self) -> bool:
        if not self.batched._promises():
            return True
        return readable(*self.tensors) and all(self[b].check_claims() for b in range(self.count))

    @property
    def block_diagonal(self) -> bool:
        """True."""
        return True

    def _each(self, function: Callable[..., Any], *batches: Tensor) -> Any:
        if not self.batched.tensors:  # alike to the last: nothing for vmap to map over but these
            member = self.batched
            if batches:
                return torch.func.vmap(lambda *items: function(member, *items))(*batches)
            once = function(member)
            return once.expand(self.count, *once.shape) if isinstance(once, Tensor) else once
        return torch.func.vmap(function)(self.batched, *batches)

    def gathered(self, batch: Tensor, *, transpose: bool = False) -> Tensor:
        """``(B m, k)``: k vectors of `codomain` from those of the members, ``(B, m, k)``.

        The vectors of `domain`, from ``(B, n, k)``, with `transpose`. See `scattered` for the way
        back; for members on plain vectors both are reshapes.
        """
        whole, member = self._spaces(transpose)
        if member.is_flat:
            return batch.reshape(batch.shape[0] * batch.shape[1], batch.shape[-1])

        def column(rows: Tensor) -> Tensor:
            return whole.ravel(torch.func.vmap(member.unravel)(rows))

        return torch.func.vmap(column, in_dims=2, out_dims=1)(batch)

    def scattered(self, block: Tensor, *, transpose: bool = False) -> Tensor:
        """``(B, n, k)``: vectors of the members from k of `domain`, ``(B n, k)``.

        Those of `codomain`, ``(B, m, k)``, with `transpose`.
        """
        whole, member = self._spaces(not transpose)
        if member.is_flat:
            return block.reshape(self.count, member.size, block.shape[-1])

        def column(v: Tensor) -> Tensor:
            return torch.func.vmap(member.ravel)(whole.unravel(v))

        return torch.func.vmap(column, in_dims=1, out_dims=2)(block)

    def _spaces(self, domain: bool) -> tuple[Space, Space]:
        """Space of the whole and of a member."""
        if domain:
            return self.domain, self.batched.domain
        return self.codomain, self.batched.codomain

    def _matvec(self, v: Tensor) -> Tensor:
        batch = torch.func.vmap(self.batched.domain.ravel)(self.domain.unravel(v))
        image = self._each(lambda A, x: A._matvec(x), batch)
        return self.codomain.ravel(torch.func.vmap(self.batched.codomain.unravel)(image))

    def _matmat(self, block: Tensor) -> Tensor:
        if not (self.batched.domain.is_flat and self.batched.codomain.is_flat):
            return super()._matmat(block)
        batch = block.reshape(self.count, self.batched.shape[1], block.shape[1])
        return self._each(lambda A, x: A._matmat(x), batch).reshape(self.shape[0], block.shape[1])

    def _transpose(self) -> LinearOperator:
        transposed = object.__new__(Stacked)
        transposed._hold(self._each(lambda A: A.T), self.count, self.structure.transpose())
        return transposed

    def _cost(self) -> Cost:
        # That of a member: the batch would take the axis of its members for one of theirs.
        return self.count * self[0].cost

    def _exact_diagonal(self) -> Tensor | None:
        if self[0]._exact_diagonal() is None:
            return None
        rows = self._each(lambda A: A._exact_diagonal())
        return self.domain.ravel(torch.func.vmap(self.batched.domain.unravel)(rows))

    def _exact_trace(self) -> Tensor | None:
        if self[0]._exact_trace() is None:
            return None
        traces: Tensor = self._each(lambda A: A._exact_trace())
        return traces.sum()

    def _exact_logdet(self) -> Tensor | None:
        # Whether there is one may depend on the values of a member.
        logdets = [self[b]._exact_logdet() for b in range(self.count)]
        known = [logdet for logdet in logdets if logdet is not None]
        return torch.stack(known).sum() if len(known) == len(logdets) else None

    def _describe(self) -> str:
        return f"{self.count} of {self.batched!r}"


def _sharing_facts(operators: list[LinearOperator]) -> LinearOperator:
    """The first of them, with those facts alone that all of them have; operand by operand."""
    first = operators[0]
    shared = object.__new__(type(first))
    shared.__dict__.update(first.__dict__)
    shared._fixed = None
    shared.structure = reduce(Structure.meet, (operator.structure for operator in operators))
    shared._claims = tuple({claim: None for operator in operators for claim in operator._claims})
    for name in first._parameters:
        values: list[Any] = [operator.__dict__.get(name) for operator in operators]
        if isinstance(values[0], LinearOperator):
            shared.__dict__[name] = _sharing_facts(values)
        elif isinstance(values[0], (list, tuple)):
            parts = [
                _sharing_facts(list(part)) if isinstance(part[0], LinearOperator) else part[0]
                for part in zip(*values, strict=True)
            ]
            shared.__dict__[name] = type(values[0])(parts)
    return shared


def _times(count: int, space: Space) -> Space:
    shapes = tuple(torch.Size([count, *shape]) for shape in space.shapes)
    return Space(space.treespec, shapes, space.dtype, space.device)


def _check_alike(first: LinearOperator, other: LinearOperator, index: int) -> None:
    name = f"operators[{index}]"
    if not isinstance(other, LinearOperator):
        raise TypeError(f"{name} is a {type(other).__name__}; expected an operator")
    # What an operator does may depend on whether it is symmetric, unlike on its other facts.
    same = (
        pytree.tree_structure(first) == pytree.tree_structure(other)
        and first.symmetric == other.symmetric
        and [t.shape for t in first.tensors] == [t.shape for t in other.tensors]
    )
    if not same:
        raise ValueError(
            f"{name} is {other!r}, but operators[0] is {first!r}: they differ in more than the "
            "values of their tensors; a batch of unlike operators is BlockDiagonal"
        )
