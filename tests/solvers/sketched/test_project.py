"""`SketchAndProject`: its rate, in expectation and along the way, and its traps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, StructureError
from solvers.sketched.project import SketchAndProject
from solvers.sketched.sketch import generator_of

DOUBLE = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def general(n: int, seed: int = 0) -> Tensor:
    return 2 * torch.eye(n, dtype=DOUBLE) + 0.5 * torch.tanh(sampled(n, n, seed=seed))


def saddle() -> ops.Saddle:
    root = sampled(6, 6)
    B = ops.Dense(root @ root.T / 6 + torch.eye(6, dtype=DOUBLE), positive_definite=True)
    return ops.Saddle(B, ops.Dense(torch.eye(2, 6, dtype=DOUBLE) + 0.3 * sampled(2, 6, seed=1)))


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


def after(A: object, b: Tensor, k: int, **settings: object) -> Tensor:
    """x after k iterations."""
    solver = SketchAndProject(maxiter=k, stop_at_maxiter=True, rtol=0.0, **settings)
    return solver.prepare(A).solve(b).value


def squares(A: Tensor, x: Tensor, k: int, seeds: int, **settings: object) -> Tensor:
    """``|x_k - x|^2 / |x|^2`` for many seeds."""
    errors = [after(A, A @ x, k, seed=seed, **settings) - x for seed in range(seeds)]
    return torch.stack(errors).square().sum(1) / x.square().sum()


@pytest.mark.parametrize("method", ["kaczmarz", "gaussian"])
class TestEveryMethod:
    @pytest.mark.parametrize("block_size", [1, 3, 100])
    def test_solves_saddle_point_systems(self, method, block_size):
        """Indefinite, which is of no concern."""
        K = saddle()
        b = sampled(8, 2)
        solver = SketchAndProject(method=method, block_size=block_size, rtol=1e-6, maxiter=50_000)
        x, info = solver.prepare(K).solve(b)
        assert info.converged
        close(x, torch.linalg.solve(K.to_dense(), b), 1e-4)

    def test_not_symmetric(self, method):
        A, b = general(6), sampled(6)
        prepared = SketchAndProject(method=method, rtol=1e-10).prepare(A)
        close(prepared.solve(b).value, torch.linalg.solve(A, b))
        close(prepared.solve_transpose(b).value, torch.linalg.solve(A.T, b))

    def test_rate_in_expectation(self, method):
        """``E |x_k - x|^2 <= (1 - c sigma_min^2 / |A|_F^2)^k |x|^2``, c = 1 or 2 / pi."""
        A, x, k = general(5), sampled(5, seed=1), 40
        share = torch.linalg.svdvals(A).min() ** 2 / A.square().sum()
        bound = (1 - (1.0 if method == "kaczmarz" else 2 / torch.pi) * share) ** k
        errors = squares(A, x, k, 60, method=method)
        assert errors.mean() + 2 * errors.std() / 60**0.5 <= bound
        # And it is no faster than what a single equation can do: the bound says something.
        assert errors.mean() > bound**8

    def test_the_error_never_grows(self, method):
        """Every step is a projection; one with the wrong sign would go uphill from the start."""
        A, x = general(6), sampled(6, seed=1)
        errors = [
            float(torch.linalg.vector_norm(after(A, A @ x, k, method=method) - x))
            for k in range(1, 25)
        ]
        assert errors[0] < float(torch.linalg.vector_norm(x))
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))

    def test_a_step_lands_on_its_equations(self, method):
        """``S^T A x = S^T b`` at the point that is nearest to the start."""
        A, b = general(6), sampled(6)
        x = after(A, b, 1, method=method, block_size=2)
        if method == "kaczmarz":
            S = (A @ x - b).abs() < 1e-12
            assert S.sum() == 2
            rows, right = A[S], b[S]
        else:
            generator = generator_of(0)
            S = torch.randn(6, 2, generator=generator, dtype=DOUBLE)
            rows, right = S.T @ A, S.T @ b
        close(x, torch.linalg.pinv(rows) @ right)

    def test_deterministic(self, method):
        A, b = general(6), sampled(6)
        one, two, other = (after(A, b, 9, method=method, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)

    def test_blocks_need_fewer_iterations(self, method):
        A, b = general(12), sampled(12)
        counts = [
            SketchAndProject(method=method, block_size=q, rtol=1e-3, maxiter=50_000)
            .prepare(A)
            .solve(b)
            .info.iterations
            for q in (1, 3, 9)
        ]
        assert counts[0] > 2 * counts[1] > 4 * counts[2]


class TestKaczmarz:
    def test_rows_are_drawn_by_their_squared_norm(self):
        """Rows of norms 1, 2 and 3: in ratios 1 : 4 : 9."""
        A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE))
        hit = torch.zeros(3)
        for seed in range(280):
            hit += after(A, torch.ones(3, dtype=DOUBLE), 1, seed=seed) != 0
        expected = torch.tensor([20.0, 80.0, 180.0])
        # Five standard deviations of a binomial count.
        assert ((hit - expected).abs() < 5 * (expected * (1 - expected / 280)).sqrt()).all()

    def test_rows_of_operators(self):
        """Held or made by products, the draws are the same."""
        M = general(7) * (sampled(7, 7, seed=5) > -0.5) + torch.eye(7)
        b = sampled(7)
        dense = after(M, b, 20)
        products = ops.FunctionOperator(lambda v, M: M @ v, torch.zeros(7, dtype=DOUBLE), M)
        for A in (ops.Sparse(M.to_sparse()), products):
            torch.testing.assert_close(after(A, b, 20), dense)

    def test_zero_rows_are_never_drawn(self):
        A = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=DOUBLE))
        solver = SketchAndProject(rtol=1e-12, block_size=3)
        x, info = solver.prepare(A).solve(torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE))
        assert info.converged
        close(x, torch.tensor([1.0, 0.0, 0.5], dtype=DOUBLE))

    @pytest.mark.parametrize("scale", [1e-200, 1e200])
    def test_huge_and_tiny_rows(self, scale):
        A, b = ops.Dense(scale * general(4)), sampled(4)
        x, info = SketchAndProject(rtol=1e-8).prepare(A).solve(b)
        assert info.converged
        close(x * scale, torch.linalg.solve(general(4), b), 1e-6)


class TestLimits:
    def test_ill_conditioned(self):
        A = torch.diag(torch.tensor([1.0, 1e-3], dtype=DOUBLE))
        b = torch.ones(2, dtype=DOUBLE)
        with pytest.warns(ConvergenceWarning, match=r"maxiter after 50 .*rate is 1 - \(sigma_min"):
            info = SketchAndProject(maxiter=50).prepare(A).solve(b).info
        assert info.status == "maxiter"

    def test_equations_that_contradict_each_other(self):
        A = torch.ones(2, 2, dtype=DOUBLE)
        with pytest.warns(ConvergenceWarning, match="maxiter"):
            info = (
                SketchAndProject(maxiter=100).prepare(A).solve(torch.tensor([1.0, -1.0]).double())
            )
        assert not info.info.converged
        with pytest.warns(ConvergenceWarning):
            SketchAndProject().prepare(torch.zeros(2, 2)).solve(torch.ones(2))

    def test_a_singular_system_that_has_solutions(self):
        """From zero the limit is the shortest of them."""
        A = sampled(6, 2) @ sampled(2, 6, seed=1)
        b = A @ sampled(6)
        x, info = SketchAndProject(rtol=1e-10, maxiter=20_000).prepare(A).solve(b)
        assert info.converged
        close(x, torch.linalg.pinv(A) @ b, 1e-6)

    def test_refusals(self):
        with pytest.raises(ValueError, match="method='uniform'; expected 'kaczmarz' or 'gaussian'"):
            SketchAndProject(method="uniform")
        with pytest.raises(ValueError, match="block_size=0; expected at least 1"):
            SketchAndProject(block_size=0)
        with pytest.raises(StructureError, match="square"):
            SketchAndProject().prepare(sampled(3, 2))
