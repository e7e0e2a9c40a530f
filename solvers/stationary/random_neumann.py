"""The Neumann series cut off at random, without bias: `RandomNeumann`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import applied
from solvers.linear_solver import PreparedSolver, Progress
from solvers.stationary.sampling import PreparedSampling, SampledSolver
from solvers.stationary.step_size import StepSize


@dataclass(frozen=True, kw_only=True)
class RandomNeumann(SampledSolver):
    """An estimate of the Neumann series ``alpha sum_j (I - alpha A)^j b`` from random terms of it.

    - ``"uniform"``: ``Q alpha prod_{i=1..p} (I - alpha H_i) b`` with p uniform on ``0, ..., Q - 1``
      and every H_i a sample of A. Its expectation is the sum of the first Q terms, the truncated
      series of ``Neumann(maxiter=Q - 1)``, bias and all. Ghadimi and Wang (2018, arXiv:1802.02246,
      algorithm 3); the solver of BSA and TTSA.
    - ``"geometric"``: ``alpha sum_{j=0..p} c^-j prod_{i=1..j} (I - alpha H_i) b`` with
      ``c = 1 - 1/Q``, where after each term the sum goes on with probability c. Its expectation is
      the whole series, ``A^-1 b``.

    The expectation of the transposed solve is the transpose of that.

    Parameters
    ----------
    terms
        Q: of ``"uniform"`` the number of terms in the expectation, of ``"geometric"`` the mean
        number of terms that are computed (at least 2).
    samples
        The mean of so many independent estimates is taken; the variance falls by as much.
    distribution
        ``"uniform"`` or ``"geometric"``.
    step_size
        ``alpha``. None estimates it as `Neumann` does.
    operators, seed
        Samples of A, and the stream of random numbers; see `SampledSolver`.
    estimation_steps, rtol, atol, strict
        As for `SampledSolver`; `strict` must be False.

    Notes
    -----
    An estimate costs ``(Q - 1) / 2`` products on average if uniform, ``Q - 1`` if geometric.
    Without `operators` those of one solve share their products, and cost as many as the longest.
    All columns of a block have the same p and the same H_i: an estimate is one linear operator.

    With ``t_j = alpha (I - alpha A)^j b``, and A not sampled, the variance of ``"uniform"`` is
    ``Q sum_{j<Q} |t_j|^2 - |sum_{j<Q} t_j|^2``: little where the terms are alike, and up to Q - 1
    times the squared mean where they die out early. That of ``"geometric"`` is finite if and only
    if the spectral radius of ``I - alpha A`` is below ``sqrt(1 - 1/Q)``, that is for Q above
    ``1 / (2 alpha mu)`` or so; with T the samples of ``I - alpha A``, if and only if that of
    ``E[T (x) T]`` is below ``1 - 1/Q``.

    `Info.residual` is that of the estimate, and large; ``info.converged`` is False and the status
    ``"maxiter"`` unless it happens to meet the tolerance. That is the method, so nothing is warned
    about, but for terms that grow tenfold over the first one: ``"diverged"``.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 0.5], dtype=torch.float64))
    >>> # The expectation is 1, and 1 + 1/2 + 1/4.
    >>> prepared = RandomNeumann(step_size=1.0, terms=3, samples=3000).prepare(A)
    >>> prepared.solve(torch.ones(2, dtype=torch.float64)).value.round(decimals=1)
    tensor([1.0000, 1.7000], dtype=torch.float64)
    """

    terms: int = 10
    samples: int = 1
    distribution: Literal["uniform", "geometric"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distribution not in ("uniform", "geometric"):
            raise ValueError(
                f"RandomNeumann: distribution={self.distribution!r}; expected 'uniform' or "
                "'geometric'"
            )
        least = 2 if self.distribution == "geometric" else 1
        if self.terms < least:
            raise ValueError(
                f"RandomNeumann: terms={self.terms}; expected at least {least} for "
                f"distribution={self.distribution!r}"
            )
        if self.samples < 1:
            raise ValueError(f"RandomNeumann: samples={self.samples}; expected at least 1")
        if self.strict:
            raise ValueError("RandomNeumann: strict=True; an estimate meets no tolerance")

    @property
    def truncated(self) -> bool:
        """True."""
        return True

    @property
    def columnwise(self) -> bool:
        """Where the operators are not sampled."""
        return self.operators is None

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A, and estimate the step size where none is given."""
        return _PreparedRandomNeumann(self, A)


class _PreparedRandomNeumann(PreparedSampling):
    solver: RandomNeumann

    def __init__(self, solver: RandomNeumann, A: LinearOperator) -> None:
        super().__init__(solver, A)
        self.step = StepSize.of(A, solver)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._estimate(block, self._lengths(), transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._estimate(block, self._lengths(), transpose=True)

    def _lengths(self) -> list[int]:
        """The p of each sample."""
        Q, count, generator = self.solver.terms, self.solver.samples, self.generator
        if self.solver.distribution == "uniform":
            drawn = torch.randint(Q, (count,), generator=generator, device=generator.device)
        else:
            # P(p >= j) = P(u <= c^j) = c^j for u uniform on (0, 1].
            uniform = torch.rand(
                count, generator=generator, dtype=torch.float64, device=generator.device
            )
            drawn = (torch.log1p(-uniform) / math.log(1 - 1 / Q)).floor().long()
        lengths: list[int] = drawn.tolist()
        return lengths

    def _estimate(
        self, block: Tensor, lengths: list[int], *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        """The mean of the estimates of these lengths."""
        # Those that sample nothing share their terms.
        chains = [lengths] if self.solver.operators is None else [[p] for p in lengths]
        alpha = self.step.columns(block)
        x, largest = torch.zeros_like(block), block.new_zeros(())
        progress = Progress(status="maxiter")
        for chain in chains if bool(block.any()) else ():
            term = block
            for j, weight in enumerate(self._weights(chain)):
                if j:
                    H = self._draw(transpose=transpose)
                    term = term - alpha * applied(H, term)
                    progress.products += block.shape[1]
                    sizes = torch.linalg.vector_norm(term, dim=0)
                    largest = torch.maximum(largest, sizes.nan_to_num(torch.inf).max())
                x = x + (weight / len(lengths)) * (alpha * term)
            progress.iterations = max(progress.iterations, *chain)
        progress.detail = (
            f"a random estimate from {len(lengths)} draws, unbiased but not accurate; "
            f"{self.step.source}"
        )
        if bool(largest > 10):
            progress.status = "diverged"
            progress.detail = self.step.doubt or (
                f"the terms grow: {self.step.source} exceeds 2 / L, or A is not positive definite"
            )
        return x, progress

    def _weights(self, chain: list[int]) -> list[float]:
        """Of the terms ``alpha (I - alpha A)^j b`` in the sum of the estimates of these lengths."""
        Q, counts = self.solver.terms, Counter(chain)
        length = max(chain) + 1
        if self.solver.distribution == "uniform":
            return [float(Q * counts[j]) for j in range(length)]
        c = 1 - 1 / Q
        return [sum(counts[p] for p in range(j, length)) / c**j for j in range(length)]
