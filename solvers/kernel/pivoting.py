"""`pivoted_cholesky`: a partial Cholesky factor from few columns, as accurate as asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from operators import LinearOperator
from operators.tracing import plain_values
from solvers.solution import NotPositiveDefiniteError, StructureError

Sampling = Literal["greedy", "random"]

# In float64 whatever the dtype of A: a residual is a difference of nearly equal numbers.
WIDE = torch.float64
# A greedy pivot is at least this part of the largest one there is.
GREEDY = 0.5


@dataclass(frozen=True, eq=False)
class PivotedFactor:
    """``A ~ L L^T``, equal in the rows and columns of the pivots.

    Parameters
    ----------
    factor
        L, ``(n, r)``, in float64.
    pivots
        ``(r,)``: rows in the order in which they were eliminated.
    residual
        ``(n,)``: diagonal of ``A - L L^T``; none is negative.
    trace
        ``tr(W A)`` for the weights W that were asked for.
    weighted
        ``tr(W (A - L L^T))``.
    """

    factor: Tensor
    pivots: Tensor
    residual: Tensor
    trace: float
    weighted: float

    @property
    def rank(self) -> int:
        """Columns r of L."""
        return self.factor.shape[1]


def pivoted_cholesky(
    A: LinearOperator,
    *,
    rank: int | None = None,
    atol: float = 0.0,
    weights: Tensor | None = None,
    sampling: Sampling = "greedy",
    block_size: int = 64,
    seed: int = 0,
) -> PivotedFactor:
    """``A ~ L L^T`` with r columns, for positive semidefinite A of which single entries are known.

    Parameters
    ----------
    A
        Operator with `operators.LinearOperator.submatrix` and a known diagonal.
    rank
        Most columns; by default n. It is a limit on memory: ``8 n r`` bytes.
    atol
        Stop where the weighted trace of the residual is at most this. Where the residual is but
        rounding it stops in any case.
    weights
        ``(n,)``, positive: a row counts for its weight times its residual. By default ones.
    sampling
        ``"greedy"``: the largest weighted residual. ``"random"``: drawn with probabilities in
        proportion to it (Chen, Epperly, Tropp and Webber, 2022, arXiv:2207.06503, Algorithm 2.1),
        whose expected error is near that of the best approximation; greedy may be misled by
        outliers, but where the eigenvalues fall fast it takes the smaller rank.
    block_size
        Rows that are proposed at once; see Notes.
    seed
        Of the draws.

    Raises
    ------
    ValueError
        A setting is out of range, or A is not finite.
    StructureError
        A does not know its diagonal.
    NotPositiveDefiniteError
        A residual is negative beyond rounding: A is not positive semidefinite.
    TypeError
        A has no cheap entries.

    Notes
    -----
    Rows are proposed in blocks, whose own residual matrix H, ``b x b``, decides which of them
    become pivots, so that products with L are of matrices. Greedy: those with the largest
    residuals; the largest that is left in H is a pivot while it is at least half of the largest
    there may be outside. Random: b draws, of which the i-th is accepted with the probability
    ``H_ii / H_ii^(0)``, its residual after the pivots before it over the one it was drawn with:
    the pivots have the very distribution of one draw at a time (Epperly, Tropp and Webber, 2024,
    arXiv:2410.03969, Algorithm 2.2).

    Costs ``n r`` evaluations, and ``b^2`` for each block, ``n r^2`` flops and n r numbers.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    >>> K = ops.Dense(torch.exp(-(torch.cdist(x, x) ** 2)), positive_semidefinite=True)
    >>> found = pivoted_cholesky(K, atol=1e-8)
    >>> found.rank, float((found.factor @ found.factor.T - K.matrix).abs().max()) < 1e-8
    (8, True)
    """
    n = A.shape[0]
    limit = n if rank is None else min(rank, n)
    if limit < min(1, n):
        raise ValueError(f"rank={rank}; expected at least 1")
    if block_size < 1:
        raise ValueError(f"block_size={block_size}; expected at least 1")
    if not atol >= 0:
        raise ValueError(f"atol={atol}; expected a number >= 0")
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling={sampling!r}; expected one of {get_args(Sampling)}")
    A = plain_values(A, "pivoted_cholesky reads its pivots; it cannot run inside vmap")
    with torch.no_grad():
        return _Elimination(A, weights, sampling, seed).run(limit, atol, block_size)


class _Elimination:
    """What is left of A after the pivots so far."""

    def __init__(
        self, A: LinearOperator, weights: Tensor | None, sampling: Sampling, seed: int
    ) -> None:
        diagonal = A._exact_diagonal()
        if diagonal is None:
            raise StructureError(
                f"{A!r} does not know its diagonal, from which pivots are chosen; give an operator "
                "that does, as ops.Dense(matrix)"
            )
        self.A, self.sampling = A, sampling
        self.diagonal = diagonal.to(WIDE)
        self.weights = torch.ones_like(self.diagonal) if weights is None else weights.to(WIDE)
        if self.weights.shape != self.diagonal.shape:
            raise ValueError(
                f"weights has shape {tuple(self.weights.shape)}; expected ({A.shape[0]},)"
            )
        if not bool(torch.isfinite(self.diagonal).all()):
            raise ValueError(f"the diagonal of {A!r} holds NaN or infinite entries")
        # A residual below this is rounding, of the entry itself and of what was taken off it.
        self.noise = 10 * torch.finfo(A.dtype).eps * self.diagonal.abs()
        self.left = self.diagonal.clone()
        self._check()
        self.generator = torch.Generator().manual_seed(seed)

    def run(self, limit: int, atol: float, block_size: int) -> PivotedFactor:
        """Eliminate up to `limit` rows."""
        n = len(self.left)
        everything = torch.arange(n, device=self.left.device)
        factor = self.left.new_zeros(n, 0)
        # By columns, and longer by halves: the products below read whole columns.
        store = self.left.new_zeros(min(limit, 4 * block_size), n)
        pivots: list[Tensor] = []
        done = 0
        trace = float((self.weights * self.left).sum())
        while done < limit and float((self.weights * self.left).sum()) > atol:
            proposed = self._proposed(min(block_size, n))
            if not len(proposed):
                break
            seen = store[:done, proposed]
            H = self.A.submatrix(proposed, proposed).to(WIDE) - seen.T @ seen
            accepted = self._accepted(H, proposed, limit - done)
            fresh, core = proposed[accepted], H[accepted][:, accepted]
            root, failed = torch.linalg.cholesky_ex(core)
            if int(failed):
                # What was accepted is above rounding one by one, but not together: one is enough.
                fresh, root = fresh[:1], core[:1, :1].sqrt()
            column = (
                self.A.submatrix(everything, fresh).to(WIDE).T
                - store[:done, fresh].T @ (store[:done])
            )
            new = torch.linalg.solve_triangular(root, column, upper=False)
            # The pivots of a block beyond those that are needed are none: so the rank is that of
            # one at a time.
            gained = (new.square() @ self.weights).cumsum(0)
            enough = float((self.weights * self.left).sum()) - gained <= atol
            needed = int(enough.nonzero()[0]) + 1 if bool(enough.any()) else len(fresh)
            fresh, new = fresh[:needed], new[:needed]
            end = done + needed
            if end > len(store):
                longer = store.new_zeros(min(limit, max(end, len(store) * 3 // 2)), n)
                longer[:done] = store[:done]
                store = longer
            store[done:end] = new
            done = end
            pivots.append(fresh)
            self.left -= new.square().sum(0)
            self.left[fresh] = 0.0
            self._check()
        index = torch.cat(pivots) if pivots else everything[:0]
        weighted = float((self.weights * self.left).sum())
        factor = store[:done].T
        return PivotedFactor(factor, index, self.left, trace, weighted)

    def _check(self) -> None:
        """Drop what is rounding; refuse what is negative beyond it."""
        # Errors of r subtractions, and of the entries through the inverse of the pivots.
        allowed = self.noise.max() * 1e6 if len(self.noise) else 0.0
        if not bool((self.left >= -allowed).all()):
            worst = int(self.left.argmin())
            raise NotPositiveDefiniteError(
                f"{self.A!r} is not positive semidefinite: elimination leaves "
                f"{float(self.left[worst]):.3g} of the diagonal {float(self.diagonal[worst]):.3g} "
                f"of row {worst}"
            )
        self.left[self.left <= self.noise] = 0.0

    def _proposed(self, count: int) -> Tensor:
        importance = self.weights * self.left
        if self.sampling == "greedy":
            values, index = importance.topk(count)
            return index[values > 0]
        cumulative = importance.cumsum(0)
        if not bool(cumulative[-1] > 0):
            return cumulative.new_zeros(0, dtype=torch.int64)
        # Through the distribution function: torch.multinomial stops at 2^24 categories.
        uniform = torch.rand(count, generator=self.generator, dtype=WIDE).to(cumulative.device)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        return drawn.clamp_max(len(cumulative) - 1)

    def _accepted(self, H: Tensor, proposed: Tensor, most: int) -> Tensor:
        """Which rows of the block become pivots, in their order."""
        H, weight = H.clone(), self.weights[proposed]
        before, floor = self.left[proposed], self.noise[proposed]
        accepted: list[int] = []
        threshold = 0.0
        if self.sampling == "greedy":
            # Nothing outside the block is larger than the least in it.
            threshold = float((weight * before).min()) if len(proposed) < len(self.left) else 0.0
        chance = torch.rand(len(proposed), generator=self.generator, dtype=WIDE)
        for step in range(len(proposed)):
            if len(accepted) == most:
                break
            if self.sampling == "greedy":
                left = torch.where(H.diagonal() > floor, weight * H.diagonal(), 0.0)
                i = int(left.argmax())
                largest = max(float(left[i]), threshold)
                if not float(left[i]) >= GREEDY * largest or not float(left[i]) > 0:
                    break
            else:
                i = step
                pivot = float(H[i, i])
                drawn = pivot > float(floor[i]) and float(chance[i]) * float(before[i]) < pivot
                if not drawn:
                    continue
            accepted.append(i)
            H = H - torch.outer(H[:, i], H[i] / H[i, i])
            # Exactly, so that no row is taken twice.
            H[i] = 0.0
            H[:, i] = 0.0
        if not accepted:
            # Rounding put the block below the threshold: its largest row is a pivot in any case.
            accepted = [int((weight * before).argmax())]
        return torch.tensor(accepted, device=proposed.device)
