"""Gradient steps on the quadratic: their expectation, their noise, and the warm start."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, StructureError
from solvers.stationary.quadratic_sgd import QuadraticSGD
from solvers.stationary.richardson import Richardson

FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def symmetric(matrix: Tensor) -> ops.LinearOperator:
    return ops.Dense(matrix, symmetric=True)


MATRIX = spd(torch.linspace(0.2, 1.5, 6, dtype=FLOAT64))
B = sampled(6, 2, seed=1)


def steps(solver: QuadraticSGD, A: ops.LinearOperator, b: Tensor, *, transpose=False, **options):
    prepared = solver.prepare(A)
    return (prepared.solve_transpose if transpose else prepared.solve)(b, **options)


class TestGradientDescent:
    @pytest.mark.parametrize("K", [1, 2, 9])
    def test_is_descent_on_the_quadratic(self, K):
        x = torch.zeros_like(B, requires_grad=True)
        for _ in range(K):
            value = (x * (MATRIX @ x)).sum() / 2 - (B * x).sum()
            (gradient,) = torch.autograd.grad(value, x)
            x = (x - 0.7 * gradient).detach().requires_grad_()
        solver = QuadraticSGD(step_size=0.7, maxiter=K, stop_at_maxiter=True, rtol=0.0)
        solution = steps(solver, symmetric(MATRIX), B)
        torch.testing.assert_close(solution.value, x.detach(), rtol=1e-12, atol=1e-14)
        assert solution.info.iterations == K
        assert solution.info.products == 2 * K

    @pytest.mark.parametrize("transpose", [False, True])
    def test_normal_is_descent_on_the_residual(self, transpose):
        matrix = sampled(6, 6, seed=3)
        A = matrix.T if transpose else matrix
        x = torch.zeros_like(B, requires_grad=True)
        for _ in range(5):
            (gradient,) = torch.autograd.grad((A @ x - B).square().sum() / 2, x)
            x = (x - 0.02 * gradient).detach().requires_grad_()
        solver = QuadraticSGD(
            step_size=0.02, maxiter=5, stop_at_maxiter=True, rtol=0.0, normal=True
        )
        solution = steps(solver, ops.Dense(matrix), B, transpose=transpose)
        torch.testing.assert_close(solution.value, x.detach(), rtol=1e-12, atol=1e-14)
        assert solution.info.products == 2 * 2 * 5

    def test_is_richardson(self):
        solver = QuadraticSGD(step_size=0.9, rtol=1e-10, maxiter=1000, strict=True)
        x, info = steps(solver, symmetric(MATRIX), B)
        plain = Richardson(step_size=0.9, rtol=1e-10, maxiter=1000).prepare(symmetric(MATRIX))
        assert info.iterations == plain.solve(B).info.iterations
        torch.testing.assert_close(x, torch.linalg.solve(MATRIX, B), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    def test_the_step_is_estimated(self, scale, dtype):
        rtol = 1e-9 if dtype == FLOAT64 else 1e-5
        A, b = symmetric((scale * MATRIX).to(dtype)), B.to(dtype)
        x, info = steps(QuadraticSGD(rtol=rtol, maxiter=1000, strict=True), A, b)
        assert x.dtype == dtype
        torch.testing.assert_close(scale * (MATRIX @ x.double()), B, rtol=0, atol=1e2 * rtol)
        assert "= 1 / L by 6 Krylov steps" in info.reason

    def test_indefinite_operators_need_the_normal_equations(self):
        A = ops.Diagonal(torch.tensor([1.0, -0.5, 2.0], dtype=FLOAT64))
        b = torch.ones(3, dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match=r"diverged.*not positive definite"):
            steps(QuadraticSGD(maxiter=1000), A, b)
        x, _ = steps(QuadraticSGD(normal=True, rtol=1e-9, maxiter=1000, strict=True), A, b)
        torch.testing.assert_close(x, 1 / A.values, rtol=1e-7, atol=0)

    def test_so_do_operators_that_are_not_symmetric(self):
        matrix = torch.eye(6, dtype=FLOAT64) + 0.3 * sampled(6, 6)
        with pytest.raises(StructureError, match="normal=True"):
            QuadraticSGD().prepare(ops.Dense(matrix))
        solver = QuadraticSGD(normal=True, rtol=1e-9, maxiter=20_000, strict=True)
        for transpose, M in ((False, matrix), (True, matrix.T)):
            x, _ = steps(solver, ops.Dense(matrix), B, transpose=transpose)
            torch.testing.assert_close(x, torch.linalg.solve(M, B), rtol=1e-5, atol=1e-5)

    def test_divergence_and_the_limit_are_flagged(self):
        with pytest.warns(ConvergenceWarning, match=r"diverged.*exceeds 2 / L"):
            x, info = steps(QuadraticSGD(step_size=2.0, maxiter=500), symmetric(MATRIX), B)
        assert torch.isfinite(x).all()
        assert info.residual > 10
        with pytest.warns(ConvergenceWarning, match="maxiter after 3"):
            steps(QuadraticSGD(maxiter=3, rtol=1e-9), symmetric(MATRIX), B)


class TestWarmStart:
    def test_goes_on_where_it_ended(self):
        A = symmetric(MATRIX)
        first = QuadraticSGD(step_size=0.5, maxiter=4, stop_at_maxiter=True, rtol=0.0)
        second = QuadraticSGD(step_size=0.5, maxiter=7, stop_at_maxiter=True, rtol=0.0)
        third = QuadraticSGD(step_size=0.5, maxiter=11, stop_at_maxiter=True, rtol=0.0)
        x = steps(second, A, B, guess=steps(first, A, B).value).value
        torch.testing.assert_close(x, steps(third, A, B).value, rtol=1e-12, atol=1e-13)

    def test_few_steps_follow_a_solution_that_moves(self):
        """AmIGO: N steps for each of many slowly changing systems do what many would for one."""
        warm = cold = torch.zeros(6, dtype=FLOAT64)
        solver = QuadraticSGD(maxiter=5, stop_at_maxiter=True)
        for t in range(60):
            matrix = MATRIX + 0.01 * math.sin(0.05 * t) * torch.eye(6, dtype=FLOAT64)
            b = B[:, 0] + 0.02 * t * B[:, 1]
            prepared = solver.prepare(symmetric(matrix))
            warm, cold = prepared.solve(b, guess=warm).value, prepared.solve(b).value
        exact = torch.linalg.solve(matrix, b)
        assert (warm - exact).norm() < 0.1 * (cold - exact).norm()


class TestSampledOperators:
    """H is one of two matrices with equal chances; all sequences are enumerated."""

    noise = spd(torch.linspace(-0.4, 0.5, 6, dtype=FLOAT64), seed=5)
    parts = (MATRIX + noise, MATRIX - noise)

    def solver(self, K: int, choice=None, **settings) -> QuadraticSGD:
        supply = iter(choice) if choice is not None else None

        def draw(generator: torch.Generator) -> ops.LinearOperator:
            if supply is not None:
                return symmetric(next(supply))
            return symmetric(self.parts[int(torch.randint(2, (), generator=generator))])

        return QuadraticSGD(
            step_size=0.5, maxiter=K, stop_at_maxiter=True, operators=draw, rtol=0.0, **settings
        )

    @pytest.mark.parametrize("transpose", [False, True])
    def test_the_mean_iterate_is_that_of_gradient_descent(self, transpose):
        """The first step from zero multiplies with nothing: K - 1 samples for K steps."""
        A, K = symmetric(MATRIX), 5
        draws = [
            steps(self.solver(K, choice), A, B, transpose=transpose).value
            for choice in itertools.product(self.parts, repeat=K - 1)
        ]
        plain = QuadraticSGD(step_size=0.5, maxiter=K, stop_at_maxiter=True, rtol=0.0)
        torch.testing.assert_close(
            torch.stack(draws).mean(0), steps(plain, A, B).value, rtol=0, atol=1e-14
        )

    @pytest.mark.parametrize("transpose", [False, True])
    def test_so_is_that_of_the_normal_equations_by_independent_samples(self, transpose):
        parts = [part + 0.1 * sampled(6, 6, seed=7) for part in self.parts]  # not symmetric
        mean, K = sum(parts) / 2, 3
        draws = []
        for choice in itertools.product(parts, repeat=2 * K - 1):
            supply = iter(choice)
            solver = QuadraticSGD(
                step_size=0.1,
                maxiter=K,
                stop_at_maxiter=True,
                operators=lambda g, s=supply: ops.Dense(next(s)),
                rtol=0.0,
                normal=True,
            )
            draws.append(steps(solver, ops.Dense(mean), B, transpose=transpose).value)
            assert next(supply, None) is None
        A = mean.T if transpose else mean
        x = torch.zeros_like(B)
        for _ in range(K):
            x = x - 0.1 * A.T @ (A @ x - B)
        torch.testing.assert_close(torch.stack(draws).mean(0), x, rtol=0, atol=1e-14)
        # One sample for both factors would descend on another quadratic.
        assert (sum(part.T @ part for part in parts) / 2 - mean.T @ mean).norm() > 0.1

    def test_a_constant_step_leaves_a_noise_that_no_number_of_steps_lowers(self):
        """Scalar a (1 +- d): stationary E e^2 = alpha d^2 x*^2 a / (2 - alpha a (1 + d^2))."""
        a, d, alpha = 0.8, 0.5, 0.25

        def draw(generator: torch.Generator) -> ops.LinearOperator:
            signs = 2.0 * torch.randint(2, (4000,), generator=generator) - 1
            return ops.Diagonal((a * (1 + d * signs)).double())

        A, b = a * ops.Identity(4000, FLOAT64), torch.ones(4000, dtype=FLOAT64)
        floor = alpha * a * d**2 / (2 - alpha * a * (1 + d**2))
        for K in (100, 400):
            solver = QuadraticSGD(
                step_size=alpha, maxiter=K, stop_at_maxiter=True, operators=draw, seed=1
            )
            x, info = steps(solver, A, b)
            assert float((a * x - 1).square().mean()) == pytest.approx(floor, rel=0.1)
            assert info.residual == pytest.approx(math.sqrt(floor), rel=0.1)
            assert not info.converged
            # The mean is right all the same.
            assert float(x.mean()) == pytest.approx(1 / a, rel=0.01)
        # From the solution the noise is gone: it is that of H (x - guess).
        near = steps(solver, A, b, guess=(1 + 1e-4) * b / a)
        assert near.info.residual < 1e-3 * math.sqrt(floor)

    def test_each_solve_draws_anew_and_reproducibly(self):
        A, solver = symmetric(MATRIX), self.solver(6)
        one, two = solver.prepare(A), solver.prepare(A)
        values = [one.solve(B).value for _ in range(3)]
        assert all(torch.equal(x, two.solve(B).value) for x in values)
        assert not torch.equal(values[0], values[1])
        updated, also = one.update(A), two.update(A)
        assert torch.equal(updated.solve(B).value, also.solve(B).value)

    def test_minibatch_hessians_of_a_mean_loss(self):
        X, y = sampled(60, 4, seed=2), sampled(4, seed=3)

        def loss(y: Tensor, X: Tensor) -> Tensor:
            return ((X @ y) ** 2).mean() / 2 + 0.25 * y @ y

        def draw(generator: torch.Generator) -> ops.LinearOperator:
            return ops.Hessian(loss, y, X[torch.randint(60, (30,), generator=generator)])

        A, b = ops.Hessian(loss, y, X), sampled(4, seed=4)
        solver = QuadraticSGD(step_size=0.1, maxiter=150, stop_at_maxiter=True, operators=draw)
        x, info = steps(solver, A, b)
        expected = torch.linalg.solve(A.to_dense(), b)
        assert (x - expected).norm() < 0.15 * expected.norm()
        assert info.iterations == 150
        assert info.products == 149 + 1

    def test_blow_ups_are_flagged(self):
        solver = QuadraticSGD(step_size=3.0, maxiter=200, operators=lambda g: symmetric(MATRIX))
        with pytest.warns(ConvergenceWarning, match="diverged"):
            x, _ = steps(solver, symmetric(MATRIX), B)
        assert torch.isfinite(x).all()

    def test_zero_is_solved_by_zero(self):
        x, info = steps(self.solver(5), symmetric(MATRIX), torch.zeros(6, 2, dtype=FLOAT64))
        assert not x.any()
        assert info.converged
        assert info.iterations == 0


def test_members_of_a_batch():
    stack = ops.Stacked([symmetric(MATRIX), symmetric(100 * MATRIX)])
    solver = QuadraticSGD(rtol=1e-9, maxiter=1000, strict=True)
    x = steps(solver, stack, torch.cat([B, B])).value
    for i, c in enumerate((1, 100)):
        expected = torch.linalg.solve(c * MATRIX, B)
        torch.testing.assert_close(x[6 * i : 6 * i + 6], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"QuadraticSGD: step_size=0.0; expected a positive number"),
        ({"maxiter": 0}, r"QuadraticSGD: maxiter=0; expected at least 1"),
        ({"stop_at_maxiter": True}, r"stop_at_maxiter needs a maxiter"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        QuadraticSGD(**settings)
