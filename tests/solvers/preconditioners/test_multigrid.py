"""Smoothers and cycles against their matrices, and against pyamg's own cycles."""

from __future__ import annotations

import numpy as np
import pyamg
import pytest
import scipy.sparse as sp

from solvers.preconditioners.multigrid import Cycle, Level, coarsest_solver
from solvers.preconditioners.smoothers import Chebyshev, GaussSeidel, Jacobi, Smoother
from solvers.solution import SingularError
from tests.solvers.preconditioners.problems import convection, poisson


def of(smoother: Smoother, n: int) -> np.ndarray:
    return smoother(np.eye(n))


@pytest.mark.parametrize("make", [poisson, convection])
def test_gauss_seidel_is_a_sweep_forward_and_back(make):
    A = make(5, 4).to_scipy()
    M = A.toarray()
    D, L, U = np.diag(np.diag(M)), np.tril(M, -1), np.triu(M, 1)
    expected = np.linalg.inv((D + L) @ np.linalg.inv(D) @ (D + U))
    np.testing.assert_allclose(of(GaussSeidel(A), 20), expected, atol=1e-14)
    # As pyamg sweeps.
    x, b = np.zeros(20), np.random.default_rng(0).standard_normal(20)
    pyamg.relaxation.relaxation.gauss_seidel(A, x, b, sweep="symmetric")
    np.testing.assert_allclose(GaussSeidel(A)(b), x, atol=1e-14)


def test_jacobi():
    A = convection(5, 4).to_scipy()
    expected = np.diag(4 / 3 / 1.9 / A.diagonal())
    np.testing.assert_allclose(of(Jacobi(A, 1.9), 20), expected, atol=1e-14)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_chebyshev_is_its_polynomial(degree):
    A = poisson(5, 4).to_scipy()
    radius = 1.8
    left = np.eye(20) - of(Chebyshev(A, radius, degree), 20) @ A.toarray()
    t, V = np.linalg.eigh(A.toarray() / 4)  # D = 4 I
    low, high = radius / 30, 1.1 * radius
    T = np.polynomial.chebyshev.Chebyshev.basis(degree)
    expected = T((high + low - 2 * t) / (high - low)) / T((high + low) / (high - low))
    np.testing.assert_allclose(left, V @ np.diag(expected) @ V.T, atol=1e-12)


@pytest.mark.parametrize("smoother", ["gauss-seidel", "jacobi", "chebyshev"])
def test_smoothers_leave_rows_of_zeros_at_zero(smoother):
    """Coarse levels have such rows where candidates depend on each other in an aggregate."""
    A = sp.block_diag([poisson(4).to_scipy(), sp.csr_array((1, 1))], format="csr")
    make = {
        "gauss-seidel": GaussSeidel,
        "jacobi": lambda A: Jacobi(A, 2.0),
        "chebyshev": lambda A: Chebyshev(A, 2.0, 3),
    }
    M = of(make[smoother](A), 5)
    assert np.isfinite(M).all()
    assert not M[4].any()
    assert not M[:, 4].any()


def hierarchy(A: sp.csr_array) -> list[Level]:
    """Four levels by pairs of neighbours, with restrictions that are no transposes."""
    levels = []
    for depth in range(3):
        n = A.shape[0]
        P = sp.csr_array((np.ones(n), (np.arange(n), np.arange(n) // 2)))
        R = sp.csr_array(P.T * (1 + 0.1 * depth))
        R.data = R.data * np.linspace(0.9, 1.1, len(R.data))
        levels.append(Level(A, R, P, GaussSeidel(A)))
        A = sp.csr_array(R @ A @ P)
    levels.append(Level(A, None, None, GaussSeidel(A)))
    return levels


def reference(levels: list[Level], kind: str, sweeps: int, order: int = 1) -> np.ndarray:
    """The matrix of a cycle, from the propagators of the error."""
    A = levels[0].A.toarray()
    inverse = np.linalg.inv(A)
    if len(levels) == 1:
        return inverse
    eye = np.eye(len(A))
    smooth = eye - of(levels[0].smoother, len(A)) @ A
    visits = {"V": "V", "W": "WW", "F": "FV"}[kind][::order]
    coarse = levels[1].A.toarray()
    left = np.eye(len(coarse))
    for one in visits if len(levels) > 2 else "V":
        left = (np.eye(len(coarse)) - reference(levels[1:], one, sweeps, order) @ coarse) @ left
    correction = (np.eye(len(coarse)) - left) @ np.linalg.inv(coarse)
    middle = eye - levels[0].P @ correction @ levels[0].R @ A
    power = np.linalg.matrix_power(smooth, sweeps)
    return (eye - power @ middle @ power) @ inverse


@pytest.mark.parametrize("kind", ["V", "W", "F"])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_cycles_against_their_matrices(kind, sweeps):
    levels = hierarchy(convection(6, 4).to_scipy())
    *finer, last = levels
    coarsest = coarsest_solver(last.A, symmetric=False)
    cycle = Cycle(finer, coarsest, kind, sweeps)
    expected = reference(levels, kind, sweeps)
    np.testing.assert_allclose(cycle(np.eye(24)), expected, atol=1e-13)
    np.testing.assert_allclose(cycle(np.arange(24.0)), expected @ np.arange(24.0), atol=1e-12)
    turned = [
        Level(
            level.A.T.tocsr(), level.P.T.tocsr(), level.R.T.tocsr(), GaussSeidel(level.A.T.tocsr())
        )
        for level in finer
    ]
    transposed = coarsest_solver(last.A.T.tocsr(), symmetric=False)
    cycle = Cycle(turned, transposed, kind, sweeps, backwards=True)
    np.testing.assert_allclose(cycle(np.eye(24)), expected.T, atol=1e-13)


@pytest.mark.parametrize("kind", ["V", "W", "F"])
def test_cycles_are_those_of_pyamg(kind):
    A = poisson(20, 19).to_scipy()
    made = pyamg.smoothed_aggregation_solver(A.copy(), max_coarse=3)
    levels = [
        Level(level.A.tocsr(), level.R.tocsr(), level.P.tocsr(), GaussSeidel(level.A.tocsr()))
        for level in made.levels[:-1]
    ]
    assert len(levels) >= 3
    cycle = Cycle(levels, coarsest_solver(made.levels[-1].A, symmetric=True), kind, 1)
    b = np.random.default_rng(0).standard_normal(380)
    np.testing.assert_allclose(cycle(b), made.aspreconditioner(kind) @ b, rtol=1e-10, atol=1e-11)


def test_coarsest_systems(monkeypatch):
    A = convection(4, 4).to_scipy()
    b = np.random.default_rng(0).standard_normal((16, 3))
    expected = np.linalg.solve(A.toarray(), b)
    np.testing.assert_allclose(coarsest_solver(A, symmetric=False)(b), expected)
    # Pure Neumann: the solution of least norm.
    neumann = sp.csr_array(np.array([[1.0, -1, 0], [-1, 2, -1], [0, -1, 1]]))
    x = coarsest_solver(neumann, symmetric=True)(np.array([1.0, 0, -1]))
    np.testing.assert_allclose(x, [1, 0, -1], atol=1e-14)
    monkeypatch.setattr("solvers.preconditioners.multigrid.DENSE", 2)
    np.testing.assert_allclose(coarsest_solver(A, symmetric=False)(b), expected)
    with pytest.raises(SingularError, match="coarsest system, of 3 unknowns, is singular"):
        coarsest_solver(sp.csr_array(np.ones((3, 3))), symmetric=True)
