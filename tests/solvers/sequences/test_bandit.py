"""`TsallisINF` against the optimality conditions, exact expectations, and the traps on record."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from solvers.sequences.bandit import Bandit, TsallisINF, tsallis_probabilities
from solvers.sequences.contextual import BinnedBandit, ChebyshevBandit

FLOAT64 = torch.float64
LEARNERS: dict[str, Callable[..., Bandit]] = {
    "TsallisINF": TsallisINF,
    "BinnedBandit": lambda arms, **options: BinnedBandit(arms, 0.0, 1.0, **options),
    "ChebyshevBandit": lambda arms, **options: ChebyshevBandit(arms, 0.0, 1.0, **options),
}
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS.keys())


def heavy_tailed(rounds: int, arms: int, seed: int, exponent: float) -> Tensor:
    """Pareto costs: ``P(cost > c) = c^-exponent``, without a mean for an exponent below 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rounds, arms, generator=generator, dtype=FLOAT64) ** (-1 / exponent)


def play(bandit: Bandit, costs: Tensor, contexts: Tensor | None = None) -> list[int]:
    """The arms chosen in a round for each row of costs."""
    chosen = []
    for i, row in enumerate(costs.tolist()):
        chosen.append(bandit.choose(None if contexts is None else float(contexts[i])))
        bandit.learn(row[chosen[-1]])
    return chosen


def even(rounds: int) -> Tensor:
    """Contexts all over [0, 1], the same ones whenever asked."""
    return torch.arange(rounds, dtype=FLOAT64) * 0.618 % 1


class TestTsallisProbabilities:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=30),
        st.floats(1e-4, 2.0),
    )
    @example([0.0] * 20, 2.0)
    @example([0.0, 1e-300], 1e-4)
    @example([1e12, 0.0], 2.0)
    def test_are_the_minimiser(self, totals, rate):
        """``1 / sqrt(p_i) - 1 / sqrt(p_j) = eta (K_i - K_j) / 2``, from the Lagrangian."""
        K = torch.tensor(totals, dtype=FLOAT64)
        p = tsallis_probabilities(K, rate)
        assert torch.isfinite(p).all()
        assert (p > 0).all()
        assert abs(float(p.sum()) - 1) <= 1e-14
        roots = p.rsqrt()
        best = int(K.argmin())
        expected = rate * (K - K[best]) / 2
        assert torch.allclose(roots - roots[best], expected, rtol=1e-12, atol=1e-12)

    def test_newton_from_above_steps_beyond_the_pole(self):
        """Started at z = -1 whatever the totals, as published code does, it finds no probabilities.

        With 1,500 rounds behind it the least total is far above, and the sum below 1.
        """
        K, rate = torch.linspace(300, 600, 20, dtype=FLOAT64), 2 / math.sqrt(1500)
        z = -1.0
        for _ in range(20):
            p = 4 * (rate * (K - z)) ** -2
            z = z - float((p.sum() - 1) / (rate * p.pow(1.5).sum()))
        assert not abs(float(p.sum()) - 1) < 0.01
        assert abs(float(tsallis_probabilities(K, rate).sum()) - 1) <= 1e-14


