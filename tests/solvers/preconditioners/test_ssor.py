from __future__ import annotations

import math

import pytest
import torch

import operators as ops
import solvers
from solvers.preconditioners.ssor import SSOR
from tests.solvers.preconditioners.problems import condition, convection, poisson, sampled


@pytest.mark.parametrize("omega", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("make", [poisson, convection])
def test_the_formula(omega, make):
    A = make(5, 6)
    M = A.to_dense()
    D, L, U = torch.diag(M.diagonal()), M.tril(-1), M.triu(1)
    middle = (2 - omega) / omega * D
    inverse = (D / omega + L) @ torch.linalg.inv(middle) @ (D / omega + U)
    for form in (A, ops.Dense(M, symmetric=A.symmetric)):
        P = SSOR(omega=omega).prepare(form)
        torch.testing.assert_close(P.to_dense(), torch.linalg.inv(inverse))
        torch.testing.assert_close(P.T.to_dense(), torch.linalg.inv(inverse).T)


def test_the_condition_number_falls_by_an_order_of_h():
    """Axelsson: O(1 / h) at omega = 2 / (1 + c h), where A has O(1 / h^2)."""
    conditions, plain = [], []
    for side in (11, 23):
        A = poisson(side, side)
        omega = 2 / (1 + math.pi / (side + 1))
        M = A.to_dense()
        conditions.append(condition(SSOR(omega=omega).prepare(A).to_dense(), M))
        plain.append(condition(torch.eye(len(M)).double(), M))
    assert plain[1] / plain[0] == pytest.approx(4, rel=0.05)
    assert 1.7 < conditions[1] / conditions[0] < 2.1


def test_exact_for_a_triangle_with_unit_omega():
    M = torch.diag(1 + sampled(6) ** 2) + sampled(6, 6, seed=1).tril(-1)
    b = sampled(6, seed=2)
    torch.testing.assert_close(
        SSOR().prepare(ops.Dense(M)) @ b, torch.linalg.solve(M, b), rtol=1e-10, atol=1e-10
    )


def test_not_definite_where_the_diagonal_is_not():
    A = ops.Dense(torch.tensor([[1.0, 0.5], [0.5, -1.0]]), symmetric=True)
    P = SSOR().prepare(A)
    assert P.symmetric
    assert not P.positive_definite


@pytest.mark.parametrize("omega", [0.0, 2.0, -1.0, float("nan")])
def test_omega_out_of_range(omega):
    with pytest.raises(ValueError, match=r"SSOR: omega=.*; expected a number between 0 and 2"):
        SSOR(omega=omega)


def test_a_zero_on_the_diagonal():
    with pytest.raises(solvers.SingularError):
        SSOR().prepare(ops.Sparse(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), symmetric=True))
