"""How many nonzeros the columns of a Cholesky factor will have: `column_counts`."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from solvers.sparse.matrix import Array

# More than a cholmod_common takes, of any version.
COMMON_BYTES = 1 << 16
# Values of CHOLMOD's enumerations: the lower half is stored; only the pattern; any ordering.
LOWER, PATTERN, GIVEN = -1, 0, 1
INTEGER = {np.dtype(np.int32): 0, np.dtype(np.int64): 2}


class _SparseMatrix(ctypes.Structure):
    """``cholmod_sparse``, alike in all versions."""

    _fields_ = (
        ("nrow", ctypes.c_size_t),
        ("ncol", ctypes.c_size_t),
        ("nzmax", ctypes.c_size_t),
        ("p", ctypes.c_void_p),
        ("i", ctypes.c_void_p),
        ("nz", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("stype", ctypes.c_int),
        ("itype", ctypes.c_int),
        ("xtype", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("sorted", ctypes.c_int),
        ("packed", ctypes.c_int),
    )


def column_counts(matrix: Any, permutation: Array, extension: str) -> Array | None:
    """Nonzeros of each column of L, ``P A P^T = L L^T``, without computing L.

    Parameters
    ----------
    matrix
        Symmetric CSC array with sorted indices.
    permutation
        Column of A that is eliminated k-th.
    extension
        File of the extension module that is linked to CHOLMOD.

    Returns
    -------
    ndarray
        In the order of elimination; None where the CHOLMOD that the module has been linked to does
        not show its routines.

    Notes
    -----
    From the elimination tree and the first descendants of its nodes, in about ``O(nnz(A))``
    (Gilbert, Ng and Peyton, 1994, doi:10.1137/S089547989223921), by CHOLMOD's
    ``cholmod_analyze_ordering``, which scikit-sparse 0.4 calls and does not pass on.
    """
    shared = ctypes.CDLL(extension)
    wide = matrix.indices.dtype == np.int64
    prefix = "cholmod_l_" if wide else "cholmod_"
    try:
        start, analyse, finish = (
            shared[prefix + name] for name in ("start", "analyze_ordering", "finish")
        )
    except AttributeError:
        return None
    n = matrix.shape[0]
    common = ctypes.create_string_buffer(COMMON_BYTES)
    view = _SparseMatrix(nrow=n, ncol=n, nzmax=matrix.nnz, stype=LOWER, xtype=PATTERN)
    view.p, view.i = _address(matrix.indptr), _address(matrix.indices)
    view.itype, view.sorted, view.packed = INTEGER[matrix.indices.dtype], 1, 1
    order = np.ascontiguousarray(permutation, dtype=matrix.indices.dtype)
    # Parents, postorder, counts, first descendants, levels.
    work = np.empty((5, n), dtype=matrix.indices.dtype)
    start(common)
    done = analyse(
        ctypes.byref(view),
        ctypes.c_int(GIVEN),
        ctypes.c_void_p(_address(order)),
        None,
        ctypes.c_size_t(0),
        *(ctypes.c_void_p(_address(row)) for row in work),
        common,
    )
    finish(common)
    return work[2].copy() if done else None


def _address(array: Array) -> int:
    return int(array.ctypes.data)