@every_learner
class TestEveryLearner:
    @pytest.mark.parametrize("exponent", [0.3, 1.1])
    def test_probabilities_are_probabilities_under_heavy_tails(self, make, exponent):
        @settings(max_examples=1, deadline=None, derandomize=True)
        @given(st.integers(0, 2**32 - 1))
        def check(seed):
            bandit, costs = make(20, seed=seed % 1000), heavy_tailed(1500, 20, seed, exponent)
            for context, row in zip(even(1500).tolist(), costs.tolist(), strict=True):
                p = bandit.probabilities(context)
                assert torch.isfinite(p).all()
                assert (p >= 0).all()
                assert abs(float(p.sum()) - 1) <= 1e-12
                bandit.learn(row[bandit.choose(context)])

        check()

    def test_draws_follow_the_probabilities(self, make):
        bandit = make(4, seed=3)
        play(bandit, heavy_tailed(30, 4, 0, 2.0), even(30))
        p, draws = bandit.probabilities(0.4), 2000
        counts = torch.zeros(4, dtype=FLOAT64)
        for _ in range(draws):
            counts[bandit.choose(0.4)] += 1
        # Nothing was learned of draws alone; 3 degrees of freedom: 16.3 is passed once in 1,000.
        assert torch.equal(bandit.probabilities(0.4), p)
        assert float(((counts - draws * p) ** 2 / (draws * p)).sum()) < 16.3

    def test_finds_the_cheapest_arm(self, make):
        costs = heavy_tailed(2000, 5, 1, 3.0) * torch.tensor([5.0, 4.0, 1.0, 3.0, 8.0])
        chosen = play(make(5), costs, even(2000))
        assert chosen[-300:].count(2) > 240

    def test_one_seed_one_sequence(self, make):
        costs = heavy_tailed(100, 5, 0, 1.5)
        first, again, other = (play(make(5, seed=s), costs, even(100)) for s in (1, 1, 2))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("between", [False, True])
    def test_goes_on_from_a_file_bit_for_bit(self, make, between):
        """Between a choice and its cost, too."""
        costs, contexts = heavy_tailed(200, 6, 5, 1.2), even(200)
        bandit, copy = make(6, seed=1), make(6, seed=99)
        play(bandit, costs[:100], contexts[:100])
        arm = bandit.choose(0.3) if between else -1
        file = io.BytesIO()
        torch.save(bandit.state_dict(), file)
        file.seek(0)
        copy.load_state_dict(torch.load(file, weights_only=True))
        if between:
            bandit.learn(float(costs[100, arm]))
            copy.learn(float(costs[100, arm]))
        rest = play(bandit, costs[100:], contexts[100:])
        assert play(copy, costs[100:], contexts[100:]) == rest
        mine, theirs = bandit.state_dict(), copy.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    def test_the_state_is_a_copy(self, make):
        bandit = make(3)
        state = bandit.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        play(bandit, heavy_tailed(10, 3, 0, 1.0), even(10))
        assert all(torch.equal(state[name], before[name]) for name in state)

    def test_states_that_do_not_fit(self, make):
        with pytest.raises(ValueError, match=r"state .*; expected"):
            make(4).load_state_dict(make(5).state_dict())
        with pytest.raises(ValueError, match=r"state \{\}; expected"):
            make(4).load_state_dict({})

    def test_the_least_cost_forever(self, make):
        """Nothing to divide by, and nothing to tell the arms apart."""
        bandit = make(4, least=1.0)
        play(bandit, torch.ones(50, 4, dtype=FLOAT64), even(50))
        assert torch.allclose(bandit.probabilities(0.5), torch.full((4,), 0.25, dtype=FLOAT64))

    def test_the_unit_of_the_costs_does_not_matter(self, make):
        """A power of two is exact, so the choices are the same to the last bit."""
        costs = heavy_tailed(200, 5, 7, 1.5)
        chosen = play(make(5, least=0.0), costs, even(200))
        assert play(make(5, least=0.0), 2.0**20 * costs, even(200)) == chosen

    def test_one_arm(self, make):
        assert play(make(1), heavy_tailed(5, 1, 0, 1.0), even(5)) == [0] * 5

    @pytest.mark.parametrize("cost", [0.5, -1.0, math.nan, math.inf])
    def test_costs_out_of_range(self, make, cost):
        bandit = make(3)
        bandit.choose(0.5)
        with pytest.raises(ValueError, match=r"cost=.*; expected a finite number >= least=1"):
            bandit.learn(cost)
        bandit.learn(2.0)  # the choice still stands
        with pytest.raises(RuntimeError, match=r"a cost without a choice; choose\(\) first"):
            bandit.learn(2.0)

    def test_settings_out_of_range(self, make):
        with pytest.raises(ValueError, match="arms=0; expected at least 1"):
            make(0)
        with pytest.raises(ValueError, match="least=nan; expected a finite number"):
            make(2, least=math.nan)


def test_the_estimated_totals_are_right_in_the_mean():
    """The probability that was drawn with divides: averaged over the draw nothing is left over."""
    costs = torch.tensor([3.0, 40.0, 7.0, 500.0], dtype=FLOAT64)
    bandit = TsallisINF(4, least=1.0)
    play(bandit, heavy_tailed(20, 4, 0, 1.0))
    p, before, state = bandit.probabilities(), bandit.totals.clone(), bandit.state_dict()
    mean = torch.zeros(4, dtype=FLOAT64)
    for arm in range(4):
        bandit.load_state_dict(state)
        while bandit.choose() != arm:
            pass
        bandit.learn(float(costs[arm]))
        mean += p[arm] * (bandit.totals - before)[0]
    assert torch.allclose(mean, costs - 1, rtol=1e-12)


def relaxation(rounds: int, seed: int) -> Tensor:
    """Iterations of SOR to 1e-8 on a shifted Laplacian of a 10 x 10 grid, ``(rounds, 20)``.

    By the asymptotic rate of Young (1971). The shift is ``-0.15 + 0.6 Beta(2, 6)``, as in the
    low-variance stream of arXiv:2310.02246; the relaxation factors are 1, 1.05, ..., 1.95.
    """
    generator = torch.Generator().manual_seed(seed)
    # A Beta(2, 6) number is the second smallest of seven uniform ones.
    uniform = torch.rand(rounds, 7, generator=generator, dtype=FLOAT64)
    shift = (-0.15 + 0.6 * uniform.sort(dim=1).values[:, 1])[:, None]
    omega = torch.linspace(1, 1.95, 20, dtype=FLOAT64)
    jacobi = 4 * math.cos(math.pi / 11) / (4 + shift)
    real = (omega * jacobi) ** 2 - 4 * (omega - 1)
    rate = torch.where(real > 0, (omega * jacobi + real.clamp_min(0).sqrt()) ** 2 / 4, omega - 1)
    return torch.ceil(math.log(1e-8) / rate.log())


def test_relaxation_factors_are_learned_from_iteration_counts():
    costs = relaxation(5000, 0)
    chosen = torch.tensor(play(TsallisINF(20), costs))
    paid = costs.gather(1, chosen[:, None])[:, 0]
    best = costs[-300:].mean(0).min()
    assert paid[-300:].mean() < 1.1 * best
    assert paid[:300].mean() > 1.3 * best
