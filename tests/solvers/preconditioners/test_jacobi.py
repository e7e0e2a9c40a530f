from __future__ import annotations

import pytest
import torch

import operators as ops
import solvers
from solvers.preconditioners.jacobi import Jacobi
from tests.solvers.preconditioners.problems import condition, poisson, sampled


def test_the_inverse_of_the_diagonal():
    A = ops.Dense(sampled(5, 5))
    P = Jacobi().prepare(A)
    assert isinstance(P, ops.Diagonal)
    torch.testing.assert_close(P.to_dense(), torch.diag(1 / A.matrix.diagonal()))
    absolute = Jacobi(absolute=True).prepare(A)
    torch.testing.assert_close(absolute.values, 1 / A.matrix.diagonal().abs())
    assert absolute.positive_definite


def test_of_sums_and_low_rank():
    fisher = ops.LowRankPlusDiagonal(sampled(3, 6), 0.5)
    for A in (fisher, 2.0 * fisher + ops.Identity(6), poisson(6) + fisher):
        expected = 1 / A.to_dense().diagonal()
        torch.testing.assert_close(Jacobi().prepare(A)._exact_diagonal(), expected)


def test_undoes_a_scaling():
    """The condition number of D A D is that of A for the best D, up to q nonzeros in a row."""
    A = poisson(8, 8).to_dense()
    d = torch.exp(3 * sampled(64))
    scaled = ops.Dense(d[:, None] * A * d, symmetric=True)
    P = Jacobi().prepare(scaled).to_dense()
    assert condition(P, scaled.matrix) < 1.001 * condition(torch.eye(64).double(), A)
    assert float(torch.linalg.cond(scaled.matrix)) > 1e4
    b = sampled(64, seed=1)
    info = solvers.CG(rtol=1e-8, preconditioner=Jacobi()).prepare(scaled).solve(b).info
    assert info.converged
    assert info.iterations < 40


def test_nested_parameters():
    A = ops.Hessian(
        lambda y: (y["a"] ** 2).sum() + (3 * y["b"]) ** 2,
        {"a": torch.ones(2), "b": torch.tensor(1.0)},
    )
    with pytest.raises(solvers.StructureError, match=r"Jacobi: Hessian.* does not know its diag"):
        Jacobi().prepare(A)
    # What the message proposes.
    P = ops.Diagonal(1 / ops.diagonal(A).value, A.domain)
    solution = (
        solvers.CG(preconditioner=P).prepare(A).solve({"a": torch.ones(2), "b": torch.tensor(9.0)})
    )
    assert solution.info.iterations == 1
    torch.testing.assert_close(solution.value["b"], torch.tensor(0.5))


def test_a_zero_is_named():
    A = ops.Dense(torch.tensor([[1.0, 2.0, 0], [2.0, 0.0, 0], [0, 0, 0]]))
    with pytest.raises(solvers.SingularError, match=r"zero in row 1 \(and 1 others\)"):
        Jacobi().prepare(A)
