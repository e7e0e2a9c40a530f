"""Bandits that know a number on which the costs depend: `BinnedBandit`, `ChebyshevBandit`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from solvers.sequences.bandit import Bandit, TsallisINF


class BinnedBandit(TsallisINF):
    """An independent `TsallisINF` in each of several equal intervals of the context.

    Parameters
    ----------
    arms
        Number of arms.
    low, high
        Interval of the contexts; one beyond it counts as the nearer end.
    bins
        Number of intervals.
    least, seed
        As for `Bandit`.

    Notes
    -----
    Source: Khodak, Chow, Balcan and Talwalkar (2024), arXiv:2310.02246, section 2.3.

    Examples
    --------
    >>> bandit = BinnedBandit(2, 0.0, 1.0, bins=2)
    >>> for step in range(1000):
    ...     context = step % 10 / 10
    ...     arm = bandit.choose(context)
    ...     bandit.learn(30.0 if (arm == 0) == (context < 0.5) else 10.0)
    >>> [int(bandit.probabilities(context).argmax()) for context in (0.2, 0.7)]
    [1, 0]
    """

    def __init__(
        self,
        arms: int,
        low: float,
        high: float,
        *,
        bins: int = 5,
        least: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(arms, least=least, seed=seed)
        _check_interval(self, low, high)
        if bins < 1:
            raise ValueError(f"BinnedBandit: bins={bins}; expected at least 1")
        self.low, self.high, self.bins = low, high, bins
        self._reset(bins)

    def _row(self, context: float | None) -> int:
        share = (_inside(self, context, self.low, self.high) + 1) / 2
        return min(int(share * self.bins), self.bins - 1)


class ChebyshevBandit(Bandit):
    """Chebyshev regression of each arm's cost on the context, and draws by predicted excess.

    Arm i is predicted to cost ``y_i(c) = sum_j theta_ij T_j(c)``, and drawn with probability

        p_i = 1 / (arms + eta_t (y_i - min y)) ,   eta_t = 2 t sqrt(arms) / s_t ,

    the rest falling to the arm predicted to be cheapest; ``s_t`` is the root mean square of the
    errors that the predictions have had so far. Arms not yet tried are predicted to cost `least`,
    and so are tried.

    Parameters
    ----------
    arms
        Number of arms.
    low, high
        Interval of the contexts; one beyond it counts as the nearer end.
    degree
        Of the polynomials.
    ridge
        Weight of the penalty ``max(1, j)^2 theta_ij^2`` in the least squares.
    least, seed
        As for `Bandit`.

    Notes
    -----
    The coefficients of a Lipschitz function fall off as ``1 / j``: the paper bounds them by a
    multiple of that, in a constrained least-squares problem a round; the penalty here says the same
    in closed form, and does not depend on the unit of the costs. `eta_t` is the paper's up to its
    bound of the regression's error, which is taken for zero. A round solves one system of size
    ``degree + 1`` and evaluates the polynomials of all arms, about 0.2 ms.

    Source: ChebCB of Khodak, Chow, Balcan and Talwalkar (2024), arXiv:2310.02246, section 3; the
    draws are SquareCB of Foster and Rakhlin (2020), arXiv:2002.04926.

    Examples
    --------
    >>> bandit = ChebyshevBandit(2, -1.0, 1.0)
    >>> for step in range(1000):
    ...     context = step % 21 / 10 - 1
    ...     bandit.learn([20.0 + 5 * context, 20.0 - 5 * context][bandit.choose(context)])
    >>> [int(bandit.probabilities(context).argmax()) for context in (-0.8, 0.8)]
    [0, 1]
    """

    _learned = ("grams", "moments", "coefficients", "rounds", "squares")

    def __init__(
        self,
        arms: int,
        low: float,
        high: float,
        *,
        degree: int = 6,
        ridge: float = 0.1,
        least: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(arms, least=least, seed=seed)
        _check_interval(self, low, high)
        if degree < 0:
            raise ValueError(f"ChebyshevBandit: degree={degree}; expected at least 0")
        if not 0 < ridge < math.inf:
            raise ValueError(f"ChebyshevBandit: ridge={ridge}; expected a positive number")
        self.low, self.high, self.degree, self.ridge = low, high, degree, ridge
        orders = torch.arange(degree + 1, dtype=torch.float64)
        penalty = ridge * orders.clamp_min(1) ** 2
        self.grams = torch.diag(penalty).repeat(arms, 1, 1)
        self.moments = torch.zeros(arms, degree + 1, dtype=torch.float64)
        self.coefficients = torch.zeros(arms, degree + 1, dtype=torch.float64)
        self.rounds = torch.tensor(0)
        self.squares = torch.tensor(0.0, dtype=torch.float64)

    def predicted(self, context: float) -> Tensor:
        """Predicted cost of each arm, ``(arms,)``."""
        return self.coefficients @ self._polynomials(context) + self.least

    def _polynomials(self, context: float | None) -> Tensor:
        angle = math.acos(_inside(self, context, self.low, self.high))
        return torch.cos(angle * torch.arange(self.degree + 1, dtype=torch.float64))

    def probabilities(self, context: float | None = None) -> Tensor:
        """As for `Bandit`."""
        predicted = self.coefficients @ self._polynomials(context)
        best = int(predicted.argmin())
        gaps = predicted - predicted[best]
        rounds = int(self.rounds)
        error = math.sqrt(float(self.squares) / max(rounds, 1))
        # Where the errors have all been zero, no gap is too small to be sure of.
        excess = torch.where(gaps > 0, gaps / error, 0.0)
        p = 1 / (self.arms + 2 * rounds * math.sqrt(self.arms) * excess)
        p[best] = 0.0
        p[best] = 1 - p.sum()
        return p

    def _learn(self, arm: int, probability: float, context: float, cost: float) -> None:
        polynomials, excess = self._polynomials(context), cost - self.least
        self.squares += (excess - self.coefficients[arm] @ polynomials) ** 2
        self.rounds += 1
        self.grams[arm] += torch.outer(polynomials, polynomials)
        self.moments[arm] += excess * polynomials
        self.coefficients[arm] = torch.linalg.solve(self.grams[arm], self.moments[arm])


def _check_interval(bandit: Bandit, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"{type(bandit).__name__}: low={low}, high={high}; expected finite numbers, low < high"
        )


def _inside(bandit: Bandit, context: float | None, low: float, high: float) -> float:
    """The context on [-1, 1]."""
    if context is None or not math.isfinite(context):
        raise ValueError(
            f"{type(bandit).__name__}: context={context}; expected a finite number, in "
            f"[{low:g}, {high:g}] if it is to mean anything"
        )
    return min(max(2 * (context - low) / (high - low) - 1, -1.0), 1.0)
