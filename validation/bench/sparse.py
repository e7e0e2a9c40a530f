"""Products with sparse matrices: five-point Laplacians against torch, scipy and scatter."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse
import torch

import operators as ops
from validation.bench import limits
from validation.bench.timing import Bench


def laplacian(side: int) -> scipy.sparse.csr_array:
    """``-u_xx - u_yy`` by five points on side x side of them, times their spacing squared."""
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    eye = scipy.sparse.eye_array(side)
    plane = scipy.sparse.csr_array(scipy.sparse.kron(eye, line) + scipy.sparse.kron(line, eye))
    plane.sort_indices()
    plane.indices, plane.indptr = plane.indices.astype(np.int32), plane.indptr.astype(np.int32)
    return plane


def product(bench: Bench) -> None:
    """``A v`` for 1e4, 1e5 and 1e6 unknowns."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    for side in (100, 316, 1000):
        product_of(bench, laplacian(side))


def product_of(bench: Bench, L: scipy.sparse.csr_array) -> None:
    """``A v`` for one matrix."""
    n = L.shape[0]
    v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = ops.Sparse(L, symmetric=True)
    csr, array = A.to_torch("csr"), v.numpy()
    rows, columns, values = A.pattern.rows, A.pattern.columns, A.values
    # Values in double, columns and a pointer for each row in 32 bits, v and A v.
    traffic = 12 * A.nnz + 4 * n + 16 * n
    limit = "a copy of as many bytes"
    bench.compare(
        f"A @ v, five-point Laplacian, {n:,} unknowns, float64",
        {
            "Sparse": lambda: A @ v,
            "torch CSR": lambda: csr @ v,
            "scipy CSR": lambda: L @ array,
            "gather, index_add": lambda: torch.zeros_like(v).index_add_(
                0, rows, values * v[columns]
            ),
        },
        lambda medians: (
            f"{traffic / 1e6:.1f} MB at least; ours moves them at "
            f"{traffic / 1e9 / medians['Sparse']:.1f} GB/s, a copy at "
            f"{traffic / 1e9 / medians[limit]:.1f} GB/s."
        ),
        tolerance=1e-12,
        beside={limit: limits.copy(traffic)},
    )
