"""Levenberg-Marquardt on what Gauss-Newton and Newton cannot do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from scipy import optimize
from torch.func import jacrev

import solvers
from hyperlearn.conditions import LeastSquares
from hyperlearn.inner import LevenbergMarquardt
from hyperlearn.solutions import argmin, least_squares, root
from tests.hyperlearn.inner.systems import (
    SYSTEMS,
    at,
    equation,
    powell_badly_scaled,
    powell_singular,
    rosenbrock,
    rosenbrock_residuals,
)
from tests.hyperlearn.problems import FLOAT64, sampled


@pytest.mark.parametrize("scale", ["identity", "diagonal"])
def test_a_step_is_the_formula(scale: Any) -> None:
    y0 = at(-1.2, 1.0)
    problem = equation(LeastSquares, rosenbrock_residuals, y0, None)
    method = LevenbergMarquardt(damping=0.1, scale=scale)
    state = method.begin(problem, y0[None])
    step, _ = method._step(problem, state)
    J, r = jacrev(rosenbrock_residuals)(y0), rosenbrock_residuals(y0)
    B = J.T @ J
    D = torch.diag(B.diagonal()) if scale == "diagonal" else torch.eye(2, dtype=FLOAT64)
    expected = -torch.linalg.solve(B + 0.1 * B.diagonal().max() * D, J.T @ r)
    torch.testing.assert_close(step[0], expected)


def test_rosenbrock_both_ways() -> None:
    # The condition number of the Hessian there is 2500.
    y = least_squares(rosenbrock_residuals, at(-1.2, 1.0), None)
    torch.testing.assert_close(y, at(1.0, 1.0), rtol=1e-7, atol=0)
    y = argmin(rosenbrock, at(-1.2, 1.0), None, method=LevenbergMarquardt())
    torch.testing.assert_close(y, at(1.0, 1.0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_classical_systems(name: str) -> None:
    F, y0 = SYSTEMS[name]
    method = LevenbergMarquardt(scale="diagonal", maxiter=2000)
    answer = root(F, y0, None, method=method, return_info=True)
    assert answer.info.converged, answer.info.reason


def test_powell_singular() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        y = least_squares(powell_singular, at(3, -1, 0, 1), None)
    assert float(powell_singular(y).norm()) < 1e-8


def test_badly_scaled_residuals_by_marquardt() -> None:
    method = LevenbergMarquardt(scale="diagonal", maxiter=1000)
    y = root(powell_badly_scaled, at(0, 1), None, method=method)
    torch.testing.assert_close(y, at(1.0981593e-5, 9.1061467), rtol=1e-6, atol=0)


def test_a_fit_with_a_residual_against_scipy_and_its_gradient_against_differences() -> None:
    t = torch.linspace(0, 2, 15, dtype=FLOAT64)
    data = 2 * torch.exp(-1.3 * t) + 0.3 * sampled(15, seed=5)

    def fit(y: Any, data: Any) -> Any:
        return y[0] * torch.exp(-y[1] * t) - data

    y = least_squares(fit, at(1.0, 1.0), data)
    reference = optimize.least_squares(
        lambda y: fit(torch.as_tensor(y), data).numpy(),
        [1.0, 1.0],
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-13,
    )
    torch.testing.assert_close(y, torch.as_tensor(reference.x), rtol=1e-6, atol=1e-8)
    J = jacrev(lambda d: least_squares(fit, at(1.0, 1.0), d))(data)
    for i in (0, 7, 14):
        e = torch.zeros(15, dtype=FLOAT64)
        e[i] = 1e-4
        up, down = (least_squares(fit, y, data + s * e) for s in (1, -1))
        torch.testing.assert_close(J[:, i], (up - down) / 2e-4, rtol=1e-5, atol=1e-7)


def test_more_unknowns_than_are_formed() -> None:
    n = 300
    x = sampled(n).abs() + 0.5

    def residuals(y: Any, x: Any) -> Any:
        return torch.cat([y**2 - x, 0.1 * (y[1:] - y[:-1])])

    y = least_squares(residuals, torch.ones(n, dtype=FLOAT64), x)
    slope = jacrev(lambda y: residuals(y, x).square().sum() / 2)(y)
    assert float(slope.norm()) < 1e-8


def test_an_underdetermined_fit_is_one_of_the_minimisers() -> None:
    a = sampled(2, 5, seed=7)
    b = sampled(2, seed=8)
    y = least_squares(lambda y, x: a @ y - b, torch.zeros(5, dtype=FLOAT64), None)
    torch.testing.assert_close(a @ y, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bad", [{"damping": -1.0}, {"scale": "columns"}])
def test_settings(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"LevenbergMarquardt: {name}="):
        LevenbergMarquardt(**bad)
    with pytest.raises(ValueError, match="scale='diagonal' with 300 unknowns"):
        least_squares(
            lambda y, x: y, torch.ones(300), None, method=LevenbergMarquardt(scale="diagonal")
        )
