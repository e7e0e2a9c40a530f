"""Richardson's iteration ``x <- x + alpha P (b - A x)``, plain and with momentum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.iterative import PreconditionedSolver, PreparedIteration
from solvers.linear_solver import PreparedSolver, Progress
from solvers.solution import StructureError
from solvers.stationary.spectrum import safe_step, spectrum
from solvers.stationary.step_size import SteppedSolver, span

Acceleration = Literal["none", "heavy-ball", "chebyshev"]
# a and c of d <- a P r + c d, x <- x + d, for each member.
Coefficients = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Richardson(PreconditionedSolver, SteppedSolver):
    """``x <- x + alpha P (b - A x)``: the gradient method, and its accelerations.

    For eigenvalues of ``P A`` in ``[l, L]`` and ``q = (sqrt(L/l) - 1) / (sqrt(L/l) + 1)`` the error
    after k steps, in the norm in which ``P A`` is self-adjoint, is at most this of the first one:

    - ``"none"``, with ``alpha = 2 / (l + L)``: ``((L - l) / (L + l))^k``;
    - ``"heavy-ball"``: ``q^k (1 + k (1 - q^2) / (1 + q^2))``;
    - ``"chebyshev"``: ``2 q^k / (1 + q^(2k))``, the least that a polynomial in ``P A`` achieves on
      the whole interval: what CG does without its inner products, and without its gain from gaps.

    Parameters
    ----------
    step_size
        ``alpha`` of the plain iteration. None means ``2 / (l + L)`` where A and P are symmetric,
        and otherwise a step for which ``I - alpha P A`` contracts (`spectrum.safe_step`).
    acceleration
        ``"none"``; ``"heavy-ball"``, the stationary second-order method; ``"chebyshev"``, the
        semi-iteration. Both need ``P A`` with real positive eigenvalues.
    eigenvalue_bounds
        ``(l, L)``, where they are known. None estimates them.
    estimation_steps
        Krylov steps of that estimate, one product with A and P each; the vector they start from is
        drawn from a fixed seed.
    preconditioner, maxiter, stop_at_maxiter, rtol, atol, strict
        As for `PreconditionedSolver`.

    Notes
    -----
    Each iteration is one product with A, one with P, and ``6 n`` flops; there is no inner product
    but in the test of the residual, which is the true one. A column that has converged stops; where
    a residual grows tenfold over the first one, the column stops with status ``"diverged"``.

    An l that is too large slows the convergence down to that of the eigenvalues below it; an L that
    is too small makes the accelerated iterations diverge. The estimate of L errs to the safe side
    as a rule; that of l is the smallest Ritz value, which is too large unless `estimation_steps` is
    of the order of ``sqrt(L / l)``.

    Sources: Richardson (1911, doi:10.1098/rsta.1911.0009); Golub and Varga (1961,
    doi:10.1007/BF01386013) for Chebyshev and its stationary limit, started by a plain step, so that
    the residual does not grow at first as under Polyak's (1964) start; Saad (2003, algorithm 12.1).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> b = torch.ones(3, dtype=torch.float64)
    >>> solver = Richardson(rtol=1e-6, maxiter=100)  # 2^-k
    >>> solver.prepare(A).solve(b).info.iterations
    20
    >>> solver = Richardson(rtol=1e-6, maxiter=100, acceleration="chebyshev")
    >>> solver.prepare(A).solve(b).info.iterations
    11
    """

    acceleration: Acceleration = "none"
    eigenvalue_bounds: tuple[float, float] | None = None
    estimation_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.acceleration not in ("none", "heavy-ball", "chebyshev"):
            raise ValueError(
                f"Richardson: acceleration={self.acceleration!r}; expected 'none', 'heavy-ball' or "
                "'chebyshev'"
            )
        bounds = self.eigenvalue_bounds
        if bounds is not None and not 0 < bounds[0] <= bounds[1] < float("inf"):
            raise ValueError(
                f"Richardson: eigenvalue_bounds={bounds}; expected (l, L) with 0 < l <= L"
            )
        if self.step_size is not None and (bounds is not None or self.acceleration != "none"):
            raise ValueError(
                f"Richardson: step_size={self.step_size} is that of the plain iteration; with "
                "eigenvalue_bounds or an acceleration leave it None"
            )

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A and P, and estimate where the eigenvalues of ``P A`` lie.

        Raises
        ------
        StructureError
            An acceleration, of an operator or a preconditioner that is not symmetric, without
            `eigenvalue_bounds`; or of one that is not positive definite.
        """
        prepared = _PreparedRichardson(self, A)
        _ = prepared.rule
        return prepared


@dataclass(frozen=True, eq=False)
class _Rule:
    """The step of the plain iteration, or the ends ``(l, L)``, one entry for each member."""

    source: str
    step: Tensor
    ends: tuple[Tensor, Tensor] | None = None


