"""`PivotedCholesky`: the inverse of a low-rank factor plus a diagonal, for smooth kernels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from operators import (
    Cost,
    Diagonal,
    Identity,
    LinearOperator,
    LowRankPlusDiagonal,
    Scaled,
    Structure,
    Sum,
)
from solvers.kernel.pivoting import WIDE, Sampling, pivoted_cholesky
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.solution import StructureError

# Part of D that may be left out.
LEFT_OUT = 0.01
# Numbers in float64 that take so much memory.
GIBIBYTE = 2**27


@dataclass(frozen=True, kw_only=True)
class PivotedCholesky(Preconditioner):
    """``P = (L L^T + D)^-1`` for ``A = K + D``, with ``K ~ L L^T`` by pivoted partial Cholesky.

    Symmetric positive definite. D is a positive diagonal, the nugget.

    Parameters
    ----------
    rank
        Most columns of L; by default as many as take 1 GiB, but at least 512.
    rtol
        Stop where ``tr(D^-1 (K - L L^T)) <= rtol tr(D^-1 K)``. By default where that trace is at
        most n / 100: what is left out has a hundredth of the diagonal D.
    damping
        ``D = damping I``, inside A; by default the diagonal operators that the sum A shows.
    sampling, block_size, seed
        Of the pivots; see `pivoted_cholesky`. Rows are weighted by ``D^-1``.

    Notes
    -----
    The eigenvalues of ``P A`` are between 1 and ``1 + |D^-1/2 (K - L L^T) D^-1/2|``, so between 1
    and one more than the trace above: conjugate gradients take few iterations at any nugget, where
    the rank allows. Kernels of finite smoothness need too many columns: there `KLCholesky`.

    With the singular values sigma and left vectors Q of ``F = D^-1/2 L``,

        P = D^-1/2 (I - Q Q^T + Q (1 + sigma^2)^-1 Q^T) D^-1/2 ,

    and ``I - Q Q^T`` is applied twice: the identity of Woodbury through ``I + F^T F`` would square
    the condition number of F and leave, of components that A enlarges by ``1 / eta``, errors of
    rounding that P enlarges again. So nuggets of 1e-12 times the diagonal of K are good.

    Costs ``n r`` evaluations of entries, about ``7 n r^2`` flops and ``2 n r`` numbers once, and
    ``8 n r`` flops for a column of a product. Harbrecht, Peters and Schneider (2012,
    doi:10.1016/j.apnum.2011.10.001); for kernels: Gardner et al. (2018, arXiv:1809.11165, section
    4); random pivots: Chen, Epperly, Tropp and Webber (2022, arXiv:2207.06503).

    What `prepare` returns has `rank`, `factor_nonzeros`, `pivots` and `residual_trace`,
    ``tr(D^-1 (K - L L^T))``.

    Warns
    -----
    RuntimeWarning
        The tolerance was not met at the largest rank; not where `rank` alone was given.

    Examples
    --------
    >>> import torch, operators as ops, solvers
    >>> x = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None]
    >>> K = ops.Dense(torch.exp(-8 * torch.cdist(x, x) ** 2), positive_semidefinite=True)
    >>> A = K + 1e-6 * ops.Identity(300)
    >>> cg = solvers.CG(preconditioner=PivotedCholesky())
    >>> _, info = cg.prepare(A).solve(torch.sin(x[:, 0]))
    >>> info.converged, info.iterations <= 5
    (True, True)
    """

    rank: int | None = None
    rtol: float | None = None
    damping: float | None = None
    sampling: Sampling = "greedy"
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"PivotedCholesky: rank={self.rank}; expected at least 1, or None")
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"PivotedCholesky: rtol={self.rtol}; expected 0 <= rtol < 1, or None")
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise ValueError(
                f"PivotedCholesky: damping={self.damping}; expected a number > 0, or None"
            )
        if self.block_size < 1:
            raise ValueError(f"PivotedCholesky: block_size={self.block_size}; expected at least 1")
        if self.sampling not in get_args(Sampling):
            raise ValueError(
                f"PivotedCholesky: sampling={self.sampling!r}; expected one of {get_args(Sampling)}"
            )

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Factorise K.

        Raises
        ------
        StructureError
            A is not known to be symmetric, shows no positive diagonal, or does not know its own.
        NotPositiveDefiniteError
            K is not positive semidefinite.
        TypeError
            K has no cheap entries.
        """
        return _LowRankInverse(self, A)


