"""Rank-one updates of an inverse, one after the other (Sherman and Morrison, 1950)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import SingularError
from solvers.structured.woodbury import low_rank_parts


@dataclass(frozen=True, kw_only=True)
class ShermanMorrison(LinearSolver):
    """Inverse of ``D + sum_t w_t u_t u_t^T`` by T rank-one updates, one after the other.

    With ``A_t = A_{t-1} + w_t u_t u_t^T`` and ``v_t = A_{t-1}^-1 u_t``,

        A_t^-1 = A_{t-1}^-1 - w_t v_t v_t^T / (1 + w_t <u_t, v_t>)

    (Sherman and Morrison, 1950). The vectors ``v_t`` are kept, not the n x n matrix: ``2 T^2 n``
    flops once, ``4 T n`` a solve. The same numbers as `Woodbury`, without a factorisation; each
    update can be tested for a zero denominator by itself.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.LowRankPlusDiagonal(torch.tensor([[1.0, 1.0]]), 2.0)
    >>> ShermanMorrison().prepare(A).solve(torch.tensor([4.0, 4.0])).value.round(decimals=5)
    tensor([1., 1.])
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Run the T updates.

        Raises
        ------
        StructureError
            A is not low rank plus diagonal.
        SingularError
            The diagonal part has zeros, or an update has a zero denominator.
        """
        return _PreparedShermanMorrison(self, A)


class _PreparedShermanMorrison(PreparedSolver):
    def __init__(self, solver: ShermanMorrison, A: LinearOperator) -> None:
        super().__init__(solver, A)
        rows, weights, d = low_rank_parts("ShermanMorrison", A)
        self.inverse_diagonal = 1.0 / d
        self.vectors = torch.empty_like(rows)  # v_t
        self.factors = torch.empty_like(weights)  # w_t / (1 + w_t <u_t, v_t>)
        for t, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            v = self.inverse_diagonal * row
            if t:
                earlier = self.vectors[:t]
                v = v - earlier.T @ (self.factors[:t] * (earlier @ row))
            denominator = 1.0 + weight * (row @ v)
            if bool(denominator == 0):
                raise SingularError(f"ShermanMorrison: update {t + 1} makes {A!r} singular")
            self.vectors[t] = v
            self.factors[t] = weight / denominator

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        projected = self.factors[:, None] * (self.vectors @ block)
        return self.inverse_diagonal[:, None] * block - self.vectors.T @ projected, Progress()


class InverseRecursion:
    """The dense recursion for the inverse of an averaged Fisher matrix: the reference.

    With ``P_0 = I / initial``, and for the exact mean (``rho = None``; the start counts as one
    sample)

        P_t = ((t+1)/t) (P_{t-1} - (P_{t-1} g)(P_{t-1} g)^T / (t + g^T P_{t-1} g)) ,

    for smoothing with ``0 < rho < 1``

        P_t = (1/(1-rho)) (P_{t-1} - rho (P_{t-1} g)(P_{t-1} g)^T / ((1-rho) + rho g^T P_{t-1} g)) .

    Under smoothing the start is forgotten, and P grows like ``(1-rho)^-t / initial`` in every
    direction that no gradient excites: beyond ``t = log(eps) / log(1-rho)`` updates that growth has
    pushed all else below rounding.
    `operators.FisherStream` is the form to use. Each update costs ``4 d^2`` flops and moves at
    least ``3 d^2`` numbers; the state is ``d^2`` numbers. Source: arXiv:2602.10905, eq. (3.2).

    Parameters
    ----------
    size
        d.
    initial
        ``> 0``.
    rho
        Smoothing, or None for the exact mean.
    dtype, device
        Of the state.

    Examples
    --------
    >>> import torch
    >>> recursion = InverseRecursion(2, initial=1.0, dtype=torch.float64)
    >>> recursion.update(torch.tensor([1.0, 0.0], dtype=torch.float64))
    >>> torch.linalg.inv(recursion.inverse)  # (I + g g^T) / 2
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """

    def __init__(
        self,
        size: int,
        *,
        initial: float,
        rho: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not initial > 0:
            raise ValueError(f"initial={initial}; expected a positive number")
        if rho is not None and not 0 < rho < 1:
            raise ValueError(f"rho={rho}; expected 0 < rho < 1, or None for the exact mean")
        self.rho, self.count = rho, 0
        self.inverse = torch.eye(size, dtype=dtype, device=device) / initial

    def update(self, gradient: Tensor) -> None:
        """Take in one gradient ``(d,)``, in place."""
        self.count += 1
        t, rho, P = self.count, self.rho, self.inverse
        u = P @ gradient
        if rho is None:
            growth, share = (t + 1) / t, 1.0 / (t + gradient @ u)
        else:
            growth, share = 1 / (1 - rho), rho / ((1 - rho) + rho * (gradient @ u))
        # One pass over P, growth * P - v v^T: the same vector on both sides keeps P symmetric. A
        # negative share, which exact arithmetic excludes, gives NaN and not a wrong inverse.
        v = ((growth * share).sqrt() * u)[:, None]
        P.addmm_(v, v.T, beta=growth, alpha=-1)

    def solve(self, b: Tensor) -> Tensor:
        """``P b``."""
        return self.inverse @ b
