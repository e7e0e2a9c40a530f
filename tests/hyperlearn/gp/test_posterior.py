"""`hyperlearn.gp.posterior`: against the dense formulas of conditioning."""

from __future__ import annotations

import pytest
import torch

import hyperlearn as hl
import operators as ops
from hyperlearn.experiments.references import points
from solvers import NotPositiveDefiniteError
from tests.hyperlearn.gp.problems import elliptic_pde, exact, generator

D = torch.float64


def posterior(nugget: float = 1e-8) -> tuple[hl.PDE, hl.Posterior]:
    pde, _ = elliptic_pde(40, 16)
    kernel = {"u": 1.5 * ops.Matern(0.6, nu=4.5)}
    return pde, hl.Posterior(kernel, pde.linearised(pde.zeros()), nugget)


def dense(pde: hl.PDE, p: hl.Posterior, M) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of functionals by the formulas, without scaling."""
    kernel, linear = p.kernels, p.linearised
    K = ops.gram(kernel, linear.blocks).to_dense()
    A = K + p.nugget * torch.diag(K.diagonal())
    cross = ops.gram(kernel, M, linear.blocks).to_dense()
    mean = cross @ torch.linalg.solve(A, linear.target)
    covariance = ops.gram(kernel, M).to_dense() - cross @ torch.linalg.solve(A, cross.T)
    return mean, covariance


def test_mean_and_covariance_are_those_of_conditioning() -> None:
    pde, p = posterior()
    x = torch.rand(6, 2, dtype=D, generator=generator(3))
    M = [{"u": ops.Functionals.value_at(x)}, {"u": ops.Functionals.laplacian_at(x)}]
    mean, covariance = dense(pde, p, M)
    torch.testing.assert_close(p.evaluate(M), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.covariance(M), covariance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.variance(M), covariance.diagonal(), rtol=1e-5, atol=1e-5)


def test_derivatives_of_the_mean_are_those_of_its_values() -> None:
    _, p = posterior()
    x = torch.rand(5, 2, dtype=D, generator=generator(4))

    def u(z: torch.Tensor) -> torch.Tensor:
        return p.value(z[None])[0]

    gradient = torch.func.vmap(torch.func.jacrev(u))(x)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(u)))(x)
    torch.testing.assert_close(p.gradient(x), gradient, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(p.hessian(x), hessian, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        p.laplacian(x), hessian.diagonal(0, 1, 2).sum(-1), rtol=1e-6, atol=1e-6
    )


def test_samples_have_the_mean_and_the_variance() -> None:
    pde, _ = elliptic_pde(8, 8)
    p = hl.Posterior({"u": ops.RBF(0.6)}, pde.linearised(pde.zeros()), 1e-6)
    x = torch.rand(4, 2, dtype=D, generator=generator(5))
    M = ops.Functionals.value_at(x)
    draws = p.sample(M, 4000, generator(6))
    spread = p.variance(M).sqrt()
    assert draws.shape == (4, 4000)
    assert ((draws.mean(1) - p.evaluate(M)).abs() < 5 * spread / 4000**0.5 + 1e-12).all()
    torch.testing.assert_close(draws.std(1), spread, rtol=0.1, atol=1e-6)


def test_equations_have_no_variance_left() -> None:
    _, p = posterior(1e-10)
    u = p.linearised.blocks
    prior = ops.Representers(p.kernels, u).variances()
    assert float((p.variance(u) / prior).abs().max()) < 1e-8


def test_norm_and_residual() -> None:
    _, p = posterior()
    K = ops.gram(p.kernels, p.linearised.blocks).to_dense()
    a = p.alpha * p.scale
    torch.testing.assert_close(p.norm(), (a @ K @ a).sqrt(), rtol=1e-6, atol=0)
    assert p.residual() < 1e-8


def test_noise_is_that_of_regression() -> None:
    x = torch.linspace(0, 1, 12, dtype=D)[:, None]
    y = torch.sin(5 * x[:, 0])
    pde = hl.PDE([hl.Equation(lambda u, data: u - data, x, y, noise=0.3)])
    kernel = ops.RBF(0.2)
    p = hl.Posterior({"u": kernel}, pde.linearised(pde.zeros()), 1e-12)
    expected = kernel(x) @ torch.linalg.solve(kernel(x) + 0.09 * torch.eye(12, dtype=D), y)
    torch.testing.assert_close(p.value(x), expected, rtol=1e-7, atol=1e-9)


def test_the_nugget_controls_the_error() -> None:
    errors = []
    pde, _ = elliptic_pde(200, 80)
    grid = points.grid(12, points.UNIT_SQUARE)
    for nugget in (1e-4, 1e-8, 1e-12):
        u = hl.solve_pde(pde, ops.RBF(0.4), nugget=nugget)
        errors.append(float((u.value(grid) - exact(grid)).square().mean().sqrt()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.rand(9, 1, dtype=dtype, generator=generator(1))
    pde = hl.PDE([hl.Equation(lambda u, data: u - data, x, x[:, 0])])
    kernel = ops.RBF(torch.tensor(0.4, dtype=dtype))
    p = hl.Posterior({"u": kernel}, pde.linearised(pde.zeros()), 1e-4)
    assert p.value(x).dtype == dtype


def test_float32_cannot_have_the_nugget_of_float64() -> None:
    pde, _ = elliptic_pde(200, 80)
    single = hl.PDE([
        hl.Equation(e.residual, e.points.float(), None if e.data is None else e.data.float())
        for e in pde.equations
    ])  # fmt: skip
    kernel = ops.RBF(torch.tensor(0.3))
    with pytest.raises(NotPositiveDefiniteError, match="float32; enlarge the nugget"):
        hl.solve_pde(single, kernel, nugget=1e-10)
    assert (
        hl.solve_pde(single, kernel, nugget=1e-5)
        .value(points.grid(4, points.UNIT_SQUARE).float())
        .isfinite()
        .all()
    )


def test_duplicate_points_need_a_nugget() -> None:
    x = torch.rand(10, 2, dtype=D, generator=generator(1))
    twice = torch.cat([x, x])
    pde = hl.PDE([hl.Equation(lambda u, data: u - data, twice, twice[:, 0])])
    p = hl.Posterior({"u": ops.RBF(0.4)}, pde.linearised(pde.zeros()), 1e-10)
    torch.testing.assert_close(p.value(x), x[:, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(NotPositiveDefiniteError, match="nearly the same twice"):
        hl.Posterior({"u": ops.RBF(0.4)}, pde.linearised(pde.zeros()), 0.0)


def test_names_of_fields() -> None:
    pde, p = posterior()
    x = torch.rand(2, 2, dtype=D)
    with pytest.raises(ValueError, match="no field 'v'; there are u"):
        p.value(x, "v")
    with pytest.raises(ValueError, match="count=0"):
        p.sample(ops.Functionals.value_at(x), 0)
    with pytest.raises(ValueError, match="expected a Kernel for each of u"):
        hl.solve_pde(pde, {"w": ops.RBF(1.0)})
