"""Operators drawn anew at every step, reproducibly: `SampledSolver`, `PreparedSampling`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from operators import LinearOperator
from solvers.linear_solver import PreparedSolver
from solvers.stationary.step_size import SteppedSolver

# Draws an operator whose expectation is A, as the Hessian of a mini-batch is.
Sampler = Callable[[torch.Generator], LinearOperator]


@dataclass(frozen=True, kw_only=True)
class SampledSolver(SteppedSolver):
    """Settings of a solver whose steps may use samples of the operator.

    Parameters
    ----------
    operators
        ``operators(generator)`` draws an operator of the shape, dtype and device of A, with
        expectation A and independent of the draws before: the Hessian of a mini-batch, made with
        ``torch.randint(..., generator=generator)``. None takes A itself each time.
    seed
        An integer starts a stream of random numbers at `prepare`; every solve, transposed or not,
        goes on from where the last one ended, and `update` hands the stream on. So the i-th solve
        is a function of `seed` and of what was solved before, and no two use the same draws; but
        preparing again begins again, and each member of a batch has a stream of its own, the same.
        A ``torch.Generator`` is used as it is, by all and ever on: hand one over where a method
        prepares for each of its steps.
    step_size, estimation_steps, rtol, atol, strict
        As for `SteppedSolver`.
    """

    operators: Sampler | None = None
    seed: int | torch.Generator = 0


class PreparedSampling(PreparedSolver):
    """A solver bound to its operator, with the stream of random numbers that it draws from."""

    solver: SampledSolver

    def __init__(self, solver: SampledSolver, A: LinearOperator) -> None:
        super().__init__(solver, A)
        seed = solver.seed
        self.generator = (
            seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        )

    def _update(self, A: LinearOperator) -> PreparedSolver:
        updated = super()._update(A)
        if isinstance(updated, PreparedSampling):
            updated.generator = self.generator
        return updated

    def _draw(self, *, transpose: bool) -> LinearOperator:
        """A sample of ``A``, or of ``A^T``.

        Raises
        ------
        TypeError
            What was drawn is no operator, or one of another dtype or device.
        ValueError
            It has another shape.
        """
        A = self.A
        if self.solver.operators is None:
            return A.T if transpose else A
        drawn = self.solver.operators(self.generator)
        if not isinstance(drawn, LinearOperator):
            raise TypeError(
                f"operators(generator) returned a {type(drawn).__name__}; expected an operator"
            )
        if drawn.shape != A.shape:
            raise ValueError(f"operators(generator) returned {drawn!r}; expected shape {A.shape}")
        if (drawn.dtype, drawn.device) != (A.dtype, A.device):
            raise TypeError(
                f"operators(generator) returned {drawn.dtype} on {drawn.device}; expected "
                f"{A.dtype} on {A.device}"
            )
        return drawn.T if transpose else drawn
