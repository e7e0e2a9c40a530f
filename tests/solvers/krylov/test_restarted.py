"""Blocks that are too large to be worked on at once."""

from __future__ import annotations

import pytest
import torch

import operators as ops
import solvers
from solvers.krylov import restarted
from solvers.krylov.restarted import slab

DOUBLE = torch.float64


def test_columns_that_are_worked_on_together(monkeypatch):
    monkeypatch.setattr(restarted, "SLAB", 8 * 100 * 20)
    assert slab(torch.zeros(100, 20, dtype=DOUBLE)) == 20
    assert slab(torch.zeros(100, 21, dtype=DOUBLE)) == 20
    assert slab(torch.zeros(50, 90, dtype=DOUBLE)) == 40
    assert slab(torch.zeros(200, 21, dtype=DOUBLE)) == 1  # ten at once are no gain
    assert slab(torch.zeros(200, 30, dtype=torch.float32)) == 20
    assert slab(torch.zeros(0, 3)) == 3


@pytest.mark.parametrize("width", [16, 1])
@pytest.mark.parametrize(
    "solver",
    [
        solvers.CG(rtol=1e-10),
        solvers.CG(rtol=1e-10, preconditioner=solvers.Jacobi()),
        solvers.MINRES(rtol=1e-10),
        solvers.GMRES(rtol=1e-10),
        solvers.BiCGStab(rtol=1e-10),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_slabs_are_one_block(solver, width, monkeypatch):
    n, k = 30, 37
    A = ops.Diagonal(torch.linspace(1, 7, n, dtype=DOUBLE))
    B = torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    B[:, 3] = 0
    whole = solver.prepare(A).solve(B)
    monkeypatch.setattr(restarted, "SLAB", 8 * n * width)
    x, info = solver.prepare(A).solve(B)
    torch.testing.assert_close(x, B / A.values[:, None], rtol=1e-9, atol=1e-9)
    assert info.converged
    assert info.iterations == whole.info.iterations
    assert info.residual <= 1e-10


def test_the_worst_slab_speaks(monkeypatch):
    n = 30
    A = ops.Diagonal(torch.linspace(-1, 7, n, dtype=DOUBLE))
    B = torch.zeros(n, 40, dtype=DOUBLE)
    B[20:, :20] = 1.0
    B[:, 20:] = 1.0  # these meet the negative eigenvalue
    monkeypatch.setattr(restarted, "SLAB", 8 * n * 20)
    with pytest.warns(solvers.ConvergenceWarning, match="indefinite"):
        info = solvers.CG(rtol=1e-10).prepare(A).solve(B).info
    assert info.status == "indefinite"
    assert not info.converged
