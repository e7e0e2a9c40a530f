"""A chain of solvers with reasons and predicted costs: `Plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from solvers.auto import costs
from solvers.linear_solver import LinearSolver
from solvers.solution import StructureError

# Fewer iterations tell nothing.
SHORTEST_TRIAL = 10


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Parameters
    ----------
    tolerances
        rtol and atol, as settings of the solvers.
    rtol
        Relative tolerance as a number.
    solves
        Right-hand sides to expect.
    memory
        Bytes that a solver may take beyond the operator.
    """

    tolerances: dict[str, Any]
    rtol: float
    solves: int
    memory: float


@dataclass(frozen=True)
class Candidate:
    """A solver that suits, why, and what it is predicted to cost.

    Parameters
    ----------
    solver
        Its settings.
    reason
        Why it is in the chain.
    setup, solve
        Predicted seconds of `prepare`, and of a solve with one column.
    memory
        Predicted bytes beyond the operator.
    iteration
        Predicted seconds of an iteration, where their number cannot be predicted; `solve` is then
        what remains to be seen, and the solver is tried first for a share of the cost of the next.
    resort
        Whether it is there for what all others fail to solve.
    trial
        Iterations that it is tried for before the next one has its turn; None where it is not on
        trial.
    """

    solver: LinearSolver
    reason: str
    setup: float = 0.0
    solve: float = 0.0
    memory: float = 0.0
    iteration: float | None = None
    resort: bool = False
    trial: int | None = None

    def seconds(self, solves: int) -> float:
        """Predicted seconds of everything, for so many right-hand sides."""
        return self.setup + solves * self.solve

    @property
    def name(self) -> str:
        """The class, and that of its preconditioner."""
        preconditioner = getattr(self.solver, "preconditioner", None)
        name = type(self.solver).__name__
        return name if preconditioner is None else f"{name} with {type(preconditioner).__name__}"

    def describe(self, solves: int) -> str:
        """Name, predicted cost and reason."""
        parts = []
        if self.resort:
            parts.append("last resort")
        elif self.iteration is not None:
            tried = "" if self.trial is None else f", tried for {self.trial} iterations"
            parts.append(f"{_time(self.iteration)} an iteration{tried}")
        else:
            parts.append(f"about {_time(self.seconds(solves))}")
        if self.memory >= 1e6:
            parts.append(_bytes(self.memory))
        return f"{self.name} ({', '.join(parts)}): {self.reason}"


@dataclass(frozen=True)
class Plan:
    """The chain of `Auto`: the first that meets the tolerance wins.

    Parameters
    ----------
    operator
        The operator, in a line.
    candidates
        In the order in which they are tried.
    solves
        Right-hand sides that the predictions are for.
    refused
        What was left out, and why.
    """

    operator: str
    candidates: tuple[Candidate, ...]
    solves: int
    refused: tuple[str, ...] = ()

    @property
    def predictable(self) -> Candidate:
        """The first whose cost can be predicted; without one the first."""
        if not self.candidates:
            refused = "; ".join(self.refused)
            raise StructureError(f"no solver for {self.operator} within the memory: {refused}")
        known = (c for c in self.candidates if c.iteration is None and not c.resort)
        return next(known, self.candidates[0])

    def __str__(self) -> str:
        lines = [self.operator]
        chain = enumerate(self.candidates, 1)
        lines += [f"{index}. {candidate.describe(self.solves)}" for index, candidate in chain]
        lines += [f"-  {line}" for line in self.refused]
        return "\n".join(lines)


def trial_length(candidate: Candidate, following: Candidate, solves: int, columns: int) -> int:
    """Iterations by which an open-ended candidate may be tried for so many columns at once.

    They take, with its set-up, `costs.TRIAL` of what follows costs for all the solves. Zero where
    they would be too few to tell anything.
    """
    assert candidate.iteration is not None
    allowed = costs.TRIAL * following.seconds(solves) - candidate.setup
    length = int(allowed / (columns * candidate.iteration))
    return length if length >= SHORTEST_TRIAL else 0


def ordered(operator: str, found: list[Candidate], request: Request) -> Plan:
    """The plan of what was found: what fits into memory, the cheapest first, resorts last.

    An iteration whose length nobody knows goes before the first of known cost, if it can make
    ten steps within a share of that cost (`costs.TRIAL`); else after all of them.
    """
    fits = [c for c in found if c.memory <= request.memory]
    refused = tuple(
        f"{c.name} is left out: it would take {_bytes(c.memory)}, and the budget is "
        f"{_bytes(request.memory)}"
        for c in found
        if c.memory > request.memory
    )
    known = [c for c in fits if c.iteration is None and not c.resort]
    known.sort(key=lambda c: c.seconds(request.solves))
    open_ended = [c for c in fits if c.iteration is not None and not c.resort]
    earlier = [c.solver for c in fits if not c.resort]
    resorts = [c for c in fits if c.resort and c.solver not in earlier]
    first, later = [], []
    for candidate in open_ended:
        if not known:
            first.append(candidate)
            continue
        trial = trial_length(candidate, known[0], request.solves, 1)
        if trial:
            first.append(replace(candidate, trial=trial))
        else:
            later.append(candidate)
    # One trial is enough: further open-ended ones come when the known ones have failed.
    chain = [*first[: 1 if known else None], *known, *later]
    chain += [replace(c, trial=None) for c in first[1:]] if known else []
    return Plan(operator, (*chain, *resorts), request.solves, refused)


def _time(seconds: float) -> str:
    if seconds <= 0:
        return "0 s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:.0f} bytes"


def _digits(value: float) -> str:
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"
