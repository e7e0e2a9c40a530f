"""The outer loop: where each method ends, what it counts, and how a run can end."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hyperlearn as hl
from solvers import CG, ConvergenceWarning, DenseCholesky, Neumann

FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


class Quadratic:
    """``G = y'Ay/2 - y'Bx``, ``g = |y - t|^2/2 + gamma |x - s|^2/2``: all optima in closed form."""

    def __init__(self, p: int = 3, d: int = 4) -> None:
        basis = torch.linalg.qr(sampled(d, d))[0]
        A = basis @ torch.diag(torch.linspace(1.0, 3.0, d, dtype=FLOAT64)) @ basis.T
        self.A, self.B = (A + A.T) / 2, sampled(d, p, seed=1)
        self.t, self.s, self.gamma = sampled(d, seed=2), sampled(p, seed=3), 1.5
        self.p, self.d = p, d

    def problem(self, **options: Any) -> hl.BilevelProblem:
        return hl.BilevelProblem(
            lambda y, x: 0.5 * y @ self.A @ y - y @ self.B @ x,
            lambda y, x: (
                0.5 * ((y - self.t) ** 2).sum() + 0.5 * self.gamma * ((x - self.s) ** 2).sum()
            ),
            x0=torch.zeros(self.p, dtype=FLOAT64),
            y0=torch.zeros(self.d, dtype=FLOAT64),
            **options,
        )

    def fixed_point(self, inverse: Tensor) -> Tensor:
        """x where ``a - C q = 0`` at y*(x), for ``q = inverse b``; C = -B'."""
        pulled = self.B.T @ inverse
        system = self.gamma * torch.eye(self.p, dtype=FLOAT64)
        system = system + pulled @ torch.linalg.solve(self.A, self.B)
        return torch.linalg.solve(system, self.gamma * self.s + pulled @ self.t)

    def minimum(self) -> Tensor:
        """Least squares in ``(A^-1 B x - t, sqrt(gamma) (x - s))``, without any hypergradient."""
        M = torch.linalg.solve(self.A, self.B)
        root = math.sqrt(self.gamma) * torch.eye(self.p, dtype=FLOAT64)
        rows, target = torch.cat([M, root]), torch.cat([self.t, root @ self.s])
        return torch.linalg.lstsq(rows, target[:, None]).solution[:, 0]

    def series(self, alpha: float, terms: int) -> Tensor:
        contraction = torch.eye(self.d, dtype=FLOAT64) - alpha * self.A
        return alpha * sum(torch.linalg.matrix_power(contraction, j) for j in range(terms))


QUADRATIC = Quadratic()
SHARED = {"step_size": 0.15, "inner_steps": 8, "inner_step_size": 0.5}
EYE = torch.eye(4, dtype=FLOAT64)


def truncated(solver: type, maxiter: int, **settings: Any) -> Any:
    return solver(maxiter=maxiter, stop_at_maxiter=True, rtol=0.0, **settings)


# What stands for A^-1 once y is stationary.
ENDS = {
    "cg": (hl.ImplicitDifferentiation(solver=CG(rtol=1e-12), **SHARED), torch.inverse(QUADRATIC.A)),
    "cholesky": (
        hl.ImplicitDifferentiation(solver=DenseCholesky(), **SHARED),
        torch.inverse(QUADRATIC.A),
    ),
    "neumann": (
        hl.ImplicitDifferentiation(solver=Neumann(step_size=0.5, rtol=1e-12, maxiter=99), **SHARED),
        torch.inverse(QUADRATIC.A),
    ),
    "neumann 2": (
        hl.ImplicitDifferentiation(solver=truncated(Neumann, 2, step_size=0.3), **SHARED),
        QUADRATIC.series(0.3, 3),
    ),
    "damped": (
        hl.ImplicitDifferentiation(solver=CG(rtol=1e-12), damping=0.5, **SHARED),
        torch.inverse(QUADRATIC.A + 0.5 * EYE),
    ),
    "identity": (hl.IdentityHessian(curvature=2.0, **SHARED), EYE / 2.0),
    "unrolled 8": (hl.Unrolled(**SHARED), QUADRATIC.series(0.5, 8)),
    "unrolled 2": (hl.Unrolled(unroll_steps=2, **SHARED), QUADRATIC.series(0.5, 2)),
    # Full gradients vanish at y*, and with them the Fisher matrix: damping is left.
    "nhgd": (hl.NHGD(damping=1.7, **SHARED), EYE / 1.7),
}


