"""`Pattern`: where the nonzeros of a sparse matrix are, and what follows from that alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from operator import index
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from operators.sparse import csr
from operators.sparse.csr import Shape
from operators.tracing import plainly


class SymbolicProduct(NamedTuple):
    """``C = A B`` entry by entry: ``C[where[p]] += A[left[p]] B[right[p]]`` over all pairs p."""

    pattern: Pattern
    left: Tensor
    right: Tensor
    where: Tensor


class Pattern:
    """Places of the nonzeros of an ``(m, n)`` matrix, by rows and then columns, none twice.

    Immutable. Equal by content, and hashable; what is derived from it (its transpose, its unions
    and products with other patterns) is worked out once and kept as long as it lives.

    Parameters
    ----------
    columns
        Column of each nonzero, ascending within a row: int64 of shape ``(nnz,)``.
    row_pointers
        Nonzeros ``row_pointers[i]`` up to ``row_pointers[i + 1]`` are in row i: int64 of shape
        ``(m + 1,)``.
    shape
        ``(m, n)``.

    Raises
    ------
    ValueError
        The indices are no such list; `Pattern.of` takes them in any order.
    TypeError
        The indices are not int64 tensors.

    Notes
    -----
    Holds ``2 nnz + m`` integers of 8 bytes.

    Examples
    --------
    >>> import torch
    >>> rows, columns = torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1])
    >>> pattern, where = Pattern.of(rows, columns, (2, 2))
    >>> pattern
    Pattern((2, 2), nnz=2)
    >>> where
    tensor([1, 0, 1])
    >>> pattern.symmetric
    True
    """

    def __init__(self, columns: Tensor, row_pointers: Tensor, shape: Shape) -> None:
        for name, tensor in (("columns", columns), ("row_pointers", row_pointers)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise TypeError(f"{name} is {_kind(tensor)}; expected an int64 tensor of one axis")
        columns, pointers = csr.unwrapped(columns), csr.unwrapped(row_pointers)
        m, n = _checked_shape(shape)
        if len(pointers) != m + 1:
            raise ValueError(f"row_pointers has length {len(pointers)}; expected m + 1 = {m + 1}")
        if columns.device != pointers.device:
            raise ValueError(
                f"columns is on {columns.device}, but row_pointers on {pointers.device}"
            )
        with plainly():
            ends = int(pointers[0]), int(pointers[-1])
            if ends != (0, len(columns)) or bool((pointers.diff() < 0).any()):
                raise ValueError(
                    f"row_pointers does not rise from 0 to nnz = {len(columns)} without falling"
                )
            _check_range(columns, n, "columns")
        if not csr.rises(columns, pointers):
            raise ValueError("columns does not rise within each row; Pattern.of sorts and merges")
        self._set(csr.rows_of(pointers), columns, pointers, (m, n))

    def _set(self, rows: Tensor, columns: Tensor, row_pointers: Tensor, shape: Shape) -> None:
        self._rows, self._columns, self._row_pointers = rows, columns, row_pointers
        self._shape = shape
        self._digest: bytes | None = None
        self._triangles: tuple[bool, bool] | None = None
        self._diagonal_positions: Tensor | None = None
        self._narrow: tuple[Tensor, Tensor] | None = None
        # A transpose knows its origin weakly: patterns must not keep themselves alive in a circle,
        # hence also None in place of a pattern for this one itself.
        self._symmetric: bool | None = None
        self._order: Tensor | None = None
        self._transposed: Pattern | None = None
        self._origin: Callable[[], Pattern | None] = _nothing
        self._eye: Pattern | None = None
        self._copies: Pattern | None = None
        self._unions: WeakKeyDictionary[Pattern, tuple[Pattern | None, Tensor, Tensor]]
        self._unions = WeakKeyDictionary()
        self._products: WeakKeyDictionary[Pattern, SymbolicProduct] = WeakKeyDictionary()

    @classmethod
    def _sorted(cls, rows: Tensor, columns: Tensor, row_pointers: Tensor, shape: Shape) -> Pattern:
        """Pattern of indices that are known to be in order."""
        pattern = object.__new__(cls)
        pattern._set(rows, columns, row_pointers, shape)
        return pattern

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, shape: Shape) -> tuple[Pattern, Tensor]:
        """Pattern of places in any order, and for each of them its position in the pattern.

        Parameters
        ----------
        rows, columns
            Integer tensors ``(k,)``; a place may come twice.
        shape
            ``(m, n)``.

        Returns
        -------
        tuple
            The pattern, and `where` of shape ``(k,)``: entry k of a list of values belongs to
            (and where places come twice is summed into) nonzero ``where[k]``.

        Raises
        ------
        ValueError
            An index is out of range, or shapes or devices differ.
        TypeError
            The indices are not integers.

        Notes
        -----
        Costs two counting sorts of k integers, none where they are in order.
        """
        m, n = _checked_shape(shape)
        for name, tensor in (("rows", rows), ("columns", columns)):
            integral = isinstance(tensor, Tensor) and not (
                tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
            )
            if not integral:
                raise TypeError(f"{name} is {_kind(tensor)}; expected an integer tensor")
        if rows.ndim != 1 or rows.shape != columns.shape:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)} and columns {tuple(columns.shape)}; "
                "expected (k,) both"
            )
        if rows.device != columns.device:
            raise ValueError(f"rows is on {rows.device}, but columns on {columns.device}")
        if m * n >= 2**63:
            raise ValueError(f"shape={shape} has more places than an int64 counts")
        with plainly():
            rows, columns = csr.unwrapped(rows).long(), csr.unwrapped(columns).long()
            _check_range(rows, m, "rows")
            _check_range(columns, n, "columns")
        rows, columns, where = csr.ordered(rows, columns, (m, n))
        return cls._sorted(rows, columns, csr.pointers_of(rows, m), (m, n)), where

    @classmethod
    def eye(cls, n: int, device: torch.device | str = "cpu") -> Pattern:
        """Pattern of the ``(n, n)`` identity."""
        with plainly():
            steps = torch.arange(n + 1, device=device)
            return cls._sorted(steps[:-1], steps[:-1], steps, (n, n))

    # --- what it is ---------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """``(m, n)``."""
        return self._shape

    @property
    def rows(self) -> Tensor:
        """Row of each nonzero, ``(nnz,)``."""
        return self._rows

    @property
    def columns(self) -> Tensor:
        """Column of each nonzero, ``(nnz,)``."""
        return self._columns

    @property
    def row_pointers(self) -> Tensor:
        """First nonzero of each row, and nnz: ``(m + 1,)``."""
        return self._row_pointers

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return len(self._columns)

    @property
    def device(self) -> torch.device:
        """Device of the indices."""
        return self._columns.device

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern on another device; itself where it is there already."""
        with plainly():
            columns = self.columns.to(device)
            if columns is self.columns:
                return self
            rows, pointers = self.rows.to(device), self.row_pointers.to(device)
        return Pattern._sorted(rows, columns, pointers, self.shape)

    @property
    def lower_triangular(self) -> bool:
        """Whether no nonzero is above the diagonal."""
        return self._triangular()[0]

    @property
    def upper_triangular(self) -> bool:
        """Whether no nonzero is below the diagonal."""
        return self._triangular()[1]

    def _triangular(self) -> tuple[bool, bool]:
        if self._triangles is None:
            with plainly():
                lower = bool((self.rows >= self.columns).all())
                self._triangles = lower, bool((self.rows <= self.columns).all())
        return self._triangles

    @property
    def symmetric(self) -> bool:
        """Whether the mirror of every place is in the pattern."""
        if self._symmetric is None:
            self._transpose()
        return bool(self._symmetric)

    @property
    def diagonal_positions(self) -> Tensor:
        """Which of the nonzeros are on the diagonal; the row of each is ``rows[positions]``."""
        if self._diagonal_positions is None:
            with plainly():
                self._diagonal_positions = (self.rows == self.columns).nonzero()[:, 0]
        return self._diagonal_positions

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Pattern)
            and self.shape == other.shape
            and self.nnz == other.nnz
            and self.device == other.device
            and self.digest == other.digest
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> bytes:
        """Sixteen bytes that no two patterns share in practice (BLAKE2); computed once."""
        if self._digest is None:
            state = hashlib.blake2b(repr(self.shape).encode(), digest_size=16)
            with plainly():
                for part in (self.columns, self.row_pointers):
                    state.update(part.cpu().contiguous().numpy().data)
            self._digest = state.digest()
        return self._digest

    def __repr__(self) -> str:
        return f"Pattern({self.shape}, nnz={self.nnz})"

    def __reduce__(self) -> tuple[Any, ...]:
        # What was derived is left behind.
        return (Pattern._sorted, (self.rows, self.columns, self.row_pointers, self.shape))

    # --- what follows from it -----------------------------------------------------------------

    def transpose(self) -> tuple[Pattern, Tensor]:
        """Pattern of ``A^T``, and the order in which it takes the values: ``values[order]``.

        A symmetric pattern is its own transpose, and the transpose of a transpose is the pattern
        that it came from. Costs one counting sort, the first time.
        """
        order = self._transpose()
        if self.symmetric:
            return self, order
        transposed = self._origin() or self._transposed
        if transposed is None:
            # It came from a pattern that is no more.
            self._order = None
            return self.transpose()
        return transposed, order

    def _transpose(self) -> Tensor:
        if self._order is not None:
            return self._order
        (m, n), columns = self.shape, self.columns
        below, pointers, order = csr.transposed(self.rows, columns, self.shape)
        if self._symmetric is None:
            with plainly():
                same = m == n and torch.equal(pointers, self.row_pointers)
                self._symmetric = same and torch.equal(below, columns)
        if not self._symmetric and self._origin() is None:
            transposed = Pattern._sorted(csr.rows_of(pointers), below, pointers, (n, m))
            transposed._origin, transposed._symmetric = ref(self), False
            self._transposed = transposed
        self._order = order
        return order

    def narrow(self) -> tuple[Tensor, Tensor]:
        """Row pointers and columns of the narrowest type that libraries take: int32 if it fits.

        Copied once, in ``4 (nnz + m)`` bytes: torch's CSR product and SuiteSparse run on 32 bits.
        """
        if self._narrow is None:
            fits = max(self.nnz, *self.shape) < 2**31
            dtype = torch.int32 if fits else torch.int64
            with plainly():
                self._narrow = self.row_pointers.to(dtype), self.columns.to(dtype)
        return self._narrow

    def block_diagonal(self, count: int) -> Pattern:
        """Pattern of `count` copies of A along a diagonal; the last one asked for is kept."""
        m, n = self.shape
        shape = (count * m, count * n)
        if self._copies is None or self._copies.shape != shape:
            indices = csr.repeated(self.rows, self.columns, self.row_pointers, self.shape, count)
            self._copies = Pattern._sorted(*indices, shape)
        return self._copies

    def union(self, other: Pattern) -> tuple[Pattern, Tensor, Tensor]:
        """Pattern of ``A + B``, and where in it the nonzeros of A and of B go.

        It is the pattern of A itself where that holds all of B. Costs two counting sorts of both
        lists, the first time.

        Raises
        ------
        ValueError
            Shapes or devices differ.
        """
        if self.shape != other.shape or self.device != other.device:
            raise ValueError(f"cannot unite {self} on {self.device} with {other} on {other.device}")
        if other not in self._unions:
            self._unions[other] = self._unite(other)
        union, ours, theirs = self._unions[other]
        return union or self, ours, theirs

    def _unite(self, other: Pattern) -> tuple[Pattern | None, Tensor, Tensor]:
        with plainly():
            rows = torch.cat([self.rows, other.rows])
            columns = torch.cat([self.columns, other.columns])
        union, where = Pattern.of(rows, columns, self.shape)
        with plainly():
            ours, theirs = where[: self.nnz].clone(), where[self.nnz :].clone()
        return None if union.nnz == self.nnz else union, ours, theirs

    def with_diagonal(self) -> tuple[Pattern, Tensor, Tensor]:
        """`union` with the identity: the pattern of ``A + c I``."""
        if self._eye is None:
            self._eye = Pattern.eye(self.shape[0], self.device)
        return self.union(self._eye)

    def product(self, other: Pattern) -> SymbolicProduct:
        """Pattern of ``A B``, and all pairs of nonzeros that enter it.

        Raises
        ------
        ValueError
            Inner sizes or devices differ.

        Notes
        -----
        There are ``P = sum_k |A[:, k]| |B[k, :]|`` pairs, the number of multiplications; they are
        kept, in 24 P bytes, as long as both patterns live. Costs a sort of them, row by row, the
        first time.
        """
        if self.shape[1] != other.shape[0] or self.device != other.device:
            raise ValueError(
                f"cannot multiply {self} on {self.device} by {other} on {other.device}"
            )
        if other not in self._products:
            m, n = self.shape[0], other.shape[1]
            rows, columns, left, right, where = csr.multiplied(
                self.row_pointers, self.columns, other.row_pointers, other.columns, n
            )
            pattern = Pattern._sorted(rows, columns, csr.pointers_of(rows, m), (m, n))
            self._products[other] = SymbolicProduct(pattern, left, right, where)
        return self._products[other]


def _nothing() -> None:
    return None


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _checked_shape(shape: Shape) -> Shape:
    try:
        m, n = (index(size) for size in shape)
    except (TypeError, ValueError):
        raise ValueError(f"shape={shape!r}; expected two integers (m, n)") from None
    if m < 0 or n < 0:
        raise ValueError(f"shape={shape!r}; expected sizes >= 0")
    return m, n


def _check_range(indices: Tensor, size: int, name: str) -> None:
    if not len(indices):
        return
    smallest, largest = int(indices.min()), int(indices.max())
    if smallest < 0 or largest >= size:
        raise ValueError(
            f"{name} reaches from {smallest} to {largest}; expected indices from 0 to {size - 1}"
        )
