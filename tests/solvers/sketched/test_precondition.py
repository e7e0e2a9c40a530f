"""`SketchAndPrecondition`: as many iterations at condition 1e10 as at 10, and LAPACK's accuracy."""

from __future__ import annotations

import warnings

import pytest
import scipy.sparse
import torch
from torch import Tensor

import operators as ops
import solvers
from solvers import ConvergenceWarning
from solvers.sketched.precondition import SketchAndPrecondition
from solvers.sketched.sketch import KINDS

DOUBLE = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def conditioned(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    U, V = torch.linalg.qr(sampled(m, n, seed=seed)).Q, torch.linalg.qr(sampled(n, n, seed=1)).Q
    return U * torch.logspace(0, -torch.log10(torch.tensor(condition)), n, dtype=DOUBLE) @ V.T


def problem(m: int, n: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, b and the minimiser, of the size of 1, with a residual of the size of 0.1."""
    A, x = conditioned(m, n, condition), sampled(n, seed=2) / n**0.5
    noise = sampled(m, seed=3)
    Q = torch.linalg.qr(A).Q
    noise = noise - Q @ (Q.T @ noise)
    return A, A @ x + 0.1 * noise / torch.linalg.vector_norm(noise), x


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_iterations_do_not_depend_on_the_condition(self, kind):
        counts = []
        for condition in (1e1, 1e4, 1e7, 1e10):
            A, b, x = problem(1500, 30, condition)
            value, info = SketchAndPrecondition(sketch=kind, rtol=1e-10).prepare(A).solve(b)
            assert info.converged
            assert info.normal_residual <= 1e-10
            counts.append(info.iterations)
            # The error of the fit, relative to b, that a backward stable method has.
            fit = torch.linalg.vector_norm(A @ (value - x)) / torch.linalg.vector_norm(b)
            assert fit < 1e-15 * condition + 1e-9
        # sqrt(n / s) = 1/2 an iteration, nearly: 33 of them.
        assert max(counts) <= 50
        assert max(counts) <= 2 * min(counts)

    def test_wide(self, kind):
        A = conditioned(1500, 30, 1e8).T
        b = A @ sampled(1500)
        x, info = SketchAndPrecondition(sketch=kind, rtol=1e-11).prepare(A).solve(b)
        assert info.converged
        assert info.iterations < 60
        close(A @ x, b, 1e-10)
        close(x, torch.linalg.lstsq(A, b, driver="gelsd").solution, 1e-6)

    def test_low_rank(self, kind):
        A = sampled(500, 4) @ sampled(4, 12, seed=1)
        b = sampled(500, 2, seed=2)
        prepared = SketchAndPrecondition(sketch=kind, rtol=1e-12).prepare(A)
        assert prepared.rank == 4
        close(prepared.solve(b).value, torch.linalg.pinv(A) @ b)
        right = A.T @ sampled(500, seed=3)
        close(prepared.solve_transpose(right).value, torch.linalg.pinv(A.T) @ right)

    def test_deterministic(self, kind):
        A, b, _ = problem(300, 10, 1e3)
        one, two = (
            SketchAndPrecondition(sketch=kind, seed=5).prepare(A).solve(b) for _ in range(2)
        )
        assert torch.equal(one.value, two.value)
        assert one.info == two.info


def test_as_accurate_as_lapack():
    """Components of the minimiser along small singular values are large: |x| = 1e7 |b|."""
    A, b, _ = problem(1500, 30, 1e10)
    b = b + 1e-3 * sampled(1500, seed=9)
    x = torch.linalg.lstsq(A, b).solution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        value, info = SketchAndPrecondition(rtol=1e-15).prepare(A).solve(b)
    assert torch.linalg.vector_norm(value) > 1e4

    def normal(x: Tensor) -> float:
        r = b - A @ x
        return float(torch.linalg.vector_norm(A.T @ r) / torch.linalg.vector_norm(r))

    assert normal(value) <= 3 * normal(x)
    assert torch.linalg.vector_norm(b - A @ value) <= (1 + 1e-9) * torch.linalg.vector_norm(
        b - A @ x
    )
    assert info.status == "stagnated"
    assert "rounding" in info.reason


def test_a_smaller_sketch_takes_longer():
    A, b, _ = problem(1500, 30, 1e5)
    counts = [
        SketchAndPrecondition(size=size, sketch="gaussian", rtol=1e-10)
        .prepare(A)
        .solve(b)
        .info.iterations
        for size in (45, 120, 600)
    ]
    assert counts[0] > counts[1] > counts[2]


def test_normal_equations_of_A_would_not_do():
    """What the sketch is for: the same iteration on ``A^T A`` itself."""
    A, b, x = problem(600, 20, 1e6)
    plain = solvers.CG(maxiter=2000, stop_at_maxiter=True).prepare(ops.Gram(ops.Dense(A)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        unconditioned = plain.solve(A.T @ b).value
    ours = SketchAndPrecondition(rtol=1e-12).prepare(A).solve(b).value
    error, theirs = (torch.linalg.vector_norm(v - x) for v in (ours, unconditioned))
    assert error < 1e-3 * theirs


def test_every_column_and_every_size():
    A, b, x = problem(300, 8, 1e3)
    block = torch.stack([b, 0 * b, 1e-20 * b, A @ x], 1)
    value, info = SketchAndPrecondition(rtol=1e-12).prepare(A).solve(block)
    assert info.converged
    close(value, torch.stack([x, 0 * x, 1e-20 * x, x], 1))
    assert not value[:, 1].any()
    for m, n in ((5, 5), (6, 2), (1, 1), (4, 0)):
        M, right = sampled(m, n), sampled(m)
        prepared = SketchAndPrecondition(rtol=1e-12).prepare(M)
        close(prepared.solve(right).value, torch.linalg.pinv(M) @ right)
        close(prepared.solve_transpose(sampled(n)).value, torch.linalg.pinv(M.T) @ sampled(n))


def test_sparse_and_by_products():
    A = scipy.sparse.random_array((2000, 25), density=0.05, rng=0)
    dense, b = torch.from_numpy(A.toarray()), sampled(2000)
    expected = torch.linalg.lstsq(dense, b).solution
    products = ops.FunctionOperator(lambda v, M: M @ v, torch.zeros(25, dtype=DOUBLE), dense)
    for operator in (A, products):
        x, info = SketchAndPrecondition(rtol=1e-12).prepare(operator).solve(b)
        close(x, expected)
        # What the solve took, counted by hand: two products an iteration, and the residuals.
        assert 2 * info.iterations < info.products < 2 * info.iterations + 12


def test_derivatives():
    A, b, _ = problem(60, 4, 10.0)
    solver = SketchAndPrecondition(rtol=1e-12, size=20)

    def ours(A: Tensor) -> Tensor:
        return solvers.solve(A, b, solver=solver).sin().sum()

    def theirs(A: Tensor) -> Tensor:
        return torch.linalg.solve(A.T @ A, A.T @ b).sin().sum()

    close(torch.func.grad(ours)(A), torch.func.grad(theirs)(A))


def test_limits():
    A, b, _ = problem(1500, 30, 1e5)
    with pytest.warns(ConvergenceWarning, match="maxiter after 3 iterations.*size of the sketch"):
        info = SketchAndPrecondition(rtol=1e-12, maxiter=3).prepare(A).solve(b).info
    assert info.status == "maxiter"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver = SketchAndPrecondition(rtol=1e-12, maxiter=3, stop_at_maxiter=True)
        assert not solver.prepare(A).solve(b).info.converged


def test_single_precision():
    A, b, x = (t.float() for t in problem(800, 10, 1e2))
    value, info = SketchAndPrecondition(rtol=1e-5).prepare(A).solve(b)
    assert value.dtype == torch.float32
    assert info.converged
    close(value, x, 1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="SketchAndPrecondition: sketch='sparse'"):
        SketchAndPrecondition(sketch="sparse")
    with pytest.raises(ValueError, match=r"SketchAndPrecondition: size=3 for Dense\(4, 9\)"):
        SketchAndPrecondition(size=3).prepare(sampled(4, 9))
