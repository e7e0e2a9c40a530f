"""`DenseLDL`: indefinite systems, and the inertia that the blocks of D show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import DenseCholesky, NotPositiveDefiniteError, SingularError, StructureError
from solvers.dense.ldl import DenseLDL, Inertia

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(values), len(values), seed=seed))
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def inertia(matrix: Tensor, zero: float = 0.0) -> Inertia:
    values = torch.linalg.eigvalsh(matrix)
    counts = (values > zero), (values < -zero), (values.abs() <= zero)
    return Inertia(*(int(count.sum()) for count in counts))


@PROPERTY
@given(n=st.integers(1, 12), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_backward_stable(n, k, seed):
    matrix, block = sampled(n, n, seed=seed), sampled(n, k, seed=seed + 1)
    matrix = matrix + matrix.T
    factor = DenseLDL().prepare(ops.Dense(matrix, symmetric=True))
    for solve in (factor.solve, factor.solve_transpose):
        x = solve(block).value
        residual = torch.linalg.matrix_norm(block - matrix @ x)
        scale = torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(x)
        assert residual <= 1e-13 * scale


@PROPERTY
@given(n=st.integers(1, 20), negative=st.integers(0, 20), seed=st.integers(0, 999))
def test_inertia_is_that_of_the_eigenvalues(n, negative, seed):
    sizes = 10 ** sampled(n, seed=seed).clamp(-2, 2)
    signs = torch.where(torch.arange(n) < negative, -1.0, 1.0)
    matrix = with_eigenvalues(sizes * signs, seed)
    factor = DenseLDL().prepare(ops.Dense(matrix, symmetric=True))
    negative = min(negative, n)
    assert factor.inertia == Inertia(n - negative, negative, 0)


@PROPERTY
@given(n=st.integers(2, 12), seed=st.integers(0, 999), exponent=st.sampled_from([-150, 0, 150]))
def test_inertia_where_all_blocks_are_of_size_two(n, seed, exponent):
    """A zero diagonal leaves no pivot of size one to begin with; no scale matters."""
    matrix = sampled(n, n, seed=seed)
    matrix = 10.0**exponent * (matrix + matrix.T).fill_diagonal_(0.0)
    factor = DenseLDL().prepare(ops.Dense(matrix, symmetric=True))
    assert bool((factor.pivots < 0).any())
    assert factor.inertia == inertia(matrix * 10.0**-exponent)


@PROPERTY
@given(n=st.integers(3, 15), rank=st.integers(1, 14), seed=st.integers(0, 999))
def test_eigenvalues_that_are_zero(n, rank, seed):
    """Those that are not keep their signs; of those that are, none is made up but by rounding."""
    rank = min(rank, n - 1)
    values = torch.zeros(n).double()
    values[:rank] = torch.where(torch.arange(rank) % 2 == 0, 1.0, -2.0)
    matrix = with_eigenvalues(values, seed)
    positive = (rank + 1) // 2
    try:
        factor = DenseLDL().prepare(ops.Dense(matrix, symmetric=True))
    except SingularError:
        return  # an exact zero in D, by chance
    found = factor.inertia
    assert found.positive >= positive
    assert found.negative >= rank - positive
    assert sum(found) == n
    assert found.zero >= n - rank - 1


@pytest.mark.parametrize(("n", "m"), [(4, 1), (6, 3), (5, 5)])
def test_inertia_of_a_saddle_point(n, m):
    """``(n, m, 0)`` where J has full rank and H is definite on its null space."""
    root = sampled(n, n)
    H, J = ops.Dense(root @ root.T, symmetric=True), ops.Dense(sampled(m, n, seed=1))
    factor = DenseLDL().prepare(ops.Saddle(H, J))
    assert factor.inertia == Inertia(n, m, 0)


def test_inertia_of_a_batch():
    matrices = [torch.eye(3), -torch.eye(3), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, -2]])]
    stack = ops.Stacked([ops.Dense(M.double(), symmetric=True) for M in matrices])
    expected = (Inertia(3, 0, 0), Inertia(0, 3, 0), Inertia(1, 2, 0))
    assert DenseLDL().prepare(stack).inertia == expected


def test_inertia_of_nothing():
    A = ops.Dense(torch.zeros(0, 0), symmetric=True)
    assert DenseLDL().prepare(A).inertia == Inertia(0, 0, 0)


def test_indefinite_where_cholesky_stops():
    A = ops.Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), symmetric=True)
    with pytest.raises(NotPositiveDefiniteError):
        DenseCholesky().prepare(A)
    x, info = DenseLDL().prepare(A).solve(torch.tensor([3.0, 3.0]).double())
    torch.testing.assert_close(x, torch.ones(2).double(), rtol=1e-15, atol=0)
    assert info.converged


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
def test_ill_conditioned(condition):
    """x is as far off as the condition lets it be, while the residual is small."""
    n = 15
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), n, dtype=torch.float64)
    values[::2] *= -1
    matrix, exact = with_eigenvalues(values), sampled(n, seed=5)
    A = ops.Dense(matrix, symmetric=True)
    x, info = DenseLDL().prepare(A).solve(matrix @ exact)
    assert info.converged
    assert info.residual < 1e-14
    assert (x - exact).norm() <= 10 * condition * 2.2e-16 * exact.norm()


def test_only_what_is_symmetric():
    with pytest.raises(StructureError, match=r"DenseLDL needs a symmetric operator; Dense\(2, 2\)"):
        DenseLDL().prepare(ops.Dense(torch.eye(2)))


@pytest.mark.parametrize(
    ("diagonal", "entry"), [([0.0, 0.0], 1), ([1.0, 0.0], 2), ([2.0, -1.0, 0.0], 3)]
)
def test_singular(diagonal, entry):
    with pytest.raises(SingularError, match=rf"entry {entry} of the diagonal of its D is exactly"):
        DenseLDL().prepare(ops.Dense(torch.diag(torch.tensor(diagonal)), symmetric=True))


def test_where_torch_has_no_such_factorisation():
    # A device that is always there, in place of those that torch has no LDL^T on; `prepare` itself
    # refuses it, as it holds no numbers.
    A = ops.Dense(torch.eye(2, device="meta"), symmetric=True)
    with pytest.raises(TypeError, match=r"on meta, where torch has no LDL\^T; expected the CPU"):
        DenseLDL()._prepare(A)
    narrow = ops.Dense(torch.eye(2, dtype=torch.bfloat16), symmetric=True)
    with pytest.raises(TypeError, match=r"bfloat16, which torch does not factorise; expected fl"):
        DenseLDL().prepare(narrow)
