"""UMFPACK and KLU, where they are installed: the LU factorisations of SuiteSparse."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Protocol

import numpy as np

from solvers.solution import MissingLibraryError, SingularError
from solvers.sparse.matrix import Array


class LUFactor(Protocol):
    """A factorisation of a square CSC array."""

    name: str

    @property
    def nonzeros(self) -> int | None:
        """Nonzeros of L and U."""

    def solve(self, block: Array, *, transpose: bool = False) -> Array:
        """``A^-1 B`` or ``A^-T B``."""

    def logdet(self) -> float:
        """``log |det A|``."""


def installed(*modules: str) -> Any:
    """The first of some modules that is installed; None for none."""
    for module in modules:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    return None


def umfpack(matrix: Any) -> LUFactor:
    """UMFPACK's factorisation of a CSC array in float64, by scikit-umfpack or scikit-sparse 0.5.

    Raises
    ------
    MissingLibraryError
        Neither is installed.
    SingularError
        A pivot is exactly zero.
    """
    library = installed("scikits.umfpack", "sksparse.umfpack")
    if library is None:
        raise MissingLibraryError(
            "UMFPACK is not installed: apt-get install libsuitesparse-dev swig, then pip install "
            "scikit-umfpack (or scikit-sparse>=0.5, for SuiteSparse 7.4 and later); or use "
            "backend='superlu'"
        )
    kind = Umfpack05 if hasattr(library, "UMFFactor") else UmfpackContext
    return kind(library, matrix)


class UmfpackContext:
    """UMFPACK by scikit-umfpack."""

    name = "UMFPACK"

    def __init__(self, library: Any, matrix: Any) -> None:
        wide = matrix.indices.dtype == np.int64
        # Of its estimate of the condition nobody needs to warn: the residual is measured.
        context = library.UmfpackContext("dl" if wide else "di", maxCond=np.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", library.UmfpackWarning)
            context.numeric(matrix)
        if context.info[library.UMFPACK_STATUS] == library.UMFPACK_WARNING_singular_matrix:
            raise SingularError("UMFPACK: a pivot is exactly zero")
        self._library, self._context, self._matrix = library, context, matrix

    @property
    def nonzeros(self) -> int | None:
        """Nonzeros of L and U."""
        info = self._context.info
        return int(info[self._library.UMFPACK_LNZ] + info[self._library.UMFPACK_UNZ])

    def solve(self, block: Array, *, transpose: bool = False) -> Array:
        """``A^-1 B`` or ``A^-T B``, column by column as UMFPACK does."""
        system = self._library.UMFPACK_At if transpose else self._library.UMFPACK_A
        columns = [
            self._context.solve(system, self._matrix, np.ascontiguousarray(column))
            for column in block.T
        ]
        return np.stack(columns, axis=1)

    def logdet(self) -> float:
        """``log |det A|``. Copies L and U."""
        _, U, _, _, scale, reciprocal = self._context.lu(self._matrix)
        # U is that of diag(scale)^-1 A, or of diag(scale) A where the factors are reciprocal.
        rows = np.log(np.abs(scale)).sum() * (-1 if reciprocal else 1)
        return float(np.log(np.abs(U.diagonal())).sum() + rows)


class Umfpack05:
    """UMFPACK by scikit-sparse 0.5."""

    name = "UMFPACK"

    def __init__(self, library: Any, matrix: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", library.UMFPACKSingularMatrixWarning)
            try:
                self._handle = library.UMFFactor(matrix).factorize(matrix)
            except (
                library.UMFPACKSingularMatrixWarning,
                library.UMFPACKSingularMatrixError,
            ) as error:
                raise SingularError(f"UMFPACK: {error}") from None

    @property
    def nonzeros(self) -> int | None:
        """Nonzeros of L and U."""
        return int(self._handle.nnz)

    def solve(self, block: Array, *, transpose: bool = False) -> Array:
        """``A^-1 B`` or ``A^-T B``."""
        x: Array = self._handle.solve(np.asfortranarray(block), trans="T" if transpose else "N")
        return x

    def logdet(self) -> float:
        """``log |det A|``."""
        return float(self._handle.slogdet()[1])


class KLU:
    """KLU by scikit-sparse 0.5, for matrices of circuits and the like: little fill, no BLAS.

    Raises
    ------
    MissingLibraryError
        It is not installed.
    SingularError
        A pivot is exactly zero.
    """

    name = "KLU"

    def __init__(self, matrix: Any) -> None:
        library = installed("sksparse.klu")
        if library is None:
            raise MissingLibraryError(
                "KLU is not installed: pip install 'scikit-sparse>=0.5', which needs SuiteSparse "
                "7.4 or later; or use backend='superlu'"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", library.KLUSingularMatrixWarning)
            try:
                self._handle = library.KLUFactor(matrix).factorize(matrix)
            except library.KLUSingularMatrixWarning as error:
                raise SingularError(f"KLU: {error}") from None

    @property
    def nonzeros(self) -> int | None:
        """Nonzeros of L and U."""
        return int(self._handle.nnz)

    def solve(self, block: Array, *, transpose: bool = False) -> Array:
        """``A^-1 B`` or ``A^-T B``."""
        if transpose:
            # It solves X A = B then, with right-hand sides in rows.
            x: Array = self._handle.solve(np.asfortranarray(block.T), transpose=True).T
        else:
            x = self._handle.solve(np.asfortranarray(block))
        return x

    def logdet(self) -> float:
        """Not offered.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError("KLU does not give determinants; use backend='superlu'")
