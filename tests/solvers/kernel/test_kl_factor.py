"""The sparse inverse factor against dense matrices, and its derivatives against differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import KLCholesky, KLFactor, KLPattern, NotPositiveDefiniteError, kl_factor
from solvers.kernel import kl_columns
from tests.solvers.kernel.grams import (
    PointGram,
    cloud,
    grid,
    matern52,
    matern72,
    rbf,
    values_and_laplacians,
)

KERNELS = {"5/2": matern52, "7/2": matern72}


def gram(kernel: str = "5/2", side: int = 7, length: float = 0.4) -> PointGram:
    points, orders = values_and_laplacians(grid(side))
    return PointGram(KERNELS[kernel], points, orders, length)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(factor: KLFactor, matrix: Tensor) -> float:
    """KL(N(0, A) | N(0, (U U^T)^-1)), of the definition."""
    U = torch.from_numpy(factor.to_scipy().toarray())
    order = torch.from_numpy(factor.pattern.order)
    M = U.T @ matrix[order][:, order] @ U
    return float(M.trace() - len(M) - torch.logdet(M)) / 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ordering", ["derivatives-last", "follow"])
def test_it_is_exact_where_the_balls_hold_everything(kernel, ordering):
    A = gram(kernel)
    matrix = A.to_dense()
    factor = kl_factor(A, KLCholesky(rho=100.0, ordering=ordering))
    n = len(matrix)
    assert factor.factor_nonzeros == n * (n + 1) // 2
    v = random(n, 3)
    torch.testing.assert_close(factor.product(v), matrix @ v, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(factor.product(v[:, 0]), matrix @ v[:, 0], rtol=1e-9, atol=1e-6)
    residual = matrix @ factor.solve(v) - v
    assert residual.norm() <= 1e-6 * v.norm()
    torch.testing.assert_close(factor.logdet(), torch.logdet(matrix))
    diagonal = torch.linalg.inv(matrix).diagonal()
    torch.testing.assert_close(factor.inverse_diagonal(), diagonal, rtol=1e-6, atol=0)
    torch.testing.assert_close(factor.solve(factor.product(v)), v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ordering", ["derivatives-last", "follow"])
def test_the_error_falls_with_rho(kernel, ordering):
    A = gram(kernel, side=12)
    matrix = A.to_dense()
    v = matrix @ random(len(matrix))
    logdet = torch.logdet(matrix)
    divergences, errors = [], []
    for rho in (2.0, 3.0, 4.0, 6.0):
        factor = kl_factor(A, KLCholesky(rho=rho, ordering=ordering))
        divergences.append(divergence(factor, matrix))
        errors.append(float((factor.product(v) - matrix @ v).norm() / (matrix @ v).norm()))
        # At the minimum of the divergence the trace is n, so that it is half of this difference.
        gap = float(factor.logdet() - logdet) / 2
        assert gap == pytest.approx(divergences[-1], rel=1e-4, abs=1e-6)
    for worse, better in itertools.pairwise(divergences):
        assert better < 0.4 * worse
    assert errors[-1] < 0.02 < errors[0]


def test_no_factor_of_this_pattern_is_closer():
    A = gram(side=6)
    matrix = A.to_dense()
    factor = kl_factor(A, KLCholesky(rho=2.0))
    least = divergence(factor, matrix)
    kept = factor.values
    for seed in range(5):
        moved = kept * (1 + 1e-3 * random(len(kept), seed=seed))
        factor.values = moved
        del factor.numbers
        assert divergence(factor, matrix) > least
        factor.values = kept


def test_a_column_is_that_of_the_inverse_of_its_gram_matrix():
    A = gram(side=6)
    factor = kl_factor(A, KLCholesky(rho=2.0, nugget=1e-3))
    pattern, U = factor.pattern, torch.from_numpy(factor.to_scipy().toarray())
    for c in (0, 17, 40, 71):
        places = pattern.indices[pattern.pointers[c] : pattern.pointers[c + 1]]
        s = torch.from_numpy(pattern.order[places])
        local = A.submatrix(s, s)
        local = local + 1e-3 * torch.diag(local.diagonal())
        inverse = torch.linalg.inv(local)
        expected = inverse[:, -1] / inverse[-1, -1].sqrt()
        found = U[torch.from_numpy(places).long(), int(pattern.columns[c])]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert (U[:, int(pattern.columns[c])] != 0).sum() == len(places)


@pytest.mark.parametrize("supernodes", [1.0, 2.0])
def test_batches_and_supernodes_change_no_column(supernodes, monkeypatch):
    A = gram(side=6)
    settings = KLCholesky(rho=2.0, supernodes=supernodes)
    whole = kl_factor(A, settings).values
    monkeypatch.setattr(kl_columns, "ENTRIES", 2000)
    torch.testing.assert_close(kl_factor(A, settings).values, whole, rtol=1e-8, atol=1e-10)


def test_samples_have_the_covariance():
    A = gram(side=4, length=0.7)
    factor = kl_factor(A, KLCholesky(rho=100.0))
    count = 20_000
    samples = factor.sample(torch.Generator().manual_seed(0), count)
    white = factor.whiten(samples)
    torch.testing.assert_close(
        white @ white.T / count, torch.eye(32, dtype=torch.float64), rtol=0, atol=0.04
    )
    matrix = A.to_dense()
    scale = matrix.diagonal().rsqrt()
    covariance = scale[:, None] * (samples @ samples.T / count) * scale
    correlation = scale[:, None] * matrix * scale
    torch.testing.assert_close(covariance, correlation, rtol=0, atol=0.05)
    one = factor.sample(torch.Generator().manual_seed(1))
    again = factor.sample(torch.Generator().manual_seed(1))
    assert one.shape == (32,)
    assert torch.equal(one, again)


# --- derivatives ------------------------------------------------------------------------------


def small(ordering: str = "derivatives-last") -> tuple[Tensor, Tensor, KLPattern]:
    points, orders = values_and_laplacians(cloud(6))
    return points, orders, KLPattern.of(points, orders, rho=1.5, neighbours=1, ordering=ordering)


DERIVED = ["values", "solve", "product", "whiten", "logdet", "inverse_diagonal", "sample"]


def inputs() -> tuple[Tensor, Tensor]:
    length = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    return length, torch.tensor(1.3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("what", DERIVED)
@pytest.mark.parametrize(
    ("nugget", "entries", "ordering"), [(0.0, 400, "follow"), (1e-2, 10**6, "derivatives-last")]
)
def test_first_derivatives(nugget, what, entries, ordering, monkeypatch):
    monkeypatch.setattr(kl_columns, "ENTRIES", entries)
    points, orders, pattern = small(ordering)
    assert pattern.nnz < 12 * 13 // 2  # sparse

    def function(length: Tensor, amplitude: Tensor, b: Tensor) -> Tensor:
        A = PointGram(matern72, points, orders, length, amplitude)
        factor = KLFactor(A, pattern, nugget)
        if what in ("solve", "product", "whiten"):
            return getattr(factor, what)(b)
        if what == "sample":
            return factor.sample(torch.Generator().manual_seed(0), 2)
        return factor.values if what == "values" else getattr(factor, what)()

    for b in (random(12), random(12, 2)):
        args = (*inputs(), b.requires_grad_())
        assert torch.autograd.gradcheck(function, args, eps=1e-6, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("what", ["solve", "product", "logdet"])
def test_second_derivatives(what):
    points, orders, pattern = small()

    def function(length: Tensor, amplitude: Tensor, b: Tensor) -> Tensor:
        A = PointGram(matern72, points, orders, length, amplitude)
        factor = KLFactor(A, pattern, 1e-2)
        if what == "logdet":
            return factor.logdet()
        return (b * getattr(factor, what)(b)).sum().log()

    args = (*inputs(), random(12).requires_grad_())
    assert torch.autograd.gradgradcheck(function, args, eps=1e-6, atol=1e-4, rtol=1e-4)


def test_derivatives_with_respect_to_points():
    points, orders, pattern = small()

    def likelihood(points: Tensor) -> Tensor:
        factor = KLFactor(PointGram(matern72, points, orders, 0.6), pattern, 1e-3)
        return factor.logdet() + factor.whiten(torch.ones(12, dtype=torch.float64)).square().sum()

    assert torch.autograd.gradcheck(likelihood, points.requires_grad_(), atol=1e-3, rtol=1e-5)


def test_likelihood_of_torch_func_and_of_the_dense_matrix():
    points, orders = values_and_laplacians(grid(5))
    pattern = KLPattern.of(points, orders, rho=100.0)
    y = random(50)

    def sparse(length: Tensor) -> Tensor:
        factor = KLFactor(PointGram(matern72, points, orders, length), pattern)
        return factor.logdet() + y @ factor.solve(y)

    def dense(length: Tensor) -> Tensor:
        matrix = PointGram(matern72, points, orders, length).to_dense()
        return torch.logdet(matrix) + y @ torch.linalg.solve(matrix, y)

    length = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.grad(sparse)(length), torch.func.grad(dense)(length), rtol=1e-6, atol=0
    )
    moved = length.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sparse(moved), moved)
    torch.testing.assert_close(gradient, torch.func.grad(sparse)(length))


def test_a_matrix_is_differentiated_where_it_was_read():
    A = gram(side=3).to_dense()
    points, orders = values_and_laplacians(grid(3))
    pattern = KLPattern.of(points, orders, rho=1.2, supernodes=1.0, neighbours=1)

    def logdet(matrix: Tensor, diagonal: Tensor) -> Tensor:
        K = ops.Dense((matrix + matrix.T) / 2, symmetric=True) + ops.Diagonal(diagonal)
        return KLFactor(K, pattern).logdet()

    args = (A.requires_grad_(), torch.full((18,), 1e-2).double().requires_grad_())
    assert torch.autograd.gradcheck(logdet, args, eps=1e-5, atol=1e-3, rtol=1e-4)


# --- awkward functionals ----------------------------------------------------------------------


def test_rows_at_one_point_work():
    # Value and Laplacian at each point are different functionals; one of them alone is dependent.
    points, orders = values_and_laplacians(cloud(15))
    A = PointGram(matern72, points, orders, 0.5)
    residual = A.to_dense() @ kl_factor(A, KLCholesky(rho=50.0)).solve(A @ random(30)) - A @ (
        random(30)
    )
    assert residual.norm() < 1e-6 * (A @ random(30)).norm()


def test_the_same_functional_twice_needs_a_nugget():
    points = torch.cat([cloud(10), cloud(10)])
    A = PointGram(matern52, points, torch.zeros(20, dtype=torch.long), 0.5)
    with pytest.raises(NotPositiveDefiniteError, match=r"functional \d+ .*nugget="):
        kl_factor(A)
    nugget = 1e-3
    matrix = A.to_dense() + nugget * torch.eye(20)
    for factor in (
        kl_factor(A, KLCholesky(rho=100.0), nugget=nugget),
        kl_factor(A, KLCholesky(rho=100.0, nugget=nugget)),
        kl_factor(A + nugget * ops.Identity(20), KLCholesky(rho=100.0)),
    ):
        torch.testing.assert_close(factor.product(random(20)), matrix @ random(20))


def test_a_kernel_that_is_too_smooth_is_refused_with_advice():
    A = PointGram(rbf, grid(20), torch.zeros(400, dtype=torch.long), 0.5)
    with pytest.raises(NotPositiveDefiniteError, match="PivotedCholesky"):
        kl_factor(A, KLCholesky(rho=6.0))


def test_update_keeps_the_pattern():
    A, B = gram(length=0.4), gram(length=0.3)
    factor = kl_factor(A)
    updated = factor.update(B)
    assert updated.pattern is factor.pattern
    assert torch.equal(updated.values, kl_factor(B).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    points = grid(6)
    K = PointGram(matern52, points, torch.zeros(36, dtype=torch.long), 0.2).to_dense()
    pattern = KLPattern.of(points)
    A = ops.Dense(K.to(dtype), symmetric=True) + 0.1 * ops.Identity(36)
    factor = kl_factor(A, pattern)
    v = random(36).to(dtype)
    assert factor.solve(v).dtype == factor.logdet().dtype == dtype
    expected = torch.linalg.solve(K + 0.1 * torch.eye(36), v.double())
    assert (factor.solve(v).double() - expected).norm() < 0.05 * expected.norm()


def test_what_is_refused():
    A = gram(side=3)
    pattern = KLPattern.of(A.points, A.orders)
    with pytest.raises(ValueError, match="pattern has 18 functionals"):
        kl_factor(gram(side=4), pattern)
    with pytest.raises(ValueError, match="does not claim"):
        kl_factor(ops.Dense(random(18, 18)), pattern)
    with pytest.raises(TypeError, match="KLCholesky"):
        kl_factor(A, 3.0)
    factor = kl_factor(A, pattern)
    with pytest.raises(ValueError, match=r"b has shape \(3,\); expected \(18,\)"):
        factor.solve(random(3))
    with pytest.raises(TypeError, match="float32"):
        factor.product(torch.ones(18))
