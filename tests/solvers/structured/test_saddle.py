"""`solvers.Saddle`: the Schur complement, beside dense linear algebra and constrained minima."""

from __future__ import annotations

import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import CG, ConvergenceWarning, DenseCholesky, DenseLU, SingularError, StructureError
from solvers.preconditioner import SolveOperator
from solvers.structured.saddle import Saddle

DOUBLE = torch.float64
few = settings(max_examples=20, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def definite(n: int, seed: int = 0) -> ops.Dense:
    root = sampled(n, n, seed=seed)
    return ops.Dense(root @ root.T / n + torch.eye(n, dtype=DOUBLE), positive_definite=True)


def general(n: int, seed: int = 0) -> ops.Dense:
    return ops.Dense(2 * torch.eye(n, dtype=DOUBLE) + 0.5 * torch.tanh(sampled(n, n, seed=seed)))


def wide(m: int, n: int, seed: int = 0) -> ops.Dense:
    """Full rank, condition below 3."""
    return ops.Dense(torch.eye(m, n, dtype=DOUBLE) + 0.3 * torch.tanh(sampled(m, n, seed=seed)))


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


def check(solver: Saddle, A: ops.LinearOperator, rtol: float = 1e-10) -> None:
    prepared, M, b = solver.prepare(A), A.to_dense(), sampled(A.shape[0], 3, seed=77)
    x, info = prepared.solve(b)
    assert info.converged
    close(x, torch.linalg.solve(M, b), rtol)
    close(prepared.solve_transpose(b).value, torch.linalg.solve(M.T, b), rtol)


@few
@given(st.integers(1, 8), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_definite(n, m, regularised, seed):
    m = min(m, n)
    C = definite(m, seed + 1) if regularised else None
    A = ops.Saddle(definite(n, seed), wide(m, n, seed + 2), C)
    check(Saddle(), A)
    assert isinstance(Saddle().prepare(A).parts[1].prepared.solver, DenseCholesky)


@few
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_not_symmetric(n, m, seed):
    m = min(m, n)
    A = ops.Saddle(general(n, seed), wide(m, n, seed + 2), general(m, seed + 1))
    check(Saddle(), A, 1e-8)
    check(Saddle(), A.T, 1e-8)
    assert isinstance(Saddle().prepare(A).parts[1].prepared.solver, DenseLU)


def test_indefinite_B():
    B = ops.Dense(torch.diag(torch.tensor([3.0, -1.0, 2.0], dtype=DOUBLE)), symmetric=True)
    G = ops.Dense(torch.tensor([[1.0, 1.0, 1.0]], dtype=DOUBLE))
    check(Saddle(), ops.Saddle(B, G))


def test_the_minimiser_under_constraints():
    """``min <u, B u> / 2 - <f, u>`` on ``G u = g``, by a basis of the null space of G."""
    B, G, f, g = definite(7), wide(3, 7), sampled(7), sampled(3, seed=1)
    A = ops.Saddle(B, G)
    u, p = Saddle().prepare(A).solve((f, g)).value
    particular = torch.linalg.lstsq(G.matrix, g).solution
    free = torch.linalg.svd(G.matrix).Vh[3:].T
    reduced = free.T @ B.matrix @ free
    expected = particular + free @ torch.linalg.solve(reduced, free.T @ (f - B @ particular))
    close(u, expected)
    close(G @ u, g)
    close(B @ u + G.T @ p, f)


@pytest.mark.parametrize("schur_solver", [CG(rtol=1e-11), DenseLU()])
def test_the_solver_of_the_schur_complement(schur_solver):
    A = ops.Saddle(definite(9), wide(4, 9), definite(4, 1))
    solver = Saddle(rtol=1e-10, schur_solver=schur_solver)
    check(solver, A, 1e-8)
    info = solver.prepare(A).solve(sampled(13)).info
    assert (info.iterations > 0) == isinstance(schur_solver, CG)


def test_inexact_parts_are_corrected():
    """B by conjugate gradients to the tolerance of the whole, S of such solves."""
    A = ops.Saddle(definite(30), wide(5, 30))
    b = sampled(35)
    x, info = Saddle(rtol=1e-11, primal_solver=CG(rtol=1e-5)).prepare(A).solve(b)
    assert info.converged
    close(x, torch.linalg.solve(A.to_dense(), b), 1e-9)


def test_transposed_products_with_the_inverse_of_a_general_B():
    """An iteration on S^T multiplies by B^-T, block by block."""
    A = ops.Saddle(general(6), wide(2, 6))
    S = A.schur_complement(ops.Inverse(A.B, DenseLU()))
    inner = A.schur_complement(SolveOperator(DenseLU().prepare(A.B)))
    close(inner.T.to_dense(), S.to_dense().T)
    close(inner.T @ torch.ones(2, dtype=DOUBLE), S.to_dense().sum(0))


def test_sparse_stokes_like():
    """A thousand unknowns; SuperLU of the whole agrees."""
    n = 20
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    B = scipy.sparse.csr_array(scipy.sparse.kronsum(line, line))
    G = scipy.sparse.csr_array(scipy.sparse.random_array((15, n * n), density=0.05, rng=0))
    A = ops.Saddle(ops.Sparse.from_scipy(B, positive_definite=True), ops.Sparse.from_scipy(G))
    whole = scipy.sparse.block_array([[B, G.T], [G, None]], format="csc")
    b = sampled(n * n + 15)
    x, info = Saddle().prepare(A).solve(b)
    assert info.converged
    close(x, torch.from_numpy(scipy.sparse.linalg.spsolve(whole, b.numpy())))


def test_update():
    prepared = Saddle().prepare(ops.Saddle(definite(5), wide(2, 5)))
    for A in (
        ops.Saddle(definite(5, 3), wide(2, 5, 4)),
        ops.Saddle(definite(5, 3), wide(2, 5, 4), definite(2)),
        ops.Saddle(definite(4, 3), wide(3, 4, 4)),
    ):
        b = sampled(7)
        close(prepared.update(A).solve(b).value, torch.linalg.solve(A.to_dense(), b))


class TestRefusals:
    def test_dependent_constraints(self):
        G = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]], dtype=DOUBLE)
        for B in (definite(3), ops.Dense(2 * torch.eye(3, dtype=DOUBLE))):
            A = ops.Saddle(B, ops.Dense(G))
            assert torch.linalg.matrix_rank(A.to_dense()) < 5
            with pytest.raises(SingularError, match="rows of G are dependent"):
                Saddle(primal_solver=DenseLU()).prepare(A)
        regularised = ops.Saddle(definite(3), ops.Dense(G), 1e-3 * ops.Identity(2, DOUBLE))
        check(Saddle(), regularised, 1e-8)

    def test_a_singular_B(self):
        B = ops.Dense(torch.diag(torch.tensor([0.0, 1.0], dtype=DOUBLE)), symmetric=True)
        G = ops.Dense(torch.tensor([[1.0, 0.0]], dtype=DOUBLE))
        A = ops.Saddle(B, G)
        assert torch.linalg.matrix_rank(A.to_dense()) == 3
        with pytest.raises(SingularError, match=r"Dense\(2, 2\) is singular"):
            Saddle(primal_solver=DenseLU()).prepare(A)
        # As the docstring says: B + c G^T G and f + c G^T g give the same solution.
        b, c = sampled(3), 2.0
        lifted = ops.Saddle(B + c * G.T @ G, G)
        right = torch.cat([b[:2] + c * (G.T @ b[2:]), b[2:]])
        close(Saddle().prepare(lifted).solve(right).value, torch.linalg.solve(A.to_dense(), b))

    def test_an_iteration_that_stops_early_is_told_of(self):
        A = ops.Saddle(definite(20), wide(8, 20))
        solver = Saddle(rtol=1e-10, schur_solver=CG(maxiter=1))
        with pytest.warns(ConvergenceWarning, match=r"Saddle on Saddle.*: maxiter"):
            assert not solver.prepare(A).solve(sampled(28)).info.converged

    def test_other_operators(self):
        with pytest.raises(StructureError, match=r"needs an operators\.Saddle; got Dense"):
            Saddle().prepare(general(3))