class TestWhereMethodsEnd:
    @pytest.mark.parametrize("name", ENDS)
    def test_fixed_point(self, name):
        method, inverse = ENDS[name]
        run = hl.minimize(QUADRATIC.problem(), method, budget=hl.Budget(steps=120), every=40)
        x = QUADRATIC.fixed_point(inverse)
        torch.testing.assert_close(run.x, x, rtol=1e-8, atol=1e-8)
        y = torch.linalg.solve(QUADRATIC.A, QUADRATIC.B @ x)
        torch.testing.assert_close(run.y, y, rtol=1e-8, atol=1e-8)
        assert run.history["hypergradient_norm"][-1] < 1e-7
        distance = float((run.x - QUADRATIC.minimum()).norm())
        if name in ("cg", "cholesky", "neumann"):
            assert distance < 1e-8
        elif name != "unrolled 8":  # its bias is 0.5^8
            assert distance > 1e-2

    def test_fixed_outer(self):
        method = hl.FixedOuter(inner_steps=20, inner_step_size=0.5)
        run = hl.minimize(QUADRATIC.problem(), method, budget=hl.Budget(steps=3))
        assert torch.equal(run.x, torch.zeros(3, dtype=FLOAT64))
        torch.testing.assert_close(run.y, torch.zeros(4, dtype=FLOAT64))

    def test_first_steps_with_momentum_by_hand(self):
        method = hl.ImplicitDifferentiation(
            solver=DenseCholesky(), step_size=0.05, momentum=0.7, inner_steps=2, inner_step_size=0.4
        )
        run = hl.minimize(QUADRATIC.problem(), method, budget=hl.Budget(steps=6))
        q = QUADRATIC
        x, velocity = torch.zeros(3, dtype=FLOAT64), torch.zeros(3, dtype=FLOAT64)
        y = torch.zeros(4, dtype=FLOAT64)
        for _ in range(6):
            for _ in range(2):
                y = y - 0.4 * (q.A @ y - q.B @ x)
            gradient = q.gamma * (x - q.s) + q.B.T @ torch.linalg.solve(q.A, y - q.t)
            velocity = 0.7 * velocity + gradient
            x = x - 0.05 * velocity
        torch.testing.assert_close(run.x, x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(run.y, y, rtol=1e-12, atol=1e-13)

    def test_projected_outer_variable(self):
        """On a box, the limit of projected gradient descent satisfies the KKT conditions."""
        seen = []
        bound = 0.2
        problem = QUADRATIC.problem(
            project_outer=hl.Box(-bound, bound),
            metrics={"largest": lambda y, x: float(seen.append(x.clone()) or x.abs().max())},
        )
        method = hl.ImplicitDifferentiation(solver=DenseCholesky(), **SHARED)
        run = hl.minimize(problem, method, budget=hl.Budget(steps=120), every=1)
        assert (run.history["largest"] <= bound).all()
        M = torch.linalg.solve(QUADRATIC.A, QUADRATIC.B)
        gradient = M.T @ (M @ run.x - QUADRATIC.t) + QUADRATIC.gamma * (run.x - QUADRATIC.s)
        at_bound = run.x.abs() == bound
        assert at_bound.any()
        assert (gradient[~at_bound].abs() < 1e-8).all()
        assert (gradient[at_bound] * run.x[at_bound] < 0).all()

    def test_projected_inner_variable(self):
        problem = QUADRATIC.problem(project_inner=hl.Ball(0.3))
        run = hl.minimize(problem, hl.Unrolled(**SHARED), budget=hl.Budget(steps=20))
        assert run.y.norm() <= 0.3 * (1 + 1e-12)
        assert run.certificate.constraint_active

    def test_nested_variables_come_back_nested(self):
        problem = hl.BilevelProblem(
            lambda y, x: ((y["a"] - x[0]) ** 2).sum() + ((y["b"] - x[1]["c"]) ** 2).sum(),
            lambda y, x: ((y["a"] - 1) ** 2).sum() + ((y["b"] - 2) ** 2).sum(),
            x0=(torch.zeros(2), {"c": torch.zeros(1, 2)}),
            y0={"a": torch.zeros(2), "b": torch.zeros(1, 2)},
        )
        method = hl.ImplicitDifferentiation(inner_step_size=0.4, step_size=0.3)
        run = hl.minimize(problem, method, budget=hl.Budget(steps=60))
        torch.testing.assert_close(run.x[0], torch.ones(2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.x[1]["c"], torch.full((1, 2), 2.0), rtol=1e-4, atol=1e-4)
        assert run.y["b"].shape == (1, 2)


def data_problem(features: int = 15) -> hl.BilevelProblem:
    """Weighted least squares on 40 samples, 30 for the outer loss; d = features."""
    n, m = 40, 30
    Z, V = sampled(n, features), sampled(m, features, seed=1)
    truth = sampled(features, seed=2)
    t, u = Z @ truth + sampled(n, seed=3), V @ truth

    def sample_loss(y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (batch["Z"] @ y - batch["t"]) ** 2

    def sample_weight(x: Tensor, batch: Any) -> Tensor:
        return torch.sigmoid(x[batch["index"]])

    return hl.BilevelProblem(
        lambda y, x, batch: (sample_weight(x, batch) * sample_loss(y, batch)).mean(),
        lambda y, x, batch: F.mse_loss(batch[0] @ y, batch[1]) + 0.01 * (x**2).mean(),
        x0=torch.zeros(n, dtype=FLOAT64),
        y0=torch.zeros(features, dtype=FLOAT64),
        inner_data={"Z": Z, "t": t, "index": torch.arange(n)},
        outer_data=(V, u),
        regularizer=hl.L2(0.05),
        likelihood=hl.WeightedLikelihood(sample_loss=sample_loss, sample_weight=sample_weight),
    )


STOCHASTIC = {
    "step_size": 1.0,
    "inner_steps": 3,
    "inner_step_size": 0.02,
    "inner_batch_size": 8,
    "outer_batch_size": 10,
}
METHODS = {
    "cg": hl.ImplicitDifferentiation(**STOCHASTIC),
    "identity": hl.IdentityHessian(**STOCHASTIC),
    "unrolled": hl.Unrolled(**STOCHASTIC),
    "nhgd": hl.NHGD(**STOCHASTIC),
    "nhgd, samples": hl.NHGD(rows="sample", samples_per_step=3, **STOCHASTIC),
    "nhgd, carried": hl.NHGD(reset="never", window=7, rho=0.1, **STOCHASTIC),
}


class TestReproducibility:
    @pytest.mark.parametrize("name", METHODS)
    def test_one_seed_one_run(self, name):
        def go(seed: int, **options: Any) -> hl.Run:
            return hl.minimize(
                data_problem(), METHODS[name], budget=hl.Budget(steps=7), seed=seed, **options
            )

        first, second, other = go(1, every=2), go(1, every=2), go(2, every=2)
        assert torch.equal(first.x, second.x)
        assert torch.equal(first.y, second.y)
        for column in first.history:
            if column != "seconds":
                np.testing.assert_array_equal(first.history[column], second.history[column])
        for column in first.certificates:
            np.testing.assert_array_equal(first.certificates[column], second.certificates[column])
        assert not torch.equal(first.x, other.x)
        # How often a run is recorded has no part in it.
        assert torch.equal(go(1, every=100).x, first.x)

    def test_global_generator_is_neither_read_nor_moved(self):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = hl.minimize(data_problem(), METHODS["nhgd"], budget=hl.Budget(steps=3))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        second = hl.minimize(data_problem(), METHODS["nhgd"], budget=hl.Budget(steps=3))
        assert torch.equal(first.x, second.x)

    def test_arguments_are_left_alone(self):
        problem = data_problem()
        hl.minimize(problem, METHODS["cg"], budget=hl.Budget(steps=3))
        assert torch.equal(problem.x0, torch.zeros_like(problem.x0))
        assert torch.equal(problem.y0, torch.zeros_like(problem.y0))


# gradients, Hessian products, cross products, samples: each outer step with T = 3 inner steps.
# A solver's products include the one that measures its residual.
CG10, NEUMANN10 = truncated(CG, 10), truncated(Neumann, 10, step_size=0.01)
COUNTS = {
    "cg10": (hl.ImplicitDifferentiation(solver=CG10, **STOCHASTIC), 4, 11, 1, 34 + 12 * 40),
    "neumann10": (
        hl.ImplicitDifferentiation(solver=NEUMANN10, **STOCHASTIC), 4, 11, 1, 34 + 12 * 40,
    ),
    "cholesky": (
        hl.ImplicitDifferentiation(solver=DenseCholesky(), **STOCHASTIC), 4, 16, 1, 34 + 17 * 40,
    ),
    "cg10, 2 batches": (
        hl.ImplicitDifferentiation(solver=CG10, cross_batches=2, **STOCHASTIC),
        4, 11, 1, 34 + 12 * 16,
    ),
    "identity": (hl.IdentityHessian(**STOCHASTIC), 4, 0, 1, 34 + 40),
    "identity, trajectory": (
        hl.IdentityHessian(cross="trajectory", **STOCHASTIC), 4, 0, 3, 34 + 24,
    ),
    "unrolled": (hl.Unrolled(**STOCHASTIC), 4, 3, 3, 34 + 48),
    "unrolled 2": (hl.Unrolled(unroll_steps=2, **STOCHASTIC), 4, 2, 2, 34 + 32),
    "nhgd": (hl.NHGD(**STOCHASTIC), 4, 0, 1, 34 + 40),
    "nhgd, trajectory": (hl.NHGD(cross="trajectory", **STOCHASTIC), 4, 0, 3, 34 + 24),
    "nhgd, corrected": (hl.NHGD(weight_correction=True, **STOCHASTIC), 7, 0, 1, 34 + 24 + 40),
    "nhgd, samples": (
        hl.NHGD(rows="sample", samples_per_step=5, **STOCHASTIC), 7, 0, 1, 34 + 15 + 40,
    ),
    "none": (hl.FixedOuter(**STOCHASTIC), 3, 0, 0, 24),
}  # fmt: skip


class TestOracleCounts:
    @pytest.mark.parametrize("name", COUNTS)
    def test_what_theory_says(self, name):
        """With a certificate at each record: diagnostics are no part of a method's cost."""
        method, gradients, hessians, crosses, samples = COUNTS[name]
        run = hl.minimize(data_problem(), method, budget=hl.Budget(steps=4), every=1)
        steps = np.arange(5)
        np.testing.assert_array_equal(run.history["gradients"], gradients * steps)
        np.testing.assert_array_equal(run.history["hessian_products"], hessians * steps)
        np.testing.assert_array_equal(run.history["cross_products"], crosses * steps)
        calls = (gradients + hessians + crosses) * steps
        np.testing.assert_array_equal(run.history["oracle_calls"], calls)
        np.testing.assert_array_equal(run.history["oracle_samples"], samples * steps)
        assert len(run.certificates["converged"]) == 4


class TestBudget:
    def test_steps(self):
        run = hl.minimize(data_problem(), METHODS["identity"], budget=hl.Budget(steps=7), every=3)
        np.testing.assert_array_equal(run.history["step"], [0, 3, 6, 7])
        assert run.status == "finished"
        assert "7 outer steps" in run.message

    def test_last_step_is_recorded_once(self):
        run = hl.minimize(data_problem(), METHODS["identity"], budget=hl.Budget(steps=6), every=3)
        np.testing.assert_array_equal(run.history["step"], [0, 3, 6])

    @pytest.mark.parametrize(("calls", "steps"), [(1, 1), (5, 1), (6, 2), (50, 10), (51, 11)])
    def test_oracle_calls(self, calls, steps):
        """5 an outer step: the run ends with the first step that reaches the limit."""
        run = hl.minimize(data_problem(), METHODS["identity"], budget=hl.Budget(oracle_calls=calls))
        assert run.history["step"][-1] == steps
        assert run.history["oracle_calls"][-1] == 5 * steps

    def test_seconds_of_training(self):
        run = hl.minimize(data_problem(), METHODS["identity"], budget=hl.Budget(seconds=0.1))
        seconds = run.history["seconds"]
        assert seconds[-1] >= 0.1
        assert (np.diff(seconds) > 0).all()
        # It stopped with the first step beyond: all earlier records lie below.
        assert (seconds[:-1] < 0.1).all()

    def test_recording_is_off_the_clock(self):
        problem = hl.BilevelProblem(
            lambda y, x: ((y - x) ** 2).sum(),
            lambda y, x: (y**2).sum(),
            x0=torch.ones(1),
            y0=torch.ones(1),
            metrics={"slow": lambda y, x: time.sleep(0.1) or 0.0},
        )
        start = time.perf_counter()
        run = hl.minimize(problem, hl.IdentityHessian(), budget=hl.Budget(steps=3), every=1)
        assert time.perf_counter() - start - run.history["seconds"][-1] >= 0.4

    def test_whichever_comes_first(self):
        budget = hl.Budget(steps=1000, oracle_calls=12, seconds=1e6)
        run = hl.minimize(data_problem(), METHODS["identity"], budget=budget)
        assert run.history["step"][-1] == 3

    def test_no_limit(self):
        with pytest.raises(ValueError, match="needs a limit"):
            hl.Budget()

    @pytest.mark.parametrize(
        "limits",
        [{"steps": 0}, {"seconds": -1.0}, {"oracle_calls": math.inf}, {"seconds": math.nan}],
    )
    def test_no_positive_limit(self, limits):
        with pytest.raises(ValueError, match="expected a positive number"):
            hl.Budget(**limits)

    def test_every(self):
        with pytest.raises(ValueError, match="every=0"):
            hl.minimize(data_problem(), METHODS["cg"], budget=hl.Budget(steps=1), every=0)


class TestRecords:
    def test_history_of_a_step_by_step_run(self):
        """The record at step k is that of a run which ended there."""
        seen: list[dict[str, float]] = []
        problem = data_problem()
        run = hl.minimize(
            problem,
            METHODS["nhgd"],
            budget=hl.Budget(steps=4),
            every=1,
            callbacks=[lambda row: seen.append(dict(row))],
        )
        assert [row["step"] for row in seen] == [0, 1, 2, 3, 4]
        for steps in (1, 3):
            short = hl.minimize(problem, METHODS["nhgd"], budget=hl.Budget(steps=steps), every=9)
            loss = float(problem.outer_loss(short.y, short.x, problem.outer_data))  # on all data
            assert run.history["outer_loss"][steps] == loss == seen[steps]["outer_loss"]
        start = problem.outer_loss(problem.y0, problem.x0, problem.outer_data)
        assert run.history["outer_loss"][0] == float(start)
        assert math.isnan(run.history["hypergradient_norm"][0])

    def test_metrics(self):
        problem = data_problem()
        problem.metrics["first"] = lambda y, x: float(x[0])
        run = hl.minimize(problem, METHODS["cg"], budget=hl.Budget(steps=4), every=2)
        assert run.history["first"][-1] == float(run.x[0])

    def test_a_certificate_with_each_record_after_the_first(self, tmp_path):
        path = tmp_path / "run.h5"
        run = hl.minimize(
            data_problem(), METHODS["cg"], budget=hl.Budget(steps=4), every=1, record=path
        )
        loaded = hl.load_run(path)
        for found in (run, loaded):
            assert all(len(column) == 4 for column in found.certificates.values())
            assert found.certificate == run.certificate
            assert found.certificates["adjoint_residual"][-1] == run.certificate.adjoint_residual
        assert (run.certificates["inner_stationarity"] > 0).all()
        assert run.certificates["converged"].all()

    def test_certificate_describes_the_step_that_was_taken(self):
        """Not the state after it: stationarity is that of the y and x the gradient came from."""
        method = hl.ImplicitDifferentiation(solver=DenseCholesky(), **SHARED)
        q = QUADRATIC
        run = hl.minimize(q.problem(), method, budget=hl.Budget(steps=1))
        # y never moved from 0 = y*(0), and x has since.
        assert run.certificate.inner_stationarity == 0.0
        assert (q.A @ run.y - q.B @ run.x).norm() > 0.1


class TestMissedTolerance:
    def test_warned_about_once_with_the_number(self):
        method = hl.ImplicitDifferentiation(
            solver=Neumann(step_size=5.0, maxiter=50), **SHARED | {"step_size": 1e-9}
        )
        with pytest.warns(
            ConvergenceWarning, match=r"missed its tolerance in 3 of 3 steps"
        ) as seen:
            run = hl.minimize(QUADRATIC.problem(), method, budget=hl.Budget(steps=3))
        assert len([w for w in seen if issubclass(w.category, ConvergenceWarning)]) == 1
        assert "missed its tolerance in 3 of 3" in run.message
        assert not run.certificates["converged"].any()
        worst = run.certificates["adjoint_residual"].max()
        assert f"{worst:.3g}" in run.message

    def test_an_iteration_limit_that_is_no_method(self):
        """Without stop_at_maxiter the limit is a failure, in a loop as in a single solve."""
        method = hl.ImplicitDifferentiation(solver=CG(maxiter=1), **SHARED)
        with pytest.warns(ConvergenceWarning, match="in 2 of 2 steps"):
            hl.minimize(QUADRATIC.problem(), method, budget=hl.Budget(steps=2))

    def test_truncation_as_a_method(self):
        method = hl.ImplicitDifferentiation(solver=CG(maxiter=1, stop_at_maxiter=True), **SHARED)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = hl.minimize(QUADRATIC.problem(), method, budget=hl.Budget(steps=2))
        assert not run.certificates["converged"].any()  # but it is on record

    def test_warnings_of_the_losses_still_come_through(self):
        def outer(y: Tensor, x: Tensor) -> Tensor:
            warnings.warn("from the loss", UserWarning, stacklevel=1)
            return (y**2).sum()

        problem = hl.BilevelProblem(
            lambda y, x: ((y - x) ** 2).sum(), outer, x0=torch.ones(1), y0=torch.ones(1)
        )
        with pytest.warns(UserWarning, match="from the loss"):
            hl.minimize(problem, hl.IdentityHessian(), budget=hl.Budget(steps=1))


class TestEndings:
    @pytest.mark.parametrize(
        ("method", "culprit"),
        [
            (hl.ImplicitDifferentiation(**SHARED | {"inner_step_size": 1e30}), "y is no longer"),
            (
                hl.IdentityHessian(**SHARED | {"step_size": 1e20}),
                "no longer finite|NaN or infinite",
            ),
            (hl.Unrolled(**SHARED | {"step_size": 1e20}), "no longer finite"),
            (hl.NHGD(damping=1.0, **SHARED | {"inner_step_size": 1e60}), "y is no longer finite"),
        ],
    )
    def test_divergence(self, tmp_path, method, culprit):
        path = tmp_path / "run.h5"
        with pytest.raises(hl.DivergedError, match=culprit) as error:
            hl.minimize(
                QUADRATIC.problem(), method, budget=hl.Budget(steps=500), every=1, record=path
            )
        assert "reduce step_size or inner_step_size" in str(error.value)
        run, loaded = error.value.run, hl.load_run(path)
        assert run.status == loaded.status == "diverged"
        assert run.message == loaded.message == str(error.value)
        assert torch.isfinite(run.x).all()  # the last sound point
        assert torch.isfinite(run.y).all()
        assert torch.equal(loaded.x, run.x)
        assert (loaded.history["step"] == np.arange(len(loaded.history["step"]))).all()

    def test_outer_gradient_overflows_before_y_does(self):
        problem = hl.BilevelProblem(
            lambda y, x: 0.5 * ((y - x) ** 2).sum(),
            lambda y, x: -(y**4).sum(),  # unbounded below
            x0=torch.ones(2, dtype=FLOAT64),
            y0=torch.ones(2, dtype=FLOAT64),
        )
        method = hl.ImplicitDifferentiation(inner_step_size=1.0, solver=DenseCholesky())
        with pytest.raises(hl.DivergedError) as error:
            hl.minimize(problem, method, budget=hl.Budget(steps=500))
        assert error.value.run.status == "diverged"

    def test_an_adjoint_system_that_breaks_down(self):
        problem = hl.BilevelProblem(
            lambda y, x: (y**2 - y**4 + x * y).sum(),  # its Hessian is indefinite for y > 0.41
            lambda y, x: ((y - 1) ** 2).sum(),
            x0=torch.ones(2, dtype=FLOAT64),
            y0=torch.zeros(2, dtype=FLOAT64),
        )
        method = hl.ImplicitDifferentiation(inner_step_size=0.1, solver=DenseCholesky())
        with pytest.raises(hl.DivergedError, match=r"not positive definite.*increase damping"):
            hl.minimize(problem, method, budget=hl.Budget(steps=500))

    def test_interruption_keeps_the_record(self, tmp_path):
        path = tmp_path / "run.h5"

        def interrupt(row: Any) -> None:
            if row["step"] == 4:
                raise KeyboardInterrupt

        run = hl.minimize(
            data_problem(),
            METHODS["cg"],
            budget=hl.Budget(steps=100),
            every=2,
            record=path,
            callbacks=[interrupt],
        )
        loaded = hl.load_run(path)
        for found in (run, loaded):
            assert found.status == "interrupted"
            assert "after 4 outer steps" in found.message
            np.testing.assert_array_equal(found.history["step"], [0, 2, 4])
        assert torch.equal(loaded.x, run.x)
        short = hl.minimize(data_problem(), METHODS["cg"], budget=hl.Budget(steps=4))
        assert torch.equal(short.x, run.x)

    def test_interruption_within_a_step_leaves_the_step_before(self, tmp_path):
        calls = 0

        def inner(y: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 100:
                raise KeyboardInterrupt
            return ((y - x) ** 2).sum()

        problem = hl.BilevelProblem(
            inner, lambda y, x: ((y - 1) ** 2).sum(), x0=torch.ones(2), y0=torch.ones(2)
        )
        path = tmp_path / "run.h5"
        run = hl.minimize(problem, hl.IdentityHessian(), budget=hl.Budget(steps=100), record=path)
        assert run.status == hl.load_run(path).status == "interrupted"
        assert torch.equal(hl.load_run(path).y, run.y)

    @pytest.mark.parametrize("exception", [RuntimeError("no more disk"), SystemExit(3)])
    def test_exception_in_a_callback(self, tmp_path, exception):
        path = tmp_path / "run.h5"

        def fail(row: Any) -> None:
            if row["step"] == 2:
                raise exception

        with pytest.raises(type(exception)) as error:
            hl.minimize(
                data_problem(),
                METHODS["nhgd"],
                budget=hl.Budget(steps=100),
                every=1,
                record=path,
                callbacks=[fail],
            )
        assert error.value is exception
        loaded = hl.load_run(path)
        assert loaded.status == "failed"
        assert type(exception).__name__ in loaded.message
        np.testing.assert_array_equal(loaded.history["step"], [0, 1, 2])
        assert loaded.x.shape == (40,)

    def test_callback_that_returns_true_stops(self):
        seen = []
        run = hl.minimize(
            data_problem(),
            METHODS["cg"],
            budget=hl.Budget(steps=100),
            every=1,
            callbacks=[lambda row: row["step"] >= 3, lambda row: seen.append(row["step"])],
        )
        assert seen == [0, 1, 2, 3]  # the second one still saw the last record
        assert run.status == "finished"

    def test_callback_that_stops_at_the_start(self):
        run = hl.minimize(
            data_problem(),
            METHODS["cg"],
            budget=hl.Budget(steps=100),
            callbacks=[lambda row: True],
        )
        np.testing.assert_array_equal(run.history["step"], [0])
        assert torch.equal(run.x, torch.zeros(40, dtype=FLOAT64))
        assert run.certificate is None

    def test_other_results_do_not_stop(self):
        run = hl.minimize(
            data_problem(),
            METHODS["cg"],
            budget=hl.Budget(steps=2),
            callbacks=[lambda row: 1, lambda row: "go on"],
        )
        assert run.history["step"][-1] == 2

    def test_bad_setting_leaves_no_file(self, tmp_path):
        path = tmp_path / "run.h5"
        with pytest.raises(ValueError, match="batch size 41"):
            hl.minimize(
                data_problem(),
                hl.IdentityHessian(inner_batch_size=41),
                budget=hl.Budget(steps=1),
                record=path,
            )
        assert not path.exists()

    def test_projection_that_changes_the_shape(self):
        problem = QUADRATIC.problem(project_outer=lambda x: x[:2])
        with pytest.raises(ValueError, match=r"project_outer\(x\)"):
            hl.minimize(problem, hl.IdentityHessian(), budget=hl.Budget(steps=1))


def test_progress_goes_to_stderr_and_is_off_by_default(capsys):
    def run(**options: Any) -> str:
        hl.minimize(data_problem(), METHODS["cg"], budget=hl.Budget(steps=3), **options)
        return capsys.readouterr()

    silent, shown = run(), run(progress=True)
    assert (silent.out, silent.err, shown.out) == ("", "", "")
    assert "100%" in shown.err
    assert "outer loss" in shown.err


class TestMisuse:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": hl.NHGD}, r"method is the class NHGD; expected an instance of Method"),
            ({"budget": 5}, "budget is 5; expected an instance of Budget"),
            ({"problem": None}, "problem is None; expected an instance of BilevelProblem"),
        ],
    )
    def test_arguments_of_the_wrong_kind(self, changes, message):
        arguments = {
            "problem": QUADRATIC.problem(),
            "method": hl.IdentityHessian(),
            "budget": hl.Budget(steps=1),
        }
        with pytest.raises(TypeError, match=message):
            hl.minimize(**arguments | changes)

    def test_solver_that_is_none(self):
        with pytest.raises(TypeError, match=r"solver=.*expected a solver, e.g. CG\(\)"):
            hl.ImplicitDifferentiation(solver=CG)

    def test_steps_that_are_not_whole(self):
        with pytest.raises(ValueError, match=r"inner_steps=2.5; expected a whole number"):
            hl.IdentityHessian(inner_steps=2.5)


class TestClosedOverTensors:
    """A loss may close over tensors that require grad; no graph of theirs is carried along."""

    @pytest.mark.parametrize(
        "method", [hl.ImplicitDifferentiation(), hl.IdentityHessian(), hl.Unrolled()]
    )
    def test_the_run_is_the_same_and_keeps_no_graph(self, method):
        runs = []
        for requires_grad in (False, True):
            shift = torch.full((2,), 0.3, dtype=FLOAT64, requires_grad=requires_grad)
            problem = hl.BilevelProblem(
                lambda y, x, shift=shift: ((y - x + shift) ** 2).sum(),
                lambda y, x, shift=shift: ((y - shift) ** 2).sum() + (x**2).sum(),
                x0=torch.ones(2, dtype=FLOAT64),
                y0=torch.ones(2, dtype=FLOAT64),
            )
            runs.append(hl.minimize(problem, method, budget=hl.Budget(steps=3)))
        assert not runs[1].x.requires_grad
        assert not runs[1].y.requires_grad
        assert torch.equal(runs[0].x, runs[1].x)

    def test_hypergradient(self):
        shift = torch.ones(2, dtype=FLOAT64, requires_grad=True)
        x = torch.zeros(2, dtype=FLOAT64)
        grad, _ = hl.hypergradient(
            lambda y, x: ((y - shift) ** 2).sum(), lambda y, x: ((y - x) ** 2).sum(), x, x
        )
        assert not grad.requires_grad
        torch.testing.assert_close(grad, torch.full((2,), -2.0, dtype=FLOAT64))


class TestErrorBound:
    def test_recorded_where_all_of_the_data_is_used(self):
        """G = (y - x)^2 / 2: mu = |C| = 1 and g = (y - 1)^2 has L_b = 2."""
        data = torch.zeros(4, dtype=FLOAT64)

        def problem(smoothness: hl.Smoothness | None) -> hl.BilevelProblem:
            return hl.BilevelProblem(
                lambda y, x, batch: 0.5 * ((y - x + batch.mean()) ** 2).sum(),
                lambda y, x: ((y - 1) ** 2).sum(),
                x0=torch.zeros(1, dtype=FLOAT64),
                y0=torch.full((1,), 3.0, dtype=FLOAT64),
                inner_data=data,
                smoothness=smoothness,
            )

        known = hl.Smoothness(strong_convexity=1.0, cross_norm=1.0, outer_smoothness=2.0)
        method = hl.ImplicitDifferentiation(inner_step_size=0.01, step_size=0.0)
        run = hl.minimize(problem(known), method, budget=hl.Budget(steps=3), every=1)
        error = abs(float(2 * (run.y - 1)) - float(2 * (0 - 1)))  # at y, and at y* = x = 0
        # The certificate is that of the last y; the bound is attained in one dimension.
        assert run.certificate.error_bound == pytest.approx(error, rel=1e-12)
        batches = dataclasses.replace(method, inner_batch_size=2)
        for other in (
            hl.minimize(problem(known), batches, budget=hl.Budget(steps=3)),
            hl.minimize(problem(None), method, budget=hl.Budget(steps=3)),
        ):
            assert other.certificate.error_bound is None


def test_stationarity_under_a_projection_vanishes_at_the_constrained_minimum():
    """min (y - 3)^2 over |y| <= 1: the gradient at y = 1 is -4, the projected step is none."""
    problem = hl.BilevelProblem(
        lambda y, x: ((y - 3) ** 2).sum(),
        lambda y, x: (y**2).sum() + (x**2).sum(),
        x0=torch.ones(1, dtype=FLOAT64),
        y0=torch.ones(1, dtype=FLOAT64),
        project_inner=hl.Ball(1.0),
    )
    for method in (hl.IdentityHessian(), hl.Unrolled(), hl.FixedOuter()):
        certificate = hl.minimize(problem, method, budget=hl.Budget(steps=1)).certificate
        assert certificate.inner_stationarity < 1e-12
        assert certificate.constraint_active


def test_failed_adjoint_solves_are_told_however_the_run_ends(tmp_path):
    """Also where Ctrl-C, and not the budget, ended it."""

    def interrupt(row: Any) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    method = hl.ImplicitDifferentiation(solver=CG(maxiter=1, rtol=1e-14), inner_step_size=0.01)
    path = tmp_path / "run.h5"
    run = hl.minimize(
        QUADRATIC.problem(),
        method,
        budget=hl.Budget(steps=9),
        every=1,
        callbacks=[interrupt],
        record=path,
    )
    assert run.status == "interrupted"
    for message in (run.message, hl.load_run(path).message):
        assert "Ctrl-C after 2 outer steps" in message
        assert "missed its tolerance in 2 of 2 steps" in message
        assert "worst in step" in message
