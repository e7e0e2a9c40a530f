"""Broyden's method: secant equation, finite termination, and the traps of published versions."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import CG, ConvergenceWarning
from solvers.stationary.broyden import Broyden

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def near_identity(n: int, size: float, seed: int = 0) -> Tensor:
    noise = sampled(n, n, seed=seed)
    return torch.eye(n, dtype=FLOAT64) + size * noise / torch.linalg.matrix_norm(noise, 2)


def steps(matrix: Tensor, b: Tensor, K: int, **settings) -> tuple[Tensor, float]:
    """What K products lead to, and its relative residual."""
    solver = Broyden(maxiter=K, stop_at_maxiter=True, rtol=0.0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x, info = solver.prepare(ops.Dense(matrix)).solve(b)
    return x, info.residual


def by_dense_algebra(matrix: Tensor, b: Tensor, K: int, scale: float) -> Tensor:
    """The residuals of the first K full steps, with the inverse updated as a dense matrix."""
    H, x, norms = scale * torch.eye(len(b), dtype=FLOAT64), torch.zeros_like(b), []
    for _ in range(K):
        s = H @ (b - matrix @ x)
        if not bool(s.any()):  # after 2 n steps nothing may be left, and 0 / 0 is no update
            norms.append(torch.linalg.vector_norm(b - matrix @ x))
            continue
        y = matrix @ s
        x = x + s
        H = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y)
        torch.testing.assert_close(H @ y, s)  # the secant equation
        norms.append(torch.linalg.vector_norm(b - matrix @ x))
    return torch.stack(norms)


@PROPERTY
@given(n=st.integers(2, 8), size=st.floats(0.1, 0.8), K=st.integers(1, 6), seed=st.integers(0, 99))
def test_is_the_good_method_and_returns_the_best_iterate(n, size, K, seed):
    matrix, b = near_identity(n, size, seed), sampled(n, seed=seed + 1)
    norms = by_dense_algebra(matrix, b, K, scale=0.7) / b.norm()
    _, residual = steps(matrix, b, K, scale=0.7)
    best = min(1.0, float(norms.min()))
    assert residual == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_the_best_iterate_is_not_the_last():
    """The residuals of full steps rise on the way."""
    matrix, b = sampled(9, 9, seed=3), sampled(9, seed=4)
    norms = by_dense_algebra(matrix, b, 8, scale=1.0) / b.norm()
    assert norms[-1] > 2 * min(1.0, float(norms.min()))
    x, residual = steps(matrix, b, 8, scale=1.0)
    assert residual == pytest.approx(min(1.0, float(norms.min())), rel=1e-8)
    assert float((b - matrix @ x).norm() / b.norm()) == pytest.approx(residual, rel=1e-8)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ends_within_2n_steps(n, sign):
    matrix = sign * near_identity(n, 0.9, seed=n)
    solver = Broyden(memory=2 * n + 1, maxiter=2 * n, rtol=1e-9, strict=True)
    b = sampled(n, 2, seed=1)
    x, info = solver.prepare(ops.Dense(matrix)).solve(b)
    assert info.iterations <= 2 * n
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("line_search", ["none", "armijo", "exact"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, -1e12])
def test_solves_whatever_the_units_and_the_sign(line_search, scale):
    matrix, b = scale * near_identity(20, 0.7), sampled(20, 2, seed=1)
    prepared = Broyden(line_search=line_search, rtol=1e-10, strict=True).prepare(ops.Dense(matrix))
    for x, M in ((prepared.solve(b), matrix), (prepared.solve_transpose(b), matrix.T)):
        error = (x.value - torch.linalg.solve(M, b)).norm()
        assert error <= 1e-8 * x.value.norm()


class TestFirstMatrix:
    """-I, as root finders have it, is of the wrong sign for a positive definite operator."""

    matrix, b = spd(torch.linspace(0.5, 2, 30, dtype=FLOAT64)), sampled(30)

    def test_of_the_wrong_sign_makes_the_first_residual_grow(self):
        norms = by_dense_algebra(self.matrix, self.b, 1, scale=-1.0) / self.b.norm()
        assert norms[0] > 2
        # What is returned then is no worse than zero all the same.
        assert steps(self.matrix, self.b, 1, scale=-1.0)[1] == pytest.approx(1.0, rel=1e-14)

    def test_is_that_of_the_least_residual(self):
        """The sign and the size that a step along the residual wants, at no further product."""
        image = self.matrix @ self.b
        along = (self.b @ image) / (image @ image)
        x, residual = steps(self.matrix, self.b, 1)
        torch.testing.assert_close(x, along * self.b, rtol=1e-12, atol=0)
        assert residual < 0.6
        _, mirrored = steps(-self.matrix, self.b, 1)
        assert mirrored == pytest.approx(residual, rel=1e-12)

    def test_is_kept_where_it_is_given(self):
        x, _ = steps(self.matrix, self.b, 1, scale=0.3)
        torch.testing.assert_close(x, 0.3 * self.b, rtol=1e-13, atol=0)

    def test_no_update_is_lost_at_the_start(self):
        """A step with H = c I again would be the second of gradient descent."""
        c = 0.4
        x, _ = steps(self.matrix, self.b, 2, scale=c)
        r = self.b - self.matrix @ (c * self.b)
        assert (x - c * (self.b + r)).norm() > 1e-2 * x.norm()
        assert steps(self.matrix, self.b, 2, scale=c)[1] < 0.9 * float(
            (self.b - self.matrix @ (c * (self.b + r))).norm() / self.b.norm()
        )


def test_is_behind_cg_on_ill_conditioned_definite_operators():
    matrix, b = spd(torch.logspace(-3, 0, 200, dtype=FLOAT64)), sampled(200)
    _, ours = steps(matrix, b, 64, memory=64)
    kept = CG(maxiter=64, stop_at_maxiter=True).prepare(ops.Dense(matrix, symmetric=True))
    assert kept.solve(b).info.residual < ours < 0.5


class TestMemory:
    def test_starts_anew_from_the_best_iterate_when_it_is_full(self):
        """m + 1 products: m steps, and then the step of the least residual from the best."""
        matrix, b, m = near_identity(12, 0.8), sampled(12, seed=1), 4
        x, _ = steps(matrix, b, m, memory=m)
        r = b - matrix @ x
        image = matrix @ r
        y, residual = steps(matrix, b, m + 1, memory=m)
        torch.testing.assert_close(y, x + (r @ image) / (image @ image) * r, rtol=1e-9, atol=1e-12)
        assert residual < float(r.norm() / b.norm())

    @pytest.mark.parametrize("memory", [1, 3, 10])
    def test_little_of_it_is_enough_near_the_identity(self, memory):
        matrix, b = near_identity(50, 0.4), sampled(50, seed=1)
        solver = Broyden(memory=memory, rtol=1e-9, maxiter=200, strict=True)
        x, _ = solver.prepare(ops.Dense(matrix)).solve(b)
        torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-7)

    def test_a_cycle_without_gain_is_not_repeated(self):
        matrix = torch.roll(torch.eye(20, dtype=FLOAT64), 1, 0)  # a cyclic shift
        b = torch.eye(20, dtype=FLOAT64)[0]
        with pytest.warns(ConvergenceWarning, match=r"stagnated.*take more memory, or use GMRES"):
            _, info = Broyden(memory=3, maxiter=500).prepare(ops.Dense(matrix)).solve(b)
        assert info.iterations < 500
        assert not info.converged


class TestLineSearch:
    @PROPERTY
    @given(n=st.integers(2, 10), K=st.integers(1, 8), seed=st.integers(0, 99))
    def test_residuals_do_not_rise(self, n, K, seed):
        matrix, b = sampled(n, n, seed=seed), sampled(n, seed=seed + 1)
        for line_search in ("armijo", "exact"):
            sizes = [steps(matrix, b, k, line_search=line_search)[1] for k in (K, K + 1)]
            assert sizes[1] <= sizes[0] * (1 + 1e-12) <= 1 + 1e-12

    def test_exact_is_the_least_residual_along_the_step(self):
        matrix, b = sampled(6, 6), sampled(6, seed=1)
        x, residual = steps(matrix, b, 1, line_search="exact", scale=5.0)
        image = matrix @ b
        torch.testing.assert_close(x, (b @ image) / (image @ image) * b, rtol=1e-12, atol=0)
        assert residual <= 1

    def test_armijo_halves_until_the_residual_falls(self):
        """From H = 5 on A = 1: |1 - 5 t| falls at first for t = 1/4."""
        b = torch.ones(1, dtype=FLOAT64)
        for scale, t in ((5.0, 0.25), (1.5, 1.0), (2.5, 0.5), (70.0, 2.0**-6)):
            x, _ = steps(torch.eye(1, dtype=FLOAT64), b, 1, line_search="armijo", scale=scale)
            assert float(x) == scale * t

    def test_where_it_fails_no_full_step_is_taken_in_silence(self):
        """Uphill with H = -1: the step is not taken, but its secant turns the next one round."""
        matrix, b = 2 * torch.eye(3, dtype=FLOAT64), sampled(3)
        assert steps(matrix, b, 1, line_search="armijo", scale=-1.0)[1] == 1.0
        x, residual = steps(matrix, b, 2, line_search="armijo", scale=-1.0)
        assert residual < 1e-12
        torch.testing.assert_close(x, b / 2, rtol=1e-12, atol=0)


class TestTrouble:
    def test_what_teaches_nothing_is_a_breakdown(self):
        """<b, A b> = 0: no denominator of the update, and no descent."""
        matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=FLOAT64)
        solver = Broyden(line_search="armijo", maxiter=50)
        with pytest.warns(ConvergenceWarning, match=r"breakdown.*use GMRES"):
            _, info = solver.prepare(ops.Dense(matrix)).solve(torch.eye(2).double()[0])
        assert info.residual == 1.0

    def test_singular_operators_and_products_that_are_not_finite(self):
        b = torch.ones(2, dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match=r"residual 1;"):
            Broyden(maxiter=20).prepare(ops.Dense(torch.zeros(2, 2).double())).solve(b)
        A = ops.Dense(torch.tensor([[1.0, math.nan], [0.0, 1.0]], dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match=r"diverged.*not finite"):
            x, _ = Broyden(maxiter=20).prepare(A).solve(b)
        assert not x.any()

    def test_a_tolerance_below_rounding_stagnates(self):
        matrix, b = near_identity(8, 0.5), sampled(8)
        with pytest.warns(ConvergenceWarning, match="stagnated"):
            _, info = Broyden(rtol=1e-18, maxiter=500).prepare(ops.Dense(matrix)).solve(b)
        assert info.residual < 1e-15
        assert info.iterations < 60

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"memory": 0}, r"memory=0; expected at least 1"),
            ({"line_search": "wolfe"}, r"line_search='wolfe'; expected"),
            ({"scale": 0.0}, r"scale=0.0; expected a number other than 0"),
            ({"scale": math.nan}, r"scale=nan"),
            ({"maxiter": 0}, r"maxiter=0"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Broyden(**settings)


def test_columns_are_solved_each_by_itself():
    matrix, block = near_identity(10, 0.6), sampled(10, 3) * torch.tensor([1.0, 0.0, 1e9])
    prepared = Broyden(rtol=1e-9).prepare(ops.Dense(matrix))
    x, info = prepared.solve(block)
    singles = [prepared.solve(column) for column in block.unbind(1)]
    stacked = torch.stack([single.value for single in singles], 1)
    torch.testing.assert_close(x, stacked, rtol=1e-11, atol=0)
    assert info.iterations == max(single.info.iterations for single in singles)
    assert singles[1].info.iterations == 0
    # A product each iteration, one to see that the recurrence is true, and the final one.
    assert singles[0].info.products == singles[0].info.iterations + 2


@pytest.mark.parametrize("line_search", ["none", "armijo", "exact"])
def test_float32_reaches_the_accuracy_of_float32(line_search):
    matrix = near_identity(20, 0.7)
    solver = Broyden(line_search=line_search, rtol=2e-6, strict=True)
    for A in (ops.Dense(matrix.float()), ops.Sparse(matrix.float())):
        x, _ = dataclasses.replace(solver, memory=40).prepare(A).solve(sampled(20).float())
        assert x.dtype == torch.float32
        expected = torch.linalg.solve(matrix, sampled(20))
        assert (x - expected).norm() <= 2e-5 * expected.norm()
