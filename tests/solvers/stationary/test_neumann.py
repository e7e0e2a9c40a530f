"""The Neumann series against its partial sums written out, its error bound and its divergence."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, Neumann, NotConvergedError

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


class TestBoundBeforehand:
    """|error| <= (1 - alpha mu)^(K+1) |x|, in words in `Info.reason`."""

    values = torch.linspace(0.1, 2.0, 20, dtype=FLOAT64)

    @pytest.mark.parametrize("K", [1, 7, 40])
    @pytest.mark.parametrize("step_size", [None, 0.4])
    def test_holds_and_is_attained(self, K, step_size):
        solver = Neumann(
            step_size=step_size, maxiter=K, stop_at_maxiter=True, smallest_eigenvalue=0.1
        )
        b = torch.eye(20, dtype=FLOAT64)  # every eigenvector
        x, info = solver.prepare(ops.Diagonal(self.values)).solve(b)
        stated = float(re.search(r"\|error\| <= (\S+) \|x\| for eigenvalues", info.reason)[1])
        error = ((torch.diag(x) - 1 / self.values) * self.values).abs().max()
        assert float(error) == pytest.approx(stated, rel=0.05)  # two digits are printed

    def test_holds_where_the_operator_is_not_symmetric(self):
        noise = sampled(12, 12)
        matrix = torch.eye(12, dtype=FLOAT64) + 0.8 * noise / torch.linalg.matrix_norm(noise, 2)
        mu = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
        solver = Neumann(maxiter=9, stop_at_maxiter=True, smallest_eigenvalue=mu)
        b = torch.eye(12, dtype=FLOAT64)
        x, info = solver.prepare(ops.Dense(matrix)).solve(matrix @ b)
        stated = float(re.search(r"\|error\| <= (\S+)", info.reason)[1])
        assert 0 < torch.linalg.matrix_norm(x - b, 2) <= 1.05 * stated

    def test_an_estimate_is_called_one_and_only_a_converged_one_bounds_from_above(self):
        few = ops.Diagonal(torch.tensor([0.1, 0.5, 2.0], dtype=FLOAT64).repeat(5))
        info = Neumann(maxiter=5, stop_at_maxiter=True).prepare(few).solve(torch.ones(15).double())
        assert "|error| <= 0.74 |x| for eigenvalues >= 0.1 as estimated" in info.info.reason
        many = ops.Diagonal(torch.logspace(-4, 0, 200, dtype=FLOAT64))
        b = torch.eye(200, dtype=FLOAT64)
        x, info = Neumann(maxiter=50, stop_at_maxiter=True).prepare(many).solve(b)
        stated = float(re.search(r"\|error\| >= (\S+) \|x\| for the worst b", info.reason)[1])
        error = ((torch.diag(x) - 1 / many.values) * many.values).abs().max()
        assert 0 < stated <= float(error) * 1.05


def test_the_adjoint_identity_holds_at_every_truncation():
    matrix = torch.eye(8, dtype=FLOAT64) + 0.1 * sampled(8, 8)
    prepared = Neumann(maxiter=2, stop_at_maxiter=True).prepare(ops.Dense(matrix))
    b, u = sampled(8, seed=1), sampled(8, seed=2)
    left, right = u @ prepared.solve(b).value, prepared.solve_transpose(u).value @ b
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


def test_a_column_that_diverges_does_not_stop_the_others():
    A = ops.Diagonal(torch.tensor([0.5, 1.0, 3.0], dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match="diverged"):
        x, info = (
            Neumann(step_size=1.0, rtol=1e-9, maxiter=200)
            .prepare(A)
            .solve(torch.eye(3, dtype=FLOAT64))
        )
    torch.testing.assert_close(x[:, :2], torch.eye(3, 2).double() * torch.tensor([2.0, 1.0]))
    assert torch.isfinite(x).all()
    assert info.status == "diverged"


def test_float32_reaches_the_accuracy_of_float32():
    matrix = spd(torch.linspace(1, 5, 20, dtype=FLOAT64))
    solver = Neumann(rtol=2e-6, maxiter=500, strict=True)
    x, _ = solver.prepare(ops.Dense(matrix.float(), symmetric=True)).solve(sampled(20).float())
    assert x.dtype == torch.float32
    expected = torch.linalg.solve(matrix, sampled(20))
    assert (x - expected).norm() <= 1e-5 * expected.norm()


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

    @PROPERTY
    @given(n=st.integers(2, 20), size=st.floats(0.1, 0.8), seed=st.integers(0, 999))
    def test_converges_for_operators_that_are_not_symmetric(self, n, size, seed):
        noise = sampled(n, n, seed=seed)
        matrix = torch.eye(n, dtype=FLOAT64) + size * noise / torch.linalg.matrix_norm(noise, 2)
        matrix = 10.0 ** (seed % 13 - 6) * matrix
        b = sampled(n, 2, seed=seed + 1)
        prepared = Neumann(rtol=1e-9, maxiter=3000, strict=True).prepare(ops.Dense(matrix))
        for x, A in ((prepared.solve(b), matrix), (prepared.solve_transpose(b), matrix.T)):
            torch.testing.assert_close(x.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-6)

    def test_one_over_the_norm_would_diverge_where_eigenvalues_are_complex(self):
        matrix = torch.tensor([[1.0, -5.0], [5.0, 1.0]], dtype=FLOAT64)
        A, b = ops.Dense(matrix), torch.ones(2, dtype=FLOAT64)
        norm = float(torch.linalg.matrix_norm(matrix, 2))
        with pytest.warns(ConvergenceWarning, match="diverged"):
            Neumann(step_size=1 / norm, maxiter=500).prepare(A).solve(b)
        x, _ = Neumann(rtol=1e-8, maxiter=2000, strict=True).prepare(A).solve(b)
        torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=0)

    def test_is_reported(self):
        values = torch.linspace(1, 4, 30, dtype=FLOAT64)
        info = Neumann(rtol=1e-6, maxiter=500).prepare(ops.Diagonal(values)).solve(values).info
        stated = float(re.search(r"step_size (\S+) = 1 / L by 10 Krylov steps", info.reason)[1])
        assert 0.24 < stated < 0.255
        assert info.products == info.iterations + 1  # those of the estimate belong to `prepare`
        given = Neumann(step_size=0.2, maxiter=500).prepare(ops.Diagonal(values)).solve(values)
        assert "step_size 0.2 as given" in given.info.reason

    def test_what_no_step_size_can_do_is_said(self):
        A = ops.Diagonal(torch.tensor([1.0, -0.5], dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match=r"not positive definite.*real part -0\.5"):
            Neumann(maxiter=1000).prepare(A).solve(torch.ones(2, dtype=FLOAT64))
        A = ops.Dense(torch.tensor([[0.1, -5.0], [-5.0, 0.1]], dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match=r"perhaps no step size.*real part -4\.9"):
            Neumann(maxiter=1000).prepare(A).solve(torch.ones(2, dtype=FLOAT64))

    def test_each_member_of_a_batch_has_its_own(self):
        """Up to 1 and up to 1000: one step for both would take 1000 times as long."""
        parts = [ops.Dense(c * spd(torch.linspace(0.5, 1, 6).double(), i), symmetric=True)
                 for i, c in enumerate((1.0, 30.0, 1000.0))]  # fmt: skip
        b = sampled(18, 2)
        prepared = Neumann(rtol=1e-10, maxiter=200, strict=True).prepare(ops.Stacked(parts))
        x, info = prepared.solve(b)
        singles = [Neumann(rtol=1e-10, maxiter=200).prepare(A).solve(b[6 * i : 6 * i + 6])
                   for i, A in enumerate(parts)]  # fmt: skip
        torch.testing.assert_close(x, torch.cat([s.value for s in singles]), rtol=1e-9, atol=0)
        assert info.iterations == max(single.info.iterations for single in singles) < 60

    def test_of_the_zero_operator(self):
        A = ops.Dense(torch.zeros(2, 2), symmetric=True)
        with pytest.warns(ConvergenceWarning):
            _, info = Neumann(maxiter=3).prepare(A).solve(torch.ones(2))
        assert info.residual == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"step_size=0.0; expected a positive number"),
        ({"step_size": -1.0}, r"step_size=-1.0"),
        ({"step_size": float("nan")}, r"step_size=nan"),
        ({"estimation_steps": 0}, r"estimation_steps=0; expected at least 1"),
        ({"smallest_eigenvalue": 0.0}, r"smallest_eigenvalue=0.0; expected a positive number"),
        ({"maxiter": 0}, r"maxiter=0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Neumann(**settings)
