"""The Neumann series against its partial sums written out, its error bound and its divergence."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, Neumann, NotConvergedError
from solvers.stationary.neumann import spectral_radius

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def truncated(matrix: Tensor, b: Tensor, step_size: float, K: int) -> Tensor:
    solver = Neumann(step_size=step_size, maxiter=K, stop_at_maxiter=True, rtol=0.0)
    return solver.prepare(ops.Dense(matrix)).solve(b).value


@PROPERTY
@given(
    n=st.integers(1, 6), K=st.integers(1, 20), alpha=st.floats(0.05, 1.0), seed=st.integers(0, 99)
)
def test_k_products_give_the_partial_sum_of_k_plus_one_terms(n, K, alpha, seed):
    # Not symmetric, and I - A of norm 0.9: the terms do not grow.
    contraction = sampled(n, n, seed=seed)
    contraction = 0.9 * contraction / torch.linalg.matrix_norm(contraction, 2)
    matrix = torch.eye(n, dtype=FLOAT64) - contraction
    b = sampled(n, 2, seed=seed + 1)
    step = torch.eye(n, dtype=FLOAT64) - alpha * matrix
    total = torch.zeros_like(b)
    for j in range(K + 1):
        total = total + alpha * torch.linalg.matrix_power(step, j) @ b
    error = truncated(matrix, b, alpha, K) - total
    assert error.abs().max() <= 1e-12 * max(1.0, float(total.abs().max()))


@pytest.mark.parametrize("K", [1, 2, 10, 100])
def test_step_size_multiplies_the_whole_sum(K):
    """On ``A = a I`` the sum is geometric. ``eta b + sum`` in its place is 4.6 times too long."""
    a, alpha, b = 0.7, 0.16, sampled(4)
    expected = (1 - (1 - alpha * a) ** (K + 1)) / a * b
    x = truncated(a * torch.eye(4, dtype=FLOAT64), b, alpha, K)
    torch.testing.assert_close(x, expected, rtol=1e-13, atol=0)


@PROPERTY
@given(
    n=st.integers(2, 10),
    K=st.integers(1, 60),
    smallest=st.floats(0.01, 1.0),
    fraction=st.floats(0.1, 1.0),
    seed=st.integers(0, 99),
)
def test_error_bound(n, K, smallest, fraction, seed):
    matrix, largest = spd(torch.linspace(smallest, 3.0, n, dtype=FLOAT64), seed), 3.0
    alpha, b = fraction / largest, sampled(n, seed=seed + 1)
    solution = torch.linalg.solve(matrix, b)
    error = torch.linalg.vector_norm(truncated(matrix, b, alpha, K) - solution)
    bound = (1 - alpha * smallest) ** (K + 1) * torch.linalg.vector_norm(solution)
    assert error <= bound * (1 + 1e-10) + 1e-13 * torch.linalg.vector_norm(solution)


def test_error_bound_is_attained_on_the_slowest_eigenvector():
    matrix, b = torch.diag(torch.tensor([0.1, 1.0], dtype=FLOAT64)), torch.eye(2, dtype=FLOAT64)[0]
    error = torch.linalg.vector_norm(truncated(matrix, b, 1.0, 20) - 10 * b) / 10
    assert float(error) == pytest.approx(0.9**21, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 0.5, 3.0, 1e6])
def test_scaling_the_operator_against_the_step_size(scale):
    """G -> c G and alpha -> alpha / c leaves the series of ``c A`` at 1/c of that of A."""
    matrix, b = spd(torch.linspace(0.5, 2.0, 5, dtype=FLOAT64)), sampled(5, seed=1)
    plain = truncated(matrix, b, 0.4, 7)
    scaled = truncated(scale * matrix, b, 0.4 / scale, 7)
    torch.testing.assert_close(scaled, plain / scale, rtol=1e-13, atol=0)


class TestDivergence:
    matrix = spd(torch.linspace(0.5, 2.0, 6, dtype=FLOAT64))
    b = sampled(6, seed=1)

    @pytest.mark.parametrize("factor", [2.1, 3.0, 100.0])
    def test_a_step_size_beyond_two_over_l_is_flagged(self, factor):
        solver = Neumann(step_size=factor / 2.0, maxiter=200)
        with pytest.warns(ConvergenceWarning, match=r"diverged.*exceeds 2 / L"):
            x, info = solver.prepare(ops.Dense(self.matrix)).solve(self.b)
        assert info.status == "diverged"
        assert not info.converged
        assert torch.isfinite(x).all()  # it stopped in time
        assert info.residual > 1

    def test_is_flagged_where_truncation_is_the_method(self):
        solver = Neumann(step_size=5.0, maxiter=50, stop_at_maxiter=True)
        with pytest.warns(ConvergenceWarning, match="diverged"):
            solver.prepare(ops.Dense(self.matrix)).solve(self.b)

    def test_strict_raises(self):
        solver = Neumann(step_size=5.0, strict=True)
        with pytest.raises(NotConvergedError, match="diverged"):
            solver.prepare(ops.Dense(self.matrix)).solve(self.b)

    def test_just_below_two_over_l_it_converges(self):
        solver = Neumann(step_size=1.9 / 2.0, maxiter=2000, rtol=1e-10, strict=True)
        x, _ = solver.prepare(ops.Dense(self.matrix)).solve(self.b)
        torch.testing.assert_close(x, torch.linalg.solve(self.matrix, self.b), rtol=1e-8, atol=1e-9)

    def test_a_negative_eigenvalue_diverges_at_any_step_size(self):
        A = ops.Diagonal(torch.tensor([1.0, -0.5], dtype=FLOAT64))
        for step_size in (None, 0.1, 1.0):
            with pytest.warns(ConvergenceWarning, match="diverged"):
                Neumann(step_size=step_size, maxiter=1000).prepare(A).solve(
                    torch.ones(2, dtype=FLOAT64)
                )


class TestIterationLimit:
    A = ops.Diagonal(torch.tensor([1.0, 0.01], dtype=FLOAT64))
    b = torch.ones(2, dtype=FLOAT64)

    def test_is_flagged(self):
        with pytest.warns(ConvergenceWarning, match="maxiter after 5 iterations"):
            x, info = Neumann(step_size=1.0, maxiter=5).prepare(self.A).solve(self.b)
        assert not info.converged
        residual = torch.linalg.vector_norm(self.b - self.A @ x) / torch.linalg.vector_norm(self.b)
        assert info.residual == pytest.approx(float(residual), rel=1e-13)
        assert info.residual == pytest.approx(0.99**6 / 2**0.5, rel=1e-13)

    def test_truncation_as_the_method_is_silent_but_not_converged(self):
        solver = Neumann(step_size=1.0, maxiter=5, stop_at_maxiter=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, info = solver.prepare(self.A).solve(self.b)
        assert not info.converged
        assert info.status == "maxiter"
        assert info.iterations == 5
        assert info.products == 5 + 1  # that of the residual

    def test_stops_early_once_the_tolerance_is_met(self):
        A = ops.Diagonal(torch.tensor([1.0, 0.5], dtype=FLOAT64))
        _, info = Neumann(step_size=1.0, maxiter=1000, rtol=1e-6).prepare(A).solve(self.b)
        assert info.converged
        assert info.iterations <= 21  # 2^-20 < 1e-6


class TestAutomaticStepSize:
    @PROPERTY
    @given(n=st.integers(1, 12), condition=st.floats(1.0, 30.0), seed=st.integers(0, 999))
    def test_converges(self, n, condition, seed):
        scale = 10.0 ** (seed % 13 - 6)  # whatever the units are
        matrix = scale * spd(torch.linspace(1.0, condition, n, dtype=FLOAT64), seed)
        b = sampled(n, seed=seed + 1)
        solver = Neumann(rtol=1e-8, maxiter=3000, strict=True)
        x, _ = solver.prepare(ops.Dense(matrix, symmetric=True)).solve(b)
        expected = torch.linalg.solve(matrix, b)
        error = torch.linalg.vector_norm(x - expected)
        assert error <= 1e-8 * condition * torch.linalg.vector_norm(expected)

    def test_estimate_is_below_the_largest_eigenvalue_and_near_it(self):
        A = ops.Dense(spd(torch.linspace(1.0, 20.0, 30, dtype=FLOAT64)), symmetric=True)
        assert 0.9 * 20 <= spectral_radius(A, 20) <= 20 * (1 + 1e-12)
        assert spectral_radius(A, 20) == spectral_radius(A, 20)

    def test_of_the_zero_operator(self):
        A = ops.Dense(torch.zeros(2, 2), symmetric=True)
        assert spectral_radius(A, 3) == 0.0
        with pytest.warns(ConvergenceWarning):
            _, info = Neumann(maxiter=3).prepare(A).solve(torch.ones(2))
        assert info.residual == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"step_size=0.0; expected a positive number"),
        ({"step_size": -1.0}, r"step_size=-1.0"),
        ({"step_size": float("nan")}, r"step_size=nan"),
        ({"power_iterations": 0}, r"power_iterations=0; expected >= 1"),
        ({"maxiter": 0}, r"maxiter=0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Neumann(**settings)
