from __future__ import annotations

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from solvers.preconditioners.block_jacobi import BlockJacobi
from solvers.preconditioners.jacobi import Jacobi
from tests.solvers.preconditioners.problems import convection, sampled


def expected(M: Tensor, sizes: list[int]) -> Tensor:
    start, inverse = 0, torch.zeros_like(M)
    for size in sizes:
        block = slice(start, start + size)
        inverse[block, block] = torch.linalg.inv(M[block, block])
        start += size
    return inverse


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 4], [7, 7, 6], [20], [1] * 20, [3, 1, 3, 9, 4]])
def test_entries_and_products_give_one_answer(sizes):
    A = convection(5, 4)
    uniform = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    settings = BlockJacobi(block_size=sizes[0]) if uniform else BlockJacobi(blocks=tuple(sizes))
    M = A.to_dense()
    forms = [
        A,
        ops.Dense(M),
        ops.FunctionOperator(lambda v: M @ v, M[0], rmatvec=lambda v: M.T @ v),
    ]
    for form in forms:
        torch.testing.assert_close(settings.prepare(form).to_dense(), expected(M, sizes))


def test_more_columns_than_are_asked_for_at_once(monkeypatch):
    monkeypatch.setattr("solvers.preconditioners.block_jacobi.CHUNK", 3)
    M = sampled(11, 11)
    A = ops.FunctionOperator(lambda v: M @ v, M[0])
    P = BlockJacobi(block_size=4).prepare(A)
    torch.testing.assert_close(P.to_dense(), expected(M, [4, 4, 3]))


def test_a_block_for_each_leaf():
    M = sampled(9, 9)
    M = M @ M.T + torch.eye(9)

    def loss(y: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([y["a"].reshape(-1), y["b"].reshape(-1)])
        return flat @ M @ flat / 2

    A = ops.Hessian(loss, {"a": torch.ones(2, 3).double(), "b": torch.ones(3).double()})
    P = BlockJacobi().prepare(A)
    torch.testing.assert_close(P.to_dense(), expected(M, [6, 3]))
    assert P.symmetric
    assert P.domain == A.domain


def test_one_block_is_the_inverse_and_size_one_is_jacobi():
    A = convection(4, 4)
    b = sampled(16)
    P = BlockJacobi(block_size=99).prepare(A)
    torch.testing.assert_close(P @ b, torch.linalg.solve(A.to_dense(), b))
    torch.testing.assert_close(BlockJacobi(block_size=1).prepare(A) @ b, Jacobi().prepare(A) @ b)


def test_a_singular_block_is_named():
    M = torch.block_diag(torch.eye(2), torch.ones(2, 2), torch.eye(2))
    for A in (ops.Dense(M), ops.Sparse(M)):
        with pytest.raises(solvers.SingularError, match="block 1 of"):
            BlockJacobi(block_size=2).prepare(A)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="both block_size and blocks"):
        BlockJacobi(block_size=2, blocks=(2, 2))
    with pytest.raises(ValueError, match=r"block_size=0; expected at least 1"):
        BlockJacobi(block_size=0)
    with pytest.raises(ValueError, match=r"blocks=\(2, 0\); expected sizes of at least 1"):
        BlockJacobi(blocks=(2, 0))
    A = convection(2, 2)
    with pytest.raises(ValueError, match=r"blocks=\(2, 1\) add up to 3; expected 4"):
        BlockJacobi(blocks=(2, 1)).prepare(A)
    with pytest.raises(solvers.StructureError, match="acts on plain vectors; say block_size"):
        BlockJacobi().prepare(A)
    with pytest.raises(solvers.StructureError, match="needs a square operator"):
        BlockJacobi(block_size=2).prepare(ops.Dense(torch.ones(2, 3)))
