"""`Saddle` against ``[[B, G^T], [G, -C]]`` written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import Space
from operators.saddle import Saddle

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spd(n: int, seed: int = 0) -> Tensor:
    root = sampled(n, n, seed=seed)
    return root @ root.T + torch.eye(n, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def written_out(B: Tensor, G: Tensor, C: Tensor | None) -> Tensor:
    m = G.shape[0]
    C = torch.zeros(m, m, dtype=G.dtype) if C is None else C
    return torch.cat([torch.cat([B, G.T], 1), torch.cat([G, -C], 1)])


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.floats(-2, 2))
def test_is_its_matrix(n, m, symmetric, regularised, factor):
    B = spd(n) if symmetric else sampled(n, n)
    C = None if not regularised else spd(m, seed=1) if symmetric else sampled(m, m, seed=1)
    G = sampled(m, n, seed=2)
    A = Saddle(
        ops.Dense(B, symmetric=symmetric),
        ops.Dense(G),
        None if C is None else ops.Dense(C, symmetric=symmetric),
    )
    M = written_out(B, G, C)
    v = sampled(n + m)
    assert A.saddle
    assert A.symmetric == symmetric
    assert not A.positive_semidefinite
    close(A.to_dense(), M)
    close(A @ v, M @ v)
    close(A.T.to_dense(), M.T)
    close((factor * A).to_dense(), factor * M)
    close(A._exact_diagonal(), M.diagonal())
    D, E = sampled(n, n, seed=3), sampled(m, m, seed=4)
    for term, matrix in (
        (0.5 * ops.Identity(n + m, torch.float64), 0.5 * torch.eye(n + m, dtype=torch.float64)),
        (ops.Diagonal(v), torch.diag(v)),
        (ops.BlockDiagonal(ops.Dense(D), ops.Dense(E)), torch.block_diag(D, E)),
    ):
        for total in (A + term, term + A):
            assert isinstance(total, Saddle)
            close(total.to_dense(), M + matrix)
    assert not isinstance(A + ops.Dense(sampled(n + m, n + m)), Saddle)
    assert isinstance(A.T, Saddle)
    assert isinstance(factor * A, Saddle)
    assert (factor * A).symmetric == symmetric
    assert (A.T is A) == symmetric


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_the_schur_complement_solves_the_system(n, m, regularised):
    n = max(n, m)
    B, G = spd(n), sampled(m, n, seed=2)
    C = spd(m, seed=1) if regularised else None
    A = Saddle(
        ops.Dense(B, positive_definite=True),
        ops.Dense(G),
        None if C is None else ops.Dense(C, positive_definite=True),
    )
    inverse = ops.Dense(torch.linalg.inv(B), positive_definite=True)
    S = A.schur_complement(inverse)
    assert S.positive_semidefinite
    assert S.positive_definite == regularised
    f, g = sampled(n, seed=3), sampled(m, seed=4)
    y = torch.linalg.solve(S.to_dense(), G @ (inverse @ f) - g)
    x = inverse @ (f - G.T @ y)
    solution = torch.linalg.solve(written_out(B, G, C), torch.cat([f, g]))
    torch.testing.assert_close(torch.cat([x, y]), solution, rtol=1e-8, atol=1e-8)
    # As many negative eigenvalues as the Schur complement has positive ones.
    eigenvalues = torch.linalg.eigvalsh(A.to_dense())
    assert int((eigenvalues < 0).sum()) == m


def test_pairs_of_nested_spaces():
    space = Space.of({"a": torch.zeros(2), "b": torch.zeros(1)})
    G = ops.Dense(torch.tensor([[1.0, 2.0, 3.0]]))
    A = Saddle(2.0 * ops.Identity(space), G)
    primal, dual = A @ ({"a": torch.ones(2), "b": torch.ones(1)}, torch.tensor([1.0]))
    assert torch.equal(primal["a"], torch.tensor([3.0, 4.0]))
    assert torch.equal(primal["b"], torch.tensor([5.0]))
    assert torch.equal(dual, torch.tensor([6.0]))
    assert A.domain == A.codomain


def test_constraints_from_a_jacobian_and_an_identity_of_a_size():
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    A = Saddle(ops.Identity(2), ops.Jacobian(lambda y: (y**2).sum().reshape(1), y), ops.Identity(1))
    assert A.dtype == torch.float64
    close(A.to_dense(), torch.tensor([[1, 0, 2], [0, 1, 4], [2, 4, -1]], dtype=torch.float64))


def test_cost_counts_the_constraints_twice():
    A = Saddle(ops.Dense(spd(3)), ops.Dense(sampled(2, 3)))
    assert A.cost.flops == 2 * 9 + 2 * 2 * 6


def test_derivatives_follow_one_matrix_of_constraints():
    B, G, C, v = spd(3), sampled(2, 3), spd(2), sampled(5)

    def product(B, G, C, v):
        return Saddle(ops.Dense(B), ops.Dense(G), ops.Dense(C)) @ v

    leaves = tuple(t.clone().requires_grad_() for t in (B, G, C, v))
    assert torch.autograd.gradcheck(product, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, leaves)
    A = Saddle(ops.Dense(B), ops.Dense(G), ops.Dense(C))
    assert len(A.tensors) == 3
    gradient = torch.func.grad(lambda A: ((A @ v) ** 2).sum())(A)
    expected = torch.func.grad(lambda G: ((written_out(B, G, C) @ v) ** 2).sum())(G)
    close(gradient.G.matrix, expected)
    other = A.with_tensors((B, 2 * G, C))
    close(other.to_dense(), written_out(B, 2 * G, C))


def test_vmap_over_constraints():
    B, G, V = spd(3), sampled(4, 2, 3), sampled(4, 5)
    mapped = torch.func.vmap(lambda G, v: Saddle(ops.Dense(B), ops.Dense(G)) @ v)(G, V)
    for i in range(4):
        close(mapped[i], written_out(B, G[i], None) @ V[i])


class TestRefusals:
    B, G = ops.Dense(torch.eye(3)), ops.Dense(torch.ones(2, 3))

    def test_sizes(self):
        with pytest.raises(ValueError, match=r"Dense\(2, 2\) and Dense\(2, 3\) in column 0"):
            Saddle(ops.Dense(torch.eye(2)), self.G)
        with pytest.raises(ValueError, match=r"Dense\(4, 3\) and Dense\(3, 2\) in row 0"):
            Saddle(ops.Dense(torch.ones(4, 3)), self.G)
        with pytest.raises(ValueError, match=r"Dense\(3, 3\) in column 1"):
            Saddle(self.B, self.G, ops.Dense(torch.eye(3)))

    def test_kinds(self):
        with pytest.raises(TypeError, match="operator 1 is a Tensor"):
            Saddle(self.B, torch.ones(2, 3))
        with pytest.raises(TypeError, match=r"operator 1 is Dense\(2, 3\) \(torch.float64"):
            Saddle(self.B, ops.Dense(sampled(2, 3)))

    def test_inverse(self):
        with pytest.raises(ValueError, match=r"is Dense\(2, 2\), but B is Dense\(3, 3\)"):
            Saddle(self.B, self.G).schur_complement(ops.Dense(torch.eye(2)))
