"""MINRES against its minimisation property, and on the systems that CG cannot solve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, StructureError
from solvers.krylov.cg import CG
from solvers.krylov.minres import MINRES

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> ops.Dense:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return ops.Dense((matrix + matrix.T) / 2, symmetric=True)


def both_signs(n: int, condition: float = 10.0) -> Tensor:
    half = torch.logspace(0, 1, (n + 1) // 2, base=condition, dtype=FLOAT64)
    return torch.cat([half, -half[: n // 2]])


def truncated(A: ops.LinearOperator, b: Tensor, k: int, **settings) -> Tensor:
    """Iterate number k."""
    solver = MINRES(rtol=0.0, maxiter=k, stop_at_maxiter=True, **settings)
    return solver.prepare(A).solve(b).value


def krylov(A: Tensor, b: Tensor, k: int) -> Tensor:
    """Orthonormal basis of ``b, A b, ..., A^(k-1) b``."""
    vectors = [b]
    for _ in range(k - 1):
        w = A @ vectors[-1]
        vectors.append(w / torch.linalg.vector_norm(w))
    return torch.linalg.qr(torch.stack(vectors, 1)).Q


@PROPERTY
@given(k=st.integers(1, 6), seed=st.integers(0, 99))
def test_iterates_minimise_the_residual_over_the_krylov_space(k, seed):
    A, b = symmetric(both_signs(14), seed), sampled(14, seed=seed + 1)
    V = krylov(A.matrix, b, k)
    y = torch.linalg.lstsq(A.matrix @ V, b[:, None], driver="gelsd").solution
    torch.testing.assert_close(truncated(A, b, k), (V @ y)[:, 0], rtol=1e-6, atol=1e-8)


def test_preconditioned_iterates_minimise_the_preconditioned_residual():
    """Over ``P K_k(A P, b)``, in the norm of P."""
    A, b = symmetric(both_signs(14)), sampled(14, seed=1)
    P = symmetric(torch.linspace(1, 3, 14, dtype=FLOAT64), seed=5)
    L = torch.linalg.cholesky(P.matrix)
    for k in (1, 3, 5):
        V = P.matrix @ krylov(A.matrix @ P.matrix, b, k)
        y = torch.linalg.lstsq(L.T @ A.matrix @ V, (L.T @ b)[:, None], driver="gelsd").solution
        x = truncated(A, b, k, preconditioner=P)
        torch.testing.assert_close(x, (V @ y)[:, 0], rtol=1e-6, atol=1e-8)


@PROPERTY
@given(n=st.integers(1, 12), seed=st.integers(0, 99))
def test_terminates_in_n_iterations(n, seed):
    A, b = symmetric(both_signs(n), seed), sampled(n)
    _, info = MINRES(rtol=1e-9, strict=True).prepare(A).solve(b)
    assert info.iterations <= n


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-10])
def test_the_tolerance_is_met_by_the_true_residual_whatever_the_preconditioner(rtol):
    A, b = symmetric(both_signs(40, 1e3)), sampled(40, 3, seed=2)
    skewed = ops.Diagonal(torch.logspace(-4, 4, 40, dtype=FLOAT64))
    for P in (None, skewed):
        solver = MINRES(rtol=rtol, maxiter=20_000, strict=True, preconditioner=P)
        x, info = solver.prepare(A).solve(b)
        true = torch.linalg.vector_norm(b - A @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)
        assert float(true.max()) <= 1.0001 * rtol
        assert info.residual == pytest.approx(float(true.max()), rel=1e-3)


def test_a_good_preconditioner_shortens_it():
    """``P = |A|^-1``: eigenvalues 1 and -1, two iterations."""
    values = both_signs(40, 1e3)
    basis, _ = torch.linalg.qr(sampled(40, 40))
    A = ops.Dense(basis @ torch.diag(values) @ basis.T, symmetric=True)
    P = ops.Dense(basis @ torch.diag(1 / values.abs()) @ basis.T, positive_definite=True)
    b = sampled(40, seed=3)
    x, info = MINRES(rtol=1e-10, strict=True, preconditioner=P).prepare(A).solve(b)
    assert info.iterations == 2
    torch.testing.assert_close(x, torch.linalg.solve(A.matrix, b), rtol=1e-7, atol=1e-8)
    assert MINRES(rtol=1e-10).prepare(A).solve(b).info.iterations > 40


def test_solves_what_cg_refuses():
    A = ops.Hessian(lambda y: y[0] ** 2 - y[1] ** 2 + y[0] * y[1], torch.zeros(2, dtype=FLOAT64))
    b = torch.tensor([1.0, 1.0], dtype=FLOAT64)
    x = MINRES(rtol=1e-12, strict=True).prepare(A).solve(b).value
    torch.testing.assert_close(A @ x, b)
    skew = ops.Diagonal(torch.tensor([1.0, -1.0], dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match="use MINRES"):
        CG().prepare(skew).solve(b)
    MINRES(strict=True).prepare(skew).solve(b)


class TestSingular:
    A = ops.Diagonal(torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=FLOAT64))

    def test_a_consistent_system_is_solved_by_the_shortest_solution(self):
        b = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=FLOAT64)
        x = MINRES(rtol=1e-12, strict=True).prepare(self.A).solve(b).value
        torch.testing.assert_close(x, torch.tensor([1.0, -0.5, 0.0, 1 / 3], dtype=FLOAT64))

    @pytest.mark.parametrize("columns", [1, 2])
    def test_an_inconsistent_one_is_found_out(self, columns):
        b = torch.ones(4, columns, dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match="singular and b not in its range: use SVD"):
            x, info = MINRES().prepare(self.A).solve(b)
        assert info.status == "breakdown"
        assert info.residual == pytest.approx(0.5)  # the least that there is
        assert torch.isfinite(x).all()

    def test_spoils_no_other_column(self):
        block = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning):
            x = MINRES(rtol=1e-12).prepare(self.A).solve(block).value
        expected = torch.tensor([1.0, -0.5, 0.0, 1 / 3], dtype=FLOAT64)
        torch.testing.assert_close(x[:, 1], expected)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_preconditioner_that_is_not_definite_is_found_out(columns):
    P = ops.Diagonal(torch.linspace(-1, 1, 20, dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match=r"<r, P r> < 0: the preconditioner is not"):
        info = (
            MINRES(preconditioner=P)
            .prepare(symmetric(both_signs(20)))
            .solve(sampled(20, columns))
            .info
        )
    assert info.status == "indefinite"


@pytest.mark.parametrize("columns", [1, 3])
def test_products_that_are_not_finite(columns):
    A = ops.Diagonal(torch.tensor([1.0, -1.0, float("nan")], dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match="not finite"):
        x, info = MINRES().prepare(A).solve(torch.ones(3, columns, dtype=FLOAT64))
    assert info.status == "breakdown"
    assert torch.isfinite(x).all()


def test_each_column_converges_by_itself():
    A = symmetric(both_signs(30, 100.0))
    values, vectors = torch.linalg.eigh(A.matrix)
    block = torch.stack([vectors[:, 4], sampled(30), torch.zeros(30).double()], 1)
    x, info = MINRES(rtol=1e-10, strict=True).prepare(A).solve(block)
    torch.testing.assert_close(x[:, 0], vectors[:, 4] / values[4], rtol=1e-9, atol=1e-11)
    assert not x[:, 2].any()
    single = MINRES(rtol=1e-10, strict=True).prepare(A).solve(block[:, 1])
    assert abs(info.iterations - single.info.iterations) <= 3  # as rounding has it
    torch.testing.assert_close(x[:, 1], single.value, rtol=1e-7, atol=1e-9)


def test_what_it_says_of_an_ill_conditioned_system_is_true():
    A, b = symmetric(both_signs(12, 1e12)), sampled(12)
    with pytest.warns(ConvergenceWarning):
        x, info = MINRES(rtol=1e-14).prepare(A).solve(b)
    true = float(torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b))
    assert info.residual == pytest.approx(true, rel=1e-2)
    assert info.residual <= 1.0
    assert not info.converged


def test_the_iteration_limit():
    A, b = symmetric(both_signs(40, 1e4)), sampled(40)
    with pytest.warns(ConvergenceWarning, match="maxiter after 7 iterations"):
        info = MINRES(maxiter=7).prepare(A).solve(b).info
    assert info.iterations == 7
    assert info.products == 8


def test_refuses_what_does_not_claim_symmetry():
    with pytest.raises(StructureError, match=r"MINRES needs a symmetric operator.*use GMRES"):
        MINRES().prepare(ops.Dense(torch.eye(2)))


def test_float32():
    A = symmetric(both_signs(30))
    b = sampled(30).float()
    x = (
        MINRES(rtol=1e-5, strict=True)
        .prepare(ops.Dense(A.matrix.float(), symmetric=True))
        .solve(b)
        .value
    )
    assert x.dtype == torch.float32
    expected = torch.linalg.solve(A.matrix, b.double())
    assert torch.linalg.vector_norm(x - expected) <= 1e-3 * torch.linalg.vector_norm(expected)
