"""Random matrices S with far fewer rows than columns that keep the geometry of a subspace."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from operators import Dense, Identity, Kronecker, LinearOperator, Sparse

Kind = Literal["gaussian", "srht", "sparse-sign"]
KINDS = get_args(Kind)

# Nonzeros in a column of a sparse sign matrix: of no further use beyond eight (Tropp, Yurtsever,
# Udell and Cevher, 2019, doi:10.1137/18M1201068).
NONZEROS = 8
# A Hadamard matrix is applied as a Kronecker product of such of at most this order.
ORDER = 64
# Rows of S that go through an operator of products at a time.
ROWS = 64


def sketch(kind: Kind, size: int, A: LinearOperator, seed: int) -> LinearOperator:
    """Random S of shape ``(size, m)`` for the m rows of A, with ``E S^T S = I``.

    Parameters
    ----------
    kind
        ``"gaussian"``: entries of variance ``1 / size``. ``"srht"``: `size` rows of ``H D``, with
        random signs D and a Hadamard matrix H of the next power of two, as ``+-size^(-1/2)``
        (Ailon and Chazelle, 2009, doi:10.1137/060673096; Tropp, 2011,
        doi:10.1142/S1793536911000787). ``"sparse-sign"``: eight entries ``+-8^(-1/2)`` in each
        column, one in each of eight bands of rows (Kane and Nelson, 2014, doi:10.1145/2559902).
    size
        Rows of S. With as many as A has, S is the identity: there is nothing to gain.
    A
        What it is for.
    seed
        Of the random numbers, which are drawn on the CPU: S is the same on every device.

    Notes
    -----
    ``S A`` for a dense A ``(m, n)`` costs ``2 size m n`` flops, ``O(m n log m)``, and ``16 m n``.
    For Gaussian S the singular values of S on a subspace of dimension n lie within
    ``1 +- sqrt(n / size)``, nearly; the others do as well in practice.
    """
    m = A.shape[0]
    generator = generator_of(seed)
    if size >= m:
        return Identity(m, A.dtype, A.device)
    if kind == "gaussian":
        entries = torch.randn(size, m, generator=generator, dtype=A.dtype)
        return Dense((entries / size**0.5).to(A.device))
    if kind == "srht":
        return _subsampled_hadamard(size, m, generator, A)
    count = min(NONZEROS, size)
    bands = torch.arange(count + 1) * size // count
    drawn = torch.rand(count, m, generator=generator, dtype=torch.float64)
    rows = bands[:-1, None] + (drawn * bands.diff()[:, None]).long()
    columns = torch.arange(m).expand(count, m)
    values = _signs((count, m), generator, A.dtype) / count**0.5
    return _sparse(rows.reshape(-1), columns.reshape(-1), values.reshape(-1), (size, m), A)


def _subsampled_hadamard(
    size: int, m: int, generator: torch.Generator, A: LinearOperator
) -> LinearOperator:
    exponent, step = (m - 1).bit_length(), ORDER.bit_length() - 1
    orders = [step] * (exponent // step) + [exponent % step]
    factors = (torch.from_numpy(scipy.linalg.hadamard(2**order)) for order in orders)
    H = Kronecker(*(Dense(factor.to(A.device, A.dtype)) for factor in factors))
    signs = _signs((m,), generator, A.dtype)
    D = _sparse(torch.arange(m), torch.arange(m), signs, (2**exponent, m), A)
    rows = torch.randperm(2**exponent, generator=generator)[:size]
    ones = torch.ones(size, dtype=A.dtype) / size**0.5
    return _sparse(torch.arange(size), rows, ones, (size, 2**exponent), A) @ (H @ D)


def _sparse(
    rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], A: LinearOperator
) -> Sparse:
    rows, columns, values = (part.to(A.device) for part in (rows, columns, values))
    return Sparse.from_coo(rows, columns, values, shape)


def _signs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(dtype)


def generator_of(seed: int) -> torch.Generator:
    """Random numbers by a seed, but not those that ``torch.manual_seed(seed)`` gives.

    With these the data may have been drawn, and S is to be independent of A.
    """
    (state,) = np.random.SeedSequence([seed, 0x5E7C4]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def sketched(S: LinearOperator, A: LinearOperator) -> Tensor:
    """``S A``, dense: from the entries of A where they are held, else by products with ``A^T``."""
    if isinstance(S, Identity):
        return A.to_dense()
    if isinstance(A, Dense):
        return S._matmat(A.matrix)
    if isinstance(A, Sparse) and isinstance(S, Sparse):
        dense: Tensor = (S @ A).to_dense()
        return dense
    chunks = []
    for start in range(0, S.shape[0], ROWS):
        stop = min(start + ROWS, S.shape[0])
        unit = torch.zeros(S.shape[0], stop - start, dtype=A.dtype, device=A.device)
        unit[range(start, stop), range(stop - start)] = 1
        chunks.append(A.T._matmat(S.T._matmat(unit)))
    return torch.cat(chunks, 1).T


class Whitening(NamedTuple):
    """``S A = W N^+`` with orthonormal W: A N has singular values near 1, as many as A has rank.

    Parameters
    ----------
    basis
        W, ``(s, r)``.
    map
        N, ``(n, r)``; its columns span the row space of A.
    """

    basis: Tensor
    map: Tensor

    @classmethod
    def of(cls, SA: Tensor) -> Whitening:
        """From the singular values of ``S A``; those below rounding count as zero."""
        W, values, right = torch.linalg.svd(SA, full_matrices=False)
        largest = values.max() if values.numel() else values.new_zeros(())
        kept = values > max(SA.shape) * torch.finfo(SA.dtype).eps * largest
        return cls(W[:, kept], right[kept].mT / values[kept])
