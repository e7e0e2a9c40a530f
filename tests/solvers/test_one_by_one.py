"""`one_by_one`: LU of batches where torch's own hangs, or is wrong, on several threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.func import grad

from solvers.one_by_one import SIDE_BY_SIDE, one_by_one

CALLS = {
    "lu_factor_ex": torch.linalg.lu_factor_ex,
    "inv_ex": torch.linalg.inv_ex,
    "slogdet": torch.linalg.slogdet,
}


def batch(*shape: int) -> torch.Tensor:
    n = shape[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, n, dtype=torch.float64, generator=generator)
    return noise + 3 * n**0.5 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (SIDE_BY_SIDE + 1,), (2, SIDE_BY_SIDE + 1),
                                   (2, 3, SIDE_BY_SIDE + 1), (0, SIDE_BY_SIDE + 1)])  # fmt: skip
@pytest.mark.parametrize("name", CALLS)
def test_is_the_function_itself(name, shape):
    A = batch(*shape)
    got, expected = one_by_one(CALLS[name], A), CALLS[name](A)
    assert type(got) is type(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_systems_with_several_columns():
    A, b = batch(2, 3, 70), torch.randn(2, 3, 70, 4, dtype=torch.float64)
    x, info = one_by_one(torch.linalg.solve_ex, A, b)
    torch.testing.assert_close(A @ x, b)
    assert info.shape == (2, 3)


def test_derivatives():
    A = batch(2, 70)
    got = grad(lambda M: one_by_one(torch.linalg.slogdet, M).logabsdet.sum())(A)
    torch.testing.assert_close(got, torch.linalg.inv(A[0]).mT.new_tensor(
        [torch.linalg.inv(M).mT.tolist() for M in A]))  # fmt: skip


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor has no threads to set")
def test_with_threads_that_were_set():
    # torch.linalg.lu_factor_ex itself does not return here (torch 2.13).
    script = """
import torch, hyperlearn as hl, solvers
from operators import Dense
torch.set_num_threads(2)
x = torch.rand(2, 300, dtype=torch.float64) + 1
def solve(x):
    return hl.root(lambda y, x: y**2 + 0.1 * y.roll(1) - x, torch.ones_like(x), x)
y = torch.func.vmap(solve)(x)
assert (y**2 + 0.1 * y.roll(1, 1) - x).abs().max() < 1e-9
inverse = torch.func.vmap(
    lambda d: solvers.solve(Dense(torch.diag(d)), d, solver=solvers.DenseLU())
)(x)
assert (inverse - 1).abs().max() < 1e-12
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
