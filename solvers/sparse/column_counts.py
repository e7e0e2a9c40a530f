"""How many nonzeros the columns of a Cholesky factor will have: `column_counts`."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from solvers.sparse.matrix import Array

POINTER = ctypes.sizeof(ctypes.c_void_p)


class _Factor(ctypes.Structure):
    """How ``cholmod_factor`` begins, in every version of CHOLMOD."""

    _fields_ = (
        ("n", ctypes.c_size_t),
        ("minor", ctypes.c_size_t),
        ("permutation", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    )


def column_counts(factor: Any) -> Array | None:
    """Nonzeros of each column of L, before L is computed, of a ``Factor`` of scikit-sparse 0.4.

    Parameters
    ----------
    factor
        What ``sksparse.cholmod.analyze`` returned.

    Returns
    -------
    ndarray
        In the order of elimination; None where the object is not laid out as expected.

    Notes
    -----
    CHOLMOD counts them when it analyses (Gilbert, Ng and Peyton, 1994,
    doi:10.1137/S089547989223921), and scikit-sparse 0.4 holds on to them without passing them on:
    a ``Factor`` is a reference to its ``Common`` and a pointer to the ``cholmod_factor``. They are
    read from there. That the reference is where it should be is seen before the pointer beside it
    is followed, and that the pointer leads to the permutation of the factor before the counts are.
    Counting again, by CHOLMOD's ``cholmod_analyze_ordering``, would take a fifth of the analysis.
    """
    header, size = object.__basicsize__, type(factor).__basicsize__
    if sys.implementation.name != "cpython" or size != header + 2 * POINTER:
        return None
    common, address = (_pointer(id(factor) + header + i * POINTER) for i in range(2))
    if common != id(factor._common) or not address:
        return None
    held, permutation = _Factor.from_address(address), factor.P()
    n = len(permutation)
    if held.n != n or held.permutation != permutation.ctypes.data or not held.counts:
        return None
    kind = ctypes.c_int64 if permutation.dtype == np.int64 else ctypes.c_int32
    return np.array((kind * n).from_address(held.counts))


def _pointer(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value
