"""`check` on derivatives that are right, and wrong in known ways: it has to tell them apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hyperlearn as hl
from hyperlearn.checks import CheckReport, CheckRow
from hyperlearn.solutions import argmin, root

FLOAT64 = torch.float64
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype)


def verdicts(report: CheckReport, check: str) -> set[str]:
    found = {row.verdict for row in report.rows if row.check == check}
    assert found, f"no row {check}:\n{report}"
    return found


def error(report: CheckReport, check: str) -> float:
    return max(row.error for row in report.rows if row.check == check)


MODES = ("reverse mode", "backward()", "forward mode")


def assert_passed(report: CheckReport) -> None:
    assert report.passed, str(report)
    for check in (*MODES, "forward = reverse", "batch = one by one"):
        assert verdicts(report, check) == {"passed"}, str(report)


class Cube(torch.autograd.Function):
    """``sum x^3``, with what its derivatives are multiplied by."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, backward: float, forward: float) -> Tensor:
        return (x**3).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.factor, ctx.forward_factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return bar * ctx.factor * 3 * x**2, None, None

    @staticmethod
    def jvp(ctx: Any, dot: Tensor, *_: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return (ctx.forward_factor * 3 * x**2 * dot).sum()


def spd(size: int, condition: float) -> Tensor:
    basis = torch.linalg.qr(sampled(size, size))[0]
    return (
        basis @ torch.diag(torch.logspace(0, -math.log10(condition), size, dtype=FLOAT64)) @ basis.T
    )


class TestRight:
    def test_quadratic_solution_with_direct_term(self):
        A, B, D = spd(5, 10.0), sampled(5, 3, seed=1), sampled(3, 5, seed=2)

        def f(x: Tensor) -> Tensor:
            y = torch.linalg.solve(A.to(x), B.to(x) @ x)
            return (y**2).sum() + x @ D.to(x) @ y + x.sin().sum()

        report = hl.check(f, sampled(3))
        assert_passed(report)
        assert verdicts(report, "float32 = float64") == {"passed"}
        assert error(report, "reverse mode") < 1e-9

    def test_ill_conditioned(self):
        A = spd(6, 1e8)
        report = hl.check(lambda x: torch.linalg.solve(A.to(x), x).sin().sum(), 1e-6 * sampled(6))
        assert_passed(report)
        # and float32 cannot carry it, which is told, but is not the gradient's fault
        assert verdicts(report, "float32 = float64") == {"refused"}
        assert "badly conditioned" in str(report)

    @pytest.mark.parametrize("f", [Tensor.exp, Tensor.sin, lambda x: (1 + x**2).log(), Tensor.cosh])
    def test_elementary(self, f):
        assert_passed(hl.check(lambda x: f(x).sum(), sampled(4)))

    def test_badly_scaled(self):
        sizes = torch.logspace(-6, 6, 7, dtype=FLOAT64)
        report = hl.check(lambda x: (x / sizes.to(x)).sin().sum(), sizes * sampled(7))
        assert_passed(report)

    @PROPERTY
    @given(
        shape=st.lists(st.integers(1, 3), min_size=0, max_size=3),
        exponent=st.integers(-8, 8),
        seed=st.integers(0, 1000),
    )
    def test_any_shape_and_scale(self, shape, exponent, seed):
        x = 10.0**exponent * sampled(*shape, seed=seed)
        assert_passed(hl.check(lambda x: (x / 10.0**exponent).exp().sum(), x))

    def test_tree(self):
        x = {
            "weight": sampled(2, 3),
            "parts": [sampled(2, seed=1), torch.tensor(0.5, dtype=FLOAT64)],
        }

        def f(x: dict[str, Any]) -> Tensor:
            return (x["weight"].sum(1) * x["parts"][0]).sum() * x["parts"][1].exp()

        assert_passed(hl.check(f, x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_own_dtype(self, dtype):
        report = hl.check(lambda x: (x**3).sum(), sampled(4, dtype=dtype))
        assert_passed(report)
        name = str(dtype).removeprefix("torch.")
        assert verdicts(report, f"{name} = float64") == {"passed"}
        assert error(report, "reverse mode") < 1e-9  # differences are in float64

    def test_zeros_and_stationary_points(self):
        assert_passed(hl.check(lambda x: x.cosh().sum(), torch.zeros(3, dtype=FLOAT64)))
        assert_passed(hl.check(lambda x: ((x - 1) ** 2).sum(), 1 + 1e-9 * sampled(3)))
        # the slope is 1e-11 of the value: what counts is the change of slope across the steps
        assert_passed(hl.check(lambda x: (x - 1).cosh().sum(), 1 + 1e-11 * sampled(3)))
        assert_passed(hl.check(lambda x: (x / x.norm()).norm(), sampled(3)))  # constant 1

    def test_x_requires_grad_and_keeps_its_grad(self):
        x, weight = sampled(3).requires_grad_(), sampled(3, seed=1).requires_grad_()
        hl.check(lambda x: (weight * x**2).sum().to(x), x)
        assert x.grad is None
        assert weight.grad is None

    def test_edge_of_the_domain(self):
        assert_passed(hl.check(lambda x: (x - 0.999).log().sum(), torch.ones(2, dtype=FLOAT64)))

    def test_errors_at_displaced_points_are_outside_of_the_domain(self):
        def f(x: Tensor) -> Tensor:
            if bool((x > 1.02).any()):
                raise RuntimeError("no solution here")
            return (x**3).sum()

        report = hl.check(f, torch.ones(2, dtype=FLOAT64))
        for mode in MODES:
            assert verdicts(report, mode) == {"passed"}


class TestWrong:
    @pytest.mark.parametrize("factor", [1 + 1e-3, 1 - 1e-3, -1.0, 0.0, 2.0])
    def test_backward_of_a_function(self, factor):
        report = hl.check(lambda x: Cube.apply(x, factor, 1.0), sampled(4))
        assert not report.passed
        assert verdicts(report, "reverse mode") == {"failed"}
        assert verdicts(report, "backward()") == {"failed"}
        assert verdicts(report, "forward mode") == {"passed"}
        assert verdicts(report, "forward = reverse") == {"failed"}

    @pytest.mark.parametrize("factor", [1 + 1e-3, -1.0, 0.0])
    def test_jvp_of_a_function(self, factor):
        report = hl.check(lambda x: Cube.apply(x, 1.0, factor), sampled(4))
        assert not report.passed
        assert verdicts(report, "reverse mode") == {"passed"}
        assert verdicts(report, "forward mode") == {"failed"}
        assert verdicts(report, "forward = reverse") == {"failed"}

    def test_the_same_function_with_right_derivatives(self):
        assert_passed(hl.check(lambda x: Cube.apply(x, 1.0, 1.0), sampled(4)))

    @PROPERTY
    @given(size=st.integers(2, 30), seed=st.integers(0, 1000), exponent=st.integers(-6, 6))
    def test_single_entry(self, size, seed, exponent):
        """One entry off by 10%, at any scale: no direction leaves it out."""
        x = sampled(size, seed=seed)
        sizes = torch.ones(size, dtype=FLOAT64)
        sizes[seed % size] = 10.0**exponent

        def right(x: Tensor) -> Tensor:
            return (x / sizes).exp().sum()

        def wrong(x: Tensor) -> Tensor:
            entry = (x / sizes).exp()[seed % size]
            return right(x) - 0.1 * (entry - entry.detach())

        assert verdicts(hl.check(right, sizes * x), "reverse mode") == {"passed"}
        assert verdicts(hl.check(wrong, sizes * x), "reverse mode") == {"failed"}

    def test_detached_piece(self):
        report = hl.check(lambda x: (x * x.detach().sin()).sum(), sampled(4))
        for mode in MODES:
            assert verdicts(report, mode) == {"failed"}
        # they agree with each other: only the values show it
        assert verdicts(report, "forward = reverse") == {"passed"}
        assert "detached" in str(report)

    def test_no_graph_at_all(self):
        report = hl.check(lambda x: x.detach().exp().sum(), sampled(4))
        for mode in MODES:
            assert verdicts(report, mode) == {"failed"}

    def test_nan_gradient(self):
        # sqrt at 0 under a where: the value is fine, the gradient is 0 * inf
        x = torch.tensor([0.0, 1.0], dtype=FLOAT64)
        report = hl.check(lambda x: torch.where(x > 0.5, (x - x * (x < 0.5)).sqrt(), x).sum(), x)
        assert verdicts(report, "reverse mode") == {"failed"}
        assert "nan" in str(report)

    def test_float32_overflow(self):
        report = hl.check(lambda x: ((x * 1e30) ** 2).sum().sqrt() * 1e-30, sampled(3).float())
        assert verdicts(report, "reverse mode") == {"passed"}  # in float64
        assert verdicts(report, "float32 = float64") != {"passed"}
        assert not report.passed

    def test_vmap(self):
        class Leaks(torch.autograd.Function):
            """Its rule for batches takes the first member for all."""

            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return (x**3).sum()

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
                ctx.save_for_backward(*inputs)

            @staticmethod
            def backward(ctx: Any, bar: Tensor) -> Tensor:
                return bar * Slope.apply(*ctx.saved_tensors)

            @staticmethod
            def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
                return (x**3).sum(1), 0

        class Slope(torch.autograd.Function):
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return 3 * x**2

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...

            @staticmethod
            def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
                return 3 * x[:1].expand_as(x) ** 2, 0

        report = hl.check(lambda x: Leaks.apply(x), sampled(3))
        assert verdicts(report, "reverse mode") == {"passed"}
        if verdicts(report, "batch = one by one") != {"refused"}:
            assert verdicts(report, "batch = one by one") == {"failed"}


class TestNoisy:
    @pytest.mark.parametrize("noise", [1e-3, 1e-6])
    def test_added_noise(self, noise):
        draws = torch.Generator().manual_seed(0)

        def f(x: Tensor) -> Tensor:
            return x.exp().sum() + noise * torch.randn((), generator=draws, dtype=FLOAT64)

        report = hl.check(f, sampled(4))
        assert not report.passed
        for mode in MODES:
            assert verdicts(report, mode) == {"noisy"}
        assert "two calls at the same x differ" in str(report)
        assert "tighter tolerance" in str(report)

    def test_noise_below_what_was_asked_for(self):
        draws = torch.Generator().manual_seed(0)

        def f(x: Tensor) -> Tensor:
            return x.exp().sum() + 1e-6 * torch.randn((), generator=draws, dtype=FLOAT64)

        report = hl.check(f, sampled(4), rtol=1e-2)
        for mode in MODES:
            assert verdicts(report, mode) == {"passed"}

    def test_wrong_sign_under_noise(self):
        """Where the gradient is off by more than any noise, it is wrong."""
        draws = torch.Generator().manual_seed(0)

        def f(x: Tensor) -> Tensor:
            noise = 1e-6 * torch.randn((), generator=draws, dtype=FLOAT64)
            return Cube.apply(x, -1.0, 1.0) + noise

        assert verdicts(hl.check(f, sampled(4)), "reverse mode") == {"failed"}

    @pytest.mark.parametrize("steps", [10, 40])
    def test_inner_solve_stopped_early_from_a_random_start(self, steps):
        """Gradient descent at rate 1/2, with the implicit derivative at where it stopped."""
        A, draws = spd(3, 2.0), torch.Generator().manual_seed(0)

        class Inner(torch.autograd.Function):
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                y = torch.randn(3, generator=draws, dtype=FLOAT64)
                for _ in range(steps):
                    y = y - (A @ y - x) / 1.0
                return y

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...

            @staticmethod
            def backward(ctx: Any, bar: Tensor) -> Tensor:
                return torch.linalg.solve(A, bar)

        report = hl.check(lambda x: (Inner.apply(x) ** 2).sum(), sampled(3))
        # 2^-10 of the start is left, or 2^-40, which does not show
        expected = {"noisy"} if steps == 10 else {"passed"}
        assert verdicts(report, "reverse mode") == expected, str(report)
        assert verdicts(report, "backward()") == expected

    def test_single_precision_inside(self):
        """The derivative is right, and values that jump by 6e-8 cannot show it to 1e-6."""
        report = hl.check(lambda x: x.float().exp().sum().to(x), sampled(4), rtol=1e-6)
        assert verdicts(report, "reverse mode") == {"noisy"}
        assert verdicts(report, "backward()") == {"noisy"}

    @pytest.mark.parametrize("f", [Tensor.abs, Tensor.relu])
    def test_kink(self, f):
        report = hl.check(lambda x: f(x).sum(), torch.tensor([0.0, 1.0], dtype=FLOAT64))
        assert verdicts(report, "reverse mode") == {"noisy"}
        assert "kink at x" in str(report)

    @pytest.mark.parametrize("distance", [1e-3, 1e-6])
    def test_kink_nearby_is_none(self, distance):
        x = torch.tensor([1.0, 2.0], dtype=FLOAT64)
        assert_passed(hl.check(lambda x: (x - 1 - distance).relu().sum() + (x**2).sum(), x))

    def test_no_values_around(self):
        def f(u: Tensor) -> Tensor:
            if not torch.equal(u, torch.ones_like(u)):
                raise RuntimeError("only at 1")
            return u.sum()

        report = hl.check(f, torch.ones(2, dtype=FLOAT64))
        assert verdicts(report, "backward()") == {"noisy"}
        assert "not finite" in str(report)


class TestRefused:
    def test_forward_mode(self):
        class Square(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return (x**2).sum()

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
                ctx.save_for_backward(*inputs)

            @staticmethod
            def backward(ctx: Any, bar: Tensor) -> Tensor:
                return bar * 2 * ctx.saved_tensors[0]

        x = sampled(3)
        report = hl.check(Square.apply, x)
        assert verdicts(report, "forward mode") == {"refused"}
        assert "jvp" in str(report)
        assert report.passed
        assert not hl.check(Square.apply, x, allow_refusals=False).passed

    def test_vmap(self):
        report = hl.check(lambda x: (x**2).sum() * (1 if x.sum().item() > 0 else 2), sampled(3))
        assert verdicts(report, "batch = one by one") == {"refused"}
        assert verdicts(report, "reverse mode") == {"passed"}
        assert report.passed

    def test_float64(self):
        weight = sampled(3, 3, dtype=torch.float32)
        report = hl.check(lambda x: (weight @ x).square().sum(), sampled(3, dtype=torch.float32))
        assert verdicts(report, "float64") == {"refused"}
        for mode in MODES:
            assert verdicts(report, mode) == {"passed"}
        assert report.passed

    def test_wrong_in_float32_only(self):
        weight = sampled(3, 3, dtype=torch.float32)

        def f(x: Tensor) -> Tensor:
            return (weight @ x).square().sum() + x.detach().sin().sum()

        assert verdicts(hl.check(f, sampled(3, dtype=torch.float32)), "reverse mode") == {"failed"}

    def test_reverse_mode_is_a_failure(self):
        def f(x: Tensor) -> Tensor:
            if torch._C._functorch.is_gradtrackingtensor(x):
                raise RuntimeError("not under torch.func")
            return (x**2).sum()

        report = hl.check(f, sampled(3))
        assert verdicts(report, "reverse mode") == {"refused"}
        assert verdicts(report, "backward()") == {"passed"}
        assert not report.passed


class TestInput:
    def test_function_that_ignores_x(self):
        report = hl.check(lambda x: torch.tensor(3.0, dtype=x.dtype), sampled(3))
        assert_passed(report)
        assert "is x used at all?" in str(report)

    @pytest.mark.parametrize(
        ("x", "kind", "message"),
        [
            (torch.arange(3), TypeError, "x has a leaf of dtype torch.int64"),
            (torch.tensor([1.0, math.nan]), ValueError, "x holds 1 NaN or infinite entries"),
            (torch.tensor([math.inf]), ValueError, "x holds 1 NaN or infinite entries"),
            (torch.zeros(0), ValueError, "x has no entries"),
            ([], ValueError, "x holds no tensor"),
            ([1.0], TypeError, "x has a leaf of type float"),
            (None, TypeError, "x is missing"),
        ],
    )
    def test_x(self, x, kind, message):
        with pytest.raises(kind, match=message):
            hl.check(lambda x: x.sum(), x)

    @pytest.mark.parametrize(
        ("f", "kind", "message"),
        [
            (lambda x: x, ValueError, r"shape \(3,\); expected a scalar"),
            (lambda x: float(x.sum()), TypeError, "returned a float; expected a scalar tensor"),
            (lambda x: (x.sum(), 1), TypeError, "returned a tuple"),
            (lambda x: x.sum().long(), TypeError, "returned torch.int64"),
            (lambda x: x.sum() * math.nan, ValueError, "the function is nan at x"),
            (lambda x: x.mul_(2).sum(), ValueError, "changed its argument x in place"),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    def test_function(self, f, kind, message, dtype):
        x = torch.ones(3, dtype=dtype)
        with pytest.raises(kind, match=message):
            hl.check(f, x)
        assert torch.equal(x, torch.ones(3, dtype=dtype))

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"directions": 0}, ValueError, "directions=0"),
            ({"rtol": 0.0}, ValueError, "rtol=0.0"),
            ({"rtol": math.nan}, ValueError, "rtol=nan"),
            ({"solver": lambda x: x}, TypeError, "for bilevel problems"),
            ({"inner_loss": lambda y, x: y.sum()}, TypeError, "inner_loss go"),
        ],
    )
    def test_options(self, options, kind, message):
        with pytest.raises(kind, match=message):
            hl.check(lambda x: x.sum(), sampled(2), **options)

    def test_neither_function_nor_problem(self):
        with pytest.raises(TypeError, match="target is a int"):
            hl.check(3, sampled(2))
        with pytest.raises(TypeError, match="outer_loss, y0 is missing"):
            hl.check(inner_loss=lambda y, x: y.sum(), x=sampled(2))

    def test_seed(self):
        x = sampled(3)
        first, again, other = (hl.check(lambda x: x.exp().sum(), x, seed=s) for s in (0, 0, 1))
        assert first == again
        assert first.rows[0].error != other.rows[0].error

    def test_directions(self):
        report = hl.check(lambda x: x.exp().sum(), sampled(3), directions=5)
        assert [r.direction for r in report.rows if r.check == "reverse mode"] == list(range(5))


class TestReport:
    def test_failure_raises_the_table(self):
        report = hl.check(lambda x: (x * x.detach()).sum(), sampled(3))
        with pytest.raises(hl.CheckFailedError, match=r"(?s)reverse mode +0 .* failed") as caught:
            report.raise_for_failure()
        assert isinstance(caught.value, AssertionError)
        assert str(report) in str(caught.value)
        hl.check(lambda x: (x**2).sum(), sampled(3)).raise_for_failure()

    def test_verdicts(self):
        def passed(verdict: str, check: str = "forward mode", **options: bool) -> bool:
            rows = (
                CheckRow("reverse mode", 0, 0.0, 1.0, "passed"),
                CheckRow(check, 0, 1, 1, verdict),
            )
            return CheckReport(rows, **options).passed

        assert passed("passed")
        assert not passed("failed")
        assert not passed("noisy")
        assert passed("refused")
        assert not passed("refused", allow_refusals=False)
        assert not passed("refused", "reverse mode")
        assert not passed("refused", "implicit")

    def test_table(self):
        report = hl.check(lambda x: (x * x.detach()).sum(), sampled(3), directions=1)
        table = report.table()
        assert table.row_count == len(report.rows)
        lines = str(report).splitlines()
        assert lines[0].split() == ["check", "direction", "error", "tolerance", "verdict"]
        assert lines[1].split()[-1] == "failed"

    def test_frozen(self):
        report = CheckReport(())
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.rows = ()


class TestProblem:
    @staticmethod
    def problem(**options: Any) -> hl.BilevelProblem:
        """Weighted ridge regression with a direct term, and a quartic that makes it nonlinear."""
        Z, t, V = sampled(8, 3), sampled(8, seed=1), sampled(6, 3, seed=2)

        def inner(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, targets = batch
            fit = ((inputs @ y - targets) ** 2).mean() + (y**4).sum() / 10
            return fit + (x.exp() * y**2).sum()

        def outer(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
            return ((batch @ y - 1) ** 2).mean() + (x * y).sum() + x.cos().sum()

        given = {
            "inner_loss": inner,
            "outer_loss": outer,
            "x0": 0.3 * sampled(3, seed=3),
            "y0": torch.zeros(3, dtype=FLOAT64),
            "inner_data": (Z, t),
            "outer_data": V,
            "regularizer": hl.L2(0.2),
        }
        return hl.BilevelProblem(**(given | options))

    def assert_passed(self, report: CheckReport) -> None:
        assert report.passed, str(report)
        for check in ("implicit", "unrolled", "implicit = unrolled"):
            assert verdicts(report, check) == {"passed"}, str(report)

    def test_right(self):
        report = hl.check(self.problem())
        self.assert_passed(report)
        assert error(report, "implicit") < 1e-8
        assert error(report, "unrolled") < 1e-6
        assert "|d_y G|" in str(report)

    def test_elsewhere_than_x0(self):
        problem = self.problem()
        self.assert_passed(hl.check(problem, sampled(3, seed=9), directions=1))
        with pytest.raises(ValueError, match="x has structure"):
            hl.check(problem, sampled(4))

    def test_parts(self):
        problem = self.problem(inner_data=None, outer_data=None, **self.plain_losses())
        report = hl.check(
            outer_loss=problem.outer_loss,
            inner_loss=problem.inner_loss,
            x=problem.x0,
            y0=problem.y0,
        )
        self.assert_passed(report)

    @staticmethod
    def plain_losses() -> dict[str, Callable[..., Tensor]]:
        return {
            "inner_loss": lambda y, x: ((y - x) ** 2).sum() + (y**4).sum(),
            "outer_loss": lambda y, x: (y.sin() + x * y).sum(),
        }

    def test_float32_problem(self):
        """Points and data are taken to float64."""
        problem = self.problem()
        lower = {
            name: torch.utils._pytree.tree_map(Tensor.float, getattr(problem, name))
            for name in ("x0", "y0", "inner_data", "outer_data")
        }
        self.assert_passed(hl.check(dataclasses.replace(problem, **lower), directions=1))

    def test_ill_conditioned(self):
        A, B = spd(5, 1e6), sampled(5, 4)
        problem = self.problem(
            inner_loss=lambda y, x: y @ A @ y / 2 - y @ B @ x,
            outer_loss=lambda y, x: (1e-6 * y).sin().sum() + x.sum(),
            inner_data=None,
            outer_data=None,
            regularizer=None,
            x0=sampled(4),
            y0=torch.zeros(5, dtype=FLOAT64),
        )
        self.assert_passed(hl.check(problem, directions=1))

    def test_detached_in_the_inner_loss(self):
        """The solution depends on x through the values; the cross derivative does not see it."""
        problem = self.problem(
            inner_data=None,
            outer_data=None,
            **self.plain_losses() | {"inner_loss": lambda y, x: ((y - x.detach()) ** 2).sum()},
        )
        report = hl.check(problem, directions=1)
        assert verdicts(report, "implicit") == {"failed"}
        assert verdicts(report, "unrolled") == {"failed"}

    def test_solver_of_another_problem(self):
        """A solver that leaves the regulariser out: the values are not those of the problem."""
        without = self.problem(regularizer=None)

        def solver(x: Tensor) -> Tensor:
            return argmin(lambda y, x: without.inner_loss(y, x, without.inner_data), without.y0, x)

        self.assert_passed(hl.check(without, solver=solver, directions=1))
        report = hl.check(self.problem(), solver=solver, directions=1)
        assert verdicts(report, "implicit") == {"failed"}
        assert verdicts(report, "unrolled") == {"passed"}  # for it is the solver's own derivative

    def test_solver_that_stops_early(self):
        """From a random start: noise. From a fixed one: smooth, and not the solution."""
        A, draws = spd(3, 2.0), torch.Generator().manual_seed(0)
        problem = self.problem(
            inner_loss=lambda y, x: y @ A @ y / 2 - y @ x,
            outer_loss=lambda y, x: (y**2).sum() + x.sum(),
            inner_data=None,
            outer_data=None,
            regularizer=None,
        )

        def solver(steps: int, random: float) -> Callable[[Tensor], Tensor]:
            def solve(x: Tensor) -> Tensor:
                y = random * torch.randn(3, generator=draws, dtype=FLOAT64)
                for _ in range(steps):
                    y = y - (A @ y - x)
                return y

            return solve

        assert verdicts(hl.check(problem, solver=solver(10, 1.0)), "implicit") == {"noisy"}
        early = hl.check(problem, solver=solver(10, 0.0))
        assert verdicts(early, "implicit") == {"failed"}
        assert verdicts(early, "unrolled") == {"passed"}
        self.assert_passed(hl.check(problem, solver=solver(60, 0.0)))

    def test_solver_without_a_derivative(self):
        problem = self.problem(inner_data=None, outer_data=None, **self.plain_losses())

        def solver(x: Tensor) -> Tensor:
            x = x.detach()
            loss = problem.inner_loss
            penalty = problem.regularizer
            return argmin(lambda y, x: loss(y, x) + penalty(y), problem.y0, x)

        report = hl.check(problem, solver=solver, directions=1)
        assert report.passed
        assert verdicts(report, "implicit") == {"passed"}
        assert verdicts(report, "unrolled") == {"refused"}
        assert "no derivative" in str(report)

    def test_certificate(self):
        """A quadratic inner problem, whose constants are eigenvalues; and constants too small."""
        A, B = spd(3, 10.0), sampled(3, 3, seed=1)

        def problem(factor: float) -> hl.BilevelProblem:
            return self.problem(
                inner_loss=lambda y, x: y @ A @ y / 2 - y @ B @ x,
                outer_loss=lambda y, x: (y**2).sum() + x.sum(),
                inner_data=None,
                outer_data=None,
                regularizer=None,
                smoothness=hl.Smoothness(
                    strong_convexity=0.1 / factor,
                    cross_norm=factor * float(torch.linalg.matrix_norm(B, 2)),
                    outer_smoothness=factor * 2.0,
                ),
            )

        report = hl.check(problem(1.0))
        assert verdicts(report, "certificate") == {"passed"}
        assert report.passed
        assert error(report, "certificate") > 1e-5  # it was tried where it says something
        report = hl.check(problem(1e-2))
        assert "failed" in verdicts(report, "certificate")
        assert verdicts(report, "implicit") == {"passed"}

    def test_active_projection(self):
        options: Any = {"inner_data": None, "outer_data": None, **self.plain_losses()}
        self.assert_passed(
            hl.check(self.problem(project_inner=hl.Ball(100.0), **options), directions=1)
        )
        with pytest.raises(ValueError, match="project_inner is active"):
            hl.check(self.problem(project_inner=hl.Ball(1e-2), **options))

    def test_implicit_function_inside_a_function(self):
        def f(x: Tensor) -> Tensor:
            y = root(lambda y, x: y**3 + y - x, torch.zeros_like(x), x)
            return (x * y).sum()

        assert_passed(hl.check(f, sampled(3)))
