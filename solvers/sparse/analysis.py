"""Symbolic analysis: done once for a pattern, and what it predicts of the factorisation."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from operators import Pattern
from solvers.matrix import as_operator, numbers
from solvers.solution import MissingLibraryError, StructureError
from solvers.sparse import cholmod
from solvers.sparse.cholmod import Mode, Ordering, Symbolic
from solvers.sparse.matrix import csc_of, sparse_of

# Analyses that are kept at most.
KEPT = 8


class Analyses:
    """Symbolic analyses by pattern and settings: the last few, as long as their patterns live.

    A pattern is looked for by identity, and by its digest only among those of its size.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[weakref.ref[Pattern], tuple[str, ...], Symbolic]] = []

    def of(
        self, pattern: Pattern, settings: tuple[str, ...], make: Callable[[], Symbolic]
    ) -> Symbolic:
        """The analysis that is kept, or else the one that is made now."""
        for entry in self._entries:
            if entry[1] == settings and entry[0]() == pattern:
                self._entries = [entry, *(other for other in self._entries if other is not entry)]
                return entry[2]
        symbolic = make()
        self._entries = [(weakref.ref(pattern, self._drop), settings, symbolic), *self._entries]
        del self._entries[KEPT:]
        return symbolic

    def clear(self) -> None:
        """Keep none."""
        self._entries = []

    def _drop(self, gone: weakref.ref[Pattern]) -> None:
        self._entries = [entry for entry in self._entries if entry[0] is not gone]


analyses = Analyses()


def symbolic_of(pattern: Pattern, matrix: Any, ordering: Ordering, mode: Mode) -> Symbolic:
    """CHOLMOD's analysis of a symmetric CSC array with the pattern."""
    return analyses.of(pattern, (ordering, mode), lambda: cholmod.analyse(matrix, ordering, mode))


@dataclass(frozen=True)
class Analysis:
    """What a sparse Cholesky factorisation will take.

    Parameters
    ----------
    factor_nonzeros
        Nonzeros of L; supernodes take some more memory than 8 bytes for each.
    flops
        Operations of the numeric factorisation, ``sum_j |L_:j|^2``; a solve takes
        ``4 factor_nonzeros``.
    seconds
        Seconds that the analysis took; next to none where it was kept.
    """

    factor_nonzeros: int
    flops: float
    seconds: float


def analyse(A: Any, ordering: Ordering = "default", mode: Mode = "auto") -> Analysis:
    """Fill and flops of `SparseCholesky` for A, before it is factorised.

    Parameters
    ----------
    A
        As for `solvers.LinearSolver.prepare`; held by its nonzeros, and symmetric.
    ordering, mode
        As for `SparseCholesky`, which takes up the analysis where they are the same.

    Raises
    ------
    MissingLibraryError
        CHOLMOD is not installed, or does not tell.
    StructureError
        A is not held by its nonzeros, or not known to be symmetric.

    Notes
    -----
    Only the pattern of A enters. On grids in the plane the ordering takes a fifth of the time of
    the factorisation, in space a few hundredths; more where METIS is tried.

    Examples
    --------
    >>> import scipy.sparse
    >>> line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(9, 9))
    >>> analyse(line, "natural").factor_nonzeros
    17
    """
    start = time.perf_counter()
    operator = numbers(as_operator(A), "analyse")
    if not operator.symmetric:
        raise StructureError(
            f"analyse needs a symmetric operator; {operator!r} does not claim to be: claim it"
        )
    sparse = sparse_of(operator, "analyse")
    matrix = csc_of(sparse, "analyse", torch.float64, symmetric=True)
    symbolic = symbolic_of(sparse.pattern, matrix, ordering, mode)
    seconds = time.perf_counter() - start
    if symbolic.factor_nonzeros is None or symbolic.flops is None:
        raise MissingLibraryError(
            "scikit-sparse 0.4 does not pass on the fill that CHOLMOD predicts, and this build of "
            "it does not let it be read either; use scikit-sparse 0.5"
        )
    return Analysis(symbolic.factor_nonzeros, symbolic.flops, seconds)
