"""The step of a gradient method, given or estimated: `SteppedSolver` and `StepSize`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver
from solvers.stationary.spectrum import Spectrum, safe_step, spectrum


@dataclass(frozen=True, kw_only=True)
class SteppedSolver(LinearSolver):
    """Settings of a solver that steps along residuals.

    Parameters
    ----------
    step_size
        ``alpha``. None estimates it when the solver is prepared.
    estimation_steps
        Products with A for that estimate.
    rtol, atol, strict
        As for `LinearSolver`.
    """

    step_size: float | None = None
    estimation_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        name, alpha = type(self).__name__, self.step_size
        if alpha is not None and not 0 < alpha < float("inf"):
            raise ValueError(f"{name}: step_size={alpha}; expected a positive number, or None")
        if self.estimation_steps < 1:
            raise ValueError(
                f"{name}: estimation_steps={self.estimation_steps}; expected at least 1"
            )


@dataclass(frozen=True, eq=False)
class StepSize:
    """A step for each member of an operator, and what is known of its spectrum.

    Parameters
    ----------
    values
        ``alpha``, of shape ``(B,)``; B is 1 where there is one operator.
    source
        Where it comes from, in words.
    ends
        Where the spectrum of a symmetric A lies, if that was estimated; else None.
    doubt
        Why no step will do, in words, as far as the estimate shows; else empty.
    """

    values: Tensor
    source: str
    ends: Spectrum | None = None
    doubt: str = ""

    @classmethod
    def of(cls, A: LinearOperator, solver: SteppedSolver) -> StepSize:
        """The step that a solver was given, or estimates.

        ``1 / L`` of a symmetric A, with L estimated from above by `spectrum`; of another A that of
        `safe_step`.

        Raises
        ------
        ValueError
            A product with A is not finite.
        """
        if solver.step_size is not None:
            value = torch.tensor([solver.step_size], dtype=torch.float64)
            return cls(value, f"step_size {solver.step_size:.3g} as given")
        steps = min(solver.estimation_steps, A.shape[1])
        how = f"by {steps} Krylov steps"
        if not A.symmetric:
            values, real = safe_step(A, steps)
            source = f"step_size {span(values)}, for which I - step_size A contracts, {how}"
            return cls(values, source, doubt=_doubt("perhaps no step size will do", real, values))
        ends = spectrum(A, steps)
        largest = torch.maximum(ends.largest, -ends.smallest)
        values = torch.where(largest > 0, 1 / largest, 1.0)
        hopeless = "no step size will do, as A is not positive definite"
        doubt = _doubt(hopeless, ends.smallest, values)
        source = f"step_size {span(values)} = 1 / L {how}"
        return cls(values, source, ends, doubt)

    def columns(self, block: Tensor) -> Tensor:
        """The step of each column of a block ``(n, B k)``."""
        values = self.values.to(block.dtype).to(block.device)
        return values.repeat_interleave(block.shape[1] // len(values))


def span(values: Tensor) -> str:
    """``0.2``, or ``0.2 to 0.3``."""
    low, high = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return low if low == high else f"{low} to {high}"


def _doubt(what: str, lowest: Tensor, step: Tensor) -> str:
    # Rounding aside, of Ritz values up to about 1 / step.
    if not bool((lowest < -1e-6 / step).any()):
        return ""
    return f"{what}: a Ritz value has real part {float(lowest.min()):.3g}"