class _LowRankInverse(ApproximateInverse):
    def __init__(self, settings: PivotedCholesky, A: LinearOperator) -> None:
        if not A.symmetric:
            raise StructureError(
                f"PivotedCholesky needs a symmetric operator; {A!r} does not claim to be: claim it"
            )
        super().__init__(settings, A, Structure(symmetric=True, positive_definite=True))
        K, d = _parts(settings, A)
        n = A.shape[0]
        with torch.no_grad():
            self.root = d.detach().to(WIDE).rsqrt()
            diagonal = None if K is None else K._exact_diagonal()
            if K is None:
                K, diagonal = Diagonal(torch.zeros_like(d)), torch.zeros_like(d)
            if diagonal is None:
                raise StructureError(f"PivotedCholesky: {K!r} does not know its diagonal")
            scaled = diagonal.detach().to(WIDE) * self.root.square()
            limit = max(512, GIBIBYTE // max(1, n)) if settings.rank is None else settings.rank
            atol = LEFT_OUT * n if settings.rtol is None else settings.rtol * float(scaled.sum())
            found = pivoted_cholesky(
                K,
                rank=max(1, min(n, limit)),
                atol=atol,
                weights=self.root.square(),
                sampling=settings.sampling,
                block_size=settings.block_size,
                seed=settings.seed,
            )
            # A rank alone is the method; a tolerance that it does not meet is said.
            judged = settings.rank is None or settings.rtol is not None
            if judged and found.rank == limit < n and found.weighted > atol:
                warnings.warn(
                    f"PivotedCholesky of {A!r}: tr(D^-1 (K - L L^T)) is {found.weighted:.3g} at "
                    f"rank {limit}; asked for {atol:.3g}: raise rank= or D, or take KLCholesky",
                    RuntimeWarning,
                    stacklevel=2,
                )
            basis, triangle = torch.linalg.qr(self.root[:, None] * found.factor)
            vectors, values, _ = torch.linalg.svd(triangle)
            self.basis = basis @ vectors[:, : len(values)]
            self.weights = 1 / (1 + values.square())
        self.rank, self.pivots = found.rank, found.pivots
        self.residual_trace = found.weighted
        self.factor_nonzeros = n * found.rank

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        # In float64 as the factor is: what A enlarges most, P makes smallest.
        v = self.root[:, None] * block.to(WIDE)
        inside = self.basis.T @ v
        rest = v - self.basis @ inside
        rest = rest - self.basis @ (self.basis.T @ rest)
        image = rest + self.basis @ (self.weights[:, None] * inside)
        return (self.root[:, None] * image).to(block.dtype)

    def _cost(self) -> Cost:
        return Cost(flops=8 * self.factor_nonzeros)

    def _describe(self) -> str:
        return f"rank {self.rank}, trace left {self.residual_trace:.3g}"


def _parts(settings: PivotedCholesky, A: LinearOperator) -> tuple[LinearOperator | None, Tensor]:
    """K, None for zero, and the values of D, ``(n,)``."""
    n = A.shape[0]
    if settings.damping is not None:
        # Not A.values - damping: the operator keeps both terms, and with them all digits.
        d = torch.full((n,), settings.damping, dtype=A.dtype, device=A.device)
        return A - settings.damping * Identity(A.domain), d
    K, shown = split_diagonal(A)
    d = torch.zeros(n, dtype=A.dtype, device=A.device) if shown is None else shown.expand(n)
    if not bool((d > 0).all()):
        what = "shows no diagonal" if shown is None else "has a diagonal part that is not positive"
        raise StructureError(
            f"PivotedCholesky: {A!r} {what}; make it a sum K + D with D = eta * Identity or a "
            "positive Diagonal, or say which multiple of the identity is inside it by damping="
        )
    return K, d


def split_diagonal(A: LinearOperator) -> tuple[LinearOperator | None, Tensor | None]:
    """``A = K + D``, as far as sums, multiples and low rank plus diagonal show; either may be None.

    D is a tensor ``(n,)``, or a scalar for a multiple of the identity.

    Examples
    --------
    >>> import torch, operators as ops
    >>> K = ops.Dense(torch.eye(2))
    >>> split_diagonal(K + 0.5 * ops.Identity(2) + ops.Diagonal(torch.tensor([1.0, 2.0])))
    (Dense(2, 2), tensor([1.5000, 2.5000]))
    """
    if isinstance(A, Diagonal):
        return None, A.values
    if isinstance(A, LowRankPlusDiagonal):
        K = LowRankPlusDiagonal(A.rows, 0.0, A.weights, space=A.domain)
        return K, A.diagonal_values
    if isinstance(A, Scaled):
        inner, d = split_diagonal(A.operator)
        kept = None if inner is None else A.factor * inner
        return kept, None if d is None else (A.factor * d).to(d.dtype)
    if isinstance(A, Sum):
        (left, d), (right, e) = split_diagonal(A.left), split_diagonal(A.right)
        kept = left if right is None else right if left is None else left + right
        return kept, d if e is None else e if d is None else d + e
    return A, None
