"""BiCGStab against dense solves, and where it breaks down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from solvers import ConvergenceWarning
from solvers.krylov.bicgstab import BiCGStab

FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def general(n: int, seed: int = 0) -> ops.Dense:
    return ops.Dense(3 * torch.eye(n, dtype=FLOAT64) + 1.2 * sampled(n, n, seed=seed) / n**0.5)


def skew(n: int, shift: float = 0.0) -> ops.Dense:
    K = sampled(n, n, seed=1)
    return ops.Dense(K - K.T + shift * torch.eye(n, dtype=FLOAT64))


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_solves_general_systems(preconditioned, columns, seed):
    A, b = general(50, seed), sampled(50, columns, seed=seed + 10)
    P = ops.Dense(torch.linalg.inv(A.matrix) + 0.01 * sampled(50, 50)) if preconditioned else None
    prepared = BiCGStab(rtol=1e-10, strict=True, preconditioner=P).prepare(A)
    x, info = prepared.solve(b)
    torch.testing.assert_close(x, torch.linalg.solve(A.matrix, b), rtol=1e-7, atol=1e-8)
    assert info.iterations <= (10 if preconditioned else 20)
    x = prepared.solve_transpose(b).value
    torch.testing.assert_close(x, torch.linalg.solve(A.matrix.T, b), rtol=1e-7, atol=1e-8)


def test_two_steps_are_those_of_the_textbook():
    """Van der Vorst's table, written out for a vector."""
    A, b = general(20).matrix, sampled(20)
    x, r, shadow = torch.zeros(20, dtype=FLOAT64), b, b
    rho = alpha = omega = torch.tensor(1.0, dtype=FLOAT64)
    v = p = torch.zeros(20, dtype=FLOAT64)
    for k in (1, 2, 3):
        previous, rho = rho, shadow @ r
        p = r + (rho / previous) * (alpha / omega) * (p - omega * v)
        v = A @ p
        alpha = rho / (shadow @ v)
        s = r - alpha * v
        t = A @ s
        omega = (t @ s) / (t @ t)
        x = x + alpha * p + omega * s
        r = s - omega * t
        solver = BiCGStab(rtol=0.0, maxiter=k, stop_at_maxiter=True)
        torch.testing.assert_close(solver.prepare(ops.Dense(A)).solve(b).value, x)


def test_ends_at_the_half_step():
    """The first half of the first iteration solves ``c I``; the second would divide by zero."""
    for columns in (1, 2):
        b = sampled(6, columns)
        x, info = BiCGStab(rtol=1e-12, strict=True).prepare(4.0 * ops.Identity(6, FLOAT64)).solve(b)
        torch.testing.assert_close(x, b / 4, rtol=1e-14, atol=0)
        assert info.iterations == 1


class TestBreakdown:
    @pytest.mark.parametrize("n", [2, 20])
    @pytest.mark.parametrize("columns", [1, 3])
    def test_a_skew_symmetric_operator(self, n, columns):
        """``<A s, s> = 0`` always: no shadow residual helps, and that is said."""
        with pytest.warns(ConvergenceWarning, match="vanished, twice: use GMRES"):
            x, info = BiCGStab().prepare(skew(n)).solve(sampled(n, columns))
        assert info.status == "breakdown"
        assert torch.isfinite(x).all()
        assert info.residual <= 1.0  # what made it worse is taken back

    def test_another_shadow_residual_helps_once(self):
        """``<b, A b> = 0``, though A is far from skew: the second start does not fail."""
        A = ops.Dense(torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 3]], dtype=FLOAT64))
        b = torch.tensor([1.0, 0, 0], dtype=FLOAT64)
        assert float(b @ (A @ b)) == 0
        x = BiCGStab(rtol=1e-10, strict=True).prepare(A).solve(b).value
        torch.testing.assert_close(A @ x, b, rtol=0, atol=1e-9)
        again = BiCGStab(rtol=1e-10, strict=True).prepare(A).solve(b)
        assert torch.equal(again.value, x)  # from a fixed seed

    def test_spoils_no_other_column(self):
        A = ops.Dense(torch.block_diag(skew(2).matrix, general(6).matrix))
        block = torch.zeros(8, 2, dtype=FLOAT64)
        block[:2, 0], block[2:, 1] = 1.0, 1.0
        with pytest.warns(ConvergenceWarning, match="breakdown"):
            x = BiCGStab(rtol=1e-11).prepare(A).solve(block).value
        torch.testing.assert_close(A @ x[:, 1], block[:, 1], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_products_that_are_not_finite(self, columns):
        A = ops.Diagonal(torch.tensor([1.0, 2.0, float("nan")], dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match="not finite"):
            x, info = BiCGStab().prepare(A).solve(torch.ones(3, columns, dtype=FLOAT64))
        assert info.status == "breakdown"
        assert torch.isfinite(x).all()


def test_each_column_converges_by_itself():
    values = torch.linspace(1, 20, 25, dtype=FLOAT64)
    A = ops.Diagonal(values)
    block = torch.stack([torch.eye(25).double()[3], sampled(25), torch.zeros(25).double()], 1)
    solver = BiCGStab(rtol=1e-10, strict=True)
    x, info = solver.prepare(A).solve(block)
    torch.testing.assert_close(x[:, 0], block[:, 0] / values, rtol=1e-14, atol=0)
    assert not x[:, 2].any()
    single = solver.prepare(A).solve(block[:, 1])
    assert abs(info.iterations - single.info.iterations) <= 1
    torch.testing.assert_close(x[:, 1], single.value, rtol=1e-7, atol=1e-8)


def test_counts_two_products_an_iteration():
    _, info = BiCGStab(rtol=1e-10).prepare(general(30)).solve(sampled(30))
    assert info.products == 2 * info.iterations + 1


def test_the_iteration_limit():
    A = ops.Diagonal(torch.logspace(0, 4, 60, dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match="maxiter after 3 iterations"):
        info = BiCGStab(maxiter=3).prepare(A).solve(sampled(60)).info
    assert info.status == "maxiter"


def test_a_solver_as_preconditioner_is_transposed_with_the_system():
    A, b = general(30), sampled(30, 2)
    prepared = BiCGStab(rtol=1e-10, preconditioner=solvers.DenseLU()).prepare(A)
    x, info = prepared.solve_transpose(b)
    assert info.iterations == 1
    torch.testing.assert_close(A.matrix.T @ x, b, rtol=0, atol=1e-9)
