"""`condition_estimate`: from below, within a factor of three, by any solver."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import CG, DenseCholesky, DenseLU, Diagonal
from solvers.condition import condition_estimate
from solvers.dense.qr import QR
from solvers.dense.svd import SVD

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def true_condition(matrix: Tensor) -> float:
    inverse = torch.linalg.pinv(matrix, rtol=1e-15)
    return float(torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1))


def check(estimate: float, matrix: Tensor) -> None:
    """From below up to the rounding of solves, and not below a third."""
    truth = true_condition(matrix)
    assert truth / 3 <= estimate <= truth * (1 + 1e-14 * truth + 1e-10)


@PROPERTY
@given(n=st.integers(1, 30), seed=st.integers(0, 9999))
def test_random(n, seed):
    matrix = sampled(n, n, seed=seed)
    check(DenseLU().prepare(ops.Dense(matrix)).condition(), matrix)


@PROPERTY
@given(
    n=st.integers(2, 30),
    exponent=st.floats(0, 12),
    side=st.sampled_from(["rows", "columns", "spectrum"]),
    seed=st.integers(0, 9999),
)
def test_graded_up_to_1e12(n, exponent, side, seed):
    matrix, scale = sampled(n, n, seed=seed), torch.logspace(0, -exponent, n, dtype=torch.float64)
    if side == "spectrum":
        left, right = (torch.linalg.qr(sampled(n, n, seed=seed + i))[0] for i in (1, 2))
        matrix = (left * scale) @ right
    else:
        matrix = scale[:, None] * matrix if side == "rows" else matrix * scale
    check(DenseLU().prepare(ops.Dense(matrix)).condition(), matrix)


@pytest.mark.parametrize("n", range(1, 10))
def test_hilbert(n):
    """Condition up to 1.1e12."""
    index = torch.arange(1, n + 1, dtype=torch.float64)
    hilbert = 1 / (index[:, None] + index[None] - 1)
    A = ops.Dense(hilbert, positive_definite=True)
    for solver in (DenseCholesky(), DenseLU(), SVD(rank_rtol=0.0)):
        check(solver.prepare(A).condition(), hilbert)


@PROPERTY
@given(st.lists(st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6), min_size=1, max_size=30))
def test_exact_on_diagonals(values):
    d = torch.tensor(values, dtype=torch.float64)
    expected = float(d.abs().max() / d.abs().min())
    assert Diagonal().prepare(ops.Diagonal(d)).condition() == pytest.approx(expected, rel=1e-13)


@PROPERTY
@given(n=st.integers(1, 4), seed=st.integers(0, 999))
def test_exact_where_the_block_holds_every_vertex(n, seed):
    matrix = sampled(n, n, seed=seed)
    estimate = DenseLU().prepare(ops.Dense(matrix)).condition()
    assert estimate == pytest.approx(true_condition(matrix), rel=1e-8)


def test_higham_s_counterexample_to_a_single_start():
    """Hager's iteration from the average alone finds 1 where the norm of the inverse is large."""
    # A^-1 = I + theta C with C e = C^T e = 0 (Higham, 1988, section 4).
    C = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).double()
    inverse = torch.eye(3).double() + 1e4 * C
    matrix = torch.linalg.inv(inverse)
    check(DenseLU().prepare(ops.Dense(matrix)).condition(), matrix)
    assert float((inverse @ torch.ones(3).double() / 3).abs().sum()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=str)
def test_of_a_pseudo_inverse(shape):
    matrix = sampled(*shape)
    for solver in (QR(), SVD()):
        check(solver.prepare(ops.Dense(matrix)).condition(), matrix)
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    cut = torch.linalg.matrix_norm((Vt[:2].T / s[:2]) @ U[:, :2].T, 1)
    expected = float(torch.linalg.matrix_norm(matrix, 1) * cut)
    estimate = SVD(rank=2).prepare(ops.Dense(matrix)).condition()
    assert expected / 3 <= estimate <= expected * (1 + 1e-10)


def test_by_products_and_by_an_iteration():
    root = sampled(12, 12)
    matrix = root @ root.T + torch.eye(12).double()
    hessian = ops.Hessian(lambda y: y @ matrix @ y / 2, torch.zeros(12).double())
    check(DenseCholesky().prepare(hessian).condition(), matrix)
    check(CG(rtol=1e-12).prepare(ops.Dense(matrix, symmetric=True)).condition(), matrix)
    sparse = torch.where(sampled(12, 12, seed=2) > 1, matrix, 0.0) + 5 * torch.eye(12).double()
    check(DenseLU().prepare(ops.Sparse(sparse)).condition(), sparse)


def test_of_a_batch_it_is_the_worst():
    matrices = torch.stack([sampled(6, 6, seed=i) for i in range(5)])
    matrices = matrices + matrices.mT
    worst = max(matrices, key=true_condition)
    pattern = ops.Sparse(matrices[0]).pattern

    def loss(y: Tensor, M: Tensor) -> Tensor:
        return y @ M @ y / 2

    for make in (
        ops.Dense,
        lambda M: ops.Sparse(M.reshape(-1), pattern),
        lambda M: ops.Hessian(loss, torch.zeros(6).double(), M),
    ):
        check(DenseLU().prepare(ops.Stacked([make(M) for M in matrices])).condition(), worst)


def test_does_not_depend_on_scale_and_repeats():
    matrix = sampled(10, 10)
    estimates = {
        DenseLU().prepare(ops.Dense(2.0**k * matrix)).condition() for k in (-900, 0, 0, 900)
    }
    assert len(estimates) == 1


def test_ends_of_the_range():
    nothing = DenseLU().prepare(ops.Dense(torch.zeros(0, 0)))
    assert nothing.condition() == 0.0
    tiny = torch.diag(torch.tensor([1.0, 1e-320], dtype=torch.float64))
    assert math.isinf(DenseLU().prepare(ops.Dense(tiny)).condition())
    assert isinstance(condition_estimate(nothing), float)


def test_costs_a_handful_of_solves(monkeypatch):
    n = 200
    prepared = DenseLU().prepare(ops.Dense(sampled(n, n)))
    columns, original = [], prepared._substitute

    def counted(block: Tensor, adjoint: bool) -> object:
        columns.append(block.shape[1])
        return original(block, adjoint)

    monkeypatch.setattr(prepared, "_substitute", counted)
    prepared.condition()
    assert sum(columns) <= 40
