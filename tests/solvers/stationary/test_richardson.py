"""Richardson's iterations against their residual polynomials, and their rates."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
import solvers
from solvers import ConvergenceWarning, Neumann, StructureError
from solvers.stationary.richardson import Richardson

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64
ACCELERATIONS = ("none", "heavy-ball", "chebyshev")


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def residual_factors(values: Tensor, K: int, **settings) -> Tensor:
    """p_K(lambda) for each eigenvalue: the residual of the right-hand side of ones."""
    solver = Richardson(maxiter=K, stop_at_maxiter=True, rtol=0.0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = solver.prepare(ops.Diagonal(values)).solve(torch.ones_like(values)).value
    return 1 - values * x


class TestResidualPolynomials:
    l, L = 0.1, 3.0  # noqa: E741
    values = torch.linspace(l, L, 41, dtype=FLOAT64)
    q = (math.sqrt(L / l) - 1) / (math.sqrt(L / l) + 1)

    @pytest.mark.parametrize("K", [1, 2, 5, 20])
    def test_plain(self, K):
        """(1 - alpha lambda)^K, at most ((L - l) / (L + l))^K, which both ends attain."""
        factors = residual_factors(self.values, K, eigenvalue_bounds=(self.l, self.L))
        expected = (1 - 2 / (self.l + self.L) * self.values) ** K
        torch.testing.assert_close(factors, expected, rtol=1e-11, atol=1e-15)
        rate = (self.L - self.l) / (self.L + self.l)
        assert float(factors.abs().max()) == pytest.approx(rate**K, rel=1e-12)

    @pytest.mark.parametrize("K", [1, 2, 3, 5, 20])
    def test_chebyshev(self, K):
        """T_K(t(lambda)) / T_K(t(0)), which is 2 q^K / (1 + q^2K) at the ends."""
        factors = residual_factors(
            self.values, K, acceleration="chebyshev", eigenvalue_bounds=(self.l, self.L)
        )
        polynomial = np.polynomial.chebyshev.Chebyshev([0] * K + [1])
        t = (self.L + self.l - 2 * self.values.numpy()) / (self.L - self.l)
        zero = (self.L + self.l) / (self.L - self.l)
        expected = torch.from_numpy(polynomial(t) / polynomial(zero))
        torch.testing.assert_close(factors, expected, rtol=0, atol=1e-13)
        bound = 2 * self.q**K / (1 + self.q ** (2 * K))
        assert float(factors.abs().max()) == pytest.approx(bound, rel=1e-9)

    @pytest.mark.parametrize("K", [1, 2, 3, 5, 20])
    def test_heavy_ball(self, K):
        """q^K (1 + K (1 - q^2) / (1 + q^2)) at the ends, and nowhere more."""
        factors = residual_factors(
            self.values, K, acceleration="heavy-ball", eigenvalue_bounds=(self.l, self.L)
        )
        bound = self.q**K * (1 + K * (1 - self.q**2) / (1 + self.q**2))
        assert float(factors[0]) == pytest.approx(bound, rel=1e-9)
        assert float(factors.abs().max()) == pytest.approx(bound, rel=1e-9)

    def test_polyak_start_would_look_like_divergence(self):
        """From x_1 = x_0 + a r_0 the first residual triples at L; from a plain step none grows."""
        values = torch.tensor([1e-5, 1.0], dtype=FLOAT64)
        for K in range(1, 60, 7):
            factors = residual_factors(
                values, K, acceleration="heavy-ball", eigenvalue_bounds=(1e-5, 1.0)
            )
            assert factors.abs().max() <= 1 + 1e-9
        a = 4 / (1 + math.sqrt(1e-5)) ** 2
        assert abs(1 - a) > 2.9

    def test_one_eigenvalue_takes_one_step(self):
        for acceleration in ACCELERATIONS:
            factors = residual_factors(
                torch.full((3,), 2.5, dtype=FLOAT64),
                1,
                acceleration=acceleration,
                eigenvalue_bounds=(2.5, 2.5),
            )
            assert factors.abs().max() <= 1e-15


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_the_accelerated_ones_go_with_the_root_of_the_condition_number(acceleration):
    counts = []
    for condition in (50.0, 800.0):
        values = torch.linspace(1, condition, 400, dtype=FLOAT64)
        solver = Richardson(
            acceleration=acceleration,
            eigenvalue_bounds=(1.0, condition),
            rtol=1e-6,
            maxiter=100_000,
            strict=True,
        )
        counts.append(solver.prepare(ops.Diagonal(values)).solve(sampled(400)).info.iterations)
    assert counts[1] / counts[0] == pytest.approx(16 if acceleration == "none" else 4, rel=0.25)


class TestEstimates:
    @PROPERTY
    @given(
        n=st.integers(1, 25),
        condition=st.floats(1.0, 100.0),
        acceleration=st.sampled_from(ACCELERATIONS),
        seed=st.integers(0, 999),
    )
    def test_converge(self, n, condition, acceleration, seed):
        scale = 10.0 ** (seed % 13 - 6)
        matrix = scale * spd(torch.linspace(1.0, condition, n, dtype=FLOAT64), seed)
        b = sampled(n, 2, seed=seed + 1)
        solver = Richardson(acceleration=acceleration, rtol=1e-9, maxiter=5000, strict=True)
        x, info = solver.prepare(ops.Dense(matrix, symmetric=True)).solve(b)
        expected = torch.linalg.solve(matrix, b)
        error = (x - expected).norm(dim=0)
        assert (error <= 1e-9 * condition * expected.norm(dim=0)).all()
        if acceleration == "none":
            # The optimum, of n <= steps eigenvalues found exactly: as many as theory says.
            rate = max((condition - 1) / (condition + 1), 1e-300)
            assert info.iterations <= math.log(1e-9) / math.log(rate) * 1.25 + 8

    def test_are_reported(self):
        A = ops.Diagonal(torch.linspace(1, 5, 15, dtype=FLOAT64))
        info = Richardson(rtol=1e-6, maxiter=100).prepare(A).solve(sampled(15)).info
        assert "eigenvalues of A from 1 to 5 by 15 Krylov steps" in info.reason
        P = ops.Diagonal(1 / A.values)
        info = Richardson(preconditioner=P, maxiter=100).prepare(A).solve(sampled(15)).info
        assert "eigenvalues of P A from 1 to 1 by" in info.reason
        assert info.iterations == 1

    def test_of_an_operator_that_is_not_symmetric(self):
        noise = sampled(20, 20)
        matrix = torch.eye(20, dtype=FLOAT64) + 0.7 * noise / torch.linalg.matrix_norm(noise, 2)
        b = sampled(20, seed=1)
        prepared = Richardson(rtol=1e-10, maxiter=500, strict=True).prepare(ops.Dense(matrix))
        for x, M in ((prepared.solve(b), matrix), (prepared.solve_transpose(b), matrix.T)):
            torch.testing.assert_close(x.value, torch.linalg.solve(M, b), rtol=1e-8, atol=1e-8)

    def test_each_member_of_a_batch_has_its_own(self):
        parts = [ops.Dense(c * spd(torch.linspace(0.2, 1, 6).double(), i), symmetric=True)
                 for i, c in enumerate((1.0, 1000.0))]  # fmt: skip
        b = sampled(12)
        for acceleration in ACCELERATIONS:
            solver = Richardson(acceleration=acceleration, rtol=1e-10, maxiter=200, strict=True)
            x, info = solver.prepare(ops.Stacked(parts)).solve(b)
            one, two = (solver.prepare(A).solve(c) for A, c in zip(parts, b.split(6), strict=True))
            torch.testing.assert_close(x, torch.cat([one.value, two.value]), rtol=1e-9, atol=0)
            assert info.iterations == max(one.info.iterations, two.info.iterations)


def test_without_a_preconditioner_the_plain_iteration_is_neumann():
    """x_K is the sum of K terms; Neumann(maxiter=K) has K + 1."""
    A, b = ops.Dense(torch.eye(6, dtype=FLOAT64) + 0.1 * sampled(6, 6)), sampled(6, seed=1)
    for K in (1, 4):
        settings = {"step_size": 0.7, "stop_at_maxiter": True, "rtol": 0.0}
        x = Richardson(maxiter=K + 1, **settings).prepare(A).solve(b).value
        series = Neumann(maxiter=K, **settings).prepare(A).solve(b).value
        torch.testing.assert_close(x, series, rtol=1e-13, atol=1e-14)


class TestPreconditioner:
    matrix = torch.diag(torch.logspace(0, 4, 30, dtype=FLOAT64)) + spd(
        torch.linspace(0.1, 0.5, 30).double()
    )
    A, b = ops.Dense(matrix, positive_definite=True), sampled(30)

    @pytest.mark.parametrize("acceleration", ACCELERATIONS)
    def test_takes_the_condition_number_of_the_product(self, acceleration):
        P = ops.Diagonal(1 / self.matrix.diag())
        solver = Richardson(acceleration=acceleration, rtol=1e-9, maxiter=60, strict=True)
        x, _ = dataclasses.replace(solver, preconditioner=P).prepare(self.A).solve(self.b)
        expected = torch.linalg.solve(self.matrix, self.b)
        torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-9)
        with pytest.raises(solvers.NotConvergedError):
            solver.prepare(self.A).solve(self.b)

    def test_any_inverse_makes_it_iterative_refinement(self):
        """Also of an indefinite operator that is not symmetric, and transposed."""
        matrix = sampled(12, 12)
        near = ops.Dense(torch.linalg.inv(matrix + 1e-3 * sampled(12, 12, seed=1)))
        prepared = Richardson(preconditioner=near, rtol=1e-12, maxiter=30).prepare(matrix)
        b = sampled(12, seed=2)
        for x, M in ((prepared.solve(b), matrix), (prepared.solve_transpose(b), matrix.T)):
            assert x.info.converged
            torch.testing.assert_close(x.value, torch.linalg.solve(M, b), rtol=1e-9, atol=1e-9)

    def test_a_stale_one_is_kept_with_a_spectrum_estimated_anew(self):
        solver = Richardson(preconditioner=solvers.DenseLU(), rtol=1e-9, maxiter=200)
        prepared = solver.prepare(self.A)
        assert prepared.solve(self.b).info.iterations <= 2
        moved = ops.Dense(3 * self.matrix, positive_definite=True)
        updated = prepared.update(moved)
        x, info = updated.solve(self.b)
        # P A = 3 I: the old step would diverge, that of the new spectrum takes one iteration.
        assert info.iterations <= 2
        assert not info.refreshed
        torch.testing.assert_close(3 * (self.A @ x), self.b, rtol=0, atol=1e-7)


class TestTrouble:
    A = ops.Diagonal(torch.tensor([0.5, 1.0, 2.0], dtype=FLOAT64))
    b = torch.ones(3, dtype=FLOAT64)

    @pytest.mark.parametrize(
        "settings",
        [
            {"step_size": 1.1},
            {"eigenvalue_bounds": (0.5, 1.0)},
            {"eigenvalue_bounds": (0.5, 1.0), "acceleration": "chebyshev"},
            {"eigenvalue_bounds": (0.5, 1.0), "acceleration": "heavy-ball"},
        ],
    )
    def test_divergence_is_flagged(self, settings):
        solver = Richardson(maxiter=500, **settings)
        with pytest.warns(ConvergenceWarning, match=r"diverged.*largest eigenvalue is larger"):
            x, info = solver.prepare(self.A).solve(self.b)
        assert info.status == "diverged"
        assert info.residual > 10 / 3
        assert torch.isfinite(x).all()

    def test_a_column_that_diverges_does_not_stop_the_others(self):
        solver = Richardson(step_size=1.1, rtol=1e-9, maxiter=500)
        with pytest.warns(ConvergenceWarning, match="diverged"):
            x, _ = solver.prepare(self.A).solve(torch.eye(3, dtype=FLOAT64))
        torch.testing.assert_close(x.diag()[:2], torch.tensor([2.0, 1.0]).double())

    def test_indefinite_operators(self):
        A = ops.Diagonal(torch.tensor([1.0, -0.5], dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match=r"diverged.*real part -0\.5"):
            Richardson(maxiter=500).prepare(A).solve(self.b[:2])
        with pytest.raises(StructureError, match=r"definite operator.*Ritz value -0\.5.*MINRES"):
            Richardson(acceleration="chebyshev").prepare(A)

    def test_accelerations_need_symmetry_or_bounds(self):
        matrix = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=FLOAT64)
        with pytest.raises(StructureError, match="eigenvalue_bounds if the eigenvalues are real"):
            Richardson(acceleration="chebyshev").prepare(ops.Dense(matrix))
        given = Richardson(acceleration="chebyshev", eigenvalue_bounds=(1.0, 2.0), maxiter=200)
        x, info = given.prepare(ops.Dense(matrix)).solve(self.b[:2])
        assert info.converged
        torch.testing.assert_close(x, torch.tensor([0.5, 0.5]).double(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"step_size": 0.0}, r"step_size=0.0; expected a positive number"),
            ({"estimation_steps": 0}, r"estimation_steps=0; expected at least 1"),
            ({"acceleration": "nesterov"}, r"acceleration='nesterov'; expected"),
            ({"eigenvalue_bounds": (0.0, 1.0)}, r"eigenvalue_bounds=\(0.0, 1.0\); expected"),
            ({"eigenvalue_bounds": (2.0, 1.0)}, r"0 < l <= L"),
            ({"step_size": 1.0, "acceleration": "chebyshev"}, r"leave it None"),
            ({"step_size": 1.0, "eigenvalue_bounds": (1.0, 2.0)}, r"leave it None"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Richardson(**settings)


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_float32_reaches_the_accuracy_of_float32(acceleration):
    matrix = spd(torch.linspace(1, 20, 30, dtype=FLOAT64))
    solver = Richardson(acceleration=acceleration, rtol=5e-6, maxiter=500, strict=True)
    x, _ = solver.prepare(ops.Dense(matrix.float(), symmetric=True)).solve(sampled(30).float())
    assert x.dtype == torch.float32
    expected = torch.linalg.solve(matrix, sampled(30))
    assert (x - expected).norm() <= 5e-5 * expected.norm()
