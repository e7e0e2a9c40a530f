"""Broyden's "good" method for ``A x = b``: an inverse learnt from the steps that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import operators
from operators import LinearOperator, Space
from solvers.iterative import IterativeSolver
from solvers.linear_solver import PreparedSolver, Progress

# Share of the slope by which a step must lower |b - A x|^2 (Armijo).
SUFFICIENT = 1e-4
LineSearch = Literal["none", "armijo", "exact"]


@dataclass(frozen=True, kw_only=True)
class Broyden(IterativeSolver):
    """``x <- x + t H (b - A x)`` with ``H ~ A^-1`` learnt as it goes, for any square operator.

    Each step s and its image ``y = A s`` update H by the rank-one term that makes ``H y = s`` and
    changes its inverse least (see `operators.Broyden`). It needs no transposed product and no
    definiteness; with full steps and `memory` enough it ends within 2 n iterations (Gay, 1979). The
    residual may rise on the way: what is returned is the best iterate that was met, not the last.
    For a symmetric positive definite A, `CG` is better.

    Parameters
    ----------
    memory
        Rank-one terms kept, ``2 n`` numbers each. When there are as many, the method starts anew
        from the best iterate: without the oldest term alone, H would be that of no sequence of
        steps. Ending within 2 n iterations takes 2 n of them.
    line_search
        ``t``. ``"none"``: 1. ``"armijo"``: the largest of ``1, 1/2, 1/4, ...`` for which ``|b - A
        x|^2`` falls by at least ``1e-4`` of its slope; where it does not fall along the direction,
        the step teaches H and is not taken. ``"exact"``: the t of the least residual. The residual
        along a line being known from the product that each iteration takes anyway, neither costs
        another one.
    scale
        Of the first H, a multiple of I; its sign should be that of A. None takes ``<r, A r> / |A
        r|^2`` of the first residual r, with which the first step lowers the residual as far as one
        along r can, whatever the sign and the units of A.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`; an iteration is one product with A.

    Notes
    -----
    The columns of a block are solved one by one, each with its own H. An iteration costs one
    product and about ``16 m n`` flops for m terms kept.

    Source: Broyden (1965, doi:10.1090/S0025-5718-1965-0198670-6); its end on linear systems by Gay
    (1979, doi:10.1137/0716047); for hypergradients of physics-informed networks Hao et al. (2022,
    arXiv:2209.07075), whose first H has the wrong sign for a positive definite Hessian.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64))
    >>> b = torch.tensor([2.0, 0.0], dtype=torch.float64)
    >>> x, info = Broyden(rtol=1e-12).prepare(A).solve(b)
    >>> x, info.iterations
    (tensor([1., 1.], dtype=torch.float64), 4)
    """

    memory: int = 30
    line_search: LineSearch = "none"
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"Broyden: memory={self.memory}; expected at least 1")
        if self.line_search not in ("none", "armijo", "exact"):
            raise ValueError(
                f"Broyden: line_search={self.line_search!r}; expected 'none', 'armijo' or 'exact'"
            )
        if self.scale is not None and not 0 < abs(self.scale) < math.inf:
            raise ValueError(
                f"Broyden: scale={self.scale}; expected a number other than 0, or None"
            )

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A; there is nothing to factorise."""
        return _PreparedBroyden(self, A)


class _Point(NamedTuple):
    """``x``, its residual and the norm of that."""

    x: Tensor
    residual: Tensor
    size: float

    @classmethod
    def of(cls, x: Tensor, residual: Tensor) -> _Point:
        return cls(x, residual, float(torch.linalg.vector_norm(residual)))


class _PreparedBroyden(PreparedSolver):
    solver: Broyden

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        worst, columns = Progress(), []
        for b, target in zip(block.T.contiguous(), targets.tolist(), strict=True):
            x, progress = self._column(b, target)
            columns.append(x)
            worst.include(progress)
        return torch.stack(columns, 1) if columns else torch.zeros_like(block), worst

    def _column(self, b: Tensor, target: float) -> tuple[Tensor, Progress]:
        limit, space = self.solver.limit(len(b)), Space.flat(len(b), b.dtype, b.device)
        progress = Progress()
        best = point = _Point.of(torch.zeros_like(b), b)
        learnt: operators.Broyden | None = None
        # Residual at the last start, and when it was last measured.
        started = measured = math.inf
        while best.size > target:
            if progress.iterations >= limit:
                progress.status = "maxiter"
                break
            if learnt is None or len(learnt) == self.solver.memory:
                if not best.size < started:
                    progress.status = "stagnated"
                    progress.detail = (
                        f"{self.solver.memory} steps from the best iterate led to no better one: "
                        "take more memory, or use GMRES"
                    )
                    break
                point, started = best, best.size
                image = self._product(point.residual, progress)
                scale = self._scale(point.residual, image)
                learnt = operators.Broyden(space, memory=self.solver.memory, scale=scale)
                direction, image = scale * point.residual, scale * image
            else:
                direction = learnt.inverse()._matvec(point.residual)
                image = self._product(direction, progress)
            progress.iterations += 1
            if not math.isfinite(float(image @ image + direction @ direction)):
                progress.status = "diverged"
                progress.detail = "a step, or its product with A, is not finite"
                break
            length = self._length(point.residual, image)
            # The update is the same for every multiple of a step.
            if not learnt.update(direction, image) and length == 0:
                progress.status = "breakdown"
                progress.detail = "no step lowers the residual, and none teaches: use GMRES"
                break
            point = _Point.of(point.x + length * direction, point.residual - length * image)
            best = point if point.size < best.size else best
            if best.size <= target:
                # Rounding may have parted the recurrence from b - A x: measure, and go on from the
                # truth as long as that pays.
                best = point = _Point.of(best.x, b - self._product(best.x, progress))
                if best.size > target and not best.size < 0.5 * measured:
                    progress.status = "stagnated"
                    break
                measured = best.size
        return best.x, progress

    def _product(self, v: Tensor, progress: Progress) -> Tensor:
        progress.products += 1
        return self.A._matvec(v)

    def _scale(self, residual: Tensor, image: Tensor) -> float:
        """Of the first H: by default that of the least residual along this one."""
        if self.solver.scale is not None:
            return self.solver.scale
        length, size = (float(torch.linalg.vector_norm(v)) for v in (residual, image))
        if not 0 < size < math.inf:
            return 1.0
        cosine = float(residual @ image) / (length * size)
        # Where they are nearly orthogonal, nothing tells the sign.
        return (cosine if abs(cosine) > 1e-3 else 1.0) * length / size

    def _length(self, residual: Tensor, image: Tensor) -> float:
        """t, from ``|r - t y|^2 = |r|^2 - 2 t <r, y> + t^2 |y|^2``."""
        if self.solver.line_search == "none":
            return 1.0
        slope, square = float(residual @ image), float(image @ image)
        if square == 0:
            return 0.0
        if self.solver.line_search == "exact":
            return slope / square
        longest = 2 * (1 - SUFFICIENT) * slope / square
        return min(1.0, 2.0 ** math.floor(math.log2(longest))) if longest > 0 else 0.0
