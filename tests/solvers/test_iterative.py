"""Preconditioners that grow old, and guesses to start from."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator
from solvers import CG, ConvergenceWarning, DenseLU, Neumann, NotConvergedError
from solvers.iterative import FEW, varies
from solvers.krylov.bicgstab import BiCGStab
from solvers.krylov.gmres import GMRES
from solvers.krylov.lsmr import LSMR
from solvers.krylov.minres import MINRES
from solvers.preconditioner import Preconditioner, as_preconditioner

FLOAT64 = torch.float64
N = 60


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def system(drift: float) -> ops.Dense:
    """Not symmetric; far from the one at drift 0 by that much."""
    D = torch.diag(torch.logspace(0, 3, N, dtype=FLOAT64))
    E = torch.diag(torch.logspace(3, 0, N, dtype=FLOAT64))
    return ops.Dense(D + 0.3 * sampled(N, N, seed=1) + drift * E)


@dataclass(frozen=True, kw_only=True)
class Counting(Preconditioner):
    """The inverse of A with an error that makes a solve take a few iterations."""

    made: list[LinearOperator] = field(default_factory=list, compare=False)
    error: float = 0.3

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        self.made.append(A)
        M = A.to_dense()
        near = torch.eye(N, dtype=FLOAT64) + self.error * sampled(N, N, seed=2) / N**0.5
        return ops.Dense(torch.linalg.inv(M) @ near)


def solver(P: Preconditioner, **settings) -> GMRES:
    return GMRES(**{"rtol": 1e-10, "restart": N, "preconditioner": P, **settings})


class TestUpdate:
    b = sampled(N, seed=3)

    def test_a_small_change_keeps_the_preconditioner(self):
        P = Counting()
        prepared = solver(P, strict=True).prepare(system(0.0))
        fresh = prepared.solve(self.b).info
        updated = prepared.update(system(0.01))
        x, info = updated.solve(self.b)
        assert len(P.made) == 1
        assert fresh.iterations <= info.iterations <= 2 * fresh.iterations
        assert not info.refreshed
        torch.testing.assert_close(system(0.01) @ x, self.b, rtol=0, atol=1e-7)

    def test_more_than_twice_the_iterations_make_it_anew_for_the_next_solve(self):
        P = Counting()
        prepared = solver(P, strict=True).prepare(system(0.0))
        fresh = prepared.solve(self.b).info.iterations
        updated = prepared.update(system(30.0))
        slow = updated.solve(self.b).info
        assert slow.iterations > 2 * fresh > FEW
        assert slow.converged
        assert not slow.refreshed
        assert len(P.made) == 1
        quick = updated.solve(self.b).info
        assert quick.refreshed
        assert P.made[1] is updated.A
        assert quick.iterations <= 1.2 * fresh
        again = updated.solve(self.b).info
        assert not again.refreshed
        assert len(P.made) == 2
        # The first object is as it was.
        assert prepared.solve(self.b).info.iterations == fresh
        assert len(P.made) == 2

    def test_where_it_is_due_an_update_makes_it_for_the_newer_operator(self):
        P = Counting()
        prepared = solver(P).prepare(system(0.0))
        prepared.solve(self.b)
        slow = prepared.update(system(30.0))
        slow.solve(self.b)
        later = slow.update(system(40.0))
        assert len(P.made) == 1
        info = later.solve(self.b).info
        assert info.refreshed
        assert len(P.made) == 2
        assert P.made[1] is later.A

    def test_an_unconverged_solve_is_repeated_with_a_fresh_one(self):
        P = Counting()
        prepared = solver(P, maxiter=25).prepare(system(0.0))
        fresh = prepared.solve(self.b).info
        updated = prepared.update(system(300.0))
        # A warning would fail: what is returned did converge.
        x, info = updated.solve(self.b)
        assert info.converged
        assert info.refreshed
        assert info.iterations <= 1.2 * fresh.iterations
        assert info.products > 25  # those of the first attempt count
        assert len(P.made) == 2
        torch.testing.assert_close(system(300.0) @ x, self.b, rtol=0, atol=1e-7)

    def test_one_that_fails_with_a_fresh_one_too_is_not_repeated_again(self):
        P = Counting(error=3.0)
        prepared = solver(P, maxiter=5).prepare(system(0.0))
        with pytest.warns(ConvergenceWarning, match="maxiter"):
            prepared.solve(self.b)
        updated = prepared.update(system(1.0))
        with pytest.warns(ConvergenceWarning, match="maxiter after 5"):
            info = updated.solve(self.b).info
        assert info.refreshed
        assert not info.converged
        assert len(P.made) == 2
        with pytest.raises(NotConvergedError):
            solver(P, maxiter=5, strict=True).prepare(system(0.0)).update(system(1.0)).solve(self.b)

    def test_a_truncated_solve_is_not_repeated_and_is_judged_by_its_pace(self):
        P = Counting()
        prepared = solver(P, maxiter=6, stop_at_maxiter=True).prepare(system(0.0))
        prepared.solve(self.b)
        near = prepared.update(system(1e-4))
        assert not near.solve(self.b).info.refreshed
        assert not near.solve(self.b).info.refreshed
        far = prepared.update(system(300.0))
        assert not far.solve(self.b).info.refreshed
        assert len(P.made) == 1
        assert far.solve(self.b).info.refreshed

    def test_the_pace_survives_a_chain_of_updates(self):
        """Ten small steps, each solved within twice the iterations, add up to a large one."""
        P = Counting()
        prepared = solver(P, strict=True).prepare(system(0.0))
        fresh = prepared.solve(self.b).info.iterations
        counts = []
        for k in range(1, 31):
            prepared = prepared.update(system(1.0 * k))
            info = prepared.solve(self.b).info
            counts.append(info.iterations)
            assert info.converged
        assert 2 <= len(P.made) <= 6
        # Never much above twice: what is slow once is made anew for the next.
        assert sum(count > 2 * fresh for count in counts) == len(P.made) - 1
        assert max(counts) <= 3 * fresh

    def test_updates_without_a_solve_in_between(self):
        P = Counting()
        prepared = solver(P).prepare(system(0.0))
        fresh = prepared.solve(self.b).info.iterations
        for k in range(3):
            prepared = prepared.update(system(0.01 * k))
        assert prepared.solve(self.b).info.iterations <= 2 * fresh
        assert len(P.made) == 1

    def test_a_solve_of_zero_says_nothing_of_the_pace(self):
        P = Counting()
        prepared = solver(P).prepare(system(0.0))
        prepared.solve(0 * self.b)
        updated = prepared.update(system(0.01))
        updated.solve(self.b)
        assert not updated.solve(self.b).info.refreshed
        assert len(P.made) == 1

    def test_neither_does_a_guess(self):
        """One digit takes a tenth of the iterations of ten, and is not ten times as quick."""
        P = Counting()
        prepared = solver(P).prepare(system(0.0))
        x = torch.linalg.solve(system(0.0).matrix, self.b)
        near = x + 1e-9 * torch.linalg.vector_norm(x) * sampled(N, seed=5)
        few = prepared.solve(self.b, guess=near).info.iterations
        updated = prepared.update(system(0.0))
        full = updated.solve(self.b).info
        assert full.iterations > 2 * few
        assert not updated.solve(self.b).info.refreshed
        assert len(P.made) == 1

    def test_so_few_iterations_are_not_worth_it(self):
        """A factorisation is exact: one iteration. After a small change it takes three."""
        prepared = GMRES(rtol=1e-10, preconditioner=DenseLU()).prepare(system(0.0))
        assert prepared.solve(self.b).info.iterations == 1
        updated = prepared.update(ops.Dense(system(0.0).matrix * (1 + 1e-3 * sampled(N, N))))
        info = updated.solve(self.b).info
        assert 2 < info.iterations <= FEW
        assert not updated.solve(self.b).info.refreshed

    def test_transposed_solves_use_the_transposed_preconditioner_stale_and_fresh(self):
        P = Counting()
        prepared = solver(P, strict=True).prepare(system(0.0))
        fresh = prepared.solve_transpose(self.b).info.iterations
        updated = prepared.update(system(0.01))
        x, info = updated.solve_transpose(self.b)
        assert info.iterations <= 2 * fresh
        assert len(P.made) == 1
        torch.testing.assert_close(system(0.01).matrix.T @ x, self.b, rtol=0, atol=1e-7)
        far = updated.update(system(30.0))
        slow = far.solve_transpose(self.b).info
        assert slow.iterations > 2 * fresh
        x, info = far.solve_transpose(self.b)
        assert info.refreshed
        assert info.iterations <= 1.2 * fresh
        torch.testing.assert_close(system(30.0).matrix.T @ x, self.b, rtol=0, atol=1e-6)
        assert not far.solve(self.b).info.refreshed
        assert len(P.made) == 2

    @pytest.mark.parametrize("kind", ["operator", "prepared", "function"])
    def test_what_was_not_made_from_settings_stays(self, kind):
        """It cannot be made anew: no solve is repeated in vain."""
        inverse = torch.linalg.inv(system(0.0).matrix)
        P = {
            "operator": ops.Dense(inverse),
            "prepared": DenseLU().prepare(system(0.0)),
            "function": lambda v: inverse @ v,
        }[kind]
        prepared = GMRES(rtol=1e-10, maxiter=10, preconditioner=P).prepare(system(0.0))
        assert prepared.solve(self.b).info.iterations == 1
        updated = prepared.update(system(30.0))
        with pytest.warns(ConvergenceWarning, match="maxiter after 10"):
            info = updated.solve(self.b).info
        assert not info.refreshed
        assert info.products < 20

    def test_without_a_preconditioner_there_is_nothing_to_keep(self):
        updated = GMRES(rtol=1e-8, restart=N).prepare(system(0.0)).update(system(1.0))
        assert not updated.solve(self.b).info.refreshed

    def test_members_of_a_batch_are_judged_one_by_one(self):
        P = Counting()
        first = ops.Stacked([system(0.0), system(0.0)])
        prepared = solver(P).prepare(first)
        b = self.b.repeat(2)
        prepared.solve(b)
        assert len(P.made) == 2
        updated = prepared.update(ops.Stacked([system(0.01), system(30.0)]))
        updated.solve(b)
        assert len(P.made) == 2
        info = updated.solve(b).info
        assert info.refreshed
        assert len(P.made) == 3  # that of the second alone

    def test_the_gradient_is_that_of_the_updated_operator(self):
        P = Counting()
        M = system(0.01).matrix.requires_grad_()
        prepared = solver(P, rtol=1e-12).prepare(system(0.0))
        prepared.solve(self.b)
        updated = prepared.update(ops.Dense(M))
        updated.solve(self.b).value.square().sum().backward()
        expected = torch.func.grad(lambda M: torch.linalg.solve(M, self.b).square().sum())(
            M.detach()
        )
        torch.testing.assert_close(M.grad, expected, rtol=1e-7, atol=1e-9)
        assert len(P.made) == 1

    def test_info_of_the_preconditioner_is_that_of_the_fresh_one(self):
        @dataclass(frozen=True, kw_only=True)
        class Numbered(Counting):
            def _prepare(self, A: LinearOperator) -> LinearOperator:
                P = super()._prepare(A)
                P.operator_complexity = float(len(self.made))
                return P

        prepared = solver(Numbered()).prepare(system(0.0))
        assert prepared.solve(self.b).info.operator_complexity == 1.0
        updated = prepared.update(system(30.0))
        assert updated.solve(self.b).info.operator_complexity == 1.0
        assert updated.solve(self.b).info.operator_complexity == 2.0


def test_what_varies():
    A = system(0.0)
    assert not varies(None)
    assert not varies(ops.Identity(N, FLOAT64))
    assert not varies(as_preconditioner(DenseLU(), A))
    for choice in (GMRES(), GMRES().prepare(A), lambda v: v):
        P = as_preconditioner(choice, A)
        assert varies(P)
        assert varies(2.0 * P)


ITERATIONS = {
    "CG": CG(rtol=1e-9),
    "MINRES": MINRES(rtol=1e-9),
    "GMRES": GMRES(rtol=1e-9),
    "BiCGStab": BiCGStab(rtol=1e-9),
    "Neumann": Neumann(rtol=1e-9, maxiter=5000),
}


class TestGuess:
    """An iteration starts from a guess; others do not look at it."""

    M = torch.diag(torch.linspace(1, 20, 30, dtype=FLOAT64)) + 0.1 * torch.ones(30, 30).double()
    A = ops.Dense(M, positive_definite=True)
    b = sampled(30, 3, seed=1)
    x = torch.linalg.solve(M, b)

    @pytest.mark.parametrize("name", ITERATIONS)
    @pytest.mark.parametrize("columns", [1, 3])
    def test_a_good_one_saves_iterations(self, name, columns):
        prepared = ITERATIONS[name].prepare(self.A)
        b, x = self.b[:, :columns], self.x[:, :columns]
        cold = prepared.solve(b).info
        near = x + 1e-5 * sampled(30, columns, seed=2)
        warm = prepared.solve(b, guess=near)
        assert warm.info.iterations < 0.75 * cold.iterations
        torch.testing.assert_close(warm.value, x, rtol=0, atol=1e-7)
        assert warm.info.residual <= 1e-9
        back = prepared.solve_transpose(b, guess=near)
        assert back.info.iterations < 0.75 * cold.iterations

    @pytest.mark.parametrize("name", ITERATIONS)
    def test_the_solution_itself_takes_none(self, name):
        x, info = ITERATIONS[name].prepare(self.A).solve(self.b, guess=self.x)
        assert info.iterations == 0
        assert info.products <= 2 * 3
        torch.testing.assert_close(x, self.x, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("bad", [1e6, 1e300])
    def test_a_bad_one_does_no_harm(self, bad):
        prepared = CG(rtol=1e-9).prepare(self.A)
        cold = prepared.solve(self.b)
        guess = self.x.clone()
        guess[:, 1] *= bad
        x, info = prepared.solve(self.b, guess=guess)
        assert info.iterations == prepared.solve(self.b[:, 1]).info.iterations
        torch.testing.assert_close(x, cold.value, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
    def test_is_scaled_with_the_right_hand_side(self, scale):
        prepared = CG(rtol=1e-9).prepare(self.A)
        guess = scale * (self.x + 1e-5 * sampled(30, 3, seed=2))
        warm = prepared.solve(scale * self.b, guess=guess)
        assert warm.info.iterations < prepared.solve(self.b).info.iterations
        torch.testing.assert_close(warm.value / scale, self.x, rtol=1e-6, atol=1e-8)

    def test_one_vector_serves_all_columns(self):
        b = self.b[:, :1] + 1e-4 * self.b
        info = CG(rtol=1e-9).prepare(self.A).solve(b, guess=self.x[:, 0]).info
        assert info.iterations < CG(rtol=1e-9).prepare(self.A).solve(b).info.iterations

    def test_nested_structures(self):
        A = ops.Hessian(
            lambda y: (y["a"] ** 2).sum() * 2 + (y["b"] ** 4).sum(),
            {"a": torch.ones(2).double(), "b": torch.ones(1, 2).double()},
        )
        b = {"a": torch.ones(2).double(), "b": torch.ones(1, 2).double()}
        prepared = CG(rtol=1e-12).prepare(A)
        x, info = prepared.solve(b)
        assert info.iterations > 0
        assert prepared.solve(b, guess=x).info.iterations == 0

    def test_a_batch(self):
        stack = ops.Stacked([self.A, ops.Dense(2 * self.M, positive_definite=True)])
        b = torch.cat([self.b, self.b])
        x = torch.cat([self.x, self.x / 2])
        for guess, rhs in ((x, b), (x[:, 0], b[:, 0]), (x[:, 0], b[:, :1].expand(-1, 2))):
            assert CG().prepare(stack).solve(rhs, guess=guess).info.iterations == 0

    def test_derivatives_are_those_without(self):
        M = self.M.clone().requires_grad_()
        b = self.b[:, 0].clone().requires_grad_()
        start = self.x[:, 0].clone().requires_grad_()
        prepared = CG(rtol=1e-12).prepare(ops.Dense((M + M.T) / 2, symmetric=True))
        x, info = prepared.solve(b, guess=start)
        assert info.iterations == 0
        x.square().sum().backward()
        expected = torch.func.grad(
            lambda M, b: torch.linalg.solve((M + M.T) / 2, b).square().sum(), (0, 1)
        )(self.M, self.b[:, 0])
        torch.testing.assert_close(M.grad, expected[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b.grad, expected[1], rtol=1e-9, atol=1e-10)
        assert start.grad is None

    def test_under_torch_func(self):
        prepared = CG(rtol=1e-12).prepare(self.A)
        inverse = torch.linalg.inv(self.M)

        def solved(b: Tensor, guess: Tensor) -> Tensor:
            return prepared.solve(b, guess=guess).value

        b, x = self.b[:, 0], self.x[:, 0]
        gradient = torch.func.grad(lambda b: solved(b, x).sum())(b)
        torch.testing.assert_close(gradient, inverse.sum(0), rtol=1e-9, atol=1e-10)
        nothing = torch.func.grad(lambda guess: solved(b, guess).sum())(x)
        assert not nothing.any()
        for in_dims in ((1, None), (1, 1)):
            guess = x if in_dims[1] is None else self.x
            values = torch.func.vmap(solved, in_dims)(self.b, guess)
            torch.testing.assert_close(values.T, self.x, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("solver", [DenseLU(), LSMR(rtol=1e-9), solvers.DenseCholesky()])
    def test_others_do_not_look_at_it(self, solver):
        prepared = solver.prepare(self.A)
        x, info = prepared.solve(self.b)
        same = prepared.solve(self.b, guess=torch.full_like(x, float("nan")))
        assert torch.equal(same.value, x)
        assert same.info == info

    def test_what_does_not_fit(self):
        prepared = CG().prepare(self.A)
        with pytest.raises(ValueError, match=r"guess has shape \(29,\); expected \(30,\)"):
            prepared.solve(self.b, guess=torch.zeros(29, dtype=FLOAT64))
        with pytest.raises(ValueError, match=r"guess has 2 columns for 3 of b"):
            prepared.solve(self.b, guess=self.x[:, :2])
        with pytest.raises(TypeError, match=r"guess is torch.float32 on cpu"):
            prepared.solve(self.b, guess=self.x.float())
        with pytest.raises(ValueError, match=r"guess holds 90 NaN or infinite entries"):
            prepared.solve(self.b, guess=self.x / 0.0)

    def test_a_stationary_iteration_goes_on_where_it_was(self):
        """Twice five terms of a Neumann series are ten and one more."""
        settings = {"step_size": 0.04, "stop_at_maxiter": True}
        five = Neumann(maxiter=5, **settings).prepare(self.A)
        eleven = Neumann(maxiter=11, **settings).prepare(self.A)
        once = five.solve(self.b).value
        twice = five.solve(self.b, guess=once).value
        torch.testing.assert_close(twice, eleven.solve(self.b).value, rtol=1e-12, atol=0)
