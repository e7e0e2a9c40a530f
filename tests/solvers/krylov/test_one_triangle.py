"""The product from one triangle is the product; and it is used where it may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import CG
from solvers.krylov import one_triangle
from solvers.krylov.one_triangle import vector_product

threadpoolctl = pytest.importorskip("threadpoolctl")


def symmetric(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (M + M.T + 8 * n**0.5 * torch.eye(n, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_is_the_product(dtype, transposed, monkeypatch):
    monkeypatch.setattr(one_triangle, "LARGE", 0)
    M = symmetric(70, dtype)
    A = ops.Dense(M.T if transposed else M, symmetric=True)
    v = torch.linspace(-1, 1, 70, dtype=dtype)
    product = vector_product(A)
    assert product != A._matvec
    torch.testing.assert_close(product(v), A @ v)
    # One triangle alone is read.
    upper = ops.Dense(M.triu(), symmetric=False)
    upper.structure = A.structure
    found = vector_product(upper)(v)
    lower = ops.Dense(M.tril(), symmetric=False)
    lower.structure = A.structure
    assert any(torch.allclose(x, M @ v, rtol=1e-4) for x in (found, vector_product(lower)(v)))


@pytest.mark.parametrize(
    "A",
    [
        ops.Dense(symmetric(20)),  # not claimed
        ops.Dense(symmetric(20), symmetric=True),  # small
        ops.Dense(symmetric(40)[::2, ::2], symmetric=True),  # not contiguous
        ops.Dense(symmetric(20, torch.bfloat16), symmetric=True),
        ops.Diagonal(torch.ones(20)),
    ],
    ids=["no claim", "small", "strided", "bfloat16", "diagonal"],
)
def test_other_operators_bring_their_own(A, monkeypatch):
    if not (isinstance(A, ops.Dense) and A.dtype == torch.float64 and A.matrix.is_contiguous()):
        monkeypatch.setattr(one_triangle, "LARGE", 0)
    assert vector_product(A) == A._matvec


def test_a_large_system():
    n = 1100
    A = ops.Dense(symmetric(n), symmetric=True)
    b = torch.ones(n, dtype=torch.float64)
    prepared = CG(rtol=1e-10, strict=True).prepare(A)
    assert prepared._vector_product != A._matvec
    x, info = prepared.solve(b)
    torch.testing.assert_close(A.matrix @ x, b, rtol=0, atol=1e-8)
    assert info.iterations < 60
