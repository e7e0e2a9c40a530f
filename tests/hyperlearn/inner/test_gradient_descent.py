"""Gradient descent: its steps, rates, step sizes, and the proximal forms."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import solvers
from hyperlearn.conditions import Stationary
from hyperlearn.inner import GradientDescent
from hyperlearn.inner.gradient_descent import largest_curvature
from hyperlearn.projections import Box
from hyperlearn.proximal import L1
from hyperlearn.solutions import argmin
from tests.hyperlearn.inner.systems import equation
from tests.hyperlearn.problems import FLOAT64, sampled, spd

N = 5
ZERO = torch.zeros(N, dtype=FLOAT64)
BY = sampled(N, seed=2)


def quadratic(condition: float) -> Any:
    H = spd(N, condition, seed=1)
    return (lambda y, x: y @ H @ y / 2 - BY @ y), torch.linalg.solve(H, BY)


def test_the_rate_is_that_of_the_theory() -> None:
    """Plain: (1 - 1/kappa)^k; accelerated: about (1 - 1/sqrt(kappa))^(k/2) for |F|."""
    for kappa in (10.0, 100.0):
        loss, exact = quadratic(kappa)
        plain = argmin(loss, ZERO, None, method=GradientDescent(), return_info=True)
        torch.testing.assert_close(plain.y, exact, rtol=1e-7, atol=1e-8)
        # 3.7e-11 to be reached: 24 kappa steps, and a few for what the start has.
        assert plain.info.iterations <= 27 * kappa
    for kappa in (100.0, 1000.0):
        loss, exact = quadratic(kappa)
        fast = argmin(
            loss, ZERO, None, method=GradientDescent(acceleration="nesterov"), return_info=True
        )
        torch.testing.assert_close(fast.y, exact, rtol=1e-6, atol=1e-7)
        assert fast.info.iterations <= 60 * kappa**0.5
    method = GradientDescent(step_size=1e-3, acceleration="strongly-convex", strong_convexity=1.0)
    strong = argmin(loss, ZERO, None, method=method, return_info=True)
    torch.testing.assert_close(strong.y, exact, rtol=1e-6, atol=1e-7)
    assert strong.info.iterations <= 60 * 1000**0.5


def test_too_long_a_step_diverges_and_says_so() -> None:
    loss, _ = quadratic(10.0)
    with pytest.warns(solvers.ConvergenceWarning, match="diverged"):
        argmin(loss, ZERO, None, method=GradientDescent(step_size=1.0))


def test_the_largest_curvature() -> None:
    loss, _ = quadratic(50.0)
    got = largest_curvature(equation(Stationary, loss, ZERO, None), ZERO[None], steps=200)
    torch.testing.assert_close(got, torch.tensor([50.0], dtype=FLOAT64), rtol=1e-6, atol=0)
    flat = equation(Stationary, lambda y, x: (0 * y).sum(), ZERO, None)
    torch.testing.assert_close(largest_curvature(flat, ZERO[None]), torch.ones(1).double())


def test_the_step_is_searched_where_the_curvature_grows() -> None:
    """The Hessian at the start says little of that further on."""
    loss = lambda y, x: (y**4).sum() / 4 + 1e-3 * (y**2).sum() - (100 * x * y).sum()  # noqa: E731
    for acceleration in ("none", "nesterov"):
        answer = argmin(
            loss, ZERO, BY, method=GradientDescent(acceleration=acceleration), return_info=True
        )
        assert answer.info.converged, answer.info.reason
        y = answer.y
        torch.testing.assert_close(y**3 + 2e-3 * y, 100 * BY, rtol=1e-7, atol=1e-8)


def test_a_constant_in_the_loss_does_not_stop_it() -> None:
    loss, exact = quadratic(20.0)
    for shift in (1e3, -1e6):
        y = argmin(lambda y, x, c=shift: loss(y, x) + c, ZERO, None, method=GradientDescent())
        torch.testing.assert_close(y, exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("acceleration", ["none", "nesterov"])
def test_projected_and_proximal_steps(acceleration: Any) -> None:
    H = spd(N, 10.0, seed=1)
    loss = lambda y, x: y @ H @ y / 2 - 3 * BY @ y  # noqa: E731
    method = GradientDescent(acceleration=acceleration)
    y = argmin(loss, ZERO, None, constraint=Box(-0.5, 0.5), method=method)
    g = H @ y - 3 * BY
    free = (y > -0.5) & (y < 0.5)
    assert float(g[free].abs().max()) < 1e-8
    assert bool(((y == 0.5) <= (g <= 1e-9)).all())
    assert bool(((y == -0.5) <= (g >= -1e-9)).all())
    y = argmin(loss, ZERO, None, penalty=L1(0.8), method=method)
    g = H @ y - 3 * BY
    on = y != 0
    assert float((g + 0.8 * y.sign())[on].abs().max()) < 1e-8
    assert bool((g[~on].abs() <= 0.8).all())


def test_a_given_step_is_taken_exactly() -> None:
    loss, _ = quadratic(10.0)
    method = GradientDescent(step_size=0.05, maxiter=3, rtol=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        y = argmin(loss, ZERO, None, method=method)
    by_hand = ZERO
    for _ in range(3):
        by_hand = by_hand - 0.05 * torch.func.grad(loss)(by_hand, None)
    torch.testing.assert_close(y, by_hand, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "bad",
    [{"step_size": 0.0}, {"step_size": -1.0}, {"acceleration": "heavy-ball"},
     {"acceleration": "strongly-convex"}, {"strong_convexity": 1.0}],
)  # fmt: skip
def test_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="GradientDescent: "):
        GradientDescent(**bad)
