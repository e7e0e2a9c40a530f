"""Learners that choose one of several settings by what each has cost: `Bandit`, `TsallisINF`."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor


class Bandit(ABC):
    """Chooses an arm, is told what that cost, and learns to choose cheap ones.

    Each round is one `choose` and one `learn`; a choice whose cost is never told is forgotten.

    Parameters
    ----------
    arms
        Number of arms.
    least
        What a round costs at least: 1 for the iterations of a solver that starts from zero.
    seed
        Of the draws.

    Raises
    ------
    ValueError
        A setting is out of range.
    """

    # Tensors that hold what was learned.
    _learned: ClassVar[tuple[str, ...]]

    def __init__(self, arms: int, *, least: float = 1.0, seed: int = 0) -> None:
        name = type(self).__name__
        if arms < 1:
            raise ValueError(f"{name}: arms={arms}; expected at least 1")
        if not math.isfinite(least):
            raise ValueError(f"{name}: least={least}; expected a finite number")
        self.arms, self.least = arms, least
        self.generator = torch.Generator().manual_seed(seed)
        # Arm, its probability and its context, until the cost is known; arm -1 for none.
        self._pending = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)

    @abstractmethod
    def probabilities(self, context: float | None = None) -> Tensor:
        """Probability of each arm in this round: ``(arms,)`` in float64, summing to 1.

        Raises
        ------
        ValueError
            The learner needs a context, and there is none, or one that is not finite.
        """

    @abstractmethod
    def _learn(self, arm: int, probability: float, context: float, cost: float) -> None:
        """Take in the cost of an arm that was drawn with this probability."""

    def choose(self, context: float | None = None) -> int:
        """Draw an arm.

        Parameters
        ----------
        context
            A number known beforehand that the costs depend on; a learner without contexts does not
            look at it.

        Raises
        ------
        ValueError
            As for `probabilities`.
        """
        p = self.probabilities(context)
        arm = int(torch.multinomial(p, 1, generator=self.generator))
        self._pending = torch.tensor(
            [arm, p[arm], 0.0 if context is None else context], dtype=torch.float64
        )
        return arm

    def learn(self, cost: float) -> None:
        """Take in what the arm last chosen has cost.

        Raises
        ------
        ValueError
            The cost is not finite, or below `least`.
        RuntimeError
            No arm was chosen since the last cost.
        """
        if not (math.isfinite(cost) and cost >= self.least):
            raise ValueError(
                f"{type(self).__name__}: cost={cost}; expected a finite number >= least="
                f"{self.least:g}"
            )
        arm, probability, context = self._pending.tolist()
        if arm < 0:
            raise RuntimeError(f"{type(self).__name__}: a cost without a choice; choose() first")
        self._pending = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
        self._learn(int(arm), probability, context, float(cost))

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned and the state of the generator: a copy goes on bit for bit."""
        state = {name: getattr(self, name).clone() for name in (*self._learned, "_pending")}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a learner with the same settings.

        Raises
        ------
        ValueError
            Other names or shapes.
        """
        own = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if shapes != expected:
            raise ValueError(f"{type(self).__name__}: state {shapes}; expected {expected}")
        for name in (*self._learned, "_pending"):
            setattr(self, name, state[name].to(own[name]).clone())
        self.generator.set_state(state["generator"])


class TsallisINF(Bandit):
    """Online mirror descent with the Tsallis entropy of power 1/2; it need not know the horizon.

    In round t an arm is drawn with the probabilities that `tsallis_probabilities` makes of the
    estimated total costs ``K_i`` and ``eta_t = 2 / sqrt(t)``. The arm played adds
    ``(cost - least) / p_i`` to its total, the others nothing, which is right in the mean. Over t
    rounds the cost exceeds that of the best fixed arm by ``O(sqrt(arms t))`` at most, whatever the
    sequence of costs, and by ``O(log t)`` where they are drawn independently.

    Parameters
    ----------
    arms, least, seed
        As for `Bandit`.

    Notes
    -----
    The theory wants costs in [0, 1]: totals are divided by the mean of ``cost - least`` so far.
    Costs may have a heavy tail, as the iterations of SOR have where the relaxation factor is near
    2. A round costs some ten Newton steps on `arms` numbers, about 0.2 ms.

    Source: Zimmert and Seldin (2021), arXiv:1807.07623, algorithm 1 with importance weighting; as
    a choice of the parameter of a solver Khodak, Chow, Balcan and Talwalkar (2024),
    arXiv:2310.02246, whose scale this is.

    Examples
    --------
    >>> bandit = TsallisINF(3, seed=1)
    >>> for _ in range(500):
    ...     bandit.learn([30.0, 10.0, 20.0][bandit.choose()])
    >>> int(bandit.probabilities().argmax())
    1
    """

    _learned = ("totals", "rounds", "spent")

    def __init__(self, arms: int, *, least: float = 1.0, seed: int = 0) -> None:
        super().__init__(arms, least=least, seed=seed)
        self._reset(1)

    def _reset(self, rows: int) -> None:
        """Independent learners, a row each; here there is one."""
        self.totals = torch.zeros(rows, self.arms, dtype=torch.float64)
        self.rounds = torch.zeros(rows, dtype=torch.int64)
        self.spent = torch.zeros(rows, dtype=torch.float64)

    def _row(self, context: float | None) -> int:
        return 0

    def probabilities(self, context: float | None = None) -> Tensor:
        """As for `Bandit`; there are no contexts."""
        row = self._row(context)
        rounds, spent = int(self.rounds[row]), float(self.spent[row])
        scale = spent / rounds if spent > 0 else 1.0
        return tsallis_probabilities(self.totals[row] / scale, 2 / math.sqrt(rounds + 1))

    def _learn(self, arm: int, probability: float, context: float, cost: float) -> None:
        row, excess = self._row(context), cost - self.least
        self.totals[row, arm] += excess / probability
        self.rounds[row] += 1
        self.spent[row] += excess


def tsallis_probabilities(totals: Tensor, rate: float) -> Tensor:
    """``p_i = 4 / (rate (K_i - z))^2`` with z such that they sum to 1.

    The minimiser of ``<p, K> - (4 / rate) sum_i sqrt(p_i)`` over the simplex.

    Parameters
    ----------
    totals
        ``K``, ``(arms,)``; finite.
    rate
        ``eta > 0``.

    Notes
    -----
    The root lies between ``2 / eta`` and ``2 sqrt(arms) / eta`` below the least total. From the
    former end, where the sum is at least 1, Newton's method descends monotonically, for the sum is
    convex in z. Started elsewhere it may step beyond the pole at the least total, and the
    probabilities become NaN.
    """
    # Numbers of Python: some twenty of them are done before one tensor is.
    gaps = (rate * (totals - totals.min())).tolist()
    below = 2.0  # rate (min K - z)
    while True:
        roots = [2 / (gap + below) for gap in gaps]
        total = sum(root * root for root in roots)
        step = (total - 1) / sum(root * root * root for root in roots)
        if step <= 4 * sys.float_info.epsilon * below:
            return torch.tensor(roots, dtype=torch.float64).square() / total
        below += step