class _PreparedRichardson(PreparedIteration):
    solver: Richardson

    @cached_property
    def rule(self) -> _Rule:
        """What the coefficients are made of; made anew with the preconditioner."""
        solver, A, P = self.solver, self.A, self.preconditioner
        plain = solver.acceleration == "none"
        if solver.step_size is not None:
            step = torch.tensor([solver.step_size], dtype=torch.float64)
            return _Rule(f"step_size {solver.step_size:.3g} as given", step)
        if solver.eigenvalue_bounds is not None:
            ends = torch.tensor(solver.eigenvalue_bounds, dtype=torch.float64).reshape(2, 1)
            return self._between(ends[0], ends[1], "given")
        steps = min(solver.estimation_steps, A.shape[0])
        if A.symmetric and (P is None or P.symmetric):
            found = spectrum(A, steps, P)
            if found.definite:
                return self._between(found.smallest, found.largest, f"by {steps} Krylov steps")
            if not plain:
                raise StructureError(
                    f"Richardson: acceleration={solver.acceleration!r} needs a positive definite "
                    f"operator; {A!r} has the Ritz value {float(found.smallest.min()):.3g}: use "
                    "MINRES or a direct solver"
                )
        elif not plain:
            raise StructureError(
                f"Richardson: acceleration={solver.acceleration!r} needs a symmetric operator and "
                f"preconditioner; {A!r} and {P!r} do not claim to be: claim it, give "
                "eigenvalue_bounds if the eigenvalues are real, or use GMRES"
            )
        step, real = safe_step(A, steps, P)
        source = f"step_size {span(step)} by {steps} Krylov steps"
        if bool((real <= 0).any()):
            source += f"; a Ritz value has real part {float(real.min()):.3g}, so no step will do"
        return _Rule(source, step)

    def _between(self, l: Tensor, L: Tensor, how: str) -> _Rule:  # noqa: E741
        what = "P A" if self.preconditioner is not None else "A"
        return _Rule(
            f"eigenvalues of {what} from {span(l)} to {span(L)} {how}", 2 / (l + L), (l, L)
        )

    @cached_property
    def _transposed(self) -> PreparedSolver:
        # P^T A^T has the eigenvalues of P A.
        P = None if self.preconditioner is None else self.preconditioner.T
        transposed = type(self)(self.solver, self.A.T, P)
        if P is None or self.rule.ends is not None:
            transposed.__dict__["rule"] = self.rule
        return transposed

    def _renew(self) -> None:
        super()._renew()
        self.__dict__.pop("rule", None)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        limit = self.solver.limit(block.shape[0])
        progress = Progress(detail=self.rule.source)
        x, step, residual = torch.zeros_like(block), torch.zeros_like(block), block
        active = torch.linalg.vector_norm(block, dim=0) > targets
        coefficients = self._coefficients(block)
        while bool(active.any()):
            if progress.iterations >= limit:
                progress.stopped("maxiter")
                break
            a, c = next(coefficients)
            step = torch.where(active, a * self._precondition(residual) + c * step, 0.0)
            x = x + step
            residual = torch.where(active, block - self._product(x), residual)
            progress.iterations += 1
            progress.products += block.shape[1]
            size = torch.linalg.vector_norm(residual, dim=0)
            grown = active & ~(size <= 10.0)  # NaN lands here too
            if bool(grown.any()):
                progress.status = "diverged"
                finite = bool(torch.isfinite(size[grown]).all())
                progress.detail = (
                    f"the residual grows tenfold, with {self.rule.source}: the largest eigenvalue "
                    "is larger, or one is not positive"
                    if finite
                    else "a product with A or the preconditioner is not finite"
                )
            active = active & (size > targets) & ~grown
        progress.residual = residual
        return x, progress

    def _coefficients(self, block: Tensor) -> Iterator[Coefficients]:
        rule, acceleration = self.rule, self.solver.acceleration

        def columns(values: Tensor) -> Tensor:
            spread = values.to(block.dtype).to(block.device)
            return spread.repeat_interleave(block.shape[1] // len(values))

        first = columns(rule.step)
        yield first, torch.zeros_like(first)
        if rule.ends is None or acceleration == "none":
            while True:
                yield first, torch.zeros_like(first)
        smallest, largest = rule.ends
        if acceleration == "heavy-ball":
            root, other = largest.sqrt(), smallest.sqrt()
            a, c = columns(4 / (root + other) ** 2), columns(((root - other) / (root + other)) ** 2)
            while True:
                yield a, c
        # T_{k+1}(t) = 2 t T_k(t) - T_{k-1}(t); ratio_k = T_k(1/s) / T_{k+1}(1/s), which is s at
        # first and falls to q.
        s = (largest - smallest) / (largest + smallest)
        ratio = s
        while True:
            a, c = 2 * rule.step / (2 - s * ratio), s * ratio / (2 - s * ratio)
            ratio = s / (2 - s * ratio)
            yield columns(a), columns(c)
