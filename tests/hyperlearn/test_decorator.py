"""`hl.implicit`: solvers of the user's, against closed forms and central differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hyperlearn as hl
from hyperlearn import operators as ops
from hyperlearn import solvers

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


M = drawn(4, 4) / 4 + 2 * torch.eye(4)  # not symmetric
POINT = drawn(4)


def F(y: Tensor, x: Tensor) -> Tensor:
    return M @ y + x * torch.tanh(y) - 1


def newton(x: Tensor, steps: int = 60) -> Tensor:
    y = torch.zeros(4, dtype=torch.float64)
    for _ in range(steps):
        y = y - torch.linalg.solve(torch.func.jacrev(F)(y, x), F(y, x))
    return y


def exact(x: Tensor) -> Tensor:
    y = newton(x)
    return -torch.linalg.solve(torch.func.jacrev(F)(y, x), torch.func.jacrev(F, 1)(y, x))


class TestKinds:
    def test_residual_in_every_mode(self):
        solver = hl.implicit(residual=F)(newton)
        expected = exact(POINT)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(solver)(POINT), expected, rtol=1e-10, atol=1e-12)
        x = POINT.clone().requires_grad_()
        weight = drawn(4)
        solver(x).backward(weight)
        torch.testing.assert_close(x.grad, expected.T @ weight, rtol=1e-10, atol=1e-12)

    def test_gradcheck_and_gradgradcheck(self):
        solver = hl.implicit(residual=F)(newton)
        x = POINT.clone().requires_grad_()
        assert torch.autograd.gradcheck(solver, (x,), atol=1e-7)
        assert torch.autograd.gradgradcheck(solver, (x,), atol=1e-6)

    def test_loss_and_fixed_point(self):
        A = M @ M.T

        @hl.implicit(loss=lambda y, b: y @ A @ y / 2 - b @ y)
        def minimiser(b: Tensor) -> Tensor:
            return torch.linalg.solve(A, b)

        @hl.implicit(fixed_point=lambda y, b: y - (A @ y - b) / 20)
        def limit(b: Tensor) -> Tensor:
            return torch.linalg.solve(A, b)

        for solver in (minimiser, limit):
            torch.testing.assert_close(torch.func.jacrev(solver)(POINT), torch.linalg.inv(A))

    def test_several_arguments_and_nested_results(self):
        @hl.implicit(residual=lambda y, a, b: {"p": y["p"] - a * b["u"], "q": y["q"] ** 2 - a})
        def pair(a: Tensor, b: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"p": a * b["u"], "q": a.sqrt()}

        a, b = torch.tensor(4.0).double(), {"u": torch.tensor([1.0, 2.0]).double()}
        by_a = torch.func.jacrev(pair)(a, b)
        torch.testing.assert_close(by_a["p"], b["u"])
        torch.testing.assert_close(by_a["q"], torch.tensor(0.25).double())
        by_b = torch.func.jacrev(pair, argnums=1)(a, b)
        torch.testing.assert_close(by_b["p"]["u"], 4 * torch.eye(2).double())

    def test_vmap_calls_the_solver_for_each_member(self):
        calls = []

        @hl.implicit(residual=F)
        def counted(x: Tensor) -> Tensor:
            assert x.shape == (4,)
            calls.append(1)
            return newton(x)

        X = drawn(3, 4)
        found = torch.func.vmap(torch.func.jacrev(counted))(X)
        torch.testing.assert_close(found, torch.stack([exact(x) for x in X]))
        assert len(calls) == 3

    def test_a_solver_that_uses_autograd_itself(self):
        @hl.implicit(loss=lambda y, b: ((y - b) ** 2).sum(), rtol=1e-6)
        def by_torch(b: Tensor) -> Tensor:
            assert not b.requires_grad
            y = torch.nn.Parameter(torch.zeros_like(b))
            optimizer = torch.optim.SGD([y], lr=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                ((y - b) ** 2).sum().backward()
                optimizer.step()
            return y

        b = POINT.clone().requires_grad_()
        torch.testing.assert_close(torch.func.jacrev(by_torch)(b), torch.eye(4).double())


class TestByproduct:
    def settings(self, near: bool) -> tuple[list[int], object]:
        """A solver that hands over its factorisation, at y or at a point beside it."""
        prepared = []

        @hl.implicit(residual=F, byproduct=True, linear_solver=solvers.DenseLU(), return_info=True)
        def with_factor(x: Tensor) -> tuple[Tensor, solvers.PreparedSolver]:
            y = newton(x)
            at = y + (1e-4 if near else 1.0) * torch.ones(4)
            prepared.append(solvers.DenseLU().prepare(ops.Jacobian(F, at, x)))
            return y, prepared[-1]

        return prepared, with_factor

    @pytest.mark.parametrize("near", [True, False])
    def test_gives_the_derivative_of_y_wherever_it_was_prepared(self, near):
        _, solver = self.settings(near)
        x = POINT.clone().requires_grad_()
        y, info = solver(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, exact(POINT).sum(0), rtol=1e-7, atol=1e-9)
        assert info.adjoint
        assert info.adjoint[-1].converged
        if near:
            assert info.adjoint[-1].iterations <= 4
            assert "GMRES" in info.adjoint[-1].solver

    def test_of_another_kind_is_refused(self):
        @hl.implicit(residual=F, byproduct=True)
        def alone(x: Tensor) -> Tensor:
            return newton(x)

        with pytest.raises(TypeError, match=r"byproduct=True expected \(y, prepared\)"):
            alone(POINT)

        @hl.implicit(residual=F, byproduct=True)
        def matrix(x: Tensor) -> tuple[Tensor, Tensor]:
            return newton(x), M

        with pytest.raises(TypeError, match="expected a prepared solver"):
            matrix(POINT)


class TestErrors:
    def test_an_inexact_result_is_told(self):
        rough = hl.implicit(residual=F)(lambda x: newton(x, steps=1))
        with pytest.warns(solvers.ConvergenceWarning, match="residual"):
            rough(POINT)
        strict = hl.implicit(residual=F, strict=True)(lambda x: newton(x, steps=1))
        with pytest.raises(solvers.NotConvergedError):
            strict(POINT)

    def test_settings(self):
        with pytest.raises(TypeError, match="nothing given; expected one of"):
            hl.implicit()
        with pytest.raises(TypeError, match="residual, loss given"):
            hl.implicit(residual=F, loss=F)
        with pytest.raises(ValueError, match="differentiate='unrolled'"):
            hl.implicit(residual=F, differentiate="unrolled")
        with pytest.raises(TypeError, match="linear_solver"):
            hl.implicit(residual=F, linear_solver="cg")

    def test_results_that_are_none(self):
        with pytest.raises(ValueError, match="NaN"):
            hl.implicit(residual=F)(lambda x: newton(x) / 0)(POINT)
        with pytest.raises(TypeError, match="result of"):
            hl.implicit(residual=F)(lambda x: 3)(POINT)

    def test_keyword_that_is_differentiated_is_refused(self):
        @hl.implicit(residual=F)
        def with_start(x: Tensor, *, start: Tensor) -> Tensor:
            return newton(x)

        with_start(POINT, start=torch.zeros(4))
        with pytest.raises(ValueError, match="keyword argument start"):
            with_start(POINT, start=torch.zeros(4, requires_grad=True))

    def test_what_the_condition_closes_over_counts(self):
        def through(scale: Tensor) -> Tensor:
            @hl.implicit(residual=lambda y, x: y - scale * x)
            def solver(x: Tensor) -> Tensor:
                return scale.detach() * x

            return solver(POINT).sum()

        leaf = torch.tensor(3.0).double().requires_grad_()
        through(leaf).backward()
        torch.testing.assert_close(leaf.grad, POINT.sum())


class TestModes:
    def test_identity_and_one_step(self):
        def T(y: Tensor, x: Tensor) -> Tensor:
            return y - F(y, x) / 4

        for mode in ("identity", "one_step"):
            solver = hl.implicit(fixed_point=T, differentiate=mode)(newton)
            y = newton(POINT)
            expected = -torch.func.jacrev(F, 1)(y, POINT) / 4
            torch.testing.assert_close(torch.func.jacrev(solver)(POINT), expected)
            torch.testing.assert_close(solver(POINT), y)
