"""`LowRank`: conjugate gradients preconditioned by pivoted Cholesky, for smooth kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperlearn.gp.backend import Backend, Factor, System
from hyperlearn.gp.gram_cg import GramCG
from operators import Dense as DenseOperator
from operators import Diagonal, KernelGram, LinearOperator
from solvers import PivotedCholesky
from solvers.kernel.pivoting import Sampling

# Bytes of the Gram matrix up to which it is held, rather than computed for every product.
HELD = 2**31


@dataclass(frozen=True)
class LowRank(Backend):
    """CG on ``K + D``, preconditioned by ``L L^T + D`` with a pivoted partial Cholesky factor L.

    For smooth kernels, whose Gram matrices have eigenvalues that fall exponentially: a rank of some
    hundreds serves any number of equations. Few iterations at any nugget. Its rank adapts itself to
    D (see `solvers.PivotedCholesky`).

    Parameters
    ----------
    rtol
        Of ``|b - A x| / |b|``, measured.
    rank
        Most columns of L; by default as many as take 1 GiB, 512 at least.
    left_out
        What L may leave out: a trace of so many times that of D. The determinant is wrong by
        ``n left_out`` at most.
    sampling
        ``"greedy"`` or ``"random"`` pivots (RPCholesky).
    seed
        Of random pivots.
    hold
        Whether to hold K, ``8 n^2`` bytes; otherwise each product evaluates it, tile by tile, in
        memory O(n r). By default up to 2 GiB.
    maxiter
        Of CG.

    Notes
    -----
    Costs ``n r`` evaluations and ``7 n r^2`` flops once, ``n^2`` evaluations a product that is not
    held, and as much, three times, for a derivative.
    """

    rtol: float = 1e-10
    rank: int | None = None
    left_out: float = 1e-3
    sampling: Sampling = "greedy"
    seed: int = 0
    hold: bool | None = None
    maxiter: int | None = 200

    def __post_init__(self) -> None:
        if not 0 < self.rtol < 1:
            raise ValueError(f"LowRank: rtol={self.rtol}; expected between 0 and 1")
        if not 0 < self.left_out < 1:
            raise ValueError(f"LowRank: left_out={self.left_out}; expected between 0 and 1")

    def factor(self, system: System, previous: Factor | None = None) -> Factor:  # noqa: D102
        return LowRankFactor(self, system)


class LowRankFactor(Factor):
    """As `LowRank.factor` returns it.

    Attributes
    ----------
    prepared
        The solver.
    """

    def __init__(self, settings: LowRank, system: System) -> None:
        self.system, n = system, len(system.rows)
        gram: LinearOperator = KernelGram(system.rows)
        bytes_ = n * n * system.diagonal.element_size()
        hold = bytes_ <= HELD if settings.hold is None else settings.hold
        if hold:
            dense = DenseOperator(gram.to_dense(), symmetric=True, positive_semidefinite=True)
            gram = dense.vouched()  # a Gram matrix is what it claims to be
        self.matrix = gram + Diagonal(system.diagonal)
        d = system.diagonal.detach()
        # Rows have unit variance: tr(D^-1 K) = tr(D^-1).
        rtol = settings.left_out * n / float((1 / d).sum())
        preconditioner = PivotedCholesky(
            rank=settings.rank, rtol=rtol, sampling=settings.sampling, seed=settings.seed
        )
        solver = GramCG(rtol=settings.rtol, maxiter=settings.maxiter, preconditioner=preconditioner)
        self.prepared = solver.prepare(self.matrix)
        self.info: Any = None

    @property
    def rank(self) -> int:
        """Columns of L."""
        rank: int = self._inverse.rank
        return rank

    @property
    def _inverse(self) -> Any:
        return self.prepared.preconditioner  # type: ignore[attr-defined]

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``; `info` says how that went."""
        value, self.info = self.prepared.solve(b)
        x: Tensor = value
        return x

    def product(self, v: Tensor) -> Tensor:
        """``A v``."""
        image: Tensor = self.matrix @ v
        return image

    def logdet(self) -> Tensor:
        """``log det(L L^T + D)``, from below, within ``n left_out`` of that of A.

        Its derivative is ``tr(P dA)``, P the inverse of ``L L^T + D``: that of ``log det A`` but
        for what L leaves out. Deterministic; the derivative is one product of A with r columns.
        """
        P = self._inverse
        with torch.no_grad():
            value = self.system.diagonal.to(P.root).log().sum() - P.weights.log().sum()
            # P = R (I - V V^T) R with R = D^-1/2.
            V = P.root[:, None] * P.basis * (1 - P.weights).sqrt()
            weight = P.root.square().to(self.matrix.dtype)
            V = V.to(self.matrix.dtype)
        diagonal = self.system.rows.variances() + self.system.diagonal
        trace = (weight * diagonal).sum() - (V * self.product(V)).sum()
        return value.to(trace.dtype) + (trace - trace.detach())

    def inverse(self) -> Tensor:
        """``A^-1`` by n solves."""
        eye = torch.eye(len(self.system.rows), dtype=self.matrix.dtype, device=self.matrix.device)
        return self.solve(eye)
