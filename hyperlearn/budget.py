"""When a run stops, and when it writes what it needs to be resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Budget:
    """When to stop: at whichever limit comes first.

    Parameters
    ----------
    steps
        Outer steps.
    seconds
        Training time: recording and evaluation are off this clock.
    oracle_calls
        Gradients, Hessian and cross products together.
    """

    steps: int | None = None
    seconds: float | None = None
    oracle_calls: int | None = None

    def __post_init__(self) -> None:
        limits = {f.name: getattr(self, f.name) for f in fields(self)}
        if all(limit is None for limit in limits.values()):
            raise ValueError(
                "Budget needs a limit: steps=, seconds= or oracle_calls=; with none it never ends"
            )
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"Budget: {name}={limit}; expected a positive number")

    def spent(self, step: int, seconds: float, calls: int) -> float:
        """Largest share of a limit that is used up; the run ends at 1."""
        shares = [
            used / limit
            for used, limit in (
                (step, self.steps),
                (seconds, self.seconds),
                (calls, self.oracle_calls),
            )
            if limit is not None
        ]
        return max(shares)


@dataclass(frozen=True)
class Checkpoints:
    """When a recorded run writes what it needs to be resumed, and how much of that it keeps.

    A checkpoint costs a rewrite of the file: the size of x, y and the method's state, and of the
    compressed history.

    Parameters
    ----------
    seconds
        Of wall-clock time between two; None for no such rule.
    steps
        Outer steps between two; None for no such rule.
    keep
        How many of the newest to keep.
    """

    seconds: float | None = 60.0
    steps: int | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"Checkpoints: seconds={self.seconds}; expected a number >= 0 or None")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Checkpoints: steps={self.steps}; expected at least 1, or None")
        if self.keep < 1:
            raise ValueError(f"Checkpoints: keep={self.keep}; expected at least 1")

    def due(self, steps: int, seconds: float) -> bool:
        """Whether it is time, so long after the last one."""
        return (self.steps is not None and steps >= self.steps) or (
            self.seconds is not None and seconds >= self.seconds
        )
