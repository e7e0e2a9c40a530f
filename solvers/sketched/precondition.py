"""`SketchAndPrecondition`: least squares by an iteration that a sketch has made short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators import Dense, Gram, LinearOperator
from solvers.iterative import IterativeSolver
from solvers.krylov.cg import CG
from solvers.linear_solver import PreparedSolver, Progress
from solvers.sketched.sketch import Kind
from solvers.sketched.solve import PreparedSketch, check_sketch
from solvers.structured.parts import Part

# Restarts from the true residual at most.
RESTARTS = 5


@dataclass(frozen=True, kw_only=True)
class SketchAndPrecondition(IterativeSolver):
    """``x`` that minimises ``|b - A x|``, and ``|x|`` among these, in a few dozen iterations.

    From the singular values of a sketch, ``S A = W D V^T``, come the map ``N = V D^-1``, for which
    all singular values of ``A N`` lie near 1 whatever the condition of A, and a first x that
    minimises ``|S (b - A x)|``. Conjugate gradients on ``(A N)^T A N y = N^T A^T r`` correct it by
    ``N y``, and start again from the true residual until it meets the tolerance. For a wide A the
    transpose is sketched, and ``x = A^T N y`` with ``(A^T N)^T A^T N y = N^T b``.

    Parameters
    ----------
    sketch
        ``"gaussian"``, ``"srht"`` or ``"sparse-sign"``; see `solvers.sketched.sketch.sketch`.
    size
        Rows s of S, at least as many as A has columns n; by default ``4 n``. Where A has no more
        rows than that, nothing is sketched.
    seed
        Of S.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.

    Notes
    -----
    An iteration reduces the error by ``sqrt(n / s)``, nearly, so that 1e-10 takes 33 of them at the
    default size: one product with each of A and A^T, and ``4 n^2`` flops. Once it costs ``S A`` and
    ``O(s n^2)`` flops: less than a dense factorisation, ``2 m n^2``, for m well above s. Singular
    values of ``S A`` below rounding count as zero (``rank``).

    The normal equations are formed of a matrix whose condition is about 3, and not of A. With the
    start from the sketch and the restarts the solution is as good as that of a stable direct method
    for condition numbers up to the inverse of rounding (Epperly, Meier and Nakatsukasa, 2024,
    arXiv:2406.03468; without them it is not: Meier, Nakatsukasa, Townsend and Webb, 2023,
    arXiv:2302.07202). Sketching for a preconditioner is due to Rokhlin and Tygert (2008,
    doi:10.1073/pnas.0804869105) and, with QR, to Avron, Maymounkov and Toledo (2010,
    doi:10.1137/090767911); by singular values, for any rank, to Meng, Saunders and Mahoney (2014,
    doi:10.1137/120866580).

    Examples
    --------
    >>> import torch
    >>> t = torch.linspace(0, 1, 200, dtype=torch.float64)
    >>> A = t[:, None] ** torch.arange(6)
    >>> x, info = SketchAndPrecondition().prepare(A).solve(torch.exp(t))
    >>> torch.allclose(x, torch.linalg.lstsq(A, torch.exp(t)).solution)
    True
    >>> info.converged
    True
    """

    sketch: Kind = "sparse-sign"
    size: int | None = None
    seed: int = 0

    least_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sketch(self, self.sketch, self.size)

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Sketch A, and decompose the sketch.

        Raises
        ------
        TypeError
            torch does not factorise the dtype of A.
        ValueError
            The size is below the smaller side of A; or A holds NaN or infinity.
        """
        return _PreparedPreconditioned(self, A)


class _PreparedPreconditioned(PreparedSketch):
    solver: SketchAndPrecondition

    def __init__(self, solver: SketchAndPrecondition, A: LinearOperator) -> None:
        super().__init__(solver, A, solver.sketch, solver.size, solver.seed)
        self.gram = Gram(self.F @ Dense(self.map))
        # Products with N carry rounding errors of eps cond(A): how far one run can come.
        stretch = torch.linalg.vector_norm(self.map, dim=0)
        condition = float(stretch.max() / stretch.min()) if self.rank else 1.0
        self.reach = min(torch.finfo(A.dtype).eps * condition, 0.01)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._iterated(block, targets, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._iterated(block, targets, transpose=True)

    def _iterated(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        fit = self.tall != transpose
        operator, progress = self.A.T if transpose else self.A, Progress()
        limit = self.solver.limit(min(self.A.shape))
        x = self._fitted(block) if fit else block.new_zeros(operator.shape[1], block.shape[1])
        previous = torch.full_like(targets, torch.inf)
        for _ in range(1 + RESTARTS):
            progress.residual = block - operator._matmat(x)
            progress.products += block.shape[1]
            wanting = torch.linalg.vector_norm(progress.residual, dim=0)
            if fit:
                wanting = torch.minimum(wanting, self._normal_residual(operator, progress))
            # A restart that does not halve what is wanting has met the limit of rounding.
            missed = wanting > targets
            active = missed & (wanting < 0.5 * previous)
            if not bool(active.any()) or progress.iterations >= limit:
                break
            previous = wanting
            right = torch.where(active, progress.residual, 0.0)
            x = x + self._correction(right, targets, fit, limit, progress)
        if bool(missed.any()) and progress.iterations >= limit:
            progress.status, progress.detail = "maxiter", "raise maxiter, or the size of the sketch"
        elif bool(missed.any()):
            progress.status = "stagnated"
            progress.detail = "the residual is at its rounding, eps |A| |x|: loosen rtol"
        return x, progress

    def _correction(
        self, residual: Tensor, targets: Tensor, fit: bool, limit: int, progress: Progress
    ) -> Tensor:
        """``argmin |r - F N y|``, as N y, or the shortest solution of ``(F N)^T z = N^T r``."""
        right = self.map.mT @ (self.F.T._matmat(residual) if fit else residual)
        inner = Progress()
        cg = Part(CG(maxiter=limit - progress.iterations)._prepared(self.gram))
        step = self.map @ cg.solve(right, targets.clamp_min(self.reach), inner)
        progress.iterations += inner.iterations
        progress.products += 2 * (inner.iterations + 1) * residual.shape[1]
        return step if fit else self.F._matmat(step)
