"""Triangular systems by substitution: forward and backward, for blocks, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse import _sparsetools

from solvers.sparse.matrix import Array


class Substitution:
    """``(c D + L)^-1`` or ``(c D + U)^-1`` of a sparse matrix ``L + D + U``.

    Parameters
    ----------
    matrix
        Scipy CSR array with sorted indices, float32 or float64; one triangle is read.
    lower
        Whether it is the lower one.
    scale
        c.

    Notes
    -----
    Rows with a zero on the diagonal are left out: x is zero there. Refuse them before, unless they
    are zero altogether.

    With ``N = -(c D)^-1 L`` the solution is ``x = (c D)^-1 b + N x``, row by row from the first.
    That is scipy's product ``y += N x`` with x and y in one place: row i reads what the rows before
    it wrote. It takes a whole block at once; a column of 16 costs a fifth of one alone. The upper
    triangle is the same with rows and columns counted from the end. ``2 nnz(L)`` flops a column.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> T = scipy.sparse.csr_array(np.array([[2.0, 0.0], [1.0, 4.0]]))
    >>> Substitution(T, lower=True)(np.array([2.0, 9.0]))
    array([1., 2.])
    """

    def __init__(self, matrix: Any, *, lower: bool, scale: float = 1.0) -> None:
        n = matrix.shape[0]
        pointers, columns, values = matrix.indptr, matrix.indices, matrix.data
        diagonal = scale * matrix.diagonal()
        inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal != 0)
        rows = np.repeat(np.arange(n, dtype=columns.dtype), np.diff(pointers))
        kept = columns < rows if lower else columns > rows
        before = np.concatenate([[0], np.cumsum(kept, dtype=pointers.dtype)])
        pointers = before.astype(pointers.dtype, copy=False)[pointers]
        columns, values = columns[kept], values[kept] * np.repeat(-inverse, np.diff(pointers))
        if not lower:
            pointers = pointers[-1] - pointers[::-1]
            columns, values = n - 1 - columns[::-1], values[::-1]
        # Counted from the end where the triangle is the upper one.
        self.step = 1 if lower else -1
        self.inverse = inverse[:: self.step].copy()
        self.rows = scipy.sparse.csr_array((values, columns, pointers), shape=(n, n))

    def __call__(self, b: Array) -> Array:
        """The solution for ``(n,)`` or ``(n, k)``; a view that counts backwards for the upper."""
        inverse = self.inverse if b.ndim == 1 else self.inverse[:, None]
        return self._swept(np.multiply(b[:: self.step], inverse, order="C"))

    def unit(self, b: Array) -> Array:
        """``(I + (c D)^-1 L)^-1 b``: as after a product with ``c D``."""
        return self._swept(b[:: self.step].copy(order="C"))

    def _swept(self, x: Array) -> Array:
        N, n, flat = self.rows, len(x), x.reshape(-1)
        if x.ndim == 1:
            _sparsetools.csr_matvec(n, n, N.indptr, N.indices, N.data, flat, flat)
        else:
            _sparsetools.csr_matvecs(n, n, x.shape[1], N.indptr, N.indices, N.data, flat, flat)
        return x[:: self.step]
