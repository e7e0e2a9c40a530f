"""CHOLMOD by scikit-sparse, of either interface: analyse, factorise, solve, update.

scikit-sparse 0.4 (SuiteSparse 5 and later) and 0.5 (SuiteSparse 7.4 and later) share no name; which
one is there is asked of the module. Here both are a `Symbolic`, which makes any number of `Factor`.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np

from solvers.solution import MissingLibraryError
from solvers.sparse.column_counts import column_counts
from solvers.sparse.matrix import Array

Ordering = Literal["default", "amd", "metis", "nesdis", "natural", "best"]
Mode = Literal["auto", "supernodal", "simplicial"]

INSTALL = (
    "CHOLMOD is not installed: apt-get install libsuitesparse-dev libopenblas0-pthread, then "
    "pip install 'hyperlearn[cholmod]'"
)
# From so many nonzeros of L on indices have 64 bits: those of 32 bits count the storage of L, which
# supernodes pad with zeros.
WIDE = 2**30
# CHOLMOD's rule for mode="auto": supernodes where a nonzero of L costs so many flops.
SWITCH = 40.0


class NotDefinite(Exception):
    """A pivot is not positive: that at `position` in the order of elimination, from 0, if known."""

    def __init__(self, position: int | None) -> None:
        super().__init__(position)
        self.position = position


def available() -> bool:
    """Whether CHOLMOD can be used."""
    try:
        library()
    except MissingLibraryError:
        return False
    return True


def library() -> Any:
    """The module ``sksparse.cholmod``.

    Raises
    ------
    MissingLibraryError
        It is not installed.
    """
    try:
        return importlib.import_module("sksparse.cholmod")
    except ImportError as error:
        raise MissingLibraryError(f"{INSTALL} ({error})") from None


def analyse(matrix: Any, ordering: Ordering, mode: Mode) -> Symbolic:
    """Ordering and elimination tree of a symmetric CSC array; its values do not matter.

    Raises
    ------
    MissingLibraryError
        CHOLMOD is not installed, or was built without the ordering.
    """
    kind = _Symbolic05 if hasattr(library(), "CholeskyFactor") else _Symbolic04
    symbolic = kind(matrix, ordering, mode)
    if symbolic.factor_nonzeros is not None and symbolic.factor_nonzeros >= WIDE:
        return kind(with_indices(matrix, np.int64), ordering, mode)
    return symbolic


def with_indices(matrix: Any, dtype: Any) -> Any:
    """The same array with both index arrays of one type; itself where they are."""
    if matrix.indices.dtype == matrix.indptr.dtype == dtype:
        return matrix
    indices, pointers = matrix.indices.astype(dtype), matrix.indptr.astype(dtype)
    copy = type(matrix)((matrix.data, indices, pointers), shape=matrix.shape)
    # scipy narrows the indices that a constructor is given.
    copy.indices, copy.indptr = indices, pointers
    copy.has_canonical_format = True
    return copy


class Symbolic(ABC):
    """What follows from the pattern alone.

    Parameters
    ----------
    counts
        Nonzeros of each column of L, in the order of elimination; None where nobody tells.
    permutation
        Column of A that is eliminated k-th.
    index
        Type of the indices: every array that goes to CHOLMOD has it, for 0.5 mixes types up without
        a word.
    """

    counts: Array | None
    permutation: Array
    index: Any

    @property
    def factor_nonzeros(self) -> int | None:
        """Nonzeros of L."""
        return None if self.counts is None else int(self.counts.sum(dtype=np.int64))

    @property
    def flops(self) -> float | None:
        """Operations of the numeric factorisation, ``sum_j |L_:j|^2``."""
        return None if self.counts is None else float(np.square(self.counts, dtype=float).sum())

    @abstractmethod
    def factorize(self, matrix: Any) -> Factor:
        """Factorise a matrix of the same pattern, of which the lower half counts.

        Raises
        ------
        NotDefinite
            A pivot is not positive.
        """


class Factor(ABC):
    """A numeric factorisation."""

    nonzeros: int | None

    @abstractmethod
    def solve(self, block: Array) -> Array:
        """``A^-1 B`` for ``(n, k)`` in float64."""

    @abstractmethod
    def logdet(self) -> float:
        """``log det A``."""

    @abstractmethod
    def updated(self, C: Any, *, subtract: bool) -> Factor:
        """A factorisation of ``A + C C^T``, or ``A - C C^T``, beside this one; C is a CSC array.

        Raises
        ------
        NotDefinite
            What remains is not positive definite.
        """


class _Symbolic04(Symbolic):
    """By the interface of scikit-sparse 0.4."""

    def __init__(self, matrix: Any, ordering: Ordering, mode: Mode) -> None:
        cholmod = library()
        self.index = matrix.indices.dtype
        try:
            self._template = cholmod.analyze(matrix, mode=mode, ordering_method=ordering)
        except cholmod.CholmodNotInstalledError as error:
            raise MissingLibraryError(_without(ordering, error)) from None
        self.permutation = self._template.P()
        self.counts = column_counts(self._template)
        # L L^T in supernodes stops at a pivot that is not positive. Without them it is L D L^T,
        # which does not.
        flops, nonzeros = self.flops or 0.0, self.factor_nonzeros or 1
        dense = mode == "auto" and flops > 1.01 * SWITCH * nonzeros
        self._stops = mode == "supernodal" or dense

    def factorize(self, matrix: Any) -> Factor:
        cholmod = library()
        try:
            handle = self._template.cholesky(with_indices(matrix, self.index))
        except cholmod.CholmodNotPositiveDefiniteError as error:
            raise NotDefinite(error.column) from None
        if not self._stops:
            _check_pivots(handle.D())
        return _Factor04(handle, self.index, self.factor_nonzeros)


class _Factor04(Factor):
    """By the interface of scikit-sparse 0.4."""

    def __init__(self, handle: Any, index: Any, nonzeros: int | None) -> None:
        self._handle, self._index, self.nonzeros = handle, index, nonzeros

    def solve(self, block: Array) -> Array:
        x: Array = self._handle(block)
        return x

    def logdet(self) -> float:
        return float(self._handle.logdet())

    def updated(self, C: Any, *, subtract: bool) -> Factor:
        handle = self._handle.copy()
        handle.update_inplace(with_indices(C, self._index), subtract=subtract)
        _check_pivots(handle.D())
        return _Factor04(handle, self._index, None)


class _Symbolic05(Symbolic):
    """By the interface of scikit-sparse 0.5."""

    def __init__(self, matrix: Any, ordering: Ordering, mode: Mode) -> None:
        cholmod = library()
        self.index = matrix.indices.dtype
        try:
            # Never factorised itself: the second factorisation of one object is simplicial, up to
            # twenty times slower.
            self._template = cholmod.CholeskyFactor(
                matrix, lower=True, order=ordering, supernodal_mode=mode
            )
        except cholmod.CholmodNotInstalledError as error:
            raise MissingLibraryError(_without(ordering, error)) from None
        except cholmod.CholmodNotPositiveDefiniteError:
            raise NotDefinite(None) from None  # it has no nonzeros at all
        self.permutation = self._template.get_perm()
        self.counts = np.array(self._template.colcount)

    def factorize(self, matrix: Any) -> Factor:
        cholmod = library()
        try:
            handle = self._template.copy().factorize(with_indices(matrix, self.index), ldl=False)
        except cholmod.CholmodNotPositiveDefiniteError as error:
            column = re.search(r"column (\d+)", str(error))
            raise NotDefinite(int(column[1]) if column else None) from None
        return _Factor05(handle, self.index)


class _Factor05(Factor):
    """By the interface of scikit-sparse 0.5."""

    def __init__(self, handle: Any, index: Any) -> None:
        self._handle, self._index, self.nonzeros = handle, index, int(handle.nnz)

    def solve(self, block: Array) -> Array:
        x: Array = self._handle.solve(block)
        return x

    def logdet(self) -> float:
        return float(self._handle.logdet())

    def updated(self, C: Any, *, subtract: bool) -> Factor:
        handle = self._handle.copy()
        change = handle.downdate if subtract else handle.update
        change(with_indices(C, self._index))
        # An update leaves L D L^T.
        _check_pivots(handle.D.diagonal())
        return _Factor05(handle, self._index)


def _check_pivots(pivots: Array) -> None:
    wrong = np.flatnonzero(~(pivots > 0))
    if len(wrong):
        raise NotDefinite(int(wrong[0]))


def _without(ordering: Ordering, error: Exception) -> str:
    return (
        f"this CHOLMOD was built without ordering={ordering!r} ({error}); use ordering='amd', or "
        "install one with METIS: apt-get install libsuitesparse-dev"
    )
