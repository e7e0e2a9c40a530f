"""GMRES against its minimisation property; restarts, stagnation, preconditioners that vary."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
import solvers
from solvers import ConvergenceWarning, StructureError
from solvers.krylov.bicgstab import BiCGStab
from solvers.krylov.gmres import GMRES

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def general(n: int, seed: int = 0) -> ops.Dense:
    """Eigenvalues about 3, within 1.2 of it."""
    return ops.Dense(3 * torch.eye(n, dtype=FLOAT64) + 1.2 * sampled(n, n, seed=seed) / n**0.5)


def shift(n: int) -> ops.Dense:
    """The cyclic shift: GMRES makes no progress before iteration n."""
    return ops.Dense(torch.roll(torch.eye(n, dtype=FLOAT64), 1, 0))


def first(n: int) -> Tensor:
    return torch.eye(n, dtype=FLOAT64)[0]


def truncated(A: ops.LinearOperator, b: Tensor, k: int, **settings) -> Tensor:
    solver = GMRES(rtol=0.0, maxiter=k, stop_at_maxiter=True, **settings)
    return solver.prepare(A).solve(b).value


def minimiser(A: Tensor, b: Tensor, k: int, P: Tensor | None = None) -> Tensor:
    """Of ``|b - A x|`` over ``P K_k(A P, b)``, by dense algebra."""
    P = torch.eye(len(A), dtype=FLOAT64) if P is None else P
    vectors = [b]
    for _ in range(k - 1):
        w = A @ (P @ vectors[-1])
        vectors.append(w / torch.linalg.vector_norm(w))
    V = P @ torch.linalg.qr(torch.stack(vectors, 1)).Q
    return V @ torch.linalg.lstsq(A @ V, b[:, None], driver="gelsd").solution[:, 0]


@PROPERTY
@given(k=st.integers(1, 7), seed=st.integers(0, 99))
def test_iterates_minimise_the_residual_over_the_krylov_space(k, seed):
    A, b = general(12, seed), sampled(12, seed=seed + 1)
    x = truncated(A, b, k)
    torch.testing.assert_close(x, minimiser(A.matrix, b, k), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kept", [False, True])
def test_preconditioned_iterates_minimise_the_true_residual(kept):
    """On the right, whether the vectors ``P v_j`` are kept (P a function) or not (an operator)."""
    A, b = general(12), sampled(12, seed=1)
    P = torch.eye(12, dtype=FLOAT64) + 0.3 * sampled(12, 12, seed=2)
    for k in (1, 3, 6):
        x = truncated(A, b, k, preconditioner=(lambda v: P @ v) if kept else ops.Dense(P))
        torch.testing.assert_close(x, minimiser(A.matrix, b, k, P), rtol=1e-7, atol=1e-9)


@PROPERTY
@given(n=st.integers(1, 12), seed=st.integers(0, 99))
def test_terminates_in_n_iterations(n, seed):
    A = ops.Dense(sampled(n, n, seed=seed) + 0.1 * torch.eye(n, dtype=FLOAT64))
    solution = GMRES(rtol=1e-8, strict=True).prepare(A).solve(sampled(n, seed=seed + 1))
    assert solution.info.iterations <= n


@pytest.mark.parametrize("columns", [1, 4])
def test_restarts_come_to_the_same_solution(columns):
    A, b = general(50), sampled(50, columns, seed=1)
    expected = torch.linalg.solve(A.matrix, b)
    iterations = []
    for restart in (3, 10, 50):
        x, info = GMRES(rtol=1e-11, restart=restart, strict=True).prepare(A).solve(b)
        torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-10)
        iterations.append(info.iterations)
    assert iterations[0] >= iterations[1] >= iterations[2]


class TestStagnation:
    def test_a_cycle_that_gains_nothing_is_the_last(self):
        with pytest.warns(ConvergenceWarning, match=r"stagnated after 5.*a longer restart"):
            x, info = GMRES(restart=5).prepare(shift(20)).solve(first(20))
        assert info.status == "stagnated"
        assert info.residual == 1.0
        assert not x.any()

    def test_a_long_enough_cycle_solves_it(self):
        x, info = GMRES(restart=20, strict=True).prepare(shift(20)).solve(first(20))
        assert info.iterations == 20
        torch.testing.assert_close(shift(20) @ x, first(20))

    def test_rounding_ends_the_cycles(self):
        """A tolerance of zero cannot be met, and is not tried 10 n times."""
        with pytest.warns(ConvergenceWarning, match="stagnated"):
            info = GMRES(rtol=0.0).prepare(general(30)).solve(sampled(30)).info
        assert info.residual < 1e-14
        assert info.iterations < 150


class TestSingular:
    A = ops.Dense(torch.tensor([[1.0, 1, 0], [0, 2, 0], [0, 0, 0]], dtype=FLOAT64))

    @pytest.mark.parametrize("columns", [1, 2])
    def test_an_inconsistent_system_is_found_out(self, columns):
        with pytest.warns(ConvergenceWarning, match="singular on the Krylov space: use LSMR"):
            x, info = GMRES().prepare(self.A).solve(torch.ones(3, columns, dtype=FLOAT64))
        assert info.status == "breakdown"
        assert info.residual == pytest.approx(3**-0.5)
        assert torch.isfinite(x).all()

    def test_spoils_no_other_column(self):
        block = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 0, 0]], dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning):
            x = GMRES(rtol=1e-12).prepare(self.A).solve(block).value
        torch.testing.assert_close(x[:, 1], torch.tensor([0.5, 0.5, 0.0], dtype=FLOAT64))
        assert not x[:, 2].any()

    def test_nothing_but_zeros(self):
        with pytest.warns(ConvergenceWarning, match="breakdown"):
            x = GMRES().prepare(ops.Dense(torch.zeros(3, 3))).solve(torch.ones(3)).value
        assert not x.any()


@pytest.mark.parametrize("columns", [1, 3])
def test_products_that_are_not_finite(columns):
    A = ops.Diagonal(torch.tensor([1.0, 2.0, float("nan")], dtype=FLOAT64))
    b = torch.ones(3, columns, dtype=FLOAT64)
    with pytest.warns(ConvergenceWarning, match="not finite"):
        x, info = GMRES().prepare(A).solve(b)
    assert info.status == "breakdown"
    assert torch.isfinite(x).all()


class TestPreconditioned:
    A, b = general(60), sampled(60, 3, seed=1)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_the_exact_inverse_takes_one_iteration(self, columns):
        for P in (solvers.DenseLU(), solvers.DenseLU().prepare(self.A)):
            prepared = GMRES(rtol=1e-10, strict=True, preconditioner=P).prepare(self.A)
            for solve, matrix in (
                (prepared.solve, self.A.matrix),
                (prepared.solve_transpose, self.A.matrix.T),
            ):
                x, info = solve(self.b[:, :columns])
                assert info.iterations == 1
                torch.testing.assert_close(matrix @ x, self.b[:, :columns], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_one_that_varies(self, columns):
        """Kept vectors make it right; GMRES that took P for fixed would be off."""
        calls = [0]

        def varying(v: Tensor) -> Tensor:
            calls[0] += 1
            return v / (2.0 + calls[0] % 3) + 0.1 * v.abs()

        solver = GMRES(rtol=1e-10, restart=40, strict=True, preconditioner=varying)
        x, info = solver.prepare(self.A).solve(self.b[:, :columns])
        torch.testing.assert_close(self.A @ x, self.b[:, :columns], rtol=0, atol=1e-8)
        # The last residual came from the recurrence of one cycle, and was true.
        assert info.iterations <= 40

    def test_an_inner_iteration_counts_as_one_that_varies(self):
        inner = BiCGStab(rtol=0.05)
        solver = GMRES(rtol=1e-10, strict=True, preconditioner=inner)
        prepared = solver.prepare(self.A)
        info = prepared.solve(self.b).info
        assert info.iterations <= 10
        assert prepared.solve_transpose(self.b).info.converged

    def test_a_function_has_no_transpose(self):
        prepared = GMRES(preconditioner=lambda v: v / 3).prepare(self.A)
        prepared.solve(self.b)
        with pytest.raises(StructureError, match="needs the transposed preconditioner"):
            prepared.solve_transpose(self.b)


def test_each_column_converges_by_itself():
    values = torch.linspace(1, 100, 25, dtype=FLOAT64)
    A = ops.Diagonal(values)
    block = torch.stack([2.0 * torch.eye(25).double()[3], sampled(25), torch.zeros(25).double()], 1)
    solver = GMRES(rtol=1e-10, restart=25, strict=True)
    x, info = solver.prepare(A).solve(block)
    torch.testing.assert_close(x[:, 0], block[:, 0] / values, rtol=1e-14, atol=0)
    assert not x[:, 2].any()
    single = solver.prepare(A).solve(block[:, 1])
    assert info.iterations == single.info.iterations
    torch.testing.assert_close(x[:, 1], single.value, rtol=1e-8, atol=1e-10)


def test_the_iteration_limit_counts_iterations_not_cycles():
    A, b = ops.Diagonal(torch.logspace(0, 4, 60, dtype=FLOAT64)), sampled(60)
    with pytest.warns(ConvergenceWarning, match="maxiter after 17 iterations"):
        info = GMRES(maxiter=17, restart=5).prepare(A).solve(b).info
    assert info.iterations == 17
    assert info.products == 17 + 4  # a residual for each cycle
    x, info = GMRES(maxiter=17, restart=5, stop_at_maxiter=True).prepare(A).solve(b)
    true = torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b)
    assert info.residual == pytest.approx(float(true), rel=1e-9)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="GMRES: restart=0; expected at least 1"):
        GMRES(restart=0)


def test_no_failure_is_silent():
    """Forty systems of all condition numbers: what is called converged is (lineax counts these)."""
    flagged = 0
    for seed in range(40):
        U, _ = torch.linalg.qr(sampled(15, 15, seed=seed))
        V, _ = torch.linalg.qr(sampled(15, 15, seed=seed + 100))
        A = ops.Dense(U @ torch.diag(torch.logspace(-seed / 2.5, 0, 15).double()) @ V)
        b = sampled(15, seed=seed + 200)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x, info = GMRES(rtol=1e-10, restart=15).prepare(A).solve(b)
        true = float(torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b))
        assert info.converged == (info.residual <= 1e-10) == (not caught)
        rounding = 2.2e-16 * float(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(b))
        assert info.residual == pytest.approx(true, rel=1e-9, abs=5 * rounding)
        flagged += not info.converged
    assert 0 < flagged < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    A = general(12)
    half, B = ops.Dense(A.matrix.to(dtype)), sampled(12, 3).to(dtype)
    X, info = GMRES(rtol=0.1).prepare(half).solve(B)
    assert info.converged
    left = torch.linalg.vector_norm(half.matrix.double() @ X.double() - B.double(), dim=0)
    assert bool((left <= 0.15 * torch.linalg.vector_norm(B.double(), dim=0)).all())
    for j in range(3):
        one = GMRES(rtol=0.1).prepare(half).solve(B[:, j]).value
        torch.testing.assert_close(one.double(), X[:, j].double(), rtol=0.2, atol=0.1)
