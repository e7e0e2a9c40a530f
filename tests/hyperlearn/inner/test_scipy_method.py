"""Scipy's methods: the same solutions, their own limits, their own words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import jacrev, vmap

import solvers
from hyperlearn.inner import SciPy
from hyperlearn.projections import Box
from hyperlearn.solutions import argmin, fixed_point, least_squares, root
from tests.hyperlearn.inner.systems import (
    SYSTEMS,
    at,
    broyden_tridiagonal,
    rosenbrock,
    rosenbrock_residuals,
)
from tests.hyperlearn.problems import FLOAT64, POINT, contraction, sampled


@pytest.mark.parametrize(
    "method", [None, "BFGS", "CG", "Newton-CG", "trust-ncg", "trust-exact", "L-BFGS-B"]
)
def test_minimisers(method: Any) -> None:
    rtol = 1e-6 if method in ("CG", "BFGS", "L-BFGS-B", None) else 1e-8
    y = argmin(rosenbrock, at(-1.2, 1.0), None, method=SciPy(method=method, rtol=rtol))
    # Times the condition number of the Hessian there, 2500.
    torch.testing.assert_close(y, at(1.0, 1.0), rtol=2500 * rtol, atol=0)


@pytest.mark.parametrize("method", [None, "hybr", "lm", "df-sane"])
def test_roots(method: Any) -> None:
    y0 = -torch.ones(8, dtype=FLOAT64)
    y = root(broyden_tridiagonal, y0, None, method=SciPy(method=method))
    assert float(broyden_tridiagonal(y).abs().max()) < 1e-6


@pytest.mark.parametrize("method", [None, "trf", "dogbox", "lm"])
def test_least_squares(method: Any) -> None:
    y = least_squares(rosenbrock_residuals, at(-1.2, 1.0), None, method=SciPy(method=method))
    torch.testing.assert_close(y, at(1.0, 1.0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["helical valley", "trigonometric", "broyden tridiagonal"])
def test_classical_systems_agree_with_newton(name: str) -> None:
    F, y0 = SYSTEMS[name]
    assert float(F(root(F, y0, None, method=SciPy())).abs().max()) < 1e-7


def test_fixed_points_gradients_and_batches() -> None:
    T = contraction(3, 0.7, seed=1)
    f = lambda x, **o: fixed_point(lambda y, x: torch.tanh(T @ y + x), torch.zeros_like(x), x, **o)  # noqa: E731
    g = lambda x: f(x, method=SciPy())  # noqa: E731
    torch.testing.assert_close(jacrev(g)(POINT), jacrev(f)(POINT), rtol=1e-6, atol=1e-7)
    X = sampled(3, 3)
    torch.testing.assert_close(vmap(g)(X), vmap(f)(X), rtol=1e-7, atol=1e-8)


def test_options_and_words_are_scipys() -> None:
    with pytest.warns(solvers.ConvergenceWarning, match=r"scipy: .*"):
        answer = argmin(
            rosenbrock, at(-1.2, 1.0), None,
            method=SciPy(method="BFGS", options={"gtol": 10.0}), return_info=True,
        )  # fmt: skip
    assert answer.info.status == "stagnated"
    with pytest.warns(solvers.ConvergenceWarning, match="maxiter"):
        argmin(rosenbrock, at(-1.2, 1.0), None, method=SciPy(method="BFGS", maxiter=3))


def test_constraints_are_refused() -> None:
    with pytest.raises(TypeError, match="SciPy"):
        argmin(rosenbrock, at(0.0, 0.0), None, constraint=Box(0.0, 1.0), method=SciPy())
