"""What went wrong without a word in some version, or would: each is right by now, or refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hyperlearn as hl
from hyperlearn import inner, solvers


def t(*values: float, **options: bool) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


SCALE = 1.0


class TestLaterChanges:
    """Between the solve and its derivative."""

    def test_variable_of_a_loop(self):
        x, total = t(2.0, requires_grad=True), 0.0
        for k in (1.0, 2.0, 3.0):
            total = total + hl.root(lambda y, x: y**3 - x * k, t(1.0), x)  # noqa: B023
        total.sum().backward()
        exact = sum(k ** (1 / 3) for k in (1.0, 2.0, 3.0)) / 3 * 2 ** (-2 / 3)
        torch.testing.assert_close(x.grad, t(exact))

    def test_tensor_in_place(self):
        x, b = t(2.0, requires_grad=True), t(1.0)
        y = hl.root(lambda y, x: y - b * x, t(1.0), x)
        b.mul_(10)
        with pytest.raises(RuntimeError, match="modified by an inplace operation after the solve"):
            y.sum().backward()

    @pytest.mark.parametrize("mode", ["implicit", "unrolled"])
    def test_global(self, mode):
        global SCALE
        x = t(0.3, requires_grad=True)
        y = hl.fixed_point(
            lambda y, x: SCALE * torch.cos(y) / 2 + x,
            t(0.0),
            x,
            method=inner.FixedPointIteration(),
            differentiate=mode,
        )
        try:
            SCALE = 5.0
            with pytest.raises(RuntimeError, match="'SCALE', which map reads"):
                y.sum().backward()
        finally:
            SCALE = 1.0

    def test_what_the_function_does_not_read_may_change(self):
        holder = SimpleNamespace(slope=2.0, epoch=0)
        x = t(3.0, requires_grad=True)
        y = hl.root(lambda y, x: y - holder.slope * x, t(1.0), x)
        holder.epoch += 1
        y.sum().backward()
        torch.testing.assert_close(x.grad, t(2.0))

    def test_side_effects_of_a_function_stay_its_own(self):
        calls, count, c = [], 0, t(2.0, requires_grad=True)

        def residual(y: Tensor, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            calls.append(1)
            return y - c * x

        hl.root(residual, t(1.0), t(2.0)).sum().backward()
        assert count == len(calls) > 0
        torch.testing.assert_close(c.grad, t(2.0))


class TestObjects:
    def test_modules_and_objects_in_x_are_no_constants(self):
        module = torch.nn.Linear(2, 2).double()
        with pytest.raises(ValueError, match="functional_call"):
            hl.root(lambda y, m: y - 0.1 * m(y), t(0.0, 0.0), module)

        def through(w: Tensor) -> Tensor:
            return hl.root(lambda y, p: y**2 - p.w, t(1.0), SimpleNamespace(w=w)).sum()

        with pytest.raises(ValueError, match="x holds an object"):
            torch.func.grad(through)(t(3.0))

    def test_complex_x_is_refused(self):
        z = torch.tensor([1.0 + 1j], dtype=torch.complex128, requires_grad=True)
        with pytest.raises(TypeError, match=r"torch\.view_as_real"):
            hl.root(lambda y, z: y**2 - (z * z.conj()).real, t(1.0), z)
        constant = torch.tensor([1.0 + 1j], dtype=torch.complex128)
        y = hl.root(lambda y, x: y - x[0] * x[1].abs(), t(1.0), (t(2.0), constant))
        torch.testing.assert_close(y, t(2 * 2**0.5))


class TestSteps:
    def test_unrolling_goes_through_the_start(self):
        def f(start: Tensor) -> Tensor:
            return hl.argmin(
                lambda y, a: ((y - a * 3) ** 2).sum(),
                start,
                start,
                method=inner.GradientDescent(step_size=0.1, maxiter=3),
                differentiate="unrolled",
            ).sum()

        with pytest.warns(solvers.ConvergenceWarning):
            gradient = torch.func.grad(f)(t(1.0))
        torch.testing.assert_close(gradient, t(0.8**3 + 3 * (1 - 0.8**3)))

    @pytest.mark.parametrize("mode", ["unrolled", "truncated(20)"])
    def test_warm_start_still_has_a_derivative(self, mode):
        def f(x: Tensor) -> Tensor:
            return hl.argmin(
                lambda y, x: ((y - x) ** 2).sum() / 2,
                t(2.0),
                x,
                method=inner.GradientDescent(step_size=0.1),
                differentiate=mode,
            ).sum()

        steps = 20 if mode == "truncated(20)" else 1
        torch.testing.assert_close(torch.func.grad(f)(t(2.0)), t(1 - 0.9**steps))

    def test_one_step_of_newton_has_the_second_derivative(self):
        def f(x: Tensor) -> Tensor:
            newton = inner.Newton(line_search=False)
            return hl.root(
                lambda y, x: y**3 + y - x, t(0.5), x, method=newton, differentiate="one_step"
            ).sum()

        # y = 1: y' = 1 / (3 y^2 + 1), y'' = -6 y y'^3.
        torch.testing.assert_close(torch.func.grad(f)(t(2.0)), t(0.25))
        torch.testing.assert_close(torch.func.hessian(f)(t(2.0)), t(-6 / 64)[None])

    def test_solution_is_not_the_memory_of_its_start(self):
        y0 = t(2.0, 3.0)
        y = hl.root(lambda y, x: y**2 - x, y0, t(4.0, 9.0))
        y0.zero_()
        torch.testing.assert_close(y, t(2.0, 3.0))


class TestSingular:
    def test_minima_that_are_not_isolated_have_no_derivative(self):
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(2, 4, generator=generator, dtype=torch.float64)

        def f(x: Tensor) -> Tensor:
            return hl.argmin(lambda y, x: ((A @ y - x) ** 2).sum(), torch.zeros(4).double(), x)

        for transform in (torch.func.jacfwd, torch.func.jacrev):
            with pytest.raises(solvers.SingularError, match="no differentiable function of x"):
                transform(f)(t(1.0, 1.0))

    def test_units_do_not_make_singular(self):
        def f(x: Tensor) -> Tensor:
            return hl.root(
                lambda y, x: torch.stack([1e9 * (y[0] - x[0]), 1e-9 * (y[1] + y[0] - x[1])]),
                t(1.0, 1.0),
                x,
            )

        torch.testing.assert_close(
            torch.func.jacrev(f)(t(1.0, 2.0)), torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
        )

    def test_small_equations_count(self):
        y = hl.root(
            lambda y, x: torch.stack([1e6 * (y[0] - 5), 1e-6 * (y[1] - x[0])]), t(5.0, 0.0), t(3.0)
        )
        torch.testing.assert_close(y, t(5.0, 3.0))

    @pytest.mark.parametrize(
        "loss",
        [lambda y, x: torch.cos(y).sum() * x.sum(), lambda y, x: -(y**2).sum() * x.sum()],
    )
    def test_maxima_are_told(self, loss):
        with pytest.warns(solvers.ConvergenceWarning, match="no minimum"):
            _, info = hl.argmin(loss, t(0.0), t(1.0), return_info=True)
        assert info.status == "saddle"
        assert not info.converged


class TestHypergradient:
    def test_jump_of_curvature_near_the_solution(self):
        def kinked(y: Tensor, x: Tensor) -> Tensor:
            return (0.5 * (y - x) ** 2 + 0.75 * torch.relu(y) ** 2).sum()

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return (y - 3).square().sum()

        _, certificate = hl.hypergradient(outer, kinked, t(-1e-4), t(1e-9))
        assert not certificate.trustworthy(0.5)
        assert "jumps" in certificate.reason

    def test_loss_that_closes_over_x(self):
        x = t(1.0)
        with pytest.raises(ValueError, match="inner_loss closes over x itself"):
            hl.hypergradient(
                lambda y, _: (y**2).sum(), lambda y, _: ((y - x) ** 2).sum(), t(1.0), x
            )

    def test_losses_that_belong_to_an_object_which_has_x(self):
        class Task:
            def __init__(self) -> None:
                self.x = t(1.0)

            def inner(self, y: Tensor, x: Tensor) -> Tensor:
                return ((y - x) ** 2).sum()

            def outer(self, y: Tensor, x: Tensor) -> Tensor:
                return (y**2).sum()

        task = Task()
        gradient, _ = hl.hypergradient(task.outer, task.inner, t(1.0), task.x)
        torch.testing.assert_close(gradient, t(2.0))

    def test_sums_are_no_means(self):
        with pytest.raises(ValueError, match="inner_loss is no mean over its batch"):
            hl.hypergradient(
                lambda y, x: (y**2).sum(),
                lambda y, x, b: ((b - y) ** 2).sum() + (x * y**2).sum(),
                t(1.0),
                t(1.0),
                inner_batch=torch.arange(6.0).double(),
                chunk_size=2,
            )

    def test_a_loss_may_view_y(self):
        def inner_loss(y: Tensor, x: Tensor) -> Tensor:
            return ((y.view(-1) - x) ** 2).sum()

        y, x = torch.ones(16, 2).double(), torch.ones(32).double()
        gradient, _ = hl.hypergradient(lambda y, x: (y.view(-1) ** 2).sum(), inner_loss, y, x)
        torch.testing.assert_close(gradient, 2 * x)

    def test_mapped(self):
        with pytest.raises(NotImplementedError, match="returns numbers"):
            torch.func.vmap(
                lambda x: hl.hypergradient(
                    lambda y, x: (y**2).sum(), lambda y, x: ((y - x) ** 2).sum(), t(1.0), x
                )[0]
            )(torch.ones(3, 1).double())


class TestFunctionsOfTheUser:
    def test_default_arguments_of_a_projection(self):
        def clamped(y: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
            return y.clamp(low, high)

        for constraint in (clamped, torch.nn.functional.relu):
            y = hl.argmin(lambda y, x: ((y - x) ** 2).sum(), t(1.0), t(-2.0), constraint=constraint)
            torch.testing.assert_close(y, t(0.0))

    def test_solver_that_changes_its_arguments(self):
        @hl.implicit(residual=lambda y, a: y - 2 * a)
        def careless(a: Tensor) -> Tensor:
            y = 2 * a
            a -= 1
            return y

        b = t(4.0, 9.0)
        torch.testing.assert_close(careless(b), t(8.0, 18.0))
        torch.testing.assert_close(b, t(4.0, 9.0))

    def test_keyword_that_the_condition_needs(self):
        @hl.implicit(residual=lambda y, a, b=1.0: y - a * b)
        def scaled(a: Tensor, b: float = 1.0) -> Tensor:
            return a * b

        with pytest.raises(TypeError, match="b given by keyword"):
            scaled(t(1.0), b=3.0)

    def test_batch_norm_in_training(self):
        torch.manual_seed(0)

        class Cell(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = torch.nn.BatchNorm1d(3)

            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                return 0.3 * torch.tanh(self.norm(u) + z)

        layer = hl.ImplicitLayer(Cell().double(), by_sample=False)
        u = torch.randn(8, 3).double().requires_grad_()
        layer(u).square().sum().backward()
        assert layer.info.converged
        assert bool(u.grad.abs().sum() > 0)
        torch.testing.assert_close(layer.module.norm.running_mean, torch.zeros(3).double())

    def test_inference_mode(self):
        with torch.inference_mode():
            y = hl.root(lambda y, x: y**2 - x, t(1.0), t(4.0))
        torch.testing.assert_close(y.clone(), t(2.0))


class TestNested:
    def test_second_order_with_a_linear_solver_given(self):
        x = t(0.5, 0.7, 1.1)
        solver = solvers.DenseLU()

        def within(z: Tensor) -> Tensor:
            return hl.root(lambda y, z: y + 0.1 * y**3 - z, 0 * x, z, linear_solver=solver)

        def f(x: Tensor) -> Tensor:
            y = hl.fixed_point(
                lambda y, x: 0.3 * torch.cos(within(y)) + x, 0 * x, x, linear_solver=solver
            )
            return y.square().sum()

        h, units = 1e-5, torch.eye(3).double()
        slope = torch.func.grad(f)
        central = torch.stack([(slope(x + h * e) - slope(x - h * e)) / (2 * h) for e in units])
        torch.testing.assert_close(torch.func.hessian(f)(x), central, rtol=1e-7, atol=1e-8)
