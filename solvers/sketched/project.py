"""`SketchAndProject`: randomised Kaczmarz, Gaussian sketches, and their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators import Dense, LinearOperator, Sparse
from solvers.iterative import IterativeSolver
from solvers.linear_solver import PreparedSolver, Progress
from solvers.sketched.sketch import generator_of

# Columns of the transpose that are asked for at a time, where rows are not held.
ROWS = 64


@dataclass(frozen=True, kw_only=True)
class SketchAndProject(IterativeSolver):
    """Project x onto the solutions of a few random combinations of the equations, and again.

    With a random S ``(n, q)``, drawn anew in each iteration, from ``x = 0``

        x <- x + A^T S (S^T A A^T S)^+ S^T (b - A x) ,

    the point nearest to x where ``S^T A x = S^T b``. A need not be symmetric or definite, as in
    saddle-point systems, and an iteration looks at q equations only.

    Parameters
    ----------
    method
        ``"kaczmarz"``: S holds coordinates; for q = 1 row i is drawn with probability
        ``|a_i|^2 / |A|_F^2``, for more of them without replacement, in proportion to ``|a_i|^2``.
        ``"gaussian"``: S is normal; each iteration takes q products with ``A^T``.
    block_size
        q.
    seed
        Of the random numbers; every solve draws the same.
    maxiter
        Limit on the iterations. None means ``1000 n``.
    stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Notes
    -----
    For q = 1 the error falls linearly in expectation,

        E |x_k - x|^2 <= (1 - c sigma_min^2 / |A|_F^2)^k |x|^2 ,

    with c = 1 for Kaczmarz (Strohmer and Vershynin, 2009, doi:10.1007/s00041-008-9030-4) and
    c = 2 / pi for Gaussian sketches (Gower and Richtarik, 2015, arXiv:1506.03296); rows drawn
    uniformly would have the rate of A with its rows normalised. That is ``(|A|_F / sigma_min)^2``
    iterations for a factor e: the method is for well-conditioned systems, for low accuracy, and for
    rows that are dear. Blocks divide the number of iterations by about q.

    An iteration costs ``4 q n`` flops a right-hand side, ``2 q^2 n`` for a block, and the rows:
    those of a dense matrix are held, of others they are made by products with ``A^T``. All columns
    of b see the same S. The true residual is measured every ``n / q`` iterations, in which A has
    been seen once.

    Examples
    --------
    >>> import torch, operators as ops
    >>> K = ops.Saddle(ops.Identity(2), ops.Dense(torch.tensor([[1.0, 1.0]])))
    >>> x, info = SketchAndProject(rtol=1e-4).prepare(K).solve(torch.tensor([1.0, 1.0, 0.0]))
    >>> x.round(decimals=2).abs()
    tensor([0., 0., 1.])
    """

    method: Literal["kaczmarz", "gaussian"] = "kaczmarz"
    block_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("kaczmarz", "gaussian"):
            raise ValueError(
                f"SketchAndProject: method={self.method!r}; expected 'kaczmarz' or 'gaussian'"
            )
        if self.block_size < 1:
            raise ValueError(f"SketchAndProject: block_size={self.block_size}; expected at least 1")

    def limit(self, n: int) -> int:
        """Iteration limit for a system of size n."""
        return 1000 * n if self.maxiter is None else self.maxiter

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A; for Kaczmarz, measure its rows."""
        return _PreparedProjection(self, A)


class _PreparedProjection(PreparedSolver):
    solver: SketchAndProject

    def __init__(self, solver: SketchAndProject, A: LinearOperator) -> None:
        super().__init__(solver, A)
        self.size = min(solver.block_size, A.shape[0])
        self.transposed = A.T
        if solver.method == "kaczmarz":
            self.weights = self._squares().double().cpu()
            # What no equation is seen of cannot be drawn.
            self.size = min(self.size, int((self.weights > 0).sum()))

    def _squares(self) -> Tensor:
        """``|a_i|^2``, up to a common factor that keeps it within the range of the dtype."""
        A, m = self.A, self.A.shape[0]
        if isinstance(A, Sparse):
            unit = A.values / _largest(A.values)
            return unit.new_zeros(m).index_add(0, A.pattern.rows, unit.square())
        if isinstance(A, Dense):
            return (A.matrix / _largest(A.matrix)).square().sum(1)
        every = torch.arange(m, device=A.device)
        norms = [torch.linalg.vector_norm(self._rows(part), dim=1) for part in every.split(ROWS)]
        sizes = torch.cat(norms) if norms else every.to(A.dtype)
        return (sizes / _largest(sizes)).square()

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of A, ``(q, n)``."""
        if isinstance(self.A, Dense):
            return self.A.matrix[index]
        unit = torch.zeros(self.A.shape[0], len(index), dtype=self.A.dtype, device=self.A.device)
        unit[index, torch.arange(len(index), device=self.A.device)] = 1
        return self.transposed._matmat(unit).T

    def _drawn(self, block: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """``S^T A``, ``S^T B`` and the products that they took."""
        if self.solver.method == "kaczmarz":
            index = torch.multinomial(self.weights, self.size, generator=generator)
            index = index.to(block.device)
            return self._rows(index), block[index], 0 if isinstance(self.A, Dense) else self.size
        S = torch.randn(block.shape[0], self.size, generator=generator, dtype=torch.float64)
        S = S.to(block)
        return self.transposed._matmat(S).T, S.T @ block, self.size

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        progress = Progress(residual=block)
        x, active = torch.zeros_like(block), torch.linalg.vector_norm(block, dim=0) > targets
        n = block.shape[0]
        limit = self.solver.limit(n)
        sweep = -(-n // max(self.size, 1))
        generator = generator_of(self.solver.seed)
        while bool(active.any()):
            if progress.iterations >= limit or self.size == 0:
                progress.status = "maxiter"
                progress.detail = "the rate is 1 - (sigma_min / |A|_F)^2: other solvers need less"
                break
            for _ in range(min(sweep, limit - progress.iterations)):
                rows, right, products = self._drawn(block, generator)
                step = _nearest(rows, right - rows @ x)
                x = torch.where(active, x + step, x)
                progress.iterations += 1
                progress.products += products
            progress.residual = block - self.A._matmat(x)
            progress.products += block.shape[1]
            size = torch.linalg.vector_norm(progress.residual, dim=0)
            if not bool(torch.isfinite(size).all()):
                progress.status = "breakdown"
                progress.detail = "a product with A, or its size, is not finite"
                break
            active = active & (size > targets)
        return x, progress


def _nearest(rows: Tensor, gap: Tensor) -> Tensor:
    """Shortest D with ``R D = G``, or nearest to it."""
    if rows.shape[0] > 1:
        nearest: Tensor = torch.linalg.pinv(rows) @ gap
        return nearest
    scale = _largest(rows)
    unit = rows / scale
    square = unit.square().sum()
    return unit.T @ (gap / scale / torch.where(square > 0, square, 1.0))


def _largest(entries: Tensor) -> Tensor:
    largest = entries.abs().max() if entries.numel() else entries.new_ones(())
    return torch.where(largest > 0, largest, 1.0)
