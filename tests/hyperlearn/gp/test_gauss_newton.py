"""`hyperlearn.gp.gauss_newton`: convergence, line search, damping, continuation, failure."""

from __future__ import annotations

import warnings

import pytest
import torch

import hyperlearn as hl
import operators as ops
from hyperlearn.experiments.references import eikonal, points
from solvers import ConvergenceWarning, NotConvergedError
from tests.hyperlearn.gp.problems import elliptic_pde, exact, generator

D = torch.float64
GRID = points.grid(15, points.UNIT_SQUARE)


def eikonal_pde(eps: float, interior: int = 200, boundary: int = 60) -> hl.PDE:
    g = generator()
    inside = points.uniform_interior(interior, points.UNIT_SQUARE, g)
    edge = points.uniform_boundary(boundary, points.UNIT_SQUARE, g)
    equation = hl.Equation(
        lambda grad_u, lap_u, params: grad_u @ grad_u - 1 - params["eps"] * lap_u, inside
    )
    boundary_condition = hl.Equation(lambda u: u, edge)
    return hl.PDE([equation, boundary_condition], params={"eps": torch.tensor(eps, dtype=D)})


def test_the_solution_is_found_and_converges_quickly() -> None:
    pde, _ = elliptic_pde(200, 80)
    u = hl.solve_pde(pde, ops.RBF(0.4))
    assert u.converged
    assert len(u.iterations) <= 5
    assert float((u.value(GRID) - exact(GRID)).abs().max()) < 1e-5


def test_the_minimum_norm_solution_satisfies_the_equations() -> None:
    pde, _ = elliptic_pde(60, 24)
    u = hl.solve_pde(pde, ops.RBF(0.4), method=hl.GaussNewton(rtol=1e-9))
    for values in pde.values(u.posterior.states(pde)):
        assert float(values.abs().max()) < 1e-4


def test_a_linear_problem_takes_two_solves() -> None:
    x = torch.linspace(0.05, 0.95, 19, dtype=D)[:, None]
    ends = torch.tensor([[0.0], [1.0]], dtype=D)
    pde = hl.PDE([
        hl.Equation(lambda x, lap_u: -lap_u - 1.0, x), hl.Equation(lambda u: u, ends)
    ])  # fmt: skip
    u = hl.solve_pde(pde, ops.RBF(0.4), nugget=1e-12)
    assert len(u.iterations) == 2
    torch.testing.assert_close(u.value(x), x[:, 0] * (1 - x[:, 0]) / 2, rtol=1e-4, atol=1e-6)


def test_the_start_does_not_move_the_solution() -> None:
    pde, _ = elliptic_pde()
    cold = hl.solve_pde(pde, ops.RBF(0.4))
    warm = hl.solve_pde(pde, ops.RBF(0.4), start={"u": exact})
    again = hl.solve_pde(pde, ops.RBF(0.4), start=cold)
    torch.testing.assert_close(warm.value(GRID), cold.value(GRID), rtol=0, atol=1e-5)
    assert len(again.iterations) == 1
    assert len(warm.iterations) < len(cold.iterations)


def test_eikonal_needs_the_line_search() -> None:
    u = hl.solve_pde(eikonal_pde(0.1), ops.RBF(0.2), nugget=1e-8)
    assert u.converged
    assert any(iteration.step < 1 for iteration in u.iterations)
    assert float((u.value(GRID) - eikonal.solution(GRID, eps=0.1)).square().mean().sqrt()) < 5e-3


def test_continuation_ends_at_the_parameter_itself() -> None:
    pde = eikonal_pde(0.1)
    direct = hl.solve_pde(pde, ops.RBF(0.2), nugget=1e-8)
    method = hl.GaussNewton(continuation={"eps": [0.4, 0.2]})
    stepwise = hl.solve_pde(pde, ops.RBF(0.2), nugget=1e-8, method=method)
    assert len(stepwise.iterations) > len(direct.iterations)
    torch.testing.assert_close(stepwise.value(GRID), direct.value(GRID), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("continuation", "message"),
    [({"nu": [1.0]}, "continuation in"), ({"eps": [0.2], "eps2": [1.0, 2.0]}, "continuation in")],
)
def test_continuation_in_what_is_no_parameter(continuation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hl.solve_pde(
            eikonal_pde(0.1), ops.RBF(0.2), method=hl.GaussNewton(continuation=continuation)
        )


def test_what_did_not_converge_says_so() -> None:
    pde = eikonal_pde(0.05)
    with pytest.warns(ConvergenceWarning, match="not converged after 2 linear solves"):
        u = hl.solve_pde(pde, ops.RBF(0.2), nugget=1e-8, method=hl.GaussNewton(maxiter=2))
    assert not u.converged
    with pytest.raises(NotConvergedError, match="Raise maxiter"):
        hl.solve_pde(pde, ops.RBF(0.2), nugget=1e-8, method=hl.GaussNewton(maxiter=2, strict=True))


def test_levenberg_marquardt_takes_over_where_halving_fails() -> None:
    # Without halving at all a first step that overshoots is refused, and damped instead.
    method = hl.GaussNewton(min_step=1.0)
    u = hl.solve_pde(eikonal_pde(0.1), ops.RBF(0.2), nugget=1e-8, method=method)
    assert any(iteration.step == 0 for iteration in u.iterations)
    assert float((u.value(GRID) - eikonal.solution(GRID, eps=0.1)).square().mean().sqrt()) < 5e-3


def test_divergence_is_told() -> None:
    x = torch.rand(20, 1, dtype=D, generator=generator())
    pde = hl.PDE([hl.Equation(lambda u: torch.exp(u**2) - 2, x)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FloatingPointError, match="not finite at 20 of 20 points"):
            hl.solve_pde(pde, ops.RBF(0.5), start={"u": lambda z: 100 + 0 * z[:, 0]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"maxiter": 0}, "maxiter=0"),
        ({"min_step": 0.0}, "min_step=0.0"),
        ({"rtol": -1.0}, "rtol=-1.0"),
        ({"damping": float("inf")}, "damping=inf"),
    ],
)
def test_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hl.GaussNewton(**settings)
