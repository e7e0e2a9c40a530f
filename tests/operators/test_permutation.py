"""`Permutation` against its matrix of zeros and ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import Space
from operators.permutation import Permutation

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
ORDERS = st.integers(0, 7).flatmap(lambda n: st.permutations(range(n)))


def index(order: list[int]) -> Tensor:
    return torch.tensor(order, dtype=torch.int64)


def matrix(order: list[int]) -> Tensor:
    """P with one entry 1 in row i, in column order[i]."""
    P = torch.zeros(len(order), len(order), dtype=torch.float64)
    for i, j in enumerate(order):
        P[i, j] = 1.0
    return P


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@PROPERTY
@given(ORDERS)
def test_is_its_matrix(order):
    n, P = len(order), matrix(order)
    A = Permutation(index(order), dtype=torch.float64)
    v, block = sampled(n), sampled(n, 3)
    assert torch.equal(A.to_dense(), P)
    assert torch.equal(A @ v, P @ v)
    assert torch.equal(A @ v, v[index(order)])
    assert torch.equal(A @ block, P @ block)
    assert torch.equal(A.T @ v, P.T @ v)
    assert torch.equal(A.T @ (A @ v), v)
    assert torch.equal(A._exact_diagonal(), P.diagonal())
    assert A._exact_trace() == P.trace()
    assert A._exact_logdet() == 0.0


@PROPERTY
@given(ORDERS)
def test_the_facts_are_those_of_the_matrix(order):
    A, P = Permutation(index(order)), matrix(order)
    assert A.symmetric == torch.equal(P, P.T)
    identity = torch.equal(P, torch.eye(len(order), dtype=torch.float64))
    assert (A.diagonal, A.positive_definite, A.positive_semidefinite) == (identity,) * 3
    assert (A.lower_triangular, A.upper_triangular) == (identity,) * 2


@PROPERTY
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.permutations(range(n))] * 3)))
def test_products_of_permutations_are_permutations(orders):
    P, Q, R = (Permutation(index(order)) for order in orders)
    p, q, r = map(matrix, orders)
    product = P @ Q.T @ R
    assert isinstance(product, Permutation)
    assert torch.equal(product.to_dense().double(), p @ q.T @ r)
    assert (P.T @ P).diagonal


@pytest.mark.parametrize("index_dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(index_dtype, dtype):
    A = Permutation(torch.tensor([1, 2, 0], dtype=index_dtype), dtype=dtype)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    assert (A @ v).dtype == A._exact_diagonal().dtype == A._exact_logdet().dtype == dtype
    assert torch.equal(A @ v, v[[1, 2, 0]])


def test_without_a_dtype_it_takes_that_of_the_other_operand():
    P, B = Permutation(index([1, 2, 0])), ops.Dense(sampled(3, 3))
    p, b = matrix([1, 2, 0]), B.matrix
    torch.testing.assert_close((P + B).to_dense(), p + b)
    torch.testing.assert_close((P.T @ B @ P).to_dense(), p.T @ b @ p)
    torch.testing.assert_close((P @ P @ B).to_dense(), p @ p @ b)
    with pytest.raises(TypeError, match=r"cannot add Permutation\(3, 3\) \(torch.float32"):
        Permutation(index([1, 2, 0]), dtype=torch.float32) + B


def test_on_a_nested_space():
    space = Space.of({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
    A = Permutation(index([4, 3, 2, 1, 0]), space)
    result = A @ {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0])}
    assert torch.equal(result["a"], torch.tensor([[5.0, 4.0], [3.0, 2.0]]))
    assert torch.equal(result["b"], torch.tensor([1.0]))
    assert (A @ Permutation(index([4, 3, 2, 1, 0]))).domain == space


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1], TypeError, "order is list; expected a tensor"),
        (torch.tensor([0.0, 1.0]), TypeError, "dtype torch.float32; expected integers"),
        (torch.tensor([False, True]), TypeError, "torch.bool; expected a tensor of signed"),
        (torch.tensor([[0, 1]]), ValueError, r"shape \(1, 2\); expected \(n,\)"),
        (torch.tensor([0, 2]), ValueError, "order holds 2; expected each of 0, ..., 1 once"),
        (torch.tensor([0, -1]), ValueError, "order holds -1; expected each of 0, ..., 1 once"),
        (torch.tensor([2, 0, 2]), ValueError, "order holds 2 2 times and 1 not at all"),
    ],
)
def test_refuses_what_is_no_permutation(order, error, message):
    with pytest.raises(error, match=message):
        Permutation(order)


def test_refuses_another_size_and_a_dtype_twice():
    space = Space.flat(3, torch.float32)
    with pytest.raises(ValueError, match="length 2, but the space has size 3"):
        Permutation(index([1, 0]), space)
    with pytest.raises(TypeError, match="a space has both already"):
        Permutation(index([1, 0, 2]), space, dtype=torch.float32)


def test_derivatives_and_vmap():
    P, p = Permutation(index([2, 0, 1]), dtype=torch.float64), matrix([2, 0, 1])
    v = sampled(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: P @ v, v, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda v: (P @ v) ** 3, v)
    V = sampled(4, 3)
    assert torch.equal(torch.func.vmap(lambda v: P @ v)(V), V @ p.T)
    assert torch.equal(torch.func.vmap(lambda v: torch.func.jacrev(P.__matmul__)(v))(V)[2], p)


def test_orders_may_be_mapped_over():
    orders = torch.tensor([[2, 0, 1], [1, 0, 2]])
    v = sampled(3)
    result = torch.func.vmap(lambda order: Permutation(order, dtype=torch.float64) @ v)(orders)
    assert torch.equal(result, v[orders])
