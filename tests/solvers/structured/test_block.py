"""`solvers.BlockDiagonal` and `solvers.BlockTriangular`, beside dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import CG, DenseCholesky, DenseLU, SingularError, StructureError
from solvers.structured.block import BlockDiagonal, BlockTriangular

DOUBLE = torch.float64
few = settings(max_examples=15, deadline=None, derandomize=True)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def general(n: int, seed: int = 0) -> ops.Dense:
    return ops.Dense(2 * torch.eye(n, dtype=DOUBLE) + 0.5 * torch.tanh(sampled(n, n, seed=seed)))


def definite(n: int, seed: int = 0) -> ops.Dense:
    root = sampled(n, n, seed=seed)
    return ops.Dense(root @ root.T / n + torch.eye(n, dtype=DOUBLE), positive_definite=True)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


def check(prepared, A: ops.LinearOperator, rtol: float = 1e-11) -> None:
    M, b = A.to_dense(), sampled(A.shape[0], 3, seed=77)
    x, info = prepared.solve(b)
    assert info.converged
    close(x, torch.linalg.solve(M, b), rtol)
    close(prepared.solve_transpose(b).value, torch.linalg.solve(M.T, b), rtol)


def triangle(ns: list[int], seed: int, lower: bool) -> ops.Block:
    """Some of the blocks on the one side are None, too."""
    rows: list[list[ops.LinearOperator | None]] = []
    for i, m in enumerate(ns):
        row: list[ops.LinearOperator | None] = []
        for j, n in enumerate(ns):
            inside = i > j if lower else i < j
            block = ops.Dense(sampled(m, n, seed=seed + 10 * i + j)) if inside else None
            block = None if (i + j) % 3 == 2 else block
            row.append(general(n, seed + i) if i == j else block)
        rows.append(row)
    return ops.Block(rows)


class TestBlockDiagonal:
    @few
    @given(sizes, st.integers(0, 99))
    def test_any_blocks(self, ns, seed):
        A = ops.BlockDiagonal(*(general(n, seed + i) for i, n in enumerate(ns)))
        check(BlockDiagonal().prepare(A), A)

    def test_nested_blocks_of_other_kinds(self):
        inner = ops.BlockDiagonal(definite(2), ops.Diagonal(torch.tensor([3.0, -1.0]).double()))
        A = ops.BlockDiagonal(inner, 2.0 * ops.Identity(3, DOUBLE))
        check(BlockDiagonal().prepare(A), A)
        b = ((sampled(2), sampled(2)), sampled(3))
        x = BlockDiagonal().prepare(A).solve(b).value
        assert A.domain.holds(x)
        close(A.codomain.ravel(A @ x), A.codomain.ravel(b))

    def test_the_solver_of_the_blocks(self):
        A = ops.BlockDiagonal(definite(2), definite(3))
        prepared = BlockDiagonal(block_solver=DenseCholesky()).prepare(A)
        assert [part.prepared.solver for part in prepared.parts] == [DenseCholesky()] * 2

    def test_each_block_is_held_to_its_own_part_of_b(self):
        """Parts of sizes 1 and 1e-9: relative to the whole, the second would not be solved."""
        A = ops.BlockDiagonal(definite(5), definite(6, 1))
        b = sampled(11) * torch.tensor([1.0] * 5 + [1e-9] * 6)
        x, info = BlockDiagonal(rtol=1e-6, block_solver=CG()).prepare(A).solve(b)
        assert info.iterations >= 5
        close(x[5:], torch.linalg.solve(A.blocks[1].matrix, b[5:]), 1e-5)

    def test_parts_that_are_zero_or_tiny(self):
        A = ops.BlockDiagonal(general(2), general(3))
        b = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=DOUBLE)
        x = BlockDiagonal().prepare(A).solve(b).value
        assert not x[:2].any()
        b[:2] = 1e-200
        x = BlockDiagonal().prepare(A).solve(b).value
        close(x[:2], 1e-200 * torch.linalg.solve(A.blocks[0].matrix, torch.ones(2).double()))

    def test_update(self):
        A = ops.BlockDiagonal(definite(2), definite(3))
        prepared = BlockDiagonal(block_solver=DenseCholesky()).prepare(A)
        for B in (
            ops.BlockDiagonal(definite(2, 4), definite(3, 5)),
            ops.BlockDiagonal(definite(3, 4), definite(2, 5)),
        ):
            check(prepared.update(B), B)

    def test_refusals(self):
        with pytest.raises(StructureError, match=r"needs an operators\.BlockDiagonal; got Dense"):
            BlockDiagonal().prepare(general(2))
        A = ops.BlockDiagonal(ops.Dense(sampled(2, 3)), ops.Dense(sampled(3, 2)))
        with pytest.raises(StructureError, match=r"block 0 of .* is Dense\(2, 3\)"):
            BlockDiagonal().prepare(A)
        zero = ops.BlockDiagonal(general(2), ops.Dense(torch.zeros(2, 2, dtype=DOUBLE)))
        with pytest.raises(SingularError):
            BlockDiagonal(block_solver=DenseLU()).prepare(zero)


class TestBlockTriangular:
    @few
    @given(sizes, st.integers(0, 99), st.booleans())
    def test_any_triangle(self, ns, seed, lower):
        A = triangle(ns, seed, lower)
        check(BlockTriangular().prepare(A), A, 1e-9)
        check(BlockTriangular().prepare(A.T), A.T, 1e-9)

    def test_implicit_euler_all_at_once(self):
        """``(I + h L) u_{k+1} = u_k``: the steps of the scheme, in one solve."""
        n, steps, h = 4, 5, 0.1
        step = ops.Dense(torch.eye(n, dtype=DOUBLE) + h * definite(n).matrix)
        rows: list[list[ops.LinearOperator | None]] = [[None] * steps for _ in range(steps)]
        for k in range(steps):
            rows[k][k] = step
            if k:
                rows[k][k - 1] = -ops.Identity(n, DOUBLE)
        u, states = sampled(n), []
        b = torch.cat([u, torch.zeros((steps - 1) * n, dtype=DOUBLE)])
        for _ in range(steps):
            u = torch.linalg.solve(step.matrix, u)
            states.append(u)
        x = BlockTriangular().prepare(ops.Block(rows)).solve(b).value
        close(x, torch.cat(states))

    def test_refusals(self):
        full = ops.Block([[general(2), general(2, 1)], [general(2, 2), general(2, 3)]])
        with pytest.raises(StructureError, match="None on one side"):
            BlockTriangular().prepare(full)
        skew = ops.Block(
            [
                [ops.Dense(sampled(2, 3)), general(2)],
                [None, ops.Dense(sampled(3, 2))],
            ]
        )
        with pytest.raises(
            StructureError, match=r"square diagonal blocks; block 0 .*Dense\(2, 3\)"
        ):
            BlockTriangular().prepare(skew)
        with pytest.raises(StructureError, match=r"needs an operators\.Block"):
            BlockTriangular().prepare(general(2))
        A = general(2)
        hole = ops.Block([[A, None, None], [A, None, None], [None, A, A]])
        with pytest.raises(StructureError, match="None as diagonal block 1: it is singular"):
            BlockTriangular().prepare(hole)
