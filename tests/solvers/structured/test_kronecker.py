"""`solvers.Kronecker`: one factor at a time, beside dense linear algebra and scipy."""

from __future__ import annotations

import pytest
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import CG, DenseCholesky, DenseLU, SingularError, StructureError
from solvers.structured.kronecker import Kronecker

DOUBLE = torch.float64
few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 999)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def spd(n: int, seed: int = 0) -> Tensor:
    root = sampled(n, n, seed=seed)
    return root @ root.T / n + torch.eye(n, dtype=DOUBLE)


def general(n: int, seed: int = 0) -> Tensor:
    return 2 * torch.eye(n, dtype=DOUBLE) + 0.5 * torch.tanh(sampled(n, n, seed=seed))


def definite(n: int, seed: int = 0) -> ops.Dense:
    return ops.Dense(spd(n, seed), positive_definite=True)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


def check(solver: Kronecker, A: ops.LinearOperator, rtol: float = 1e-11) -> None:
    prepared, M, b = solver.prepare(A), A.to_dense(), sampled(A.shape[0], 3, seed=77)
    x, info = prepared.solve(b)
    close(x, torch.linalg.solve(M, b), rtol)
    assert info.converged
    close(prepared.solve_transpose(b).value, torch.linalg.solve(M.T, b), rtol)
    close(prepared.solve(b[:, 0]).value, x[:, 0], rtol)


class TestProducts:
    @few
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=3), seeds)
    def test_any_factors(self, sizes, seed):
        factors = [ops.Dense(general(n, seed + i)) for i, n in enumerate(sizes)]
        check(Kronecker(), ops.Kronecker(*factors))

    def test_two_factors_are_a_matrix_equation(self):
        """``S X A^T = V``."""
        S, A, V = general(3), general(4, 1), sampled(3, 4, seed=2)
        K = ops.Kronecker(ops.Dense(S), ops.Dense(A))
        X = Kronecker().prepare(K).solve(V.reshape(-1)).value.reshape(3, 4)
        close(S @ X @ A.T, V)
        close(X, torch.linalg.solve(S, torch.linalg.solve(A, V.T).T))

    def test_factors_of_other_kinds(self):
        upper = ops.Dense(general(3).triu(), upper_triangular=True)
        K = ops.Kronecker(
            ops.Diagonal(torch.tensor([1.0, -2.0]).double()), upper, ops.Identity(2, DOUBLE)
        )
        check(Kronecker(), -3.0 * K)

    def test_the_factors_are_never_multiplied_out(self):
        """The matrix would take 3.2 GB, and 5e12 flops to factorise."""
        K = ops.Kronecker(definite(100), definite(200, 1))
        b = sampled(20_000)
        x, info = Kronecker(rtol=1e-10).prepare(K).solve(b)
        assert info.converged
        close(K @ x, b, 1e-10)

    def test_the_solver_of_the_factors(self):
        K = ops.Kronecker(definite(3), definite(4, 1))
        prepared = Kronecker(factor_solver=DenseCholesky()).prepare(K)
        assert [part.prepared.solver for part in prepared.parts] == [DenseCholesky()] * 2
        with pytest.raises(StructureError, match="DenseCholesky needs a symmetric operator"):
            Kronecker(factor_solver=DenseCholesky()).prepare(ops.Kronecker(ops.Dense(general(3))))

    def test_an_iteration_counts_and_is_held_to_the_tolerance(self):
        K = ops.Kronecker(definite(6), definite(7, 1))
        b = sampled(42)
        x, info = Kronecker(rtol=1e-12, factor_solver=CG(rtol=1e-2)).prepare(K).solve(b)
        close(x, torch.linalg.solve(K.to_dense(), b), 1e-11)
        assert info.converged
        assert info.iterations >= 6 + 7

    def test_what_a_factor_reports_is_passed_on(self):
        wrong = ops.Dense(torch.diag(torch.tensor([1.0, -1.0, 2.0]).double()), symmetric=True)
        K = ops.Kronecker(wrong, definite(2))
        prepared = Kronecker(factor_solver=CG()).prepare(K)
        with pytest.warns(match="indefinite") as record:
            _, info = prepared.solve(torch.ones(6, dtype=DOUBLE))
        assert info.status == "indefinite"
        assert "Dense(3, 3)" in str(record[0].message)

    def test_update(self):
        prepared = Kronecker().prepare(ops.Kronecker(definite(2), definite(3)))
        for K in (
            ops.Kronecker(definite(2, 5), definite(3, 6)),
            ops.Kronecker(definite(3, 5), definite(2, 6)),  # the sizes change places
            ops.KroneckerSum(definite(2, 5), definite(3, 6)),
        ):
            b = sampled(6)
            close(prepared.update(K).solve(b).value, torch.linalg.solve(K.to_dense(), b))

    def test_factors_that_are_not_square(self):
        K = ops.Kronecker(ops.Dense(sampled(2, 3)), ops.Dense(sampled(3, 2)))
        with pytest.raises(StructureError, match=r"square factors; factor 0 .* Dense\(2, 3\)"):
            Kronecker().prepare(K)


