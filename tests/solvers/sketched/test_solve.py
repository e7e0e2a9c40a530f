"""`SketchAndSolve`: its expectation for Gaussian sketches is known exactly."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import NotConvergedError
from solvers.sketched.sketch import KINDS
from solvers.sketched.solve import SketchAndSolve

DOUBLE = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


def test_the_expected_loss_of_a_gaussian_sketch():
    """``E |b - A x|^2 / min |b - A x|^2 = 1 + n / (s - n - 1)``; 1.6 here."""
    A, b = sampled(60, 3), sampled(60, seed=1)
    least = (b - A @ torch.linalg.lstsq(A, b).solution).square().sum()
    ratios = []
    for seed in range(150):
        solver = SketchAndSolve(sketch="gaussian", size=9, seed=seed)
        ratios.append(float((b - A @ solver.prepare(A).solve(b).value).square().sum() / least))
    mean, spread = torch.tensor(ratios).mean(), torch.tensor(ratios).std() / 150**0.5
    assert abs(mean - 1.6) < 4 * spread
    assert spread < 0.1


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_equations_that_hold_are_solved(self, kind):
        A, x = sampled(300, 6), sampled(6, 2, seed=1)
        value, info = SketchAndSolve(sketch=kind, rtol=1e-12).prepare(A).solve(A @ x)
        close(value, x)
        assert info.converged
        assert info.status == "converged"

    def test_an_approximation_is_no_surprise(self, kind):
        """No warning; but nothing is claimed, either."""
        A, b = sampled(1000, 5), sampled(1000, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x, info = SketchAndSolve(sketch=kind, size=200).prepare(A).solve(b)
        assert not info.converged
        assert info.status == "truncated"
        assert "SketchAndPrecondition" in info.reason
        least = torch.linalg.vector_norm(b - A @ torch.linalg.lstsq(A, b).solution)
        assert 1 <= torch.linalg.vector_norm(b - A @ x) / least < 1.1
        assert info.normal_residual > 1e-8
        with pytest.raises(NotConvergedError):
            SketchAndSolve(sketch=kind, strict=True).prepare(A).solve(b)

    def test_wide(self, kind):
        A, b = sampled(5, 1000), sampled(5, seed=1)
        x, info = SketchAndSolve(sketch=kind, size=400).prepare(A).solve(b)
        # In the row space, and near the shortest solution there.
        close(A.T @ torch.linalg.lstsq(A.T, x).solution, x)
        close(x, torch.linalg.pinv(A) @ b, 0.4)
        assert info.status == "truncated"
        close(SketchAndSolve(sketch=kind, size=400).prepare(A.T).solve_transpose(b).value, x)

    def test_deterministic(self, kind):
        A, b = sampled(100, 4), sampled(100, seed=1)
        one, two, other = (
            SketchAndSolve(sketch=kind, seed=seed).prepare(A).solve(b).value for seed in (1, 1, 2)
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_what_is_too_short_to_sketch_is_solved():
    A, b = sampled(12, 4), sampled(12, 2, seed=1)
    x, info = SketchAndSolve().prepare(A).solve(b)
    close(x, torch.linalg.lstsq(A, b).solution)
    assert info.converged
    square, right = sampled(5, 5), sampled(5)
    prepared = SketchAndSolve().prepare(square)
    close(prepared.solve(right).value, torch.linalg.solve(square, right))
    close(prepared.solve_transpose(right).value, torch.linalg.solve(square.T, right))


def test_of_low_rank_the_shortest():
    A = sampled(400, 3) @ sampled(3, 8, seed=1)
    b = A @ sampled(8)
    prepared = SketchAndSolve().prepare(A)
    assert prepared.rank == 3
    close(prepared.solve(b).value, torch.linalg.pinv(A) @ b)


def test_refusals():
    with pytest.raises(ValueError, match="sketch='hadamard'; expected one of"):
        SketchAndSolve(sketch="hadamard")
    with pytest.raises(ValueError, match="size=0; expected at least 1, or None"):
        SketchAndSolve(size=0)
    with pytest.raises(ValueError, match=r"size=3 for Dense\(9, 4\); expected at least .* 4"):
        SketchAndSolve(size=3).prepare(sampled(9, 4))
    with pytest.raises(ValueError, match="holds NaN or infinite"):
        SketchAndSolve().prepare(torch.full((9, 2), float("nan")))
    with pytest.raises(TypeError, match="expected float32 or float64"):
        SketchAndSolve().prepare(ops.Dense(torch.ones(9, 2, dtype=torch.bfloat16)))
