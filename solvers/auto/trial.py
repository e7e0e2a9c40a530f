"""Trials of iterations whose length nobody can predict: `Trial`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from solvers.auto import costs
from solvers.auto.plan import SHORTEST_TRIAL, Candidate, trial_length
from solvers.iterative import PreparedIteration


@dataclass(frozen=True)
class Trial:
    """How long an iteration may be tried, and whether it is worth more after that.

    Parameters
    ----------
    candidate, following
        The iteration, and what comes next in the chain, whose cost can be predicted.
    solves
        Right-hand sides still expected, those at hand included.
    columns
        Right-hand sides at hand.
    start
        Their largest norm as a multiple of its target.

    Notes
    -----
    The trial takes `costs.TRIAL` of the cost of what follows. Then convergence is taken to be
    linear, ``distance = start q^iterations``, and the iteration goes on for half of what that
    leaves to be done, and is looked at again, as long as to finish, and to do as much for the other
    right-hand sides, is cheaper than what follows. It ends too when twice that cost is spent.
    """

    candidate: Candidate
    following: Candidate
    solves: int
    columns: int
    start: float

    @property
    def iterations(self) -> int:
        """Of the trial; 0 where they would be too few to tell anything."""
        return trial_length(self.candidate, self.following, self.solves, self.columns)

    @property
    def first(self) -> int:
        """Iterations before the first look, which is early: some are hopeless."""
        return min(self.iterations, max(SHORTEST_TRIAL, self.iterations // 3))

    @contextmanager
    def of(self, member: PreparedIteration) -> Iterator[None]:
        """A context in which the iteration is on trial."""
        member.trial = self
        try:
            yield
        finally:
            member.trial = None

    def more(self, iterations: int, distance: float) -> int:
        """Iterations to make beyond those made, which left the worst residual at a distance."""
        trying = self.iterations - iterations
        if not distance < self.start:
            return max(trying, 0)
        if distance <= 1:
            return 0
        rest = iterations * math.log(distance) / math.log(self.start / distance)
        others = self.solves / self.columns - 1
        cost = self._each * self.columns * (rest + others * (iterations + rest))
        if trying > 0:
            return trying if cost <= costs.HOPELESS * self._budget else 0
        spent = self._each * self.columns * iterations
        if cost > self._budget or spent > 2 * self._budget:
            return 0
        return math.ceil(rest / 2) + SHORTEST_TRIAL

    @property
    def _each(self) -> float:
        """Seconds of an iteration with one column."""
        assert self.candidate.iteration is not None
        return self.candidate.iteration

    @property
    def _budget(self) -> float:
        return self.following.seconds(self.solves)
