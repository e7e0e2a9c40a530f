"""`LowRank`, `Sparse` and their choice: against dense Cholesky and finite differences."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperlearn as hl
import operators as ops
from hyperlearn.experiments.references import points
from hyperlearn.gp.choice import candidates, choose_backend, explain_backend
from hyperlearn.gp.elementary import Elementary
from hyperlearn.gp.gauss_newton import step
from solvers import ConvergenceWarning, NotPositiveDefiniteError, StructureError, pivoted_cholesky
from tests.hyperlearn.gp.problems import case_a, elliptic_pde, generator

D = torch.float64
LOG_LENGTH = torch.tensor(-1.0, dtype=D)

# Kernels as functions of log length, backends, and how near they come to dense Cholesky.
CASES: dict[str, tuple[Any, hl.Backend, float]] = {
    "low rank, held": (ops.RBF, hl.LowRank(hold=True), 1e-5),
    "low rank, lazy": (ops.RBF, hl.LowRank(hold=False), 1e-5),
    "low rank, random": (ops.RBF, hl.LowRank(sampling="random", seed=3), 1e-5),
    "sparse": (lambda a: ops.Matern(a, nu=3.5), hl.Sparse(rho=4.0), 2e-2),
    # With balls that hold all points the factor is exact.
    "sparse, all": (
        lambda a: ops.Matern(a, nu=3.5),
        hl.Sparse(rho=1e3, nugget=1e-13, neighbours=400),
        1e-4,
    ),
    "sparse, following": (
        lambda a: ops.Matern(a, nu=3.5),
        hl.Sparse(rho=4.0, ordering="follow"),
        2e-2,
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def posterior(name: str, log_length: Tensor = LOG_LENGTH, backend: hl.Backend | None = None) -> Any:
    kernel, own, _ = CASES[name]
    pde, held = elliptic_pde(130, 40, 30)
    states = [{key: value + 0.3 for key, value in state.items()} for state in pde.zeros()]
    made = step(pde, {"u": kernel(log_length.exp())}, states, 1e-8, backend or own)
    return made, pde, held


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm() / b.norm()) <= tolerance


@cases
def test_solution_states_and_mean(name: str) -> None:
    (ours, pde, held), (dense, *_) = posterior(name), posterior(name, backend=hl.Dense())
    tolerance = CASES[name][2]
    assert ours.residual() < 1e-7
    for mine, theirs in zip(ours.states(pde), dense.states(pde), strict=True):
        for key, value in theirs.items():
            assert (mine[key] - value).abs().max() <= tolerance * max(1.0, value.abs().max())
    x = held.points
    assert near(ours.value(x), dense.value(x), tolerance)
    assert near(ours.gradient(x), dense.gradient(x), tolerance)
    assert near(ours.laplacian(x), dense.laplacian(x), 5 * tolerance)
    assert near(ours.hessian(x), dense.hessian(x), 5 * tolerance)
    assert near(ours.norm(), dense.norm(), tolerance)


@cases
def test_variance_and_samples(name: str) -> None:
    (ours, _, held), (dense, *_) = posterior(name), posterior(name, backend=hl.Dense())
    M = ops.Functionals.value_at(held.points[:6])
    deviation = dense.variance(M).clamp_min(0).sqrt()
    assert (ours.variance(M).clamp_min(0).sqrt() - deviation).abs().max() <= 0.1 * deviation.max()
    covariance = ours.covariance(M)
    assert torch.allclose(covariance.diagonal(), ours.variance(M), rtol=1e-3, atol=1e-10)
    draws = ours.sample(M, 4000, generator())
    assert near(draws.var(1), covariance.diagonal().clamp_min(1e-12), 0.2)


@cases
def test_hypergradient_of_validation_loss(name: str) -> None:
    def loss(log_length: Tensor) -> Tensor:
        made, _, held = posterior(name, log_length)
        state = {key: value + 0.3 for key, value in held.zeros().items()}
        blocks, target = held.linearised(state)
        return (made.evaluate(blocks) - target).square().mean() + made.alpha @ made.target / 1e3

    at = LOG_LENGTH.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    with torch.no_grad():
        e = 1e-4
        expected = (loss(at + e) - loss(at - e)) / (2 * e)
    assert float((gradient - expected).abs()) <= 1e-4 * float(expected.abs())


@pytest.mark.parametrize(("name", "tolerance"), [("low rank, lazy", 2e-3), ("sparse, all", 1e-4)])
def test_determinant_and_its_derivative(name: str, tolerance: float) -> None:
    found = []
    for backend in (None, hl.Dense()):
        at = LOG_LENGTH.clone().requires_grad_()
        logdet = posterior(name, at, backend)[0].factor.logdet()
        found.append((logdet.detach(), *torch.autograd.grad(logdet, at)))
    (value, slope), (dense_value, dense_slope) = found
    assert float((value - dense_value).abs()) <= tolerance * float(dense_value.abs())
    assert float((slope - dense_slope).abs()) <= tolerance * float(dense_slope.abs())


@pytest.mark.parametrize("name", ["low rank, held", "sparse, all"])
def test_objectives_work_with_it(name: str) -> None:
    for objective in (hl.LeaveOneOut(), hl.MarginalLikelihood(), hl.KernelFlow()):
        values = []
        for backend in (None, hl.Dense()):
            made = posterior(name, backend=backend)[0]
            held = None
            values.append(objective.loss(made, held, None, generator()))  # type: ignore[arg-type]
        assert float((values[0] - values[1]).abs()) <= 1e-2 * float(values[1].abs())


def test_rank_and_iterations_of_case_a() -> None:
    pde = case_a()["pde"]
    states = pde.zeros()
    made: Any = step(pde, {"u": ops.RBF(0.2)}, states, 1e-10, hl.LowRank())
    # Pivots until the trace of what is left is n times 1e-10: the number of eigenvalues above it.
    K = ops.KernelGram(made.rows)
    assert 262 <= pivoted_cholesky(K, atol=1e-10 * len(made.rows)).rank <= 320
    assert made.factor.info.converged
    assert made.factor.info.iterations <= 10
    assert made.residual() < 1e-6


def test_gauss_newton_keeps_the_prior_factor() -> None:
    pde, _ = elliptic_pde(80, 24)
    kernel = {"u": ops.Matern(0.5, nu=3.5)}
    first: Any = step(pde, kernel, pde.zeros(), 1e-8, hl.Sparse())
    second: Any = step(pde, kernel, first.states(pde), 1e-8, hl.Sparse(), previous=first)
    assert second.factor.prior is first.factor.prior
    other = {"u": ops.Matern(0.6, nu=3.5)}
    third: Any = step(pde, other, first.states(pde), 1e-8, hl.Sparse(), previous=first)
    assert third.factor.prior is not first.factor.prior
    alone = step(pde, kernel, first.states(pde), 1e-8, hl.Sparse())
    assert near(second.states(pde)[0]["u"], alone.states(pde)[0]["u"], 1e-6)


@pytest.mark.parametrize("backend", [hl.Sparse(rho=1e3), hl.Dense()])
def test_systems_derivatives_and_repeated_points(backend: hl.Backend) -> None:
    x = points.uniform_interior(30, points.UNIT_SQUARE, generator())
    f = x[:, 0] * x[:, 1]

    def coupled(x, grad_u, u, hess_v, lap_v, v):  # type: ignore[no-untyped-def]
        return torch.stack([grad_u[0] + v - 1.0, hess_v[0, 1] + lap_v + u - x[0], u + 0.5 * v])

    equations = [
        hl.Equation(coupled, x),
        # At the same points, and one of them twice.
        hl.Equation(
            lambda u, data: u - data, torch.cat([x[:10], x[:1]]), torch.cat([f[:10], f[:1]])
        ),
    ]
    pde = hl.PDE(equations)
    kernels = {"u": ops.Matern(0.7, nu=3.5), "v": ops.Matern(0.7, nu=3.5)}
    blocks = pde.linearised(pde.zeros()).blocks
    elementary = Elementary(blocks)
    assert elementary.split == {"v"}
    # u and the one derivative that an equation takes; v and three second derivatives.
    assert elementary.size == 30 * 2 + 30 * 4
    made = step(pde, kernels, pde.zeros(), 1e-6, backend)
    dense = step(pde, kernels, pde.zeros(), 1e-6, hl.Dense())
    ours, theirs = made.states(pde), dense.states(pde)
    for key in theirs[0]:
        assert near(ours[0][key], theirs[0][key], 1e-3), key
    assert near(made.laplacian(x, "v"), dense.laplacian(x, "v"), 1e-3)


def test_what_is_refused() -> None:
    pde, _ = elliptic_pde(40, 16)
    with pytest.raises(StructureError, match="infinitely smooth"):
        step(pde, {"u": ops.RBF(0.3)}, pde.zeros(), 1e-8, hl.Sparse())
    tight = points.uniform_interior(60, ((0.0, 1e-3), (0.0, 1e-3)), generator())
    close = hl.PDE([hl.Equation(lambda u: u - 1.0, tight)])
    with pytest.raises(NotPositiveDefiniteError):
        step(close, {"u": ops.Matern(10.0, nu=4.5)}, close.zeros(), 1e-8, hl.Sparse(nugget=0.0))
    for settings in ({"rho": 0.0}, {"nugget": -1.0}, {"neighbours": 0}, {"rtol": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            hl.Sparse(**settings)
    with pytest.raises(ValueError, match="expected"):
        hl.LowRank(left_out=0.0)


def test_what_has_not_converged_is_said() -> None:
    pde, _ = elliptic_pde(130, 40)
    with pytest.warns(ConvergenceWarning, match="maxiter"):
        step(pde, {"u": ops.Matern(0.4, nu=3.5)}, pde.zeros(), 1e-8, hl.Sparse(maxiter=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(pde, {"u": ops.Matern(0.4, nu=3.5)}, pde.zeros(), 1e-8, hl.Sparse())


def test_choice() -> None:
    def rows(n: int, d: int = 2) -> list[dict[str, ops.Functionals]]:
        return [{"u": ops.Functionals.laplacian_at(torch.rand(n, d, dtype=D))}]

    smooth, rough = {"u": ops.RBF(0.2)}, {"u": ops.Matern(0.2, nu=3.5)}
    assert isinstance(choose_backend(smooth, rows(500)), hl.Dense)
    assert isinstance(choose_backend(rough, rows(500)), hl.Dense)
    assert isinstance(choose_backend(smooth, rows(20_000)), hl.LowRank)
    assert isinstance(choose_backend(rough, rows(20_000)), hl.Sparse)
    # Balls in six dimensions hold all points.
    assert isinstance(choose_backend(rough, rows(10_000, 6)), hl.Dense)
    with pytest.raises(MemoryError, match="needs"):
        choose_backend(rough, rows(20_000, 6), memory=2**30)
    mixed = {"u": ops.RBF(0.2), "v": ops.Matern(0.2, nu=3.5)}
    refused = {type(one.backend): one.refused for one in candidates(mixed, rows(8_000))}
    assert refused[hl.LowRank]
    assert refused[hl.Sparse]
    pde, _ = elliptic_pde(40, 16)
    text = explain_backend(ops.RBF(0.3), pde)
    assert text.startswith("Dense(): 56 rows, exact and cheap")
    assert "no: an infinitely smooth kernel" in text
