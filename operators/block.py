"""Operators made of blocks: `BlockDiagonal` and `Block`.

Their arguments are tuples with one member for each column of blocks, their results tuples with one
for each row; flat vectors are these, concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.algebra import Compound
from operators.cost import Cost
from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar
from operators.space import Space
from operators.structure import Structure


def direct_sum(spaces: Sequence[Space]) -> Space:
    """Space ``X_1 + ... + X_p`` of tuples whose members lie in the given spaces.

    Raises
    ------
    ValueError
        There is no space.
    TypeError
        They differ in dtype or device.

    Examples
    --------
    >>> import torch
    >>> direct_sum([Space.flat(2, torch.float32), Space.of({"a": torch.zeros(3, 1)})]).size
    5
    """
    if not spaces:
        raise ValueError("no space; expected at least one")
    dtype, device = spaces[0].dtype, spaces[0].device
    for space in spaces[1:]:
        if space.dtype != dtype or space.device != device:
            raise TypeError(
                f"spaces are {dtype} on {device} and {space.dtype} on {space.device}; "
                "expected one dtype and device"
            )
    trees = tuple(pytree.tree_unflatten([0] * len(s.shapes), s.treespec) for s in spaces)
    shapes = tuple(chain.from_iterable(space.shapes for space in spaces))
    return Space(pytree.tree_structure(trees), shapes, dtype, device)


def of_one_kind(operators: Sequence[LinearOperator], role: str) -> tuple[LinearOperator, ...]:
    """Operators of one dtype and device; those of which only the size was said take it over.

    Parameters
    ----------
    operators, role
        At least one, and what to call one of them in error messages.

    Raises
    ------
    ValueError
        There is none.
    TypeError
        One is not an operator, or they differ in dtype or device.
    """
    if not operators:
        raise ValueError(f"no {role}; expected at least one")
    for i, operator in enumerate(operators):
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"{role} {i} is a {type(operator).__name__}; expected a LinearOperator "
                "(a matrix goes into Dense)"
            )
    typed = next((A for A in operators if not A._untyped), operators[0])
    kind = (typed.dtype, typed.device)
    moved = tuple(operators)
    if not typed._untyped:
        moved = tuple(A._on(Space.flat(A.shape[1], *kind)) for A in operators)
    for i, operator in enumerate(moved):
        if (operator.dtype, operator.device) != kind:
            raise TypeError(
                f"{role} {i} is {operator!r} ({operator.dtype} on {operator.device}), but "
                f"{typed!r} is {kind[0]} on {kind[1]}; expected one dtype and device"
            )
    return moved


class BlockDiagonal(Compound):
    """``A = diag(A_1, ..., A_p)``: each block acts on its own member of a tuple.

    Parameters
    ----------
    blocks
        Operators, not necessarily square. The domain is the tuple of their domains, which may be
        nested; so is the codomain.

    Raises
    ------
    ValueError
        There is no block.
    TypeError
        A block is not an operator, or they differ in dtype or device.

    Notes
    -----
    A product costs one with each block. Multiples are block diagonal; so are sums and products with
    what has the same partition, and with diagonals. With square blocks, the diagonal, the trace and
    ``log |det|`` are exact where every block knows them.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = BlockDiagonal(ops.Dense(torch.ones(1, 2)), 2.0 * ops.Identity(2))
    >>> A @ torch.tensor([1.0, 2.0, 3.0, 4.0])
    tensor([3., 6., 8.])
    >>> A @ (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    (tensor([3.]), tensor([6., 8.]))
    """

    _parameters = ("blocks",)

    def __init__(self, *blocks: LinearOperator) -> None:
        blocks = of_one_kind(blocks, "block")
        structure = Structure()
        if all(m == n for m, n in (block.shape for block in blocks)):
            structure = Structure.block_diagonal([block.structure for block in blocks])
        domain = direct_sum([block.domain for block in blocks])
        super().__init__(domain, direct_sum([block.codomain for block in blocks]), structure)
        self.blocks = blocks

    @property
    def block_diagonal(self) -> bool:
        """True."""
        return True

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return BlockDiagonal(*operands)

    @property
    def _row_sizes(self) -> list[int]:
        return [block.shape[0] for block in self.blocks]

    @property
    def _column_sizes(self) -> list[int]:
        return [block.shape[1] for block in self.blocks]

    def _matvec(self, v: Tensor) -> Tensor:
        parts = zip(self.blocks, v.split(self._column_sizes), strict=True)
        return torch.cat([block._matvec(part) for block, part in parts])

    def _matmat(self, block: Tensor) -> Tensor:
        parts = zip(self.blocks, block.split(self._column_sizes), strict=True)
        return torch.cat([block._matmat(part) for block, part in parts])

    def _transpose(self) -> LinearOperator:
        return BlockDiagonal(*(block.T for block in self.blocks))

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        theirs = diagonal_blocks(other, self._row_sizes, self._column_sizes)
        if theirs is None:
            return None
        return BlockDiagonal(*(a + b for a, b in zip(self.blocks, theirs, strict=True)))

    def _scale(self, factor: Scalar) -> LinearOperator:
        return BlockDiagonal(*(factor * block for block in self.blocks))

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        theirs = diagonal_blocks(other, self._column_sizes, None)
        if theirs is None:
            return None
        return BlockDiagonal(*(a @ b for a, b in zip(self.blocks, theirs, strict=True)))

    def _rcompose(self, other: LinearOperator) -> LinearOperator | None:
        theirs = diagonal_blocks(other, None, self._row_sizes)
        if theirs is None:
            return None
        return BlockDiagonal(*(a @ b for a, b in zip(theirs, self.blocks, strict=True)))

    def _exact_diagonal(self) -> Tensor | None:
        diagonals = self._of_square_blocks(lambda block: block._exact_diagonal())
        return None if diagonals is None else torch.cat(diagonals)

    def _exact_trace(self) -> Tensor | None:
        traces = self._of_square_blocks(lambda block: block._exact_trace())
        return None if traces is None else torch.stack(traces).sum()

    def _exact_logdet(self) -> Tensor | None:
        logdets = self._of_square_blocks(lambda block: block._exact_logdet())
        return None if logdets is None else torch.stack(logdets).sum()

    def _of_square_blocks(
        self, value: Callable[[LinearOperator], Tensor | None]
    ) -> list[Tensor] | None:
        """A value of each block; None where one is not square or does not know it."""
        if self._row_sizes != self._column_sizes:
            return None
        values = [value(block) for block in self.blocks]
        known = [entry for entry in values if entry is not None]
        return known if len(known) == len(values) else None

    def to_dense(self) -> Tensor:
        """Matrix ``(m, n)``, from that of each block."""
        self.check_claims()
        return torch.block_diag(*(block.to_dense() for block in self.blocks))


def diagonal_blocks(
    A: LinearOperator, row_sizes: list[int] | None, column_sizes: list[int] | None
) -> tuple[LinearOperator, ...] | None:
    """Diagonal blocks of A where it has them in these sizes (None: in any); else None."""
    if isinstance(A, BlockDiagonal):
        rows_agree = row_sizes in (None, A._row_sizes)
        return A.blocks if rows_agree and column_sizes in (None, A._column_sizes) else None
    sizes = row_sizes or column_sizes
    if not isinstance(A, Diagonal) or sizes is None or (column_sizes or sizes) != sizes:
        return None
    # On plain vectors, which go with blocks on any space. A part has the facts of the whole.
    pieces = [A.values] * len(sizes) if A.values.ndim == 0 else A.values.split(sizes)
    return tuple(
        A._derived(piece, Space.flat(size, A.dtype, A.device), A.structure)
        for piece, size in zip(pieces, sizes, strict=True)
    )


class Block(LinearOperator):
    """``A = [[A_11, ..., A_1q], ..., [A_p1, ..., A_pq]]``.

    Parameters
    ----------
    rows
        p rows of q operators each; None is a block of zeros. The operators of a row have one
        codomain, those of a column one domain; where some of these are plain vectors and others
        nested, the nested one is taken.

    Raises
    ------
    ValueError
        Rows differ in length, a row or column holds no operator, or blocks do not fit together.
    TypeError
        A block is not an operator, or they differ in dtype or device.

    Notes
    -----
    A product costs one with each block that is not None. No fact is inferred; `BlockDiagonal` and
    `operators.saddle.Saddle` know some.

    Examples
    --------
    >>> import torch, operators as ops
    >>> B = ops.Dense(torch.tensor([[1.0, 2.0]]))
    >>> A = Block([[B, None], [ops.Identity(2), ops.Dense(torch.ones(2, 1))]])
    >>> A @ (torch.tensor([1.0, 1.0]), torch.tensor([3.0]))
    (tensor([3.]), tensor([4., 4.]))
    """

    _parameters: ClassVar[tuple[str, ...]] = ("blocks",)

    def __init__(self, rows: Sequence[Sequence[LinearOperator | None]]) -> None:
        lengths = sorted({len(row) for row in rows})
        if len(lengths) != 1:
            raise ValueError(
                f"rows have {lengths} blocks; expected rows of one length, None for zeros"
            )
        given = [block for row in rows for block in row if block is not None]
        held = iter(of_one_kind(given, "block"))
        self.blocks = tuple(None if block is None else next(held) for row in rows for block in row)
        self._width = lengths[0]
        self._join()

    def _join(self) -> None:
        """Spaces of the whole, from those of the blocks."""
        columns = list(zip(*self.rows, strict=True))
        inputs = [_shared(column, j, "column") for j, column in enumerate(columns)]
        outputs = [_shared(row, i, "row") for i, row in enumerate(self.rows)]
        LinearOperator.__init__(self, direct_sum(inputs), direct_sum(outputs), self._facts())
        self._column_sizes = [space.size for space in inputs]
        self._row_sizes = [space.size for space in outputs]

    def _facts(self) -> Structure:
        return Structure()

    @property
    def rows(self) -> tuple[tuple[LinearOperator | None, ...], ...]:
        """The blocks, row by row; None for zeros."""
        starts = range(0, len(self.blocks), self._width)
        return tuple(self.blocks[start : start + self._width] for start in starts)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._rowwise(v, lambda block, part: block._matvec(part))

    def _matmat(self, block: Tensor) -> Tensor:
        return self._rowwise(block, lambda block, part: block._matmat(part))

    def _rowwise(self, v: Tensor, product: Callable[[LinearOperator, Tensor], Tensor]) -> Tensor:
        parts = v.split(self._column_sizes)
        products = (
            [product(A, part) for A, part in zip(row, parts, strict=True) if A is not None]
            for row in self.rows
        )
        return torch.cat([reduce(torch.add, terms) for terms in products])

    def _transpose(self) -> LinearOperator:
        columns = zip(*self.rows, strict=True)
        return Block([[None if A is None else A.T for A in column] for column in columns])

    def _scale(self, factor: Scalar) -> LinearOperator:
        return Block([[None if A is None else factor * A for A in row] for row in self.rows])

    def _cost(self) -> Cost:
        return sum((A.cost for row in self.rows for A in row if A is not None), Cost())

    def _exact_diagonal(self) -> Tensor | None:
        if self._row_sizes != self._column_sizes:
            return None
        diagonals = []
        for i, (row, size) in enumerate(zip(self.rows, self._row_sizes, strict=True)):
            block = row[i]
            if block is None:
                diagonals.append(torch.zeros(size, dtype=self.dtype, device=self.device))
            elif (diagonal := block._exact_diagonal()) is not None:
                diagonals.append(diagonal)
            else:
                return None
        return torch.cat(diagonals)


def _shared(line: Sequence[LinearOperator | None], index: int, name: str) -> Space:
    """Space that the blocks of a row map into, or those of a column out of."""
    blocks = [block for block in line if block is not None]
    if not blocks:
        raise ValueError(
            f"{name} {index} of blocks holds only None, so its size is not known; "
            "put an operator of zeros there, as Dense(torch.zeros(m, n))"
        )
    spaces = [block.codomain if name == "row" else block.domain for block in blocks]
    first = next((i for i, space in enumerate(spaces) if not space.is_flat), 0)
    shared = spaces[first]
    for block, space in zip(blocks, spaces, strict=True):
        if space.size != shared.size or not (space.is_flat or space == shared):
            what = "codomains" if name == "row" else "domains"
            raise ValueError(
                f"{blocks[first]!r} and {block!r} in {name} {index} of blocks do not fit: "
                f"their {what} are {shared} and {space}"
            )
    return shared
