"""L-BFGS: its matrix against BFGS in full, its line search, and what it minimises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperlearn.conditions import Stationary
from hyperlearn.inner import LBFGS
from hyperlearn.inner.lbfgs import _two_loops
from hyperlearn.solutions import argmin
from tests.hyperlearn.inner.systems import at, equation, rosenbrock
from tests.hyperlearn.problems import FLOAT64, sampled, spd


def test_the_two_loops_are_the_product_formula() -> None:
    n, m = 6, 4
    H = spd(n, 30.0)
    s = sampled(m, n, seed=1)  # newest first
    c = s @ H
    matrix = (s[0] @ c[0]) / (c[0] @ c[0]) * torch.eye(n, dtype=FLOAT64)
    for i in reversed(range(m)):
        rho = 1 / (s[i] @ c[i])
        V = torch.eye(n, dtype=FLOAT64) - rho * torch.outer(c[i], s[i])
        matrix = V.T @ matrix @ V + rho * torch.outer(s[i], s[i])
    g = sampled(n, seed=2)
    torch.testing.assert_close(_two_loops(g[None], s[None], c[None])[0], matrix @ g)
    torch.testing.assert_close(matrix @ c[0], s[0])
    # Without pairs it is the identity.
    none = torch.zeros(1, m, n, dtype=FLOAT64)
    torch.testing.assert_close(_two_loops(g[None], none, none)[0], g)


def test_every_step_meets_the_conditions_of_wolfe() -> None:
    y0 = at(-1.2, 1.0)
    problem = equation(Stationary, rosenbrock, y0, None)
    method = LBFGS()
    state = method.begin(problem, y0[None])
    slope = torch.func.grad(rosenbrock)
    for _ in range(25):
        new = method.advance(problem, state)
        y, z = state["y"][0], new["y"][0]
        d = z - y
        assert float(rosenbrock(z)) <= float(rosenbrock(y) + 1e-4 * slope(y) @ d) + 1e-14
        assert float(slope(z) @ d) >= 0.9 * float(slope(y) @ d) - 1e-14
        state = new
    assert bool((state["s"][0, 0] @ state["c"][0, 0]) > 0)


def test_rosenbrock_in_many_dimensions() -> None:
    def chained(y: Any, x: Any) -> Any:
        return (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum()

    for n in (2, 30):
        answer = argmin(chained, torch.zeros(n).double(), None, method=LBFGS(), return_info=True)
        assert answer.info.converged, answer.info.reason
        torch.testing.assert_close(answer.y, torch.ones(n).double(), rtol=1e-7, atol=0)


def test_an_ill_conditioned_quadratic_converges_fast_to_the_end() -> None:
    """Where differences of the loss are rounding, the slope goes on."""
    for seed in range(4):
        H, b = spd(8, 1e4, seed), sampled(8, seed=seed + 1)
        answer = argmin(
            lambda y, x, H=H, b=b: y @ H @ y / 2 - b @ y,
            torch.zeros(8).double(), None, method=LBFGS(), return_info=True,
        )  # fmt: skip
        assert answer.info.converged, answer.info.reason
        assert answer.info.iterations < 120
        assert answer.info.evaluations < 2 * answer.info.iterations + 20


def test_it_is_the_default_of_many_unknowns() -> None:
    x = sampled(300)
    answer = argmin(
        lambda y, x: torch.cosh(y - x).sum(), torch.zeros(300).double(), x, return_info=True
    )
    assert answer.info.method.startswith("LBFGS")
    torch.testing.assert_close(answer.y, x, rtol=1e-8, atol=1e-9)


def test_a_loss_without_a_minimum_is_flagged() -> None:
    import solvers

    with pytest.warns(solvers.ConvergenceWarning):
        argmin(lambda y, x: y.sum(), torch.zeros(2).double(), None, method=LBFGS(maxiter=50))


@pytest.mark.parametrize("bad", [{"memory": 0}, {"c1": 0.6}, {"c2": 0.4}, {"c2": 1.0}])
def test_settings(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"LBFGS: {name}="):
        LBFGS(**bad)
