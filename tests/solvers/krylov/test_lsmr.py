"""LSMR against the pseudo-inverse and ridge regression, with their derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
import solvers
from solvers import ConvergenceWarning, StructureError
from solvers.krylov.lsmr import LSMR

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64
SHAPES = [(20, 8), (8, 20), (10, 10)]


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def ridge(A: Tensor, b: Tensor, damping: float) -> Tensor:
    gram = A.T @ A + damping**2 * torch.eye(A.shape[1], dtype=FLOAT64)
    return torch.linalg.solve(gram, A.T @ b)


@PROPERTY
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 999)
)
def test_is_the_pseudo_inverse_for_every_shape_and_rank(m, n, rank, seed):
    """Also where A is singular: the shortest minimiser."""
    rank = min(m, n, rank)
    U, _ = torch.linalg.qr(sampled(m, rank, seed=seed))
    V, _ = torch.linalg.qr(sampled(n, rank, seed=seed + 1))
    A = U @ torch.diag(torch.linspace(1, 4, rank, dtype=FLOAT64)) @ V.T
    b, c = sampled(m, 2, seed=seed + 2), sampled(n, seed=seed + 3)
    prepared = LSMR(rtol=1e-11, strict=True).prepare(ops.Dense(A))
    pseudo_inverse = torch.linalg.pinv(A, rtol=1e-10)
    torch.testing.assert_close(prepared.solve(b).value, pseudo_inverse @ b, rtol=0, atol=1e-8)
    x = prepared.solve_transpose(c).value
    torch.testing.assert_close(x, pseudo_inverse.T @ c, rtol=0, atol=1e-8)


def test_iterates_minimise_the_gradient_over_the_krylov_space():
    """``|A^T (b - A x)|`` over ``K_k(A^T A, A^T b)``."""
    A, b = sampled(15, 9), sampled(15, seed=1)
    for k in range(1, 6):
        vectors = [A.T @ b]
        for _ in range(k - 1):
            w = A.T @ (A @ vectors[-1])
            vectors.append(w / torch.linalg.vector_norm(w))
        V = torch.linalg.qr(torch.stack(vectors, 1)).Q
        y = torch.linalg.lstsq(A.T @ A @ V, (A.T @ b)[:, None], driver="gelsd").solution
        solver = LSMR(rtol=0.0, maxiter=k, stop_at_maxiter=True)
        x = solver.prepare(ops.Dense(A)).solve(b).value
        torch.testing.assert_close(x, (V @ y)[:, 0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("exponent", [0, 3, 6])
def test_what_it_says_is_true(exponent):
    U, _ = torch.linalg.qr(sampled(40, 15))
    V, _ = torch.linalg.qr(sampled(15, 15, seed=1))
    A = ops.Dense(U @ torch.diag(torch.logspace(-exponent, 0, 15, dtype=FLOAT64)) @ V)
    b = sampled(40, seed=2)
    x, info = LSMR(rtol=1e-9, maxiter=5000, strict=True).prepare(A).solve(b)
    r = b - A @ x
    size = torch.linalg.vector_norm(r)
    assert info.residual == pytest.approx(float(size / torch.linalg.vector_norm(b)), rel=1e-9)
    normal = torch.linalg.vector_norm(A.T @ r) / (torch.linalg.matrix_norm(A.matrix, 2) * size)
    # The judge's |A| is a lower estimate, and its x was not yet scaled back: a rounding of x.
    rounding = 2e-16 * float(torch.linalg.vector_norm(x) / size + 1)  # |A| = 1
    said = info.normal_residual
    assert 0.8 * said - rounding <= float(normal) <= 1.001 * said + rounding
    assert info.normal_residual <= 1e-9


def test_a_consistent_system_stops_by_its_residual():
    A = ops.Dense(sampled(30, 12))
    b = A @ sampled(12, seed=1)
    info = LSMR(rtol=1e-8, strict=True).prepare(A).solve(b).info
    assert info.residual <= 1e-8
    assert info.normal_residual > 1e-8


def test_a_right_hand_side_orthogonal_to_the_range():
    A = ops.Dense(torch.tensor([[1.0, 0], [0, 2], [0, 0]], dtype=FLOAT64))
    b = torch.tensor([0.0, 0, 5], dtype=FLOAT64)
    x, info = LSMR(strict=True).prepare(A).solve(b)
    assert not x.any()
    assert info.iterations == 0
    assert info.residual == 1.0
    nothing = LSMR(strict=True).prepare(ops.Dense(torch.zeros(3, 2, dtype=FLOAT64))).solve(b)
    assert not nothing.value.any()


class TestPreconditioned:
    A, b = ops.Dense(sampled(60, 20) * torch.logspace(0, 3, 20).double()), sampled(60, 2, seed=1)

    def inverse_of_r(self) -> ops.Dense:
        """P with ``A P`` near to orthonormal columns."""
        R = torch.linalg.qr(self.A.matrix).R
        return ops.Dense(torch.linalg.inv(R) @ (torch.eye(20).double() + 0.02 * sampled(20, 20)))

    def test_takes_fewer_iterations_to_the_same_solution(self):
        plain = LSMR(rtol=1e-10, maxiter=5000, strict=True).prepare(self.A).solve(self.b)
        solver = LSMR(rtol=1e-10, strict=True, preconditioner=self.inverse_of_r())
        prepared = solver.prepare(self.A)
        x, info = prepared.solve(self.b)
        assert info.iterations < 25 < plain.info.iterations
        pseudo_inverse = torch.linalg.pinv(self.A.matrix)
        torch.testing.assert_close(x, pseudo_inverse @ self.b, rtol=1e-7, atol=1e-9)

    def test_the_transposed_system_has_the_transposed_preconditioner_on_the_left(self):
        c = sampled(20, 2, seed=3)
        solver = LSMR(rtol=1e-10, strict=True, preconditioner=self.inverse_of_r())
        x, info = solver.prepare(self.A).solve_transpose(c)
        assert info.iterations < 25
        expected = torch.linalg.pinv(self.A.matrix).T @ c
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)

    def test_it_may_be_narrower_than_a(self):
        """P of shape (n, 5): least squares over its range."""
        P = sampled(20, 5, seed=4)
        solver = LSMR(rtol=1e-10, stop_at_maxiter=True, maxiter=100, preconditioner=ops.Dense(P))
        with pytest.warns(ConvergenceWarning, match="stagnated"):
            x = solver.prepare(self.A).solve(self.b).value
        y = torch.linalg.lstsq(self.A.matrix @ P, self.b).solution
        torch.testing.assert_close(x, P @ y, rtol=1e-6, atol=1e-9)

    def test_what_does_not_fit(self):
        with pytest.raises(ValueError, match=r"on the right of Dense\(60, 20\): expected 20 rows"):
            LSMR(preconditioner=ops.Identity(60, FLOAT64)).prepare(self.A)
        with pytest.raises(StructureError, match="changes which solution is the shortest"):
            LSMR(preconditioner=ops.Identity(60, FLOAT64)).prepare(self.A.T)

    def test_the_gradient_does_not_depend_on_it(self):
        def loss(A: Tensor, b: Tensor, P: ops.LinearOperator | None) -> Tensor:
            solver = LSMR(rtol=1e-12, maxiter=5000, preconditioner=P)
            return solvers.solve(A, b, solver=solver).square().sum()

        P, b = self.inverse_of_r(), self.b
        A = self.A.matrix
        one = torch.func.grad(loss, (0, 1))(A, b, P)
        other = torch.func.grad(lambda A, b: (torch.linalg.pinv(A) @ b).square().sum(), (0, 1))(
            A, b
        )
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
class TestDamping:
    damping = 0.7

    def solver(self, **settings) -> LSMR:
        return LSMR(rtol=1e-12, damping=self.damping, strict=True, **settings)

    def test_is_ridge_regression(self, shape):
        A, b = sampled(*shape), sampled(shape[0], 3, seed=1)
        prepared = self.solver().prepare(ops.Dense(A))
        x, info = prepared.solve(b)
        torch.testing.assert_close(x, ridge(A, b, self.damping), rtol=1e-9, atol=1e-11)
        c = sampled(shape[1], seed=2)
        y = prepared.solve_transpose(c).value
        torch.testing.assert_close(y, ridge(A.T, c, self.damping), rtol=1e-9, atol=1e-11)
        # The residual is that of the rows [A; d I].
        left = torch.cat([b - A @ x, -self.damping * x])
        true = torch.linalg.vector_norm(left, dim=0) / torch.linalg.vector_norm(b, dim=0)
        assert info.residual == pytest.approx(float(true.max()), rel=1e-9)
        assert info.normal_residual <= 1e-12
        assert "damping=0.7" in info.solver

    def test_is_not_taken_for_a_solution_without(self, shape):
        """What the damped problem leaves is judged by its own normal equations."""
        A, b = sampled(*shape), sampled(shape[0], seed=1)
        loose = LSMR(rtol=1e-12, damping=self.damping, maxiter=1)
        with pytest.warns(ConvergenceWarning, match="maxiter after 1"):
            loose.prepare(ops.Dense(A)).solve(b)

    def test_derivatives(self, shape):
        A, b = sampled(*shape), sampled(shape[0], seed=1)
        solver, damping = self.solver(), self.damping

        def mine(A: Tensor, b: Tensor) -> Tensor:
            return solvers.solve(A, b, solver=solver)

        def theirs(A: Tensor, b: Tensor) -> Tensor:
            return ridge(A, b, damping)

        close = {"rtol": 1e-8, "atol": 1e-10}
        for k in (0, 1):
            one = torch.func.jacrev(mine, k)(A, b)
            torch.testing.assert_close(one, torch.func.jacrev(theirs, k)(A, b), **close)
        tangents = (sampled(*shape, seed=3), sampled(shape[0], seed=4))
        one = torch.func.jvp(mine, (A, b), tangents)[1]
        torch.testing.assert_close(one, torch.func.jvp(theirs, (A, b), tangents)[1], **close)
        batch = (torch.stack([A, 2 * A]), torch.stack([b, b + 1]))
        one = torch.func.vmap(mine)(*batch)
        torch.testing.assert_close(one, torch.func.vmap(theirs)(*batch), **close)

    def test_derivatives_of_a_prepared_solver(self, shape):
        A, b = sampled(*shape).requires_grad_(), sampled(shape[0], seed=1)
        prepared = self.solver().prepare(ops.Dense(A))
        for solve, matrix, rhs in (
            (prepared.solve, A, b),
            (prepared.solve_transpose, A.T, sampled(shape[1], seed=2)),
        ):
            (one,) = torch.autograd.grad(solve(rhs).value.square().sum(), A)
            (other,) = torch.autograd.grad(ridge(matrix, rhs, self.damping).square().sum(), A)
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)

    def test_a_stack(self, shape):
        A, b = sampled(2, *shape), sampled(2, shape[0], seed=1)
        stack = ops.Stacked([ops.Dense(M) for M in A])
        x, info = self.solver().prepare(stack).solve(b.reshape(-1))
        assert info.converged
        expected = torch.stack([ridge(M, c, self.damping) for M, c in zip(A, b, strict=True)])
        torch.testing.assert_close(x.reshape(2, -1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_settings_out_of_range(damping):
    with pytest.raises(ValueError, match=r"LSMR: damping=.*expected a number >= 0"):
        LSMR(damping=damping)


def test_each_column_converges_by_itself():
    A = ops.Dense(torch.diag(torch.linspace(1, 20, 20, dtype=FLOAT64)))
    block = torch.stack([torch.eye(20).double()[3], sampled(20), torch.zeros(20).double()], 1)
    x, info = LSMR(rtol=1e-11, strict=True).prepare(A).solve(block)
    torch.testing.assert_close(A @ x, block, rtol=0, atol=1e-9)
    assert not x[:, 2].any()
    single = LSMR(rtol=1e-11, strict=True).prepare(A).solve(block[:, 1])
    assert abs(info.iterations - single.info.iterations) <= 2


def test_a_stack_is_one_block():
    A, b = sampled(3, 12, 5), sampled(3, 12, seed=1)
    stack = ops.Stacked([ops.Dense(M) for M in A])
    x = LSMR(rtol=1e-11, strict=True).prepare(stack).solve(b.reshape(-1)).value
    expected = torch.linalg.lstsq(A, b[..., None]).solution[..., 0]
    torch.testing.assert_close(x.reshape(3, 5), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 3])
def test_products_that_are_not_finite(columns):
    A = ops.Diagonal(torch.tensor([1.0, 2.0, float("nan")], dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match="not finite"):
        x, info = LSMR().prepare(A).solve(torch.ones(3, columns, dtype=FLOAT64))
    assert info.status == "breakdown"
    assert not x.any()


def test_the_iteration_limit():
    A = ops.Dense(sampled(40, 30))
    with pytest.warns(ConvergenceWarning, match="maxiter after 4 iterations"):
        info = LSMR(maxiter=4).prepare(A).solve(sampled(40)).info
    assert info.iterations == 4


def test_float32():
    A, b = sampled(40, 10), sampled(40, seed=1)
    x = LSMR(rtol=1e-5, strict=True).prepare(ops.Dense(A.float())).solve(b.float()).value
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.linalg.pinv(A) @ b, rtol=1e-3, atol=1e-4)
