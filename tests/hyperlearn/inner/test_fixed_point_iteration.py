"""The fixed-point iteration, and Anderson's against the theory of GMRES."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import solvers
from hyperlearn.inner import Anderson, FixedPointIteration, Newton
from hyperlearn.solutions import fixed_point
from tests.hyperlearn.problems import FLOAT64, contraction, sampled

T, B = contraction(6, 0.9, seed=1), sampled(6, seed=2)
ZERO = torch.zeros(6, dtype=FLOAT64)
EXACT = torch.linalg.solve(torch.eye(6, dtype=FLOAT64) - T, B)


def affine(y: Any, x: Any) -> Any:
    return T @ y + B


def first(method: Any, k: int) -> Any:
    import dataclasses
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        method = dataclasses.replace(method, maxiter=k, rtol=0.0)
        return fixed_point(affine, ZERO, None, method=method)


def test_iterates_are_the_powers() -> None:
    y = ZERO
    for k in range(5):
        torch.testing.assert_close(first(FixedPointIteration(), k), y, rtol=1e-13, atol=1e-14)
        y = T @ y + B
    damped = ZERO
    for _ in range(4):
        damped = 0.7 * damped + 0.3 * (T @ damped + B)
    torch.testing.assert_close(first(FixedPointIteration(step_size=0.3), 4), damped)


def test_the_error_falls_at_the_rate_of_the_contraction() -> None:
    errors = [float((first(FixedPointIteration(), k) - EXACT).norm()) for k in range(0, 30, 5)]
    for before, after in pairwise(errors):
        assert after <= 0.9**5 * before * (1 + 1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_anderson_on_a_linear_problem_is_gmres(beta: float) -> None:
    """Walker & Ni (2011), theorem 2.2: y_{k+1} is the fixed-point step from GMRES's iterate k."""
    A = torch.eye(6, dtype=FLOAT64) - T
    for k in range(1, 5):
        K = torch.stack([torch.linalg.matrix_power(A, j) @ B for j in range(k)], 1)
        gmres = K @ torch.linalg.lstsq(A @ K, B[:, None]).solution[:, 0]
        expected = gmres + beta * (B - A @ gmres)
        got = first(Anderson(memory=10, beta=beta, ridge=0.0), k + 1)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_anderson_solves_what_does_not_contract() -> None:
    expanding = lambda y, x: -3 * torch.tanh(y) + x  # noqa: E731
    x = torch.tensor([1.0, 0.3], dtype=FLOAT64)
    zero = torch.zeros(2, dtype=FLOAT64)
    for method in (Anderson(), Newton()):
        y = fixed_point(expanding, zero, x, method=method)
        torch.testing.assert_close(y, expanding(y, x), rtol=1e-8, atol=1e-9)
    with pytest.warns(solvers.ConvergenceWarning):
        fixed_point(expanding, zero, x, method=FixedPointIteration(maxiter=200))


def test_anderson_is_faster_and_as_right() -> None:
    plain = fixed_point(affine, ZERO, None, method=FixedPointIteration(), return_info=True)
    quick = fixed_point(affine, ZERO, None, method=Anderson(), return_info=True)
    for answer in (plain, quick):
        torch.testing.assert_close(answer.y, EXACT, rtol=1e-8, atol=1e-9)
    assert quick.info.iterations < plain.info.iterations


def test_a_diverging_iteration_says_so() -> None:
    with pytest.warns(solvers.ConvergenceWarning, match="diverged"):
        fixed_point(lambda y, x: 2 * y + 1, ZERO, None, method=FixedPointIteration())


@pytest.mark.parametrize("bad", [{"memory": 0}, {"ridge": -1.0}])
def test_settings(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"Anderson: {name}="):
        Anderson(**bad)
