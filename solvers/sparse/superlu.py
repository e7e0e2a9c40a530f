"""SuperLU by scipy, without the trap of BLAS threads: `SuperLU`."""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import numpy as np
from scipy.sparse.linalg import splu

from solvers.solution import SingularError
from solvers.sparse.matrix import Array
from solvers.threads import one_blas_thread

Ordering = Literal["colamd", "mmd_at_plus_a", "mmd_ata", "natural"]

# Their names in scipy.
ORDERINGS: dict[Ordering, Literal["COLAMD", "MMD_AT_PLUS_A", "MMD_ATA", "NATURAL"]] = {
    "colamd": "COLAMD",
    "mmd_at_plus_a": "MMD_AT_PLUS_A",
    "mmd_ata": "MMD_ATA",
    "natural": "NATURAL",
}
# Columns of a block that OpenBLAS does not yet spread over threads. It would do so for each
# supernode, however small, and take up to ten times as long as one thread for the whole.
COLUMNS = 4


class SuperLU:
    """``P_r A P_c = L U`` of a square CSC array in float32 or float64.

    Parameters
    ----------
    matrix
        A; indices of 32 bits.
    ordering
        Of the columns.
    pivot_threshold
        A diagonal entry is the pivot where it is at least this fraction of the largest of its
        column: 1 is partial pivoting, 0 takes any that is not zero.
    symmetric
        Order and pivot for a matrix whose diagonal may serve as pivots.

    Raises
    ------
    SingularError
        A pivot is exactly zero.
    """

    name = "SuperLU"

    def __init__(
        self, matrix: Any, ordering: Ordering, pivot_threshold: float, *, symmetric: bool = False
    ) -> None:
        if matrix.shape[0] and not matrix.nnz:
            raise SingularError("the matrix has no nonzeros")
        try:
            self._handle = splu(
                matrix,
                permc_spec=ORDERINGS[ordering],
                diag_pivot_thresh=pivot_threshold,
                options={"SymmetricMode": symmetric},
            )
        except RuntimeError as error:
            if "singular" not in str(error):
                raise
            raise SingularError(f"SuperLU: {error}") from None

    @property
    def nonzeros(self) -> int:
        """Nonzeros of L and U, the diagonal of L included."""
        return int(self._handle.nnz)

    def solve(self, block: Array, *, transpose: bool = False) -> Array:
        """``A^-1 B`` or ``A^-T B`` for ``(n, k)`` of the dtype of A."""
        solve = functools.partial(self._handle.solve, trans="T" if transpose else "N")
        block = np.asfortranarray(block)
        if block.shape[1] <= COLUMNS:
            return cast(Array, solve(block))
        with one_blas_thread():
            return cast(Array, solve(block))

    def pivots(self) -> Array:
        """Diagonal of U, in the order of elimination. Copies U."""
        return cast(Array, self._handle.U.diagonal())

    def logdet(self) -> float:
        """``log |det A|``."""
        return float(np.log(np.abs(self.pivots().astype(float))).sum())

    def first_wrong_pivot(self) -> int | None:
        """Column of A whose pivot shows that a symmetric A is not positive definite; None for none.

        For a factorisation with ``symmetric=True`` and a threshold of zero, in which a pivot beside
        the diagonal says that the one on it was zero.
        """
        order = np.argsort(self._handle.perm_c)
        wrong = np.flatnonzero(~(self.pivots() > 0) | (order != np.argsort(self._handle.perm_r)))
        return int(order[wrong[0]]) if len(wrong) else None
