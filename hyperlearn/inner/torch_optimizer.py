"""Any optimiser of torch.optim as an inner method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperlearn.conditions import Stationary
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import InnerMethod, State


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer(InnerMethod):
    """Steps of ``optimizer([y])`` on the loss, until its gradient meets the tolerance.

    Parameters
    ----------
    optimizer
        Makes one of a list of parameters: ``functools.partial(torch.optim.Adam, lr=0.1)``, or a
        class of torch.optim.
    scheduler
        Makes a learning-rate scheduler of the optimiser; None for none.
    rtol, atol, maxiter, strict
        As for `InnerMethod`. An adaptive method with a constant step may never meet a tight one.

    Notes
    -----
    y is one flat vector, so methods that treat matrices apart (Muon) do not. The members of a batch
    are solved one by one.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    scheduler: Callable[..., Any] | None = None
    maxiter: int = 10000

    blocks = False
    solves = (Stationary,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("optimizer", callable(self.optimizer), "a class of torch.optim or a partial")

    @property
    def unrollable(self) -> str:
        """Never: torch.optim works in place."""
        return "torch.optim works in place: take GradientDescent(step_size=...)"

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """The gradient at the first point."""
        return {"y": Y, "F": equation.residual(Y)}

    def advance(self, equation: Equation, state: State) -> State:
        """One step of the optimiser, whose state goes with the equation."""
        if equation.carried is None:
            y = torch.nn.Parameter(state["y"].clone())
            optimizer = self.optimizer([y])
            schedule = None if self.scheduler is None else self.scheduler(optimizer)
            equation.carried = y, optimizer, schedule
        y, optimizer, schedule = equation.carried

        def closure() -> Tensor:
            y.grad = equation.residual(y.detach())
            return equation.value(y.detach()).sum()

        y.grad = state["F"]
        # Those that search a line (LBFGS) call it as often as they like.
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)
        if schedule is not None:
            schedule.step()
        following = y.detach().clone()
        return {"y": following, "F": equation.residual(following)}
