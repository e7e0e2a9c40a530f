"""Kernels by bilevel optimisation: three hypergradients, objectives, methods, inverse problems."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import hyperlearn as hl
import operators as ops
from hyperlearn.gp.objectives import Held
from tests.hyperlearn.gp.problems import elliptic_pde, generator

D = torch.float64


def problem(
    length: float = 0.3, objective: hl.Objective | None = None, **options
) -> hl.KernelProblem:
    pde, held = elliptic_pde(80, 32, 40)
    objective = objective or hl.ValidationResidual([held])
    return hl.kernel_problem(pde, ops.RBF(length), objective, nugget=1e-8, **options)


def converged(prob: hl.KernelProblem, x: torch.Tensor, y=None, steps: int = 8):
    y = prob.y0 if y is None else y
    tree = prob.x_space.unravel(x)
    with torch.no_grad():
        for _ in range(steps):
            y = prob.mapped(y, tree)
    return y


def total_loss(prob: hl.KernelProblem, x: torch.Tensor, y) -> float:
    """J at the converged solution, its state included."""
    y = converged(prob, x, y, 4)
    tree = prob.x_space.unravel(x)
    with torch.no_grad():
        posterior = prob.posterior(y, tree)
        held = prob.held(y)
        held = Held(held.equations, [posterior.state(e) for e in held.equations])
        return float(prob.loss(posterior, held, tree, generator()))


def gradient(prob: hl.KernelProblem, x: torch.Tensor, y, kind: str, steps: int = 4) -> torch.Tensor:
    method = hl.KernelLearning(hypergradient=kind, newton_steps=steps)
    estimator = method.start(prob, prob.oracles(), generator())
    with torch.no_grad():
        trajectory = estimator.solve_inner(prob.y_space.ravel(y), x)
    return estimator.estimate(x, trajectory).gradient


@pytest.mark.parametrize("length", [0.2, 0.35])
def test_total_derivatives_are_finite_differences(length: float) -> None:
    prob = problem(length)
    x = prob.x_space.ravel(prob.x0)
    y = converged(prob, x)
    h = 1e-3
    difference = (total_loss(prob, x + h, y) - total_loss(prob, x - h, y)) / (2 * h)
    for kind in ("implicit", "unrolled"):
        assert float(gradient(prob, x, y, kind)) == pytest.approx(difference, rel=2e-3), kind


@pytest.mark.parametrize("kind", ["one-step", "implicit", "unrolled"])
def test_a_regularizer_adds_its_value_and_its_slope(kind: str) -> None:
    def regularizer(x):
        return 3.0 * (x["u"]["log_lengthscale"] - 1.0) ** 2

    plain, regularized = problem(0.3), problem(0.3, regularizer=regularizer)
    x = plain.x_space.ravel(plain.x0)
    y = converged(plain, x)
    expected = gradient(plain, x, y, kind) + 6.0 * (x - 1.0)
    torch.testing.assert_close(gradient(regularized, x, y, kind), expected)
    added = total_loss(regularized, x, y) - total_loss(plain, x, y)
    assert added == pytest.approx(3.0 * (math.log(0.3) - 1.0) ** 2)


def test_one_step_is_total_where_newton_converges_quadratically() -> None:
    prob = problem(0.3)
    assert hl.derivative_ratio(prob, prob.x0) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "objective",
    [
        hl.LeaveOneOut(),
        hl.LeaveOneOut(equations=[0]),
        hl.MarginalLikelihood(),
        hl.MarginalLikelihood(profile=False),
        hl.KernelFlow(0.5),
    ],
    ids=str,
)
def test_objectives_have_the_derivatives_of_their_values(objective: hl.Objective) -> None:
    prob = problem(0.3, objective)
    x = prob.x_space.ravel(prob.x0)
    y = converged(prob, x)

    def loss(x: torch.Tensor) -> torch.Tensor:
        tree = prob.x_space.unravel(x)
        return prob.loss(prob.posterior(y, tree), prob.held(y), tree, generator(5))

    outer = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(outer), outer)
    h = 1e-4
    with torch.no_grad():
        difference = float(loss(x + h) - loss(x - h)) / (2 * h)
    assert float(found) == pytest.approx(difference, rel=1e-4)


def test_objectives_are_their_dense_formulas() -> None:
    prob = problem(0.3)
    y = converged(prob, prob.x_space.ravel(prob.x0))
    p = prob.posterior(y, prob.x0)
    K = ops.gram(p.kernels, p.linearised.blocks).to_dense()
    A = K + 1e-8 * torch.diag(K.diagonal())
    b, n = p.linearised.target, len(p.linearised.target)
    alpha, inverse = torch.linalg.solve(A, b), torch.linalg.inv(A)
    held, g = prob.held(y), generator()
    with torch.no_grad():
        loo = hl.LeaveOneOut().loss(p, held, None, g)
        torch.testing.assert_close(
            loo, (alpha / inverse.diagonal()).square().mean(), rtol=1e-5, atol=0
        )
        full = hl.MarginalLikelihood(profile=False).loss(p, held, None, g)
        logdet = torch.linalg.slogdet(A).logabsdet
        expected = 0.5 * (b @ alpha + logdet + n * math.log(2 * math.pi))
        torch.testing.assert_close(full, expected, rtol=1e-7, atol=0)
    # Leave one out, by leaving one out.
    k = 7
    rest = [i for i in range(n) if i != k]
    predicted = A[k, rest] @ torch.linalg.solve(A[rest][:, rest], b[rest])
    torch.testing.assert_close(b[k] - predicted, alpha[k] / inverse[k, k], rtol=1e-4, atol=1e-8)


def test_leaving_out_a_noisy_observation_counts_in_units_of_its_noise() -> None:
    g = generator()
    x, y = (torch.rand(n, 1, generator=g, dtype=D) for n in (6, 5))
    data = torch.sin(6 * y[:, 0]) + 0.1 * torch.randn(5, generator=g, dtype=D)
    pde = hl.PDE(
        [
            hl.Equation(lambda u, lap_u: lap_u + 36 * u, x),
            hl.Equation(lambda u, data: u - data, y, data, noise=0.1),
        ]
    )
    prob = hl.kernel_problem(pde, ops.RBF(0.4), hl.LeaveOneOut([1]), nugget=1e-8)
    p = prob.posterior(prob.y0, prob.x0)
    errors = []
    for k in range(5):
        rest = [i for i in range(5) if i != k]
        fewer = hl.PDE([pde.equations[0], pde.equations[1].rows(torch.tensor(rest))])
        u = hl.solve_pde(fewer, ops.RBF(0.4), nugget=1e-8)
        errors.append((u.value(y[k : k + 1]) - data[k]) / 0.1)
    found = prob.loss(p, prob.held(prob.y0), prob.x0, g)
    torch.testing.assert_close(found, torch.cat(errors).square().mean(), rtol=1e-5, atol=0)


class TestWeightedSum:
    def test_is_the_sum_of_its_parts(self) -> None:
        _, held = elliptic_pde(80, 32, 40)
        first = hl.ValidationResidual([held.rows(torch.arange(15))])
        second = hl.ValidationResidual([held.rows(torch.arange(15, 40))], weights=[2.0])
        parts: list[hl.Objective] = [first, hl.LeaveOneOut(), second]
        together = problem(0.3, hl.WeightedSum(list(zip((1.0, 0.5, 3.0), parts, strict=True))))
        y = converged(together, together.x_space.ravel(together.x0))
        value = together.outer_loss(y, together.x0)
        expected = torch.zeros((), dtype=D)
        for weight, part in zip((1.0, 0.5, 3.0), parts, strict=True):
            alone = problem(0.3, part)
            mine = converged(alone, alone.x_space.ravel(alone.x0))
            expected = expected + weight * alone.outer_loss(mine, alone.x0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)

    def test_learns_with_batches_of_both(self) -> None:
        _, held = elliptic_pde(80, 32, 40)
        objective = hl.WeightedSum(
            [(1.0, hl.ValidationResidual([held])), (10.0, hl.ValidationResidual([held]))]
        )
        method = hl.KernelLearning(step_size=0.1, learning_steps=5, outer_batch_size=20)
        run = hl.minimize(problem(1.0, objective), method, budget=hl.Budget(steps=30), every=10)
        assert run.history["outer_loss"][-1] < run.history["outer_loss"][0]

    @pytest.mark.parametrize(
        ("parts", "error", "message"),
        [
            ([], ValueError, "parts is empty"),
            ([(math.nan, hl.LeaveOneOut())], TypeError, "a part is"),
            ([(1.0, "loo")], TypeError, "a part is"),
        ],
    )
    def test_refuses(self, parts, error, message: str) -> None:
        with pytest.raises(error, match=message):
            hl.WeightedSum(parts)

    def test_refuses_samplers(self) -> None:
        _, held = elliptic_pde(80, 32, 40)
        resampled = hl.ValidationResidual([held], sampler=lambda g: [held.points])
        with pytest.raises(ValueError, match="has a sampler"):
            hl.WeightedSum([(1.0, resampled)])


@pytest.mark.parametrize("start", [0.15, 1.0])
def test_the_length_is_found_from_far(start: float) -> None:
    prob = problem(start)
    method = hl.KernelLearning(step_size=0.1, learning_steps=10)
    run = hl.minimize(prob, method, budget=hl.Budget(steps=100), every=50)
    length = float(run.x["u"]["log_lengthscale"].exp())
    assert 0.2 < length < 0.9


@pytest.mark.parametrize(
    "method",
    [
        hl.KernelLearning(step_size=0.05, hypergradient="implicit", newton_steps=4),
        hl.KernelLearning(step_size=0.05, hypergradient="unrolled", newton_steps=2),
        hl.KernelLearning(optimizer="lbfgs", learning_steps=2),
        hl.KernelLearning(step_size=0.05, learning_steps=5, outer_batch_size=20, averaging=0.5),
        hl.KernelLearning(step_size=0.05, learning_steps=5, decay=0.1, fresh=False),
    ],
    ids=lambda m: f"{m.hypergradient}-{m.optimizer}-{m.averaging}-{m.fresh}",
)
def test_each_way_decreases_the_loss(method: hl.KernelLearning) -> None:
    prob = problem(0.15)
    run = hl.minimize(prob, method, budget=hl.Budget(steps=12), every=12, seed=1)
    fixed = hl.minimize(
        prob, hl.KernelLearning(step_size=0.0, learning_steps=1), budget=hl.Budget(steps=8)
    )
    assert run.history["outer_loss"][-1] < fixed.history["outer_loss"][-1]
    assert run.certificate is not None
    assert run.certificate.converged


def test_resampled_points_are_drawn_anew() -> None:
    pde, held = elliptic_pde(60, 24, 30)
    equation = hl.Equation(lambda x, u, lap_u: -lap_u + u**3 - 1.0, pde.equations[0].points)
    drawn: list[torch.Tensor] = []

    def sampler(g: torch.Generator) -> list[torch.Tensor]:
        drawn.append(torch.rand(25, 2, dtype=D, generator=g))
        return [drawn[-1]]

    objective = hl.ValidationResidual([equation.at(held.points)], sampler=sampler)
    prob = hl.kernel_problem(
        hl.PDE([equation, pde.equations[1]]), ops.RBF(0.3), objective, nugget=1e-8
    )
    hl.minimize(prob, hl.KernelLearning(learning_steps=3), budget=hl.Budget(steps=9))
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])


def test_it_settles_by_its_rule() -> None:
    prob = problem(0.4, hl.LeaveOneOut())
    method = hl.KernelLearning(step_size=0.01, learning_steps=20, rtol=0.5)
    run = hl.minimize(prob, method, budget=hl.Budget(steps=1000))
    assert run.status == "finished"
    assert "settled to rtol=0.5" in run.message
    assert run.history["step"][-1] < 1000


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_a_resumed_run_is_the_run(tmp_path: Path, optimizer: str) -> None:
    prob = problem(0.2)
    method = hl.KernelLearning(
        step_size=0.05, learning_steps=4, outer_batch_size=20, averaging=0.5, optimizer=optimizer
    )
    whole = hl.minimize(prob, method, budget=hl.Budget(steps=10), every=1, seed=3)
    path = tmp_path / "run.h5"
    hl.minimize(prob, method, budget=hl.Budget(steps=6), every=1, seed=3, record=path)
    rest = hl.resume(path, prob, budget=hl.Budget(steps=10))
    assert torch.equal(whole.x["u"]["log_lengthscale"], rest.x["u"]["log_lengthscale"])
    assert (whole.history["outer_loss"] == rest.history["outer_loss"]).all()


def test_a_viscosity_is_found_from_observations() -> None:
    """``u_t = nu u_xx`` with u = exp(-nu pi^2 t) sin(pi x): nu from values inside."""
    g = generator(2)
    nu = 0.3

    def truth(z: torch.Tensor) -> torch.Tensor:
        return torch.exp(-nu * torch.pi**2 * z[:, 0]) * torch.sin(torch.pi * z[:, 1])

    inside = torch.rand(100, 2, dtype=D, generator=g)
    t = torch.rand(30, 1, dtype=D, generator=g)
    walls = torch.cat([torch.cat([t[:15], torch.zeros(15, 1, dtype=D)], 1),
                       torch.cat([t[15:], torch.ones(15, 1, dtype=D)], 1)])  # fmt: skip
    seen = torch.rand(40, 2, dtype=D, generator=g)
    held = torch.rand(40, 2, dtype=D, generator=g)
    heat = hl.Equation(
        lambda grad_u, hess_u, params: grad_u[0] - params["log_nu"].exp() * hess_u[1, 1], inside
    )
    observed = hl.Equation(lambda u, data: u - data, seen, truth(seen), noise=1e-3)
    pde = hl.PDE(
        [heat, hl.Equation(lambda u: u, walls), observed],
        params={"log_nu": torch.tensor(0.5, dtype=D).log()},
    )
    objective = hl.ValidationResidual([observed.at(held, truth(held))])
    prob = hl.kernel_problem(pde, ops.RBF(0.5), objective, nugget=1e-8, learn_params=("log_nu",))
    method = hl.KernelLearning(step_size=0.1, learning_steps=10)
    run = hl.minimize(prob, method, budget=hl.Budget(steps=80), every=20)
    assert float(run.x["params"]["log_nu"].exp()) == pytest.approx(nu, rel=0.05)
    u = hl.learnt_solution(prob, run.x)
    assert float((u.value(held) - truth(held)).abs().max()) < 1e-2


def test_the_scan_avoids_what_is_flat() -> None:
    pde, held = elliptic_pde(80, 32, 40)
    scan = hl.scan_lengthscale(pde, ops.RBF, hl.ValidationResidual([held]), nugget=1e-8)
    assert len(scan.scales) == 8
    assert scan.scales[0] > 0.05
    assert 0.15 < scan.best < 0.71
    assert str(scan).count("<") == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hl.ValidationResidual([]), ValueError, "validation is empty"),
        (lambda: hl.KernelFlow(1.5), ValueError, "fraction=1.5"),
        (lambda: hl.KernelLearning(hypergradient="exact"), ValueError, "hypergradient=exact"),
        (lambda: hl.KernelLearning(learning_steps=0), ValueError, "learning_steps=0"),
        (lambda: hl.KernelLearning(averaging=1.0), ValueError, "averaging=1.0"),
        (lambda: problem(learn_params=("nu",)), ValueError, "learn_params"),
    ],
)
def test_errors(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_batch_larger_than_the_validation_points() -> None:
    method = hl.KernelLearning(outer_batch_size=41)
    with pytest.raises(ValueError, match="outer_batch_size=41, but there are 40"):
        hl.minimize(problem(), method, budget=hl.Budget(steps=1))


def test_another_problem_is_refused() -> None:
    plain = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(), lambda y, x: (y**2).sum(),
        x0=torch.zeros(1), y0=torch.zeros(1),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"expected one of hyperlearn\.kernel_problem"):
        hl.minimize(plain, hl.KernelLearning(), budget=hl.Budget(steps=1))
