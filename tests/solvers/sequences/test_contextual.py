"""Contextual learners against copies without contexts and numpy's Chebyshev regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.sequences.bandit import TsallisINF
from solvers.sequences.contextual import BinnedBandit, ChebyshevBandit

FLOAT64 = torch.float64


class TestBinnedBandit:
    def test_in_one_bin_it_is_the_learner_without_contexts(self):
        binned, plain = BinnedBandit(4, -1.0, 1.0, seed=5), TsallisINF(4, seed=5)
        for step in range(200):
            arm = plain.choose()
            assert binned.choose(0.01 * (step % 10)) == arm
            cost = 1.0 + (step * 7 % 13) * (arm + 1)
            plain.learn(cost)
            binned.learn(cost)
        assert torch.equal(binned.probabilities(0.0), plain.probabilities())
        assert torch.equal(binned.probabilities(-0.9), torch.full((4,), 0.25, dtype=FLOAT64))

    @pytest.mark.parametrize(
        ("context", "row"),
        [(2.0, 0), (2.99, 0), (3.01, 1), (4.5, 2), (6.999, 4), (7.0, 4), (1e9, 4), (-1e9, 0)],
    )
    def test_which_bin(self, context, row):
        bandit = BinnedBandit(2, 2.0, 7.0, bins=5)
        bandit.choose(context)
        bandit.learn(11.0)
        assert bandit.rounds.tolist() == [int(i == row) for i in range(5)]
        assert bandit.spent[row] == 10.0

    def test_bins_out_of_range(self):
        with pytest.raises(ValueError, match="bins=0; expected at least 1"):
            BinnedBandit(2, 0.0, 1.0, bins=0)


class TestChebyshevBandit:
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.integers(0, 1000), st.integers(0, 8), st.sampled_from([0.01, 0.1, 1.0]))
    def test_the_regression_is_ridge_regression(self, seed, degree, ridge):
        rng = np.random.default_rng(seed)
        bandit = ChebyshevBandit(3, -0.5, 2.5, degree=degree, ridge=ridge, least=1.0)
        rows: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: []}
        for _ in range(40):
            context = rng.uniform(-0.5, 2.5)
            arm, cost = bandit.choose(context), 1 + rng.exponential(20)
            bandit.learn(cost)
            rows[arm].append((2 * (context + 0.5) / 3 - 1, cost - 1))
        penalty = np.sqrt(ridge) * np.diag(np.maximum(1, np.arange(degree + 1)))
        for arm, seen in rows.items():
            points, excess = (np.array([pair[i] for pair in seen]) for i in (0, 1))
            design = np.vstack([np.polynomial.chebyshev.chebvander(points, degree), penalty])
            target = np.concatenate([excess, np.zeros(degree + 1)])
            expected = np.linalg.lstsq(design, target)[0]
            np.testing.assert_allclose(bandit.coefficients[arm], expected, rtol=1e-8, atol=1e-8)

    def test_the_draw_is_inverse_in_the_predicted_excess(self):
        bandit = ChebyshevBandit(4, 0.0, 1.0)
        for step in range(60):
            context = step * 0.618 % 1
            bandit.learn(10.0 + 5 * bandit.choose(context) + 3 * context)
        p, predicted = bandit.probabilities(0.3), bandit.predicted(0.3)
        gaps = predicted - predicted.min()
        best = int(gaps.argmin())
        error = math.sqrt(float(bandit.squares) / 60)
        others = torch.arange(4) != best
        expected = 1 / (4 + 2 * 60 * 2.0 * gaps[others] / error)
        assert torch.allclose(p[others], expected, rtol=1e-12)
        assert abs(float(p[best]) - 1 + float(expected.sum())) < 1e-12

    def test_a_prediction_where_it_has_data(self):
        bandit = ChebyshevBandit(1, 0.0, 2.0, ridge=1e-3)
        for step in range(500):
            context = 2 * (step * 0.618 % 1)
            bandit.choose(context)
            bandit.learn(20 + math.exp(context))
        assert float(bandit.predicted(0.7)) == pytest.approx(20 + math.exp(0.7), abs=0.01)

    def test_beyond_the_interval_is_its_end(self):
        bandit = ChebyshevBandit(2, 0.0, 1.0)
        for context in (0.1, 0.6, 0.9, 0.4):
            bandit.choose(context)
            bandit.learn(5 + 10 * context)
        assert torch.equal(bandit.predicted(1e6), bandit.predicted(1.0))
        assert torch.equal(bandit.predicted(-1e6), bandit.predicted(0.0))

    def test_the_best_arm_of_each_context_is_found(self):
        """Costs ``10 + 50 |omega - best(context)|``: a fixed arm pays three times the excess."""
        grid, rng = np.linspace(0, 1, 9), np.random.default_rng(0)
        costs = {"ChebyshevBandit": 0.0, "TsallisINF": 0.0}
        for learner in (ChebyshevBandit(9, 0.0, 1.0), TsallisINF(9)):
            for step in range(1500):
                context = rng.uniform()
                arm = learner.choose(context)
                cost = (
                    10 + 50 * abs(grid[arm] - 0.5 - math.sin(3 * context) / 2) + rng.exponential()
                )
                learner.learn(cost)
                if step >= 1000:
                    costs[type(learner).__name__] += (cost - 11) / 500
        assert costs["ChebyshevBandit"] < costs["TsallisINF"] / 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"degree": -1}, "degree=-1; expected at least 0"), ({"ridge": 0.0}, "ridge=0.0; expec")],
    )
    def test_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            ChebyshevBandit(2, 0.0, 1.0, **options)


@pytest.mark.parametrize("kind", [BinnedBandit, ChebyshevBandit])
class TestContexts:
    @pytest.mark.parametrize("context", [None, math.nan, math.inf])
    def test_there_must_be_one(self, kind, context):
        with pytest.raises(ValueError, match=rf"context={context}; expected a finite number, in"):
            kind(3, 0.0, 1.0).choose(context)

    @pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf)])
    def test_intervals(self, kind, interval):
        with pytest.raises(ValueError, match="expected finite numbers, low < high"):
            kind(3, *interval)
