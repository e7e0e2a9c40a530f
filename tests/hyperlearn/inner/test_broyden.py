"""Broyden's method: the secant equation, its matrix, and what it solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperlearn.conditions import Root
from hyperlearn.inner import Broyden
from hyperlearn.inner.broyden import _apply
from hyperlearn.solutions import root
from tests.hyperlearn.inner.systems import SYSTEMS, at, broyden_tridiagonal, equation
from tests.hyperlearn.problems import FLOAT64, sampled, spd


@pytest.mark.parametrize("update", ["good", "bad"])
def test_the_secant_equation_holds_after_every_step(update: Any) -> None:
    F, y0 = SYSTEMS["broyden tridiagonal"]
    problem = equation(Root, F, y0, None)
    method = Broyden(update=update)
    state = method.begin(problem, y0[None])
    for _ in range(6):
        new = method.advance(problem, state)
        s, c = new["y"] - state["y"], new["F"] - state["F"]
        got = _apply(new["scale"][:, None], new["u"], new["v"], c)
        torch.testing.assert_close(got, s, rtol=1e-9, atol=1e-12)
        state = new


def test_the_good_update_is_the_least_change_of_the_jacobian() -> None:
    """B+ = B + (c - B s) s^T / |s|^2, by the formula of Sherman and Morrison."""
    F, y0 = SYSTEMS["broyden tridiagonal"]
    problem = equation(Root, F, y0, None)
    method = Broyden(initial=0.3)
    state = method.begin(problem, y0[None])
    n = len(y0)
    E = torch.eye(n, dtype=FLOAT64)
    B = E / 0.3
    for _ in range(4):
        new = method.advance(problem, state)
        s, c = (new["y"] - state["y"])[0], (new["F"] - state["F"])[0]
        B = B + torch.outer(c - B @ s, s) / (s @ s)
        many = new["u"].expand(n, -1, -1), new["v"].expand(n, -1, -1)
        H = _apply(new["scale"][:, None], *many, E).T
        torch.testing.assert_close(H, torch.linalg.inv(B), rtol=1e-8, atol=1e-9)
        state = new


def test_the_first_scale_is_the_best_along_F() -> None:
    H, b = spd(4, 30.0), sampled(4, seed=1)
    problem = equation(Root, lambda y, x: H @ y - b, b, None)
    state = Broyden().begin(problem, b[None])
    F = H @ b - b
    image = H @ F
    torch.testing.assert_close(state["scale"][0], F @ image / (image @ image))
    for c in (1e-12, 1e12):
        scaled = equation(Root, lambda y, x, c=c: c * (H @ y - b), b, None)
        got = Broyden().begin(scaled, b[None])["scale"]
        torch.testing.assert_close(c * got, state["scale"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("update", ["good", "bad"])
def test_broyden_tridiagonal_of_many_sizes(update: Any) -> None:
    for n in (1, 10, 200):
        y = root(broyden_tridiagonal, -torch.ones(n).double(), None, method=Broyden(update=update))
        assert float(broyden_tridiagonal(y).abs().max()) < 1e-8


@pytest.mark.parametrize("name", ["brown almost linear", "broyden tridiagonal"])
def test_classical_systems(name: str) -> None:
    F, y0 = SYSTEMS[name]
    answer = root(F, y0, None, method=Broyden(), return_info=True)
    assert answer.info.converged, answer.info.reason
    assert answer.info.iterations < 60


def test_a_linear_system_ends_in_twice_its_size() -> None:
    # Gay (1979): 2 n steps at most, without a line search; here with one, nearly.
    A = torch.eye(6, dtype=FLOAT64) + 0.3 * sampled(6, 6, seed=3)
    b = sampled(6, seed=4)
    answer = root(
        lambda y, x: A @ y - b, torch.zeros(6).double(), None, method=Broyden(), return_info=True
    )
    torch.testing.assert_close(answer.y, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)
    assert answer.info.iterations <= 20


def test_a_full_memory_starts_afresh() -> None:
    y = root(broyden_tridiagonal, -torch.ones(30).double(), None, method=Broyden(memory=4))
    assert float(broyden_tridiagonal(y).abs().max()) < 1e-8


def test_a_wrong_sign_is_found_out() -> None:
    y = root(lambda y, x: 2 - y - 0.1 * y**3, at(1.0, 0.5), None, method=Broyden())
    assert float((2 - y - 0.1 * y**3).abs().max()) < 1e-8


@pytest.mark.parametrize("bad", [{"update": "ugly"}, {"memory": 0}, {"initial": 0.0}])
def test_settings(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"Broyden: {name}="):
        Broyden(**bad)
