from __future__ import annotations

import pytest
import torch

import operators as ops
import solvers
from solvers.preconditioners.incomplete_lu import IncompleteLU
from tests.solvers.preconditioners.problems import convection, poisson, sampled


def test_exact_without_dropping():
    A = convection(9, 8)
    P = IncompleteLU(drop_tol=0.0, fill_factor=100).prepare(A)
    block = sampled(72, 3)
    torch.testing.assert_close(P @ block, torch.linalg.solve(A.to_dense(), block))
    torch.testing.assert_close(P.T @ block, torch.linalg.solve(A.to_dense().T, block))


def test_dropping_trades_nonzeros_for_accuracy():
    A = convection(20, 20)
    M = A.to_dense()
    errors, nonzeros = [], []
    for drop_tol in (1e-1, 1e-2, 1e-4):
        P = IncompleteLU(drop_tol=drop_tol, fill_factor=50).prepare(A)
        errors.append(float(torch.linalg.matrix_norm(P.to_dense() @ M - torch.eye(400))))
        nonzeros.append(P.factor_nonzeros)
    assert errors == sorted(errors, reverse=True)
    assert nonzeros == sorted(nonzeros)
    assert nonzeros[0] < nonzeros[2]
    assert str(P).count(f"{nonzeros[2]} nonzeros") == 1


def test_not_symmetric_though_the_matrix_is():
    P = IncompleteLU(drop_tol=0.1).prepare(poisson(10, 10))
    dense = P.to_dense()
    assert not P.symmetric
    assert torch.linalg.matrix_norm(dense - dense.T) > 1e-3 * torch.linalg.matrix_norm(dense)


@pytest.mark.parametrize("method", [solvers.CG, solvers.MINRES])
def test_refused_by_methods_for_symmetric_preconditioners(method):
    """CG went on to its limit of 10 n iterations with it."""
    A, settings = poisson(20, 20), IncompleteLU(drop_tol=0.1)
    with pytest.raises(solvers.StructureError, match=r"symmetric preconditioner; IncompleteLU of"):
        method(preconditioner=settings).prepare(A)
    b = sampled(400)
    for solver in (
        solvers.GMRES(preconditioner=settings),
        solvers.BiCGStab(preconditioner=settings),
    ):
        assert solver.prepare(A).solve(b).info.iterations < 30


def test_a_zero_pivot():
    with pytest.raises(solvers.SingularError, match="met a zero pivot; add damping"):
        IncompleteLU().prepare(ops.Sparse(torch.tensor([[1.0, 1.0], [1.0, 1.0]])))


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"drop_tol=-1; expected between 0 and 1"):
        IncompleteLU(drop_tol=-1)
    with pytest.raises(ValueError, match=r"fill_factor=0.5; expected at least 1"):
        IncompleteLU(fill_factor=0.5)
    with pytest.raises(solvers.StructureError, match="IncompleteLU needs the nonzeros"):
        IncompleteLU().prepare(ops.Hessian(lambda y: (y**4).sum(), torch.ones(3)))
    bad = ops.Sparse(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="holds NaN or infinite entries"):
        IncompleteLU().prepare(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_come_back(dtype):
    A = ops.Sparse(torch.eye(3, dtype=dtype) * 4)
    x = IncompleteLU().prepare(A)._matvec(torch.ones(3, dtype=dtype))
    assert x.dtype == dtype
    assert (x == 0.25).all()
