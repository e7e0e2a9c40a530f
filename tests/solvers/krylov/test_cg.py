"""Conjugate gradients against its theory, and against the mistakes made in published code."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
import solvers
from solvers import CG, ConvergenceWarning, NotConvergedError, StructureError

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def definite(eigenvalues: Tensor, seed: int = 0) -> ops.Dense:
    return ops.Dense(spd(eigenvalues, seed), positive_definite=True)


def truncated(A: ops.LinearOperator, b: Tensor, k: int) -> Tensor:
    """Iterate number k."""
    return CG(rtol=0.0, maxiter=k, stop_at_maxiter=True).prepare(A).solve(b).value


def true_residual(A: ops.LinearOperator, b: Tensor, x: Tensor) -> float:
    return float(torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b))


@pytest.mark.parametrize("c", [1e-12, 0.5, 2.0, 1e12])
@pytest.mark.parametrize("rtol", [1e-12, 1e-3, 0.5])
def test_a_multiple_of_the_identity_takes_one_iteration_at_any_tolerance(c, rtol):
    """Code that stops before it stores the new iterate returns 0 here."""
    b = sampled(6)
    x, info = (
        CG(rtol=rtol).prepare(ops.Dense(c * torch.eye(6, dtype=FLOAT64), symmetric=True)).solve(b)
    )
    torch.testing.assert_close(x, b / c, rtol=1e-14, atol=0)
    assert info.iterations == 1
    assert info.converged


def test_as_many_iterations_as_distinct_eigenvalues():
    eigenvalues = torch.tensor([1.0, 2.0, 5.0], dtype=FLOAT64).repeat_interleave(10)
    A, b = definite(eigenvalues), sampled(30)
    x, info = CG(rtol=1e-12).prepare(A).solve(b)
    assert info.iterations == 3
    torch.testing.assert_close(x, torch.linalg.solve(A.matrix, b), rtol=1e-10, atol=1e-11)


@PROPERTY
@given(n=st.integers(1, 10), seed=st.integers(0, 999))
def test_terminates_in_n_iterations(n, seed):
    A, b = definite(1 + 9 * sampled(n, seed=seed).sigmoid(), seed), sampled(n, seed=seed + 1)
    _, info = CG(rtol=1e-10, strict=True).prepare(A).solve(b)
    assert info.iterations <= n


@PROPERTY
@given(n=st.integers(2, 20), condition=st.floats(1.5, 1000.0), seed=st.integers(0, 999))
def test_error_falls_in_the_energy_norm_and_below_the_chebyshev_bound(n, condition, seed):
    eigenvalues = torch.logspace(0, 1, n, base=condition, dtype=FLOAT64)
    A, b = definite(eigenvalues, seed), sampled(n, seed=seed + 1)
    solution = torch.linalg.solve(A.matrix, b)

    def energy(error: Tensor) -> float:
        return float((error @ A.matrix @ error).clamp_min(0).sqrt())

    first = previous = energy(solution)
    rounding = 1e-14 * condition * first
    rate = (condition**0.5 - 1) / (condition**0.5 + 1)
    for k in range(1, min(n, 12) + 1):
        error = energy(truncated(A, b, k) - solution)
        assert error <= previous + rounding
        assert error <= 2 * rate**k * first + rounding
        previous = error


def test_thirty_iterations_at_condition_ten():
    """An update with the old residual grows here instead: 3.1 in place of 2e-8."""
    A, b = definite(torch.linspace(1, 10, 100, dtype=FLOAT64)), sampled(100)
    solution = torch.linalg.solve(A.matrix, b)
    error = torch.linalg.vector_norm(truncated(A, b, 30) - solution)
    assert error <= 1e-8 * torch.linalg.vector_norm(solution)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
@pytest.mark.parametrize("exponent", [2, 6, 10])
def test_what_it_says_of_an_ill_conditioned_system_is_true(rtol, exponent):
    eigenvalues = torch.logspace(-exponent, 0, 40, dtype=FLOAT64)
    A, b = definite(eigenvalues), sampled(40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, info = CG(rtol=rtol).prepare(A).solve(b)
    true = true_residual(A, b, x)
    # With |A| = 1, b - A x is known up to eps |x|: what measuring it twice may differ by.
    rounding = 2.2e-16 * float(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(b))
    assert info.residual == pytest.approx(true, rel=1e-9, abs=5 * rounding)
    assert info.converged == (info.residual <= rtol)
    assert bool(caught) != info.converged
    assert info.iterations <= 400


def test_an_ill_conditioned_system_is_solved_where_that_is_possible():
    """Condition 1e6, residual 1e-9: within reach of rounding, after more than n iterations."""
    A, b = definite(torch.logspace(-6, 0, 40, dtype=FLOAT64)), sampled(40)
    _, info = CG(rtol=1e-9, maxiter=2000, strict=True).prepare(A).solve(b)
    assert info.iterations > 40


class TestIndefinite:
    @pytest.mark.parametrize(
        ("values", "b"),
        [
            ([1.0, -1.0], [1.0, 1.0]),  # <p, A p> = 0 at once
            ([1.0, 2.0, -3.0], [1.0, 1.0, 0.5]),  # found later
            ([-1.0, -2.0], [1.0, 0.0]),
            ([1.0, 0.0], [0.0, 1.0]),  # singular, b in the null space
        ],
    )
    def test_is_found_out(self, values, b):
        A = ops.Diagonal(torch.tensor(values, dtype=FLOAT64))
        b = torch.tensor(b, dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match=r"indefinite.*not positive definite"):
            x, info = CG().prepare(A).solve(b)
        assert info.status == "indefinite"
        assert not info.converged
        assert torch.isfinite(x).all()
        assert info.residual == pytest.approx(true_residual(A, b, x), rel=1e-12)

    def test_strict_raises(self):
        A = ops.Diagonal(torch.tensor([1.0, -1.0]))
        with pytest.raises(NotConvergedError, match="indefinite") as error:
            CG(strict=True).prepare(A).solve(torch.ones(2))
        assert error.value.info.status == "indefinite"

    def test_a_saddle_of_a_hessian(self):
        A = ops.Hessian(lambda y: y[0] ** 2 - y[1] ** 2, torch.zeros(2, dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match="indefinite"):
            CG().prepare(A).solve(torch.ones(2, dtype=FLOAT64))

    def test_spoils_no_other_column(self):
        A = ops.Diagonal(torch.tensor([1.0, 2.0, -1.0], dtype=FLOAT64))
        block = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match="indefinite"):
            x, _ = CG(rtol=1e-12).prepare(A).solve(block)
        torch.testing.assert_close(x[:, 0], torch.tensor([1.0, 0.5, 0.0], dtype=FLOAT64))
        assert torch.isfinite(x).all()

    def test_a_product_that_is_nan_is_not_an_answer(self):
        A = ops.Diagonal(torch.tensor([1.0, float("nan")], dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning):
            _, info = CG().prepare(A).solve(torch.ones(2, dtype=FLOAT64))
        assert not info.converged


class TestIterationLimit:
    A = definite(torch.logspace(-4, 0, 30, dtype=FLOAT64))
    b = sampled(30, seed=1)

    def test_is_flagged(self):
        with pytest.warns(ConvergenceWarning, match=r"CG on Dense.*maxiter after 5 iterations"):
            x, info = CG(maxiter=5).prepare(self.A).solve(self.b)
        assert info.status == "maxiter"
        assert not info.converged
        assert info.iterations == 5
        assert info.residual == pytest.approx(true_residual(self.A, self.b, x), rel=1e-12)
        assert f"{info.residual:.3g}" in info.reason

    def test_strict_raises(self):
        with pytest.raises(NotConvergedError, match="maxiter after 5 iterations") as error:
            CG(maxiter=5, strict=True).prepare(self.A).solve(self.b)
        assert error.value.info.iterations == 5

    def test_truncation_as_the_method_is_silent_but_not_converged(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x, info = CG(maxiter=5, stop_at_maxiter=True).prepare(self.A).solve(self.b)
        assert not info.converged
        assert info.status == "maxiter"
        assert info.residual == pytest.approx(true_residual(self.A, self.b, x), rel=1e-12)

    def test_truncation_does_not_silence_other_failures(self):
        A = ops.Diagonal(torch.tensor([1.0, -1.0]))
        with pytest.warns(ConvergenceWarning, match="indefinite"):
            CG(maxiter=5, stop_at_maxiter=True).prepare(A).solve(torch.ones(2))

    def test_converged_at_the_last_iteration_is_converged(self):
        A = ops.Diagonal(torch.tensor([1.0, 2.0, 5.0], dtype=FLOAT64))
        _, info = CG(rtol=1e-12, maxiter=3, strict=True).prepare(A).solve(torch.ones(3).double())
        assert info.iterations == 3

    def test_truncated_iterates_are_those_of_the_full_run(self):
        """As the textbook has it, written out."""
        x, r = torch.zeros(30, dtype=FLOAT64), self.b
        p = r
        for k in range(1, 11):
            step = (r @ r) / (p @ (self.A @ p))
            x, previous, r = x + step * p, r, r - step * (self.A @ p)
            p = r + (r @ r) / (previous @ previous) * p
            torch.testing.assert_close(truncated(self.A, self.b, k), x, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"maxiter": 0}, r"maxiter=0; expected at least 1"),
            ({"stop_at_maxiter": True}, r"stop_at_maxiter needs a maxiter"),
            ({"maxiter": 3, "stop_at_maxiter": True, "strict": True}, r"excludes strict"),
        ],
    )
    def test_settings_that_contradict(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CG(**settings)


def test_refuses_what_does_not_claim_symmetry():
    with pytest.raises(StructureError, match=r"CG needs a symmetric operator; Dense\(2, 2\)"):
        CG().prepare(ops.Dense(torch.eye(2)))
    jacobian = ops.Jacobian(torch.sin, torch.zeros(2))
    with pytest.raises(StructureError, match="claim it, or use GMRES"):
        CG().prepare(jacobian)


class TestBlocks:
    def test_each_column_converges_by_itself(self):
        """An eigenvector is done after one iteration and must then stay as it is."""
        values = torch.linspace(1, 100, 25, dtype=FLOAT64)
        A = ops.Diagonal(values)
        eigenvector = torch.zeros(25, dtype=FLOAT64)
        eigenvector[3] = 2.0
        hard = sampled(25)
        block = torch.stack([eigenvector, hard, torch.zeros(25).double()], dim=1)
        x, info = CG(rtol=1e-10).prepare(A).solve(block)
        torch.testing.assert_close(x[:, 0], eigenvector / values, rtol=1e-15, atol=0)
        assert not x[:, 2].any()
        single = CG(rtol=1e-10).prepare(A).solve(hard)
        assert info.iterations == single.info.iterations > 20
        torch.testing.assert_close(x[:, 1], single.value, rtol=1e-12, atol=1e-14)

    def test_columns_of_any_scale_meet_the_tolerance_each(self):
        A = definite(torch.linspace(1, 50, 20, dtype=FLOAT64))
        block = sampled(20, 3) * torch.tensor([1e-200, 1.0, 1e200], dtype=FLOAT64)
        x, _ = CG(rtol=1e-9, strict=True).prepare(A).solve(block)
        scale = block.abs().amax(0)  # |b|^2 itself is not representable
        for k in range(3):
            assert true_residual(A, block[:, k] / scale[k], x[:, k] / scale[k]) <= 1.01e-9

    def test_counts_products(self):
        A = ops.Diagonal(torch.tensor([1.0, 2.0, 5.0], dtype=FLOAT64))
        one = CG(rtol=1e-12).prepare(A).solve(torch.ones(3, dtype=FLOAT64)).info
        assert one.products == 3 + 1  # three iterations, and the residual
        two = CG(rtol=1e-12).prepare(A).solve(torch.ones(3, 2, dtype=FLOAT64)).info
        assert two.products == 2 * (3 + 1)


def test_float32_reaches_the_accuracy_of_float32():
    matrix = spd(torch.linspace(1, 10, 30, dtype=FLOAT64))
    A, b = ops.Dense(matrix.float(), symmetric=True), sampled(30).float()
    x, info = CG(rtol=1e-6, strict=True).prepare(A).solve(b)
    assert x.dtype == torch.float32
    expected = torch.linalg.solve(matrix, b.double())
    assert torch.linalg.vector_norm(x - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert info.converged


@pytest.mark.parametrize("solver", [CG(), solvers.Neumann(step_size=0.1)])
def test_products_that_are_not_finite_are_not_called_indefinite(solver):
    A = ops.Dense(torch.full((2, 2), math.nan, dtype=torch.float64), symmetric=True)
    with pytest.warns(solvers.ConvergenceWarning, match="not finite"):
        info = solver.prepare(A).solve(torch.ones(2, dtype=torch.float64)).info
    assert not info.converged
    with pytest.raises(ValueError, match="not finite"):
        solvers.Neumann().prepare(A)


class Counted(ops.LinearOperator):
    """An operator that counts the columns that it multiplies."""

    def __init__(self, A: ops.LinearOperator) -> None:
        super().__init__(A.domain, A.codomain, A.structure)
        self.A, self.columns = A, 0

    def _matvec(self, v: Tensor) -> Tensor:
        self.columns += 1
        return self.A._matvec(v)

    def _matmat(self, block: Tensor) -> Tensor:
        self.columns += block.shape[1]
        return self.A._matmat(block)


class TestPreconditioned:
    A = definite(torch.logspace(0, 4, 60, dtype=FLOAT64))
    b = sampled(60, 3, seed=5)

    def close_inverse(self, error: float = 0.1) -> ops.Dense:
        """``C M C`` with ``C = A^(-1/2)`` and M near the identity, whose eigenvalues P A has."""
        values, basis = torch.linalg.eigh(self.A.matrix)
        C = basis @ torch.diag(values**-0.5) @ basis.T
        P = C @ spd(torch.linspace(1, 1 + error, 60, dtype=FLOAT64), 3) @ C
        return ops.Dense((P + P.T) / 2, positive_definite=True)

    def test_iterates_are_those_of_the_symmetric_preconditioned_system(self):
        """CG on ``L^T A L y = L^T b`` with ``P = L L^T``, ``x = L y``."""
        P = self.close_inverse(0.5)
        L = torch.linalg.cholesky(P.matrix)
        inner = L.T @ self.A.matrix @ L
        inner = ops.Dense((inner + inner.T) / 2, symmetric=True)
        b = self.b[:, 0]
        for k in (1, 2, 5):
            solver = CG(rtol=0.0, maxiter=k, stop_at_maxiter=True, preconditioner=P)
            x = solver.prepare(self.A).solve(b).value
            y = truncated(inner, L.T @ b, k)
            torch.testing.assert_close(x, L @ y, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("flexible", [False, True])
    @pytest.mark.parametrize("columns", [1, 3])
    def test_fewer_iterations_to_the_same_solution(self, flexible, columns):
        b = self.b[:, :columns]
        plain = CG(rtol=1e-10, strict=True).prepare(self.A).solve(b)
        solver = CG(rtol=1e-10, strict=True, preconditioner=self.close_inverse(), flexible=flexible)
        x, info = solver.prepare(self.A).solve(b)
        assert info.iterations < 10 < 60 < plain.info.iterations
        expected = torch.linalg.solve(self.A.matrix, b)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)

    def test_flexible_makes_the_same_iterates_where_the_preconditioner_is_fixed(self):
        settings = {"rtol": 0.0, "maxiter": 6, "stop_at_maxiter": True}
        P = self.close_inverse(0.5)
        plain = CG(**settings, preconditioner=P).prepare(self.A).solve(self.b).value
        flexible = CG(**settings, preconditioner=P, flexible=True).prepare(self.A).solve(self.b)
        torch.testing.assert_close(flexible.value, plain, rtol=1e-8, atol=1e-11)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_a_preconditioner_that_varies_wants_flexible(self, columns):
        """Good ones in turn: the usual formula loses conjugacy, the flexible one does not.

        A function may be such, and is dealt with so unasked; an operator is taken to be fixed.
        """
        A = ops.Diagonal(torch.linspace(1, 100, 100, dtype=FLOAT64))
        b = sampled(100, columns, seed=7)

        class Varying(ops.LinearOperator):
            calls = 0

            def _matvec(self, v: Tensor) -> Tensor:
                self.calls += 1
                return v / A.values * (1.0 + (torch.arange(100) + self.calls) % 4)

        def iterations(as_operator: bool, **settings: bool) -> int:
            P = Varying(A.domain, A.domain, ops.Structure(symmetric=True))
            choice = P if as_operator else P._matvec
            solver = CG(rtol=1e-9, strict=True, preconditioner=choice, **settings)
            return solver.prepare(A).solve(b).info.iterations

        fixed, flexible = iterations(True), iterations(True, flexible=True)
        assert 1.2 * flexible < fixed
        assert iterations(False) == flexible

    def test_an_inner_iteration_is_a_preconditioner(self):
        solver = CG(rtol=1e-10, strict=True, preconditioner=CG(rtol=0.1), flexible=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x, info = solver.prepare(self.A).solve(self.b)
        assert info.iterations < 30
        torch.testing.assert_close(self.A @ x, self.b, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_one_product_with_each_an_iteration_and_none_too_many(self, columns):
        A, P = Counted(self.A), Counted(self.close_inverse())
        _, info = CG(rtol=1e-10, preconditioner=P).prepare(A).solve(self.b[:, :columns])
        assert P.columns == columns * info.iterations
        assert A.columns == info.products == columns * (info.iterations + 1)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_a_preconditioner_that_is_not_definite_is_found_out(self, columns):
        P = ops.Diagonal(torch.linspace(-1, 1, 60, dtype=FLOAT64))
        with pytest.warns(ConvergenceWarning, match=r"<r, P r> <= 0: the preconditioner is not"):
            x, info = CG(preconditioner=P).prepare(self.A).solve(self.b[:, :columns])
        assert info.status == "indefinite"
        assert torch.isfinite(x).all()

    @pytest.mark.parametrize("columns", [1, 3])
    def test_a_preconditioner_that_is_nan_is_not_called_indefinite(self, columns):
        solver = CG(preconditioner=lambda v: v * math.nan)
        with pytest.warns(ConvergenceWarning, match="not finite"):
            x, info = solver.prepare(self.A).solve(self.b[:, :columns])
        assert info.status == "breakdown"
        assert not x.any()

    def test_the_tolerance_is_on_the_true_residual_not_the_preconditioned_one(self):
        """P blows the small residuals up by 1e8, and the large ones down."""
        P = ops.Diagonal(torch.logspace(-8, 8, 60, dtype=FLOAT64))
        solver = CG(rtol=1e-6, maxiter=10_000, strict=True, preconditioner=P)
        A = definite(torch.linspace(1, 2, 60).double())
        info = solver.prepare(A).solve(self.b[:, 0]).info
        assert info.residual <= 1e-6


@pytest.mark.parametrize("columns", [1, 3])
def test_a_singular_operator_and_a_right_hand_side_out_of_its_range(columns):
    """The residual grows without bound, and with rounding the curvature stays positive."""
    A = ops.Diagonal(torch.tensor([1.0, 2.0, 0.0], dtype=FLOAT64))
    with pytest.warns(ConvergenceWarning, match=r"diverged.*not in its range"):
        x, info = CG().prepare(A).solve(torch.ones(3, columns, dtype=FLOAT64))
    assert info.status == "diverged"
    assert torch.isfinite(x).all()
    inside = torch.tensor([1.0, 1.0, 0.0], dtype=FLOAT64)
    torch.testing.assert_close(
        CG(strict=True).prepare(A).solve(inside).value, inside / A.values.clamp(min=1)
    )


def test_a_vector_and_a_block_go_the_same_way():
    A, b = definite(torch.logspace(0, 2, 50, dtype=FLOAT64)), sampled(50, seed=8)
    for k in (1, 3, 20, 70):
        single = truncated(A, b, k)
        double = truncated(A, torch.stack([b, sampled(50)], 1), k)[:, 0]
        torch.testing.assert_close(double, single, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30])
def test_a_tiny_cotangent_gets_a_gradient(scale):
    """Stopping rules on ``|r|^2`` return zero for it (jax 40254)."""
    A, b = spd(torch.linspace(1, 9, 12, dtype=FLOAT64)), sampled(12)
    gradient = torch.func.grad(lambda b: scale * solvers.solve(A, b, solver=CG(rtol=1e-12)).sum())(
        b
    )
    expected = torch.linalg.solve(A, torch.ones(12, dtype=FLOAT64))
    torch.testing.assert_close(gradient / scale, expected, rtol=1e-10, atol=0)


def test_a_system_of_size_one_and_one_of_size_zero():
    """Scalars (torchopt 222) and nothing at all."""
    x = solvers.solve(torch.tensor([[4.0]]), torch.tensor(2.0), solver=CG())
    assert x.shape == ()
    assert float(x) == 0.5
    x = solvers.solve(torch.zeros(0, 0), torch.zeros(0), solver=CG())
    assert x.shape == (0,)


def test_a_batch_of_systems_converges_one_by_one():
    """Members are columns of one block: an easy one waits for a hard one, unchanged."""
    easy, hard = torch.eye(30, dtype=FLOAT64), spd(torch.logspace(0, 3, 30, dtype=FLOAT64))
    b = sampled(2, 30)
    stack = ops.Stacked([ops.Dense(M, symmetric=True) for M in (2 * easy, hard)])
    x, info = CG(rtol=1e-10).prepare(stack).solve(b.reshape(-1))
    x = x.reshape(2, 30)
    assert info.converged
    torch.testing.assert_close(x[0], b[0] / 2, rtol=1e-15, atol=0)
    torch.testing.assert_close(hard @ x[1], b[1], rtol=0, atol=1e-9)
