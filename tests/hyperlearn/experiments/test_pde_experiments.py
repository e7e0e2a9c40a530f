"""The experiments with PDEs, tiny: what a run records and stores, and that it can be resumed."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hyperlearn as hl
from hyperlearn.experiments import BUILT_IN
from hyperlearn.experiments.burgers import Burgers
from hyperlearn.experiments.experiment import BuiltIn, built_in_experiment
from hyperlearn.experiments.monge_ampere import MongeAmpere, convex_start
from hyperlearn.experiments.pde_experiment import (
    LengthNetwork,
    WarpNetwork,
    initial_and_walls,
    merged_errors,
    together,
)
from hyperlearn.experiments.references import burgers, points
from hyperlearn.experiments.schroedinger import periodic_kernel

pytestmark = pytest.mark.filterwarnings("ignore::solvers.ConvergenceWarning")

TINY = {"interior": 30, "boundary": 12, "validation": 16, "test_grid": 6}
# Settings of each experiment, and what its results hold beside errors and fields.
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "elliptic-a": (TINY, {"lengthscale", "merged_l2_error"}),
    "elliptic-b": (TINY, {"lengthscale", "variance", "merged_l2_error"}),
    "eikonal": (
        TINY | {"eps": 1.0, "merged_grid": 5},
        {"lengthscale", "merged_converged", "merged_reason"},
    ),
    "burgers": (
        TINY | {"start": "zero", "nu": 1.0},
        {"lengthscale_t", "lengthscale_x", "merged_converged", "merged_reason"},
    ),
    "schroedinger": (
        TINY,
        {"sigma_u_t", "sigma_u_x", "sigma_v_t", "sigma_v_x", "modulus_l2_error", "v_l2_error"},
    ),
    "gray-scott": (TINY, {"sigma_u_t", "sigma_u_x", "sigma_v_t", "sigma_v_x", "u_linf_error"}),
    "darcy": (
        TINY | {"observations": 8},
        {"lengthscale_u", "lengthscale_w", "log_a_rmse", "a_relative_l2_error"},
    ),
    "monge-ampere": (TINY, {"lengthscale"}),
    "sum-of-sines": ({"h": 0.2, "test_grid": 6}, {"lengthscale"}),
}
FIELDS = {"schroedinger": "uv", "gray-scott": "uv", "darcy": "uw"}


def tiny(name: str, **changes: Any) -> tuple[BuiltIn, Any]:
    made = built_in_experiment(name)
    return made, replace(made.task(0), **{**CASES[name][0], **changes})


def run_tiny(name: str, steps: int, **options: Any) -> hl.Run:
    """Two steps of learning to each of Gauss-Newton."""
    made, task = tiny(name)
    changes, budget = ["learning_steps=2"], hl.Budget(steps=steps)
    return made.run(task, "learn", changes, seed=0, budget=budget, every=1, **options)


@functools.cache
def whole(name: str) -> hl.Run:
    """One for all tests that only look."""
    return run_tiny(name, 3)


def test_every_experiment_with_a_pde_is_here():
    assert set(CASES) == set(BUILT_IN) - {"data-cleaning"}


@pytest.mark.parametrize("name", CASES)
def test_results(name: str):
    run = whole(name)
    assert run.status == "finished"
    assert run.config["problem"] == name
    names = {"l2_error", "linf_error"} | CASES[name][1]
    for field in FIELDS.get(name, "u"):
        names |= {field, f"{field}_reference", f"{field}_error"}
        found, exact, error = (run.result[field + end] for end in ("", "_reference", "_error"))
        assert found.is_grid
        assert torch.allclose(
            torch.as_tensor(found.values) - torch.as_tensor(exact.values),
            torch.as_tensor(error.values),
        )
    assert names <= set(run.result)
    for key in ("l2_error", "linf_error"):
        assert math.isclose(run.history[key][-1], run.result[key], rel_tol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_resumed_as_never_stopped(name: str, tmp_path: Path):
    """Without the problem: it is made anew from the settings in the file."""
    path = tmp_path / "run.h5"
    run_tiny(name, 1, record=path)
    resumed = hl.resume(path, budget=hl.Budget(steps=3))
    for key in ("outer_loss", "l2_error"):
        assert list(resumed.history[key]) == list(whole(name).history[key])
    stored = hl.load_run(path)
    assert CASES[name][1] <= set(stored.result)


@pytest.mark.parametrize("name", CASES)
def test_the_seed_decides_points_and_nothing_global_does(name: str):
    made, task = tiny(name)
    torch.manual_seed(1)
    first = made.problem(task)
    torch.manual_seed(2)
    second = made.problem(task)
    for one, other in zip(first.pde.equations, second.pde.equations, strict=True):
        assert torch.equal(one.points, other.points)
    for field, kernel in first.x0.items():
        for key, value in kernel.items():
            assert torch.equal(value, second.x0[field][key])
    if name != "sum-of-sines":
        moved = made.problem(replace(task, points_seed=1))
        assert not torch.equal(moved.pde.equations[0].points, first.pde.equations[0].points)


class TestFields:
    def test_lengths_of_warped_kernels_are_fields(self):
        """``l / |det D phi|^(1/2)``, by differences."""
        found = whole("eikonal").result["lengthscale"]
        made, task = tiny("eikonal")
        kernel = made.problem(task).kernels_at(whole("eikonal").x)["u"]
        x = torch.stack([torch.as_tensor(found.coordinates[axis])[3] for axis in "xy"])
        moved = [kernel.warp((x + s * e)[None])[0] for e in torch.eye(2) for s in (1e-5, -1e-5)]
        slopes = torch.stack([(moved[0] - moved[1]) / 2e-5, (moved[2] - moved[3]) / 2e-5])
        expected = kernel.kernel.lengthscale / torch.linalg.det(slopes).abs().sqrt()
        assert found.values.shape == (6, 6)
        assert float(found.values[3, 3]) == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize("kernel", ["gibbs", "matern", "fixed"])
    @pytest.mark.parametrize("objective", ["likelihood", "validation"])
    def test_other_kernels_of_the_eikonal_equation(self, kernel: str, objective: str):
        made, task = tiny("eikonal", kernel=kernel, objective=objective)
        run = made.run(task, "learn", ["learning_steps=1"], seed=0, budget=hl.Budget(steps=1))
        if kernel == "gibbs":
            assert run.result["lengthscale"].values.shape == (6, 6)
        else:
            assert run.result["lengthscale"] == run.history["lengthscale"][-1] != 0.3

    def test_lengths_of_gibbs_kernels_are_fields(self):
        found = whole("burgers").result
        assert list(found["lengthscale_t"].coordinates) == ["t", "x"]
        assert float(torch.as_tensor(found["lengthscale_x"].values).min()) > 0

    def test_parameters_are_in_the_history(self):
        run = whole("gray-scott")
        assert run.history["sigma_v_x"][0] == pytest.approx(1.0)
        assert run.history["sigma_v_x"][-1] == pytest.approx(run.result["sigma_v_x"])
        assert run.history["sigma_v_x"][-1] != run.history["sigma_v_x"][0]

    def test_darcy_knows_how_little_it_knows(self):
        deviation = whole("darcy").result["w_standard_deviation"].values
        assert 0 < float(torch.as_tensor(deviation).max()) <= 1


class TestNetwork:
    @pytest.mark.parametrize(("outputs", "count"), [(1, 2751), (2, 2802)])
    def test_size(self, outputs: int, count: int):
        network = LengthNetwork(outputs, 3.0, seed=0)
        assert sum(p.numel() for p in network.parameters()) == count

    def test_a_warp_is_near_the_identity(self):
        warp, x = WarpNetwork(seed=0), points.grid(5, points.UNIT_SQUARE)
        assert sum(p.numel() for p in warp.parameters()) == 2802
        assert 0 < float((warp(x) - x).detach().abs().max()) < 0.3
        assert not torch.equal(warp(x), WarpNetwork(seed=1)(x))

    def test_seed(self):
        x = torch.rand(5, 2, dtype=torch.float64)
        state = torch.random.get_rng_state()
        first, again = LengthNetwork(1, 3.0, seed=0)(x), LengthNetwork(1, 3.0, seed=0)(x)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(first, again)
        assert not torch.equal(first, LengthNetwork(1, 3.0, seed=1)(x))
        assert (first > 0).all()


class TestPoints:
    @pytest.mark.parametrize(("n", "first"), [(300, 100), (400, 133), (12, 4)])
    def test_initial_and_walls(self, n: int, first: int):
        start, walls = initial_and_walls(n, burgers.BOX, torch.Generator().manual_seed(0))
        assert (len(start), len(walls)) == (first, n - first)
        assert (start[:, 0] == 0).all()
        assert (walls[:, 1].abs() == 1).all()
        assert abs(int(walls[:, 1].sum())) <= 1

    def test_together(self):
        x = torch.rand(3, 1, dtype=torch.float64)
        one = hl.Equation(lambda u, data: u - data, x, x[:, 0])
        both = together(one, one.at(x[:2] + 1, x[:2, 0] + 1))
        assert torch.equal(both.points[:, 0], both.data)
        assert len(both.points) == 5


def test_periodic_kernel():
    """``exp(-(dt / s_t)^2 - 2 sin^2(pi dx / 10) / s_x^2)``, of two parameters."""
    kernel = periodic_kernel(0.3, 0.7)
    assert [value.numel() for value in kernel.parameters.values()] == [2]
    x = torch.rand(6, 2, dtype=torch.float64) * torch.tensor([1.0, 10.0])
    dt, dx = (x[:, None] - x).unbind(-1)
    expected = torch.exp(-((dt / 0.3) ** 2) - 2 * torch.sin(math.pi * dx / 10) ** 2 / 0.7**2)
    torch.testing.assert_close(kernel(x), expected)
    torch.testing.assert_close(kernel(x, x + torch.tensor([0.0, 10.0])), expected)


def test_monge_ampere_starts_convex():
    made = MongeAmpere()
    problem = made.problem(replace(made.task(0), **TINY | {"interior": 120, "boundary": 60}))
    start = convex_start(problem.pde, problem.kernels["u"], 1e-10)
    middle = points.grid(4, ((0.2, 0.8), (0.2, 0.8)))
    assert (torch.linalg.eigvalsh(start.hessian(middle)) > 0).all()


def test_burgers_merged_points_say_how_it_went():
    """Gauss-Newton that gets nowhere is a result, not the end of a run that took hours."""
    made = Burgers()
    task = replace(made.task(0), **TINY | {"start": "zero"})
    problem = made.problem(task)
    held = problem.objective.validation[0]
    posterior = problem.posterior(problem.y0, problem.x0)
    grid = points.grid(5, burgers.BOX)
    exact = {"u": burgers.solution(grid)}
    found = merged_errors(problem.pde, held, posterior, grid, exact, nugget=1e-8)
    assert isinstance(found["merged_converged"], bool)
    assert found["merged_reason"]
    # No nugget makes this Gram matrix positive definite in floating point.
    bad = problem.pde.equations[0]
    twice = merged_errors(problem.pde, bad, posterior, grid, exact, nugget=1e-300)
    assert twice["merged_converged"] is False


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("darcy", {"observations": 31}),
        ("darcy", {"noise": 0.0}),
        ("sum-of-sines", {"h": 0.3}),
        ("sum-of-sines", {"nugget": 0.0}),
        ("gray-scott", {"interior": 0}),
    ],
)
def test_settings_that_make_no_sense(name: str, changes: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny(name, **changes)
