"""`Toeplitz` and `Circulant` beside their matrices; `test_contract.py` differentiates them."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import Circulant, Dense, FalseClaimError, Identity, Toeplitz

DOUBLE = torch.float64
few = settings(max_examples=20, deadline=None, derandomize=True)
sizes = st.integers(1, 40)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def close(actual: Tensor, expected: Tensor, factor: float = 100) -> None:
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=factor * eps * scale)


def toeplitz(column: Tensor, row: Tensor | None = None) -> Tensor:
    return torch.from_numpy(scipy.linalg.toeplitz(column, column if row is None else row))


def circulant(column: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.circulant(column))


class TestToeplitz:
    @few
    @given(sizes, sizes, st.integers(0, 99))
    def test_is_scipys(self, m, n, seed):
        column, row = sampled(m, seed=seed), sampled(n, seed=seed + 1)
        A, M = Toeplitz(column, row), toeplitz(column, row)
        close(A.to_dense(), M)
        block, right = sampled(n, 3, seed=seed + 2), sampled(m, 3, seed=seed + 3)
        close(A @ block, M @ block)
        close(
            A @ block[:, 0],
            torch.from_numpy(scipy.linalg.matmul_toeplitz((column, row), block))[:, 0],
        )
        close(A.T @ right, M.T @ right)

    @few
    @given(sizes)
    def test_without_a_row_it_is_symmetric(self, n):
        column = sampled(n)
        A = Toeplitz(column)
        assert A.symmetric
        assert A.T is A
        close(A.to_dense(), toeplitz(column))

    def test_the_first_entry_of_the_row_is_not_looked_at(self):
        column, row = torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 3.0])
        A = Toeplitz(column, row)
        expected = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
        close(A.to_dense(), expected)
        close(A.T.to_dense(), expected.T)
        close((2 * A + A).to_dense(), 3 * expected)

    def test_sums_and_multiples_stay(self):
        a, b, c = Toeplitz(sampled(5)), Toeplitz(sampled(5, seed=1), sampled(5, seed=2)), 0.3
        for A in (a + b, b + a, a - 2 * b, a + c * Identity(5), c * Identity(5) + b, -b):
            assert type(A) is Toeplitz
        close(
            (c * Identity(5) - a + b).to_dense(),
            c * torch.eye(5, dtype=DOUBLE) - a.to_dense() + b.to_dense(),
        )
        assert (a + a).symmetric
        assert not (a + b).symmetric
        assert type(a + ops.Diagonal(sampled(5))) is ops.Sum
        wide = Toeplitz(sampled(2), sampled(4))
        assert type(wide + wide) is Toeplitz

    def test_definiteness_is_claimed_tried_and_kept(self):
        A = Toeplitz(torch.tensor([2.0, -1.0, 0.0]), positive_definite=True)
        A @ torch.ones(3)
        assert A.positive_definite
        assert (3 * A + Identity(3)).positive_definite
        assert not (-A).positive_definite
        wrong = Toeplitz(torch.tensor([1.0, -1.0, 0.0]), positive_definite=True)
        with pytest.raises(FalseClaimError, match="positive definite"):
            wrong @ torch.ones(3)

    def test_exact_hooks(self):
        A = Toeplitz(sampled(4), sampled(4, seed=1))
        close(A._exact_diagonal(), A.to_dense().diagonal())
        close(A._exact_trace(), A.to_dense().trace())
        assert Toeplitz(sampled(4), sampled(3))._exact_diagonal() is None

    @pytest.mark.parametrize("n", [2**12, 2**12 - 1, 4099])
    def test_long_ones_cost_little(self, n):
        column, row, v = sampled(n), sampled(n, seed=1), sampled(n, seed=2)
        A = Toeplitz(column, row)
        image, i = A @ v, 1234
        line = torch.cat([column[: i + 1].flip(0), row[1 : n - i]])
        close(image[i], line @ v, 1e3)
        assert A.cost.flops < Dense(torch.empty(n, n, device="meta")).cost.flops / 10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keeps_the_dtype(self, dtype):
        column, row = sampled(5).to(dtype), sampled(5, seed=1).to(dtype)
        image = Toeplitz(column, row) @ torch.ones(5, dtype=dtype)
        assert image.dtype == dtype
        expected = toeplitz(column.double(), row.double()).sum(1)
        torch.testing.assert_close(
            image.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps
        )

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((torch.zeros(2, 2),), ValueError, r"column has shape \(2, 2\); expected \(n,\)"),
            ((torch.zeros(0),), ValueError, r"column has shape \(0,\); expected .* n >= 1"),
            ((torch.zeros(2), torch.zeros(())), ValueError, r"row has shape \(\)"),
            (([1.0],), TypeError, "column is a list; expected a tensor"),
            ((torch.zeros(2, dtype=torch.int64),), TypeError, "floating"),
            ((torch.zeros(2), torch.zeros(2, dtype=DOUBLE)), TypeError, "row is torch.float64"),
        ],
    )
    def test_refusals(self, arguments, error, message):
        with pytest.raises(error, match=message):
            Toeplitz(*arguments)

    def test_a_definite_one_has_no_row(self):
        with pytest.raises(ValueError, match="leave row out"):
            Toeplitz(torch.ones(2), torch.ones(2), positive_definite=True)


class TestCirculant:
    @few
    @given(sizes, st.integers(0, 99))
    def test_is_scipys(self, n, seed):
        column, block = sampled(n, seed=seed), sampled(n, 2, seed=seed + 1)
        A, M = Circulant(column), circulant(column)
        close(A.to_dense(), M)
        close(A @ block, M @ block)
        close(A.T @ block, M.T @ block)
        close(A._exact_diagonal(), M.diagonal())
        close(A._exact_logdet(), torch.linalg.slogdet(M).logabsdet, 1e6)

    @few
    @given(sizes)
    def test_eigenvalues_and_inverse(self, n):
        column = 0.3 * sampled(n) / n**0.5
        column[0] += 2
        A = Circulant(column)
        every = torch.linalg.eigvals(circulant(column))
        for value in A.eigenvalues():
            assert (every - value).abs().min() < 1e-12
        close(A.inverse().to_dense(), torch.linalg.inv(circulant(column)), 1e3)

    def test_symmetry_is_claimed_and_compared(self):
        A = Circulant(torch.tensor([2.0, -1.0, 0.0, -1.0]), symmetric=True)
        assert A.T is A
        assert not Circulant(A.column).symmetric
        with pytest.raises(
            FalseClaimError, match=r"max \|c_i - c_\(n-i\)\| = 1 with max \|c\| = 2"
        ):
            Circulant(torch.tensor([2.0, -1.0, 0.0, 0.0]), symmetric=True)

    def test_definiteness_is_tried_and_kept(self):
        A = Circulant(torch.tensor([2.5, -1.0, 0.0, -1.0]), positive_definite=True)
        A @ torch.ones(4)
        assert A.inverse().positive_definite
        assert (A + 0.5 * Identity(4)).positive_definite
        with pytest.raises(FalseClaimError):
            Circulant(torch.tensor([1.0, -1.0, 0.0, -1.0]), positive_definite=True) @ torch.ones(4)

    def test_sums_and_multiples_stay(self):
        a, b = Circulant(sampled(5)), Circulant(sampled(5, seed=1))
        A = 2.0 * a - b + 0.5 * Identity(5)
        assert type(A) is Circulant
        close(A.to_dense(), 2 * a.to_dense() - b.to_dense() + 0.5 * torch.eye(5, dtype=DOUBLE))
        assert type(a + Toeplitz(sampled(5))) is ops.Sum

    @pytest.mark.parametrize("n", [4, 5, 7])
    def test_a_singular_one_has_no_inverse(self, n):
        difference = torch.eye(n, dtype=DOUBLE)[0] - torch.eye(n, dtype=DOUBLE)[1]
        with pytest.raises(ValueError, match=rf"Circulant\({n}, {n}\) is singular"):
            Circulant(difference).inverse()
        with pytest.raises(ValueError, match="singular"):
            Circulant(torch.zeros(n)).inverse()
