"""Newton's method: order of convergence, line search, saddle points, linear solvers."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

import operators as ops
import solvers
from hyperlearn.conditions import Root, Stationary
from hyperlearn.inner import Newton
from hyperlearn.solutions import argmin, root
from tests.hyperlearn.inner.systems import (
    SYSTEMS,
    at,
    broyden_tridiagonal,
    equation,
    powell_singular,
    rosenbrock,
)
from tests.hyperlearn.problems import FLOAT64, sampled, spd


def test_a_step_is_the_formula() -> None:
    F = lambda y, x: torch.stack([y[0] ** 2 + y[1], y[0] * y[1] - x])  # noqa: E731
    x, y = torch.tensor(2.0, dtype=FLOAT64), at(1.0, 3.0)
    problem = equation(Root, F, y, x)
    method = Newton(line_search=False)
    stepped = method.advance(problem, method.begin(problem, y[None]))["y"][0]
    A = torch.tensor([[2.0, 1.0], [3.0, 1.0]], dtype=FLOAT64)
    torch.testing.assert_close(stepped, y - torch.linalg.solve(A, F(y, x)))


def test_convergence_is_quadratic() -> None:
    info = root(lambda y, x: y**2 - x, at(1.5), at(2.0), return_info=True).info
    r = info.history
    # r_{k+1} / r_k^2 is bounded; and the last step from 1e-6 or so is the last.
    ratios = [b / a**2 for a, b in pairwise(r) if a > 1e-7]
    assert max(ratios) < 10 * ratios[0]
    assert info.iterations <= 5


@pytest.mark.parametrize("name", SYSTEMS)
def test_classical_systems(name: str) -> None:
    F, y0 = SYSTEMS[name]
    answer = root(F, y0, None, return_info=True)
    assert answer.info.converged
    size = float((jacrev(F)(answer.y) @ answer.y).norm()) + float(F(y0).norm()) * 1e-8
    assert float(F(answer.y).norm()) <= 1e-9 * max(size, 1e-3)
    if name == "powell badly scaled":
        torch.testing.assert_close(answer.y, at(1.0981593e-5, 9.1061467), rtol=1e-6, atol=0)


def test_the_line_search_saves_what_pure_newton_loses() -> None:
    F = lambda y, x: torch.atan(y)  # noqa: E731
    y = root(F, at(3.0), None)
    torch.testing.assert_close(y, at(0.0), rtol=0, atol=1e-8)
    with pytest.warns(solvers.ConvergenceWarning):
        root(F, at(3.0), None, method=Newton(line_search=False))


def test_a_singular_root_is_reached_slowly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        y = root(powell_singular, at(3, -1, 0, 1), None)
    assert float(y.norm()) < 1e-4


def test_rosenbrock() -> None:
    answer = argmin(rosenbrock, at(-1.2, 1.0), None, return_info=True)
    torch.testing.assert_close(answer.y, at(1.0, 1.0), rtol=1e-9, atol=0)
    assert answer.info.iterations < 40


def test_it_goes_downhill_from_a_saddle_and_not_to_it() -> None:
    # f = (y0^2 - 1)^2 + y1^2: a saddle at 0, minima at (+-1, 0).
    f = lambda y, x: (y[0] ** 2 - 1) ** 2 + y[1] ** 2  # noqa: E731
    y = argmin(f, at(0.1, 0.5), None)
    torch.testing.assert_close(y, at(1.0, 0.0), rtol=1e-9, atol=1e-8)
    problem = equation(Stationary, f, at(0.1, 0.5), None)
    state = Newton().begin(problem, at(0.1, 0.5)[None])
    after = Newton().advance(problem, state)
    assert float(f(after["y"][0], None)) < float(f(at(0.1, 0.5), None))


def test_quadratics_take_one_step() -> None:
    H, b = spd(30, 1e6, seed=1), sampled(30, seed=2)
    answer = argmin(
        lambda y, x: y @ H @ y / 2 - b @ y, torch.zeros(30).double(), None, return_info=True
    )
    assert answer.info.iterations <= 2
    torch.testing.assert_close(answer.y, torch.linalg.solve(H, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("by", [None, solvers.GMRES(rtol=1e-10), solvers.DenseLU()])
def test_any_linear_solver_leads_to_the_same_root(n: int, by: Any) -> None:
    y0 = -torch.ones(n, dtype=FLOAT64)
    y = root(broyden_tridiagonal, y0, None, linear_solver=by)
    assert float(broyden_tridiagonal(y).abs().max()) < 1e-9


def test_a_sparse_jacobian_keeps_its_analysis() -> None:
    n = 400
    i = torch.arange(n)
    pattern = ops.Pattern.of(torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]]), (n, n))[
        0
    ]
    y = root(
        broyden_tridiagonal,
        -torch.ones(n, dtype=FLOAT64),
        None,
        linear_solver=solvers.SparseLU(),
        operator=lambda y, x: ops.SparseJacobian(broyden_tridiagonal, y, sparsity=pattern),
    )
    assert float(broyden_tridiagonal(y).abs().max()) < 1e-9


def test_conjugate_gradients_for_a_large_loss() -> None:
    n = 300
    d = torch.linspace(1, 50, n, dtype=FLOAT64)
    x = sampled(n)
    loss = lambda y, x: (d * y**2 / 2 + torch.cosh(y) - x * y).sum()  # noqa: E731
    y = argmin(
        loss, torch.zeros(n).double(), x, method=Newton(), linear_solver=solvers.CG(rtol=1e-10)
    )
    assert float((d * y + torch.sinh(y) - x).abs().max()) < 1e-8


def test_an_exactly_singular_jacobian_is_no_crash() -> None:
    F = lambda y, x: torch.stack([y.sum() - 1, y.sum() - 1])  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        answer = root(F, at(3.0, 2.0), None, return_info=True)
    assert answer.info.converged == (float(F(answer.y, None).abs().max()) < 1e-9)


@pytest.mark.parametrize("bad", [{"decrease": 0.0}, {"decrease": 0.5}])
def test_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Newton: decrease="):
        Newton(**bad)


def test_the_rounding_of_a_loss_is_no_obstacle() -> None:
    """A constant of 1e8 hides what is gained below 1e-8."""
    x = sampled(5, seed=3)
    loss = lambda y, x: torch.cosh(y - x).sum() + 1e8  # noqa: E731
    answer = argmin(loss, torch.zeros(5).double(), x, return_info=True)
    assert answer.info.converged, answer.info.reason
    error: Tensor = (answer.y - x).abs().max()
    assert float(error) < 1e-9
