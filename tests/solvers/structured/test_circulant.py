"""`solvers.Circulant`, and `CirculantPreconditioner` on Toeplitz systems."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import CG, SingularError, StructureError
from solvers.structured.circulant import Circulant, CirculantPreconditioner

DOUBLE = torch.float64
few = settings(max_examples=20, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def dominant(n: int, seed: int = 0) -> Tensor:
    column = 0.5 * sampled(n, seed=seed) / n**0.5
    column[0] += 2
    return column


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


class TestCirculant:
    @few
    @given(st.integers(1, 40), st.integers(0, 99))
    def test_is_scipys(self, n, seed):
        column, block = dominant(n, seed), sampled(n, 3, seed=seed + 1)
        prepared = Circulant().prepare(ops.Circulant(column))
        x, info = prepared.solve(block)
        close(x, torch.from_numpy(scipy.linalg.solve_circulant(column, block)))
        assert info.converged
        M = torch.from_numpy(scipy.linalg.circulant(column))
        close(prepared.solve_transpose(block).value, torch.linalg.solve(M.T, block))

    @pytest.mark.parametrize("n", [63, 64])
    def test_a_small_residual_whatever_the_condition(self, n):
        """Condition 1e9: a product with the inverse leaves 1e7 times the residual."""
        size = torch.logspace(0, -9, n // 2 + 1, dtype=DOUBLE)
        A = ops.Circulant(torch.fft.irfft(torch.complex(size, 0 * size), n=n))
        b = A @ sampled(n)
        assert Circulant(rtol=1e-15).prepare(A).solve(b).info.converged
        x = A.inverse() @ b
        assert torch.linalg.vector_norm(b - A @ x) > 1e-10 * torch.linalg.vector_norm(b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keeps_the_dtype(self, dtype):
        column, b = dominant(5).to(dtype), sampled(5, seed=1).to(dtype)
        x = Circulant(rtol=0.05).prepare(ops.Circulant(column)).solve(b).value
        assert x.dtype == dtype
        M = torch.from_numpy(scipy.linalg.circulant(column.double()))
        close(x.double(), torch.linalg.solve(M, b.double()), 3 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("n", [2, 5, 8, 100])
    def test_zero_eigenvalues(self, n):
        """The constant vector is in the null space of a difference."""
        column = torch.zeros(n, dtype=DOUBLE)
        column[0], column[1] = 1, -1
        with pytest.raises(SingularError, match=r"eigenvalues lie between .*; add damping"):
            Circulant().prepare(ops.Circulant(column))
        damped = ops.Circulant(column) + 1e-3 * ops.Identity(n)
        assert Circulant().prepare(damped).solve(sampled(n)).info.converged

    def test_other_operators(self):
        with pytest.raises(StructureError, match=r"operators\.Circulant; got Toeplitz"):
            Circulant().prepare(ops.Toeplitz(torch.ones(3)))


def iterations(T: ops.Toeplitz, P: ops.LinearOperator | None) -> int:
    """Of scipy's conjugate gradients, to 1e-8."""
    count = 0

    def step(_: np.ndarray) -> None:
        nonlocal count
        count += 1

    def map_of(A: ops.LinearOperator) -> scipy.sparse.linalg.LinearOperator:
        product = lambda v: (A @ torch.from_numpy(v)).numpy()  # noqa: E731
        return scipy.sparse.linalg.LinearOperator(A.shape, matvec=product, dtype=float)

    M = None if P is None else map_of(P)
    b = sampled(T.shape[0]).numpy()
    _, failed = scipy.sparse.linalg.cg(map_of(T), b, rtol=1e-8, M=M, callback=step, maxiter=5000)
    assert not failed
    return count


class TestPreconditioner:
    @few
    @given(st.integers(1, 8), st.integers(0, 99), st.booleans())
    def test_the_optimal_one_is_the_nearest(self, n, seed, symmetric):
        """The projection onto circulant matrices, in the Frobenius norm: means along diagonals."""
        row = None if symmetric else sampled(n, seed=seed + 1)
        column = sampled(n, seed=seed)
        column[0] += 5
        T = ops.Toeplitz(column, row)
        P = CirculantPreconditioner().prepare(T)
        i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        M = T.to_dense()
        means = torch.stack([M[(i - j) % n == k].mean() for k in range(n)])
        close(torch.linalg.inv(P.to_dense()), means[(i - j) % n], 1e-9)
        assert P.symmetric == symmetric

    def test_strangs_copies_the_central_diagonals(self):
        T = ops.Toeplitz(
            torch.tensor([9.0, 2, 3, 4, 5]).double(), torch.tensor([9.0, 6, 7, 8, 1]).double()
        )
        P = CirculantPreconditioner(kind="strang").prepare(T)
        expected = torch.tensor([9.0, 2, 3, 7, 6]).double()
        close(torch.linalg.inv(P.to_dense())[:, 0], expected)

    def test_definite_where_T_is(self):
        T = ops.Toeplitz(torch.tensor([2.0, -1.0, 0.0, 0.0]), positive_definite=True)
        assert CirculantPreconditioner().prepare(T).positive_definite

    @pytest.mark.parametrize("kind", ["optimal", "strang"])
    def test_iterations_do_not_grow_with_n(self, kind):
        """``t_k = (1 + k)^-1.1``: a positive symbol; a classical example of Chan and Ng."""
        counts, plain = [], []
        for n in (64, 256, 1024):
            T = ops.Toeplitz((1 + torch.arange(n, dtype=DOUBLE)) ** -1.1)
            counts.append(iterations(T, CirculantPreconditioner(kind=kind).prepare(T)))
            plain.append(iterations(T, None))
        assert max(counts) <= min(counts) + 2
        assert max(counts) <= 10
        assert plain[-1] >= 20 > counts[-1]

    @pytest.mark.parametrize("kind", ["optimal", "strang"])
    def test_in_conjugate_gradients(self, kind):
        T = ops.Toeplitz((1 + torch.arange(500, dtype=DOUBLE)) ** -1.1)
        b = sampled(500, 2)
        P = CirculantPreconditioner(kind=kind)
        x, info = CG(rtol=1e-10, preconditioner=P).prepare(T).solve(b)
        close(x, torch.from_numpy(scipy.linalg.solve_toeplitz(T.column.numpy(), b.numpy())), 1e-8)
        assert info.iterations <= 12
        assert info.iterations < CG(rtol=1e-10).prepare(T).solve(b).info.iterations / 2

    def test_of_a_circulant_it_is_the_inverse(self):
        A = ops.Circulant(dominant(6))
        P = CirculantPreconditioner().prepare(A)
        close((P @ A.to_dense()), torch.eye(6, dtype=DOUBLE))

    def test_refusals(self):
        with pytest.raises(ValueError, match="kind='chan'; expected 'optimal' or 'strang'"):
            CirculantPreconditioner(kind="chan")
        with pytest.raises(StructureError, match=r"square operators\.Toeplitz; got Dense"):
            CirculantPreconditioner().prepare(ops.Dense(torch.eye(2)))
        with pytest.raises(StructureError, match=r"got Toeplitz\(2, 3\)"):
            CirculantPreconditioner().prepare(ops.Toeplitz(torch.ones(2), torch.ones(3)))
        skew = ops.Toeplitz(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0]))
        with pytest.raises(SingularError):
            CirculantPreconditioner().prepare(skew)
