"""Columns of any size have a norm, and come to length one."""

from __future__ import annotations

import pytest
import torch

from solvers import CG, DenseLU
from solvers.columns import lengths, units
from solvers.linear_solver import Progress
from solvers.preconditioner import SolveOperator

SIZES = {torch.float32: (1e-42, 1e-30, 1.0, 1e30), torch.float64: (1e-315, 1e-200, 1.0, 1e300)}


@pytest.mark.parametrize("dtype", SIZES)
def test_tiny_and_huge_ones(dtype):
    column = torch.tensor([3.0, 0.0, -4.0], dtype=dtype)
    sizes = torch.tensor([*SIZES[dtype], 0.0], dtype=dtype)
    block = column[:, None] * sizes
    unit, scale, norm = units(block)
    expected = torch.where(sizes > 0, column[:, None] / 5, 0.0)
    # A subnormal number has few digits.
    torch.testing.assert_close(unit[:, 1:], expected[:, 1:])
    assert float(torch.linalg.vector_norm(unit[:, 0])) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(unit * norm * scale, block, rtol=1e-6, atol=0)
    torch.testing.assert_close(lengths(block)[1:], 5 * sizes[1:], rtol=1e-6, atol=0)


def test_no_rows():
    unit, scale, norm = units(torch.zeros(0, 3))
    assert unit.shape == (0, 3)
    assert bool((scale == 1).all() & (norm == 1).all())


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_a_solver_as_an_operator_takes_any_size(size):
    M = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for solver in (DenseLU(), CG(rtol=1e-12)):
        P = SolveOperator(solver.prepare(M))
        torch.testing.assert_close(P @ (size * v) / size, torch.linalg.solve(M, v))


def test_the_first_failure_of_several_columns_counts():
    total = Progress()
    for part in (
        Progress(iterations=3, products=4),
        Progress(iterations=7, products=9, status="maxiter", detail="first"),
        Progress(iterations=5, products=1, status="diverged", detail="second", refreshed=True),
    ):
        total.include(part)
    assert (total.iterations, total.products, total.refreshed) == (7, 14, True)
    assert (total.status, total.detail) == ("maxiter", "first")
