"""The fast products are the products, and are used where they may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

import operators as ops
from solvers import CG
from solvers.krylov import products
from solvers.krylov.products import block_product, vector_product
from solvers.threads import one_blas_thread


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Threads of BLAS inside each product that asked for one."""
    found: list[int] = []

    @contextlib.contextmanager
    def one() -> Iterator[None]:
        with one_blas_thread():
            pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
            found.append(max(pool["num_threads"] for pool in pools))
            yield

    monkeypatch.setattr(products, "one_blas_thread", one)
    return found


def symmetric(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (M + M.T + 8 * n**0.5 * torch.eye(n, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_is_the_product(dtype, transposed, counted, monkeypatch):
    monkeypatch.setattr(products, "LARGE", 0)
    M = symmetric(70, dtype)
    A = ops.Dense(M.T if transposed else M, symmetric=True)
    v = torch.linspace(-1, 1, 70, dtype=dtype)
    torch.testing.assert_close(vector_product(A)(v), A @ v)
    assert counted == [1]


OTHERS = {
    "no claim": ops.Dense(symmetric(20)),
    "strided": ops.Dense(symmetric(40)[::2, ::2], symmetric=True),
    "bfloat16": ops.Dense(symmetric(20, torch.bfloat16), symmetric=True),
    "diagonal": ops.Diagonal(torch.ones(20)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_bring_their_own(name, monkeypatch):
    monkeypatch.setattr(products, "LARGE", 0)
    A = OTHERS[name]
    assert vector_product(A) == A._matvec


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks(transposed):
    M = symmetric(30)
    A = ops.Dense(M.T if transposed else M, symmetric=True)
    V = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(30, 4)
    product = block_product(A)
    assert product != A._matmat
    torch.testing.assert_close(product(V), A @ V)
    other = ops.Dense(M.triu())
    assert block_product(other) == other._matmat


def test_small_ones(monkeypatch):
    A = ops.Dense(symmetric(20), symmetric=True)
    assert vector_product(A) == A._matvec
    monkeypatch.setattr(products, "LARGE", 0)
    assert vector_product(A) != A._matvec


def test_a_large_system(counted):
    n = 1100
    A = ops.Dense(symmetric(n), symmetric=True)
    b = torch.ones(n, dtype=torch.float64)
    x, info = CG(rtol=1e-10, strict=True).prepare(A).solve(b)
    torch.testing.assert_close(A.matrix @ x, b, rtol=0, atol=1e-8)
    assert counted == [1] * info.iterations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_sparse(dtype, symmetric):
    M = torch.tensor([[2.0, 0, 1], [0, 3, 0], [1, 0, 0]]).to(dtype)
    A = ops.Sparse(M.to_sparse_csr(), symmetric=symmetric)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    product = vector_product(A)
    assert (product == A._matvec) == (dtype == torch.bfloat16)
    first = product(v)
    torch.testing.assert_close(first, M @ v)
    product(2 * v)
    torch.testing.assert_close(first, M @ v)  # each product has its own memory
