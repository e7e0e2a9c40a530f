"""`solvers.Toeplitz`: Gohberg and Semencul's formula beside scipy's Levinson and dense LU."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, SingularError, StructureError
from solvers.structured.toeplitz import Toeplitz

DOUBLE = torch.float64
few = settings(max_examples=12, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


def dominant(n: int, seed: int = 0) -> Tensor:
    line = 0.3 * torch.tanh(sampled(n, seed=seed)) / n
    line[0] = 1
    return line


@few
@given(st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_is_scipys(n, symmetric, seed):
    column, row = dominant(n, seed), dominant(n, seed + 1)
    row = column if symmetric else row
    A = ops.Toeplitz(column, None if symmetric else row)
    prepared, block = Toeplitz().prepare(A), sampled(n, 3, seed=seed + 2)
    x, info = prepared.solve(block)
    close(x, torch.from_numpy(scipy.linalg.solve_toeplitz((column, row), block)))
    assert info.converged
    y = prepared.solve_transpose(block).value
    close(y, torch.from_numpy(scipy.linalg.solve_toeplitz((row, column), block)))


def test_a_stationary_kernel_on_a_grid():
    """Three thousand points; the matrix is never formed."""
    t = torch.arange(3000, dtype=DOUBLE)
    A = ops.Toeplitz(torch.exp(-t / 50), positive_definite=True) + 1e-2 * ops.Identity(3000)
    b = sampled(3000, 2)
    x, info = Toeplitz(rtol=1e-11).prepare(A).solve(b)
    assert info.converged
    close(A @ x, b)


def test_residuals_are_corrected():
    """Condition 3e8: one application of the formula leaves a residual of 5e-10."""
    t = torch.arange(40, dtype=DOUBLE)
    A = ops.Toeplitz(torch.exp(-((t / 3) ** 2))) + 1e-8 * ops.Identity(40)
    b = A @ sampled(40)
    prepared = Toeplitz(rtol=1e-14).prepare(A)
    once = torch.linalg.vector_norm(b - A @ (prepared.inverse @ b)) / torch.linalg.vector_norm(b)
    assert once > 1e-11
    info = prepared.solve(b).info
    assert info.converged
    assert info.products == 2


def test_single_precision():
    column, row, b = (line.float() for line in (dominant(20), dominant(20, 1), sampled(20)))
    x, info = Toeplitz(rtol=1e-6).prepare(ops.Toeplitz(column, row)).solve(b)
    assert x.dtype == torch.float32
    assert info.converged
    M = torch.from_numpy(scipy.linalg.toeplitz(column.double(), row.double()))
    close(x.double(), torch.linalg.solve(M, b.double()), 1e-5)


class TestLeadingMinors:
    """The recursion needs them; A itself does not."""

    def test_zero(self):
        column = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)
        A = ops.Toeplitz(column, torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE))
        assert torch.linalg.cond(A.to_dense()) < 10
        with pytest.raises(SingularError, match="need not be singular: use DenseLU"):
            Toeplitz().prepare(A)

    def test_the_last_but_one(self):
        """Order n - 1: the recursion goes through, the formula divides by it."""
        A = ops.Toeplitz(torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE))
        assert abs(float(torch.linalg.det(A.to_dense()))) > 0.5
        with pytest.raises(SingularError, match="leading minor"):
            Toeplitz().prepare(A)

    def test_near_zero(self):
        """Six digits are lost, and brought back."""
        A, b = ops.Toeplitz(torch.tensor([1e-6, 1.0, 0.5, 0.2], dtype=DOUBLE)), sampled(4)
        assert torch.linalg.cond(A.to_dense()) < 100
        prepared = Toeplitz(rtol=1e-14).prepare(A)
        x, info = prepared.solve(b)
        assert info.converged
        close(x, torch.linalg.solve(A.to_dense(), b), 1e-12)
        assert torch.linalg.vector_norm(prepared.inverse @ b - x) > 1e-12

    def test_nearer_zero(self):
        """All digits are lost, which is reported."""
        A, b = ops.Toeplitz(torch.tensor([1e-16, 1.0, 0.5, 0.2], dtype=DOUBLE)), sampled(4)
        assert torch.linalg.cond(A.to_dense()) < 100
        with pytest.warns(
            ConvergenceWarning, match="a leading minor may be near zero; use DenseLU"
        ):
            info = Toeplitz().prepare(A).solve(b).info
        assert info.status == "inaccurate"


def test_refusals():
    with pytest.raises(StructureError, match=r"operators\.Toeplitz; got Circulant"):
        Toeplitz().prepare(ops.Circulant(torch.ones(3)))
    with pytest.raises(StructureError, match="square"):
        Toeplitz().prepare(ops.Toeplitz(torch.ones(3), torch.ones(2)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Toeplitz().prepare(ops.Toeplitz(torch.tensor([1.0, float("nan")])))
    with pytest.raises(SingularError):
        Toeplitz().prepare(ops.Toeplitz(torch.zeros(3)))