class TestSums:
    @few
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.floats(0.01, 2), seeds)
    def test_product_plus_a_multiple_of_the_identity(self, sizes, shift, seed):
        K = ops.Kronecker(*(definite(n, seed + i) for i, n in enumerate(sizes)))
        eye = ops.Identity(K.shape[0])
        for A in (K + shift * eye, shift * eye + K, 2.0 * (K + shift * eye), -K - shift * eye):
            check(Kronecker(), A)
        check(Kronecker(), (K + shift * eye) + shift * eye)

    @few
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=3), seeds)
    def test_kronecker_sum(self, sizes, seed):
        A = ops.KroneckerSum(*(definite(n, seed + i) for i, n in enumerate(sizes)))
        check(Kronecker(), A)
        check(Kronecker(), 0.5 * ops.Identity(A.shape[0]) + 3.0 * A)

    def test_the_sylvester_equation_of_scipy(self):
        """``A X + X B = Q``."""
        A, B, Q = spd(4), spd(5, 1), sampled(4, 5, seed=2)
        K = ops.KroneckerSum(ops.Dense(A), ops.Dense(B))  # symmetry is looked up
        X = Kronecker().prepare(K).solve(Q.reshape(-1)).value.reshape(4, 5)
        close(X, torch.from_numpy(scipy.linalg.solve_sylvester(A.numpy(), B.numpy(), Q.numpy())))

    def test_poisson_on_a_grid(self):
        """The fast diagonalisation of Lynch, Rice and Thomas, beside SuperLU."""
        line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(30, 30))
        grid = scipy.sparse.csc_array(scipy.sparse.kronsum(line, line))
        factor = ops.Sparse.from_scipy(line.tocsr(), symmetric=True)
        b = sampled(900)
        x = Kronecker().prepare(ops.KroneckerSum(factor, factor)).solve(b).value
        close(x, torch.from_numpy(scipy.sparse.linalg.spsolve(grid, b.numpy())))

    def test_semidefinite_factors_of_low_rank(self):
        """Rounding leaves eigenvalues of either sign at zero; the shift is far below them."""
        S, A = (sampled(2, n, seed=n) for n in (6, 7))
        low = ops.Kronecker(
            ops.Dense(1e4 * S.T @ S, positive_semidefinite=True),
            ops.Dense(1e4 * A.T @ A, positive_semidefinite=True),
        )
        prepared = Kronecker().prepare(low + 1e-3 * ops.Identity(42))
        assert prepared.eigenvalues.min() == 1e-3
        x = prepared.solve((low @ sampled(42)) + 0.0).value
        assert bool(torch.isfinite(x).all())

    def test_diagonal_factors_have_no_eigenvectors(self):
        d = ops.Diagonal(torch.linspace(1, 2, 300, dtype=DOUBLE))
        A = ops.KroneckerSum(d, definite(3))
        prepared = Kronecker().prepare(A)
        assert isinstance(prepared.basis.factors[0], ops.Identity)
        b = sampled(900)
        close(A @ prepared.solve(b).value, b)

    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    def test_singular(self, dtype):
        flat = torch.ones(3, 3, dtype=dtype)  # eigenvalues 0, 0, 3
        K = ops.Kronecker(ops.Dense(flat, symmetric=True), ops.Dense(flat, symmetric=True))
        minus = K - 9.0 * ops.Identity(9, dtype)
        with pytest.raises(SingularError, match=r"an eigenvalue is .*, where its terms reach 18"):
            Kronecker().prepare(minus)
        with pytest.raises(SingularError, match="add damping"):
            Kronecker().prepare(K + 0.0 * ops.Identity(9, dtype))
        with pytest.raises(SingularError):
            Kronecker().prepare(ops.KroneckerSum(*K.factors))

    def test_factors_that_are_not_symmetric(self):
        A = ops.KroneckerSum(definite(2), ops.Dense(general(3)))
        with pytest.raises(StructureError, match=r"Dense\(3, 3\) is not known to be symmetric"):
            Kronecker().prepare(A)


class TestKFAC:
    @pytest.mark.parametrize("style", ["factored", "tikhonov"])
    def test_layer_by_layer(self, style):
        space = ops.Space.of(
            {
                "a.weight": torch.zeros(2, 3, dtype=DOUBLE),
                "a.bias": torch.zeros(2, dtype=DOUBLE),
                "b.weight": torch.zeros(3, 2, dtype=DOUBLE),
            }
        )
        factors = {"a": (spd(2), spd(4, 1)), "b": (spd(3, 2), spd(2, 3))}
        A = ops.KFAC(factors, space, damping=0.3, damping_style=style)
        check(Kronecker(), A)
        assert [factor.shape[0] for factor in Kronecker.suits(A)] == [2, 4, 3, 2]

    def test_singular(self):
        factors = {"a": (torch.ones(2, 2), torch.eye(2))}
        A = ops.KFAC(factors, ops.Space.of({"a.weight": torch.zeros(2, 2)}), damping=0.0)
        with pytest.raises(SingularError, match="damping"):
            Kronecker().prepare(A)


def test_what_suits():
    product = ops.Kronecker(ops.Dense(general(2)), definite(3))
    symmetric = ops.Kronecker(definite(2), definite(3))
    eye = ops.Identity(6)
    assert len(Kronecker.suits(product)) == 2
    assert len(Kronecker.suits(symmetric + eye)) == 2
    assert not Kronecker.suits(product + eye)
    assert not Kronecker.suits(symmetric + ops.Diagonal(torch.arange(6).double()))
    assert not Kronecker.suits(ops.Dense(spd(6)))
    assert not Kronecker.suits(ops.Kronecker(ops.Dense(sampled(2, 3)), ops.Dense(sampled(3, 2))))


def test_other_operators():
    with pytest.raises(StructureError, match=r"Kronecker needs .*; got Dense\(2, 2\)"):
        Kronecker().prepare(spd(2))
    weighted = ops.Kronecker(definite(2), definite(2)) + ops.Diagonal(torch.arange(4).double())
    with pytest.raises(StructureError, match="plus a multiple of I"):
        Kronecker(factor_solver=DenseLU()).prepare(weighted)
