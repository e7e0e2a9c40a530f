"""Penalties and their proximal maps: minimisers, and the derivative of the active set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

import hyperlearn as hl
from tests.hyperlearn.problems import FLOAT64, central, flat, nested, sampled

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SIZE = 6
GROUPS = [[0, 4], [3], [1, 2]]  # 5 is in none


# Functions of x (SIZE,), so that one table serves values, derivatives in y and derivatives in x.
PENALTIES: dict[str, Any] = {
    "l1": hl.L1(lambda x: x.exp()),
    "elastic net": hl.ElasticNet(lambda x: x.exp(), lambda x: x.sin() + 1),
    "rows": hl.GroupLasso(lambda x: x[0].exp()),
    "groups": hl.GroupLasso(lambda x: x[:3].exp(), groups=GROUPS),
    "none": hl.ElasticNet(0.0, 0.0),
    "ball": hl.Indicator(hl.Ball(lambda x: x[0].exp())),
}
every_penalty = pytest.mark.parametrize("name", list(PENALTIES))


def points(seed: int) -> tuple[Tensor, float, Tensor]:
    y, x = 2 * sampled(SIZE, seed=seed), 0.5 * sampled(SIZE, seed=seed + 1)
    return y, 0.2 + float(sampled(1, seed=seed + 2).abs()), x


class TestEveryPenalty:
    @every_penalty
    @PROPERTY
    @given(seed=st.integers(0, 999), exponent=st.floats(-6, 1))
    def test_minimum(self, name, seed, exponent):
        """The objective is strongly convex: any u is at least ``|u - u*|^2 / 2`` above."""
        penalty = PENALTIES[name]
        y, step, x = points(seed)

        def objective(u: Tensor) -> Tensor:
            return step * penalty.penalty(u, x) + (u - y) @ (u - y) / 2

        u = penalty.prox(y, step, x)
        for direction in sampled(30, SIZE, seed=seed + 3):
            other = u + 10.0**exponent * direction
            gap = objective(other) - objective(u) - (other - u) @ (other - u) / 2
            assert gap >= -1e-12

    @every_penalty
    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_firmly_nonexpansive(self, name, seed):
        penalty = PENALTIES[name]
        (y, step, x), z = points(seed), 2 * sampled(SIZE, seed=seed + 4)
        u, v = penalty.prox(y, step, x), penalty.prox(z, step, x)
        assert (u - v) @ (u - v) <= (u - v) @ (y - z) + 1e-13

    @every_penalty
    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_derivative_in_y(self, name, seed):
        y, step, x = points(seed)

        def prox(y: Tensor) -> Tensor:
            return PENALTIES[name].prox(y, step, x)

        reverse = torch.func.jacrev(prox)(y)
        torch.testing.assert_close(reverse, central(prox, y), rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(torch.func.jacfwd(prox)(y), reverse, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(reverse, reverse.T, rtol=1e-12, atol=1e-13)

    @every_penalty
    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_derivative_in_x_and_in_the_step(self, name, seed):
        y, step, x = points(seed)

        def of_x(x: Tensor) -> Tensor:
            return PENALTIES[name].prox(y, step, x)

        def of_step(step: Tensor) -> Tensor:
            return PENALTIES[name].prox(y, step, x)

        for f, at in ((of_x, x), (of_step, torch.tensor(step, dtype=FLOAT64))):
            reverse = torch.func.jacrev(f)(at)
            torch.testing.assert_close(reverse, central(f, at), rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(torch.func.jacfwd(f)(at), reverse, rtol=1e-12, atol=1e-13)

    @every_penalty
    def test_adjoint_identity_and_vmap(self, name):
        penalty = PENALTIES[name]
        ys, vs, ws, xs = 2 * sampled(4, 5, SIZE, seed=11)

        def prox(y: Tensor, x: Tensor) -> Tensor:
            return penalty.prox(y, 0.4, x)

        def forward(y: Tensor, x: Tensor, v: Tensor) -> Tensor:
            return torch.func.jvp(prox, (y, x), (v, v))[1]

        def reverse(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
            return sum(torch.func.vjp(prox, y, x)[1](w))

        tangents = torch.func.vmap(forward)(ys, xs, vs)
        gradients = torch.func.vmap(reverse)(ys, xs, ws)
        torch.testing.assert_close((tangents * ws).sum(1), (gradients * vs).sum(1))
        one_by_one = torch.stack([prox(y, x) for y, x in zip(ys, xs, strict=True)])
        torch.testing.assert_close(torch.func.vmap(prox)(ys, xs), one_by_one)

    @every_penalty
    def test_second_derivative(self, name):
        y, step, x = points(21)

        def prox(y: Tensor) -> Tensor:
            return PENALTIES[name].prox(y, step, x)

        numerical = central(torch.func.jacrev(prox), y)
        for outer in (torch.func.jacrev, torch.func.jacfwd):
            for inner in (torch.func.jacrev, torch.func.jacfwd):
                second = outer(inner(prox))(y)
                torch.testing.assert_close(second, numerical, rtol=1e-7, atol=1e-8)

    @every_penalty
    def test_derivatives_of_every_order_are_finite_at_zero(self, name):
        penalty, x = PENALTIES[name], torch.zeros(SIZE, dtype=FLOAT64)
        origin = torch.zeros(SIZE, dtype=FLOAT64)
        for f in (
            lambda y: penalty.prox(y, 0.4, x),
            lambda x: penalty.prox(origin, 0.4, x),
            lambda y: penalty.penalty(y, x),
        ):
            for outer in (torch.func.jacrev, torch.func.jacfwd):
                for inner in (torch.func.jacrev, torch.func.jacfwd):
                    assert torch.isfinite(inner(f)(origin)).all()
                    assert torch.isfinite(outer(inner(f))(origin)).all()

    @every_penalty
    def test_gradient_of_the_penalty(self, name):
        y, _, x = points(31)
        penalty = PENALTIES[name]
        if name == "ball":
            y = y / 100  # where the indicator is 0
        for f, at in ((lambda y: penalty.penalty(y, x), y), (lambda x: penalty.penalty(y, x), x)):
            torch.testing.assert_close(torch.func.grad(f)(at), central(f, at), rtol=1e-7, atol=1e-8)

    @every_penalty
    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    def test_dtype(self, name, dtype):
        (y, step, x), penalty = points(41), PENALTIES[name]
        y, x = y.to(dtype), x.to(dtype)
        u, eps = penalty.prox(y, step, x), torch.finfo(dtype).eps
        assert (u.dtype, penalty.penalty(u, x).dtype) == (dtype, dtype)
        expected = penalty.prox(y.double(), step, x.double())
        torch.testing.assert_close(u.double(), expected, rtol=20 * eps, atol=20 * eps)
        value = (
            penalty.penalty(u.double(), x.double()) if name != "ball" else torch.zeros(()).double()
        )
        torch.testing.assert_close(penalty.penalty(u, x).double(), value, rtol=20 * eps, atol=0)

    @pytest.mark.parametrize("name", [name for name in PENALTIES if name != "rows"])
    def test_nested_is_the_flat_vector(self, name):
        y, step, x = points(51)
        penalty = PENALTIES[name]
        if name in ("l1", "elastic net"):  # weights of each entry: nested, as y is
            weights = {"l1": (lambda x: nested(x.exp()),)}
            weights["elastic net"] = (*weights["l1"], lambda x: nested(x.sin() + 1))
            of_trees = type(penalty)(*weights[name])
        else:
            of_trees = penalty
        found = of_trees.prox(nested(y), step, x)
        torch.testing.assert_close(flat(found), penalty.prox(y, step, x), rtol=1e-15, atol=0)
        torch.testing.assert_close(of_trees.penalty(found, x), penalty.penalty(flat(found), x))


class TestSubgradients:
    """``(y - u) / step`` is a subgradient of h at ``u = prox(y)``."""

    @PROPERTY
    @given(seed=st.integers(0, 999), step=st.floats(0.05, 3), l2=st.floats(0, 2))
    def test_l1_and_elastic_net(self, seed, step, l2):
        y, weight = 2 * sampled(SIZE, seed=seed), sampled(SIZE, seed=seed + 1).abs()
        for penalty, ridge in ((hl.L1(weight), 0.0), (hl.ElasticNet(weight, l2), l2)):
            u = penalty.prox(y, step)
            subgradient = (y - u) / step - 2 * ridge * u
            zero = u == 0
            assert (subgradient.abs() <= weight * (1 + 1e-13))[zero].all()
            torch.testing.assert_close(subgradient[~zero], (weight * u.sign())[~zero])

    @PROPERTY
    @given(seed=st.integers(0, 999), step=st.floats(0.05, 3))
    def test_group_lasso(self, seed, step):
        y, weight = 2 * sampled(SIZE, seed=seed), sampled(3, seed=seed + 1).abs()
        u = hl.GroupLasso(weight, groups=GROUPS).prox(y, step)
        assert u[5] == y[5]
        for group, w in zip(GROUPS, weight, strict=True):
            subgradient = (y - u)[group] / step
            if u[group].norm() == 0:
                assert subgradient.norm() <= w * (1 + 1e-13)
            else:
                torch.testing.assert_close(subgradient, w * u[group] / u[group].norm())

    @pytest.mark.parametrize("y", [-3.0, -0.4, 0.0, 0.2, 1.7])
    def test_against_a_scalar_minimiser(self, y):
        for penalty in (hl.L1(0.7), hl.ElasticNet(0.7, 0.3), hl.GroupLasso(0.7), hl.L1(0.0)):
            found = optimize.minimize_scalar(
                lambda u, penalty=penalty: (
                    0.9 * float(penalty.penalty(torch.tensor([u], dtype=FLOAT64)))
                    + (u - y) ** 2 / 2
                ),
                bounds=(-5, 5),
                method="bounded",
                options={"xatol": 1e-10},
            )
            u = penalty.prox(torch.tensor([y], dtype=FLOAT64), 0.9)
            assert float(u) == pytest.approx(found.x, abs=1e-7)


class TestMoreau:
    """``y = prox_{s h}(y) + s P(y / s)``, h being the support function of P's set."""

    @PROPERTY
    @given(seed=st.integers(0, 999), step=st.floats(0.05, 3))
    def test_identity(self, seed, step):
        y, weight = 2 * sampled(SIZE, seed=seed), sampled(SIZE, seed=seed + 1).abs()
        for penalty, projection in (
            (hl.L1(weight), hl.Box(-weight, weight)),
            (hl.GroupLasso(0.7), hl.Ball(0.7)),
        ):
            together = penalty.prox(y, step) + step * projection(y / step)
            torch.testing.assert_close(together, y, rtol=1e-13, atol=1e-14)
            jacobian = torch.func.jacrev(lambda y, penalty=penalty: penalty.prox(y, step))(y)
            jacobian = jacobian + torch.func.jacrev(projection)(y / step)
            torch.testing.assert_close(jacobian, torch.eye(SIZE, dtype=FLOAT64))


class TestLasso:
    """The use: a fixed point of the proximal gradient step is the penalised minimiser."""

    def test_fixed_point_and_its_derivative(self):
        data, target = sampled(20, SIZE, seed=1), sampled(20, seed=2)
        lasso = hl.L1(lambda x: x.exp())
        step = 1 / float(torch.linalg.matrix_norm(data, 2)) ** 2

        def following(y: Tensor, x: Tensor) -> Tensor:
            return lasso.prox(y - step * data.T @ (data @ y - target), step, x)

        def solve(x: Tensor) -> Tensor:
            y = torch.zeros(SIZE, dtype=FLOAT64)
            for _ in range(2000):
                y = following(y, x)
            return y

        x = torch.tensor(1.5, dtype=FLOAT64)
        y = solve(x)
        on = y != 0
        assert 0 < int(on.sum()) < SIZE
        # On the support: data^T (data y - target) + e^x sign(y) = 0, and it moves along.
        gram = (data.T @ data)[on][:, on]
        closed = torch.linalg.solve(gram, (data.T @ target)[on] - x.exp() * y.sign()[on])
        torch.testing.assert_close(y[on], closed)
        dy, dx = torch.func.jacrev(following, argnums=(0, 1))(y, x)
        implicit = torch.linalg.solve(torch.eye(SIZE, dtype=FLOAT64) - dy, dx)
        expected = torch.zeros(SIZE, dtype=FLOAT64)
        expected[on] = torch.linalg.solve(gram, -x.exp() * y.sign()[on])
        torch.testing.assert_close(implicit, expected)
        torch.testing.assert_close(implicit, central(solve, x).reshape(-1), rtol=1e-7, atol=1e-8)


class TestElasticNet:
    def test_ridge_is_the_l2_penalty(self):
        y = sampled(SIZE)
        ridge = hl.ElasticNet(0.0, 0.3)
        torch.testing.assert_close(ridge.penalty(y), hl.L2(0.3)(y))
        # u + step * gradient(u) = y
        u = ridge.prox(y, 0.8)
        torch.testing.assert_close(u + 0.8 * hl.L2(0.3).gradient(u), y)

    def test_without_weight_it_is_the_identity_with_its_derivative(self):
        y = torch.tensor([0.0, 1.0], dtype=FLOAT64)
        for penalty in (hl.L1(0.0), hl.ElasticNet(0.0, 0.0), hl.GroupLasso(0.0, groups=[[0]])):
            assert torch.equal(penalty.prox(y, 1.0), y)
            jacobian = torch.func.jacrev(lambda y, penalty=penalty: penalty.prox(y, 1.0))(y)
            assert torch.equal(jacobian, torch.eye(2, dtype=FLOAT64))


class TestGroupLasso:
    def test_rows_are_groups(self):
        """A matrix is a list of explicit groups, its rows; so are the leaves of a tree."""
        y, weight = sampled(2, 3), sampled(2, seed=1).abs()
        explicit = hl.GroupLasso(weight, groups=[[0, 1, 2], [3, 4, 5]])
        rows = hl.GroupLasso({"a": weight[0], "b": weight[1]})
        tree = {"a": y[0], "b": y[1]}
        for found in (
            hl.GroupLasso(weight).prox(y, 0.5),
            torch.stack([*rows.prox(tree, 0.5).values()]),
        ):
            torch.testing.assert_close(found, explicit.prox(y, 0.5), rtol=1e-14, atol=0)
        torch.testing.assert_close(hl.GroupLasso(weight).penalty(y), weight @ y.norm(dim=1))
        torch.testing.assert_close(rows.penalty(tree), weight @ y.norm(dim=1))
        torch.testing.assert_close(explicit.penalty(y), weight @ y.norm(dim=1))

    def test_a_zero_group_stays_zero(self):
        y = torch.tensor([[0.1, 0.2], [0.0, 0.0], [3.0, 4.0]], dtype=FLOAT64)
        jacobian = torch.func.jacrev(lambda y: hl.GroupLasso(1.0).prox(y, 1.0))(y)
        assert not jacobian[:2].any()
        unit = torch.tensor([0.6, 0.8], dtype=FLOAT64)
        expected = 0.8 * torch.eye(2, dtype=FLOAT64) + 0.2 * torch.outer(unit, unit)
        torch.testing.assert_close(jacobian[2, :, 2], expected)

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([], "groups are empty, or one is"),
            ([[0], []], "groups are empty, or one is"),
            ([[0, 1], [1]], "groups overlap"),
            ([[0, -1]], "indices >= 0"),
            ([[0.5]], "indices >= 0"),
        ],
    )
    def test_groups(self, groups, message):
        with pytest.raises(ValueError, match=message):
            hl.GroupLasso(1.0, groups=groups)

    def test_groups_that_do_not_fit_y(self):
        penalty = hl.GroupLasso(1.0, groups=[[0, 3]])
        for call in (penalty.penalty, lambda y: penalty.prox(y, 1.0)):
            with pytest.raises(ValueError, match="the index 3; y has 3 coordinates"):
                call(torch.ones(3))
        with pytest.raises(ValueError, match=r"shape \(3,\); .* broadcasts to \(1,\)"):
            hl.GroupLasso(torch.ones(3), groups=[[0, 1, 2]]).prox(torch.ones(3), 1.0)
        with pytest.raises(ValueError, match=r"a leaf has shape \(\); expected a last axis"):
            hl.GroupLasso(1.0).prox(torch.tensor(1.0), 1.0)


class TestIndicator:
    def test_it_is_the_projection(self):
        y = 3 * sampled(SIZE)
        for step in (0.1, 10.0):
            assert torch.equal(hl.Indicator(hl.Simplex()).prox(y, step), hl.Simplex()(y))

    @PROPERTY
    @given(seed=st.integers(0, 99))
    def test_zero_on_the_set_and_infinite_off_it(self, seed):
        y = 3 * sampled(SIZE, seed=seed)
        for projection in (hl.Simplex(), hl.Ball(1.0), hl.L1Ball(1.0)):
            penalty = hl.Indicator(projection)
            assert penalty.penalty(y) == math.inf
            assert penalty.penalty(projection(y)) == 0
            assert (
                penalty.penalty(projection(y) * (1 + 1e-6)) == math.inf
                or projection != hl.Simplex()
            )

    def test_tolerance(self):
        y = torch.tensor([1.01, 0.0], dtype=FLOAT64)
        assert hl.Indicator(hl.Ball(1.0)).penalty(y) == math.inf
        assert hl.Indicator(hl.Ball(1.0), rtol=0.02).penalty(y) == 0

    def test_arguments(self):
        with pytest.raises(TypeError, match="projection is a float; expected P"):
            hl.Indicator(1.0)
        with pytest.raises(ValueError, match="rtol=-1; expected a number >= 0"):
            hl.Indicator(hl.NonNegative(), rtol=-1)


class TestWeights:
    @pytest.mark.parametrize(
        "make",
        [hl.L1, hl.GroupLasso, lambda w: hl.ElasticNet(w, 1.0), lambda w: hl.ElasticNet(1.0, w)],
    )
    @pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
    def test_values(self, make, value):
        with pytest.raises(ValueError, match="expected a number >= 0"):
            make(value)
        with pytest.raises(ValueError, match=r"1 unsuitable entries of 2; .* a number >= 0"):
            make({"a": torch.tensor([1.0, value])})
        at_x = make(lambda x: x)
        assert at_x.prox(torch.ones(2), 1.0, torch.tensor(value)).isnan().all()
        assert at_x.penalty(torch.ones(2), torch.tensor(value)).isnan()

    @pytest.mark.parametrize("name", [name for name in PENALTIES if name != "none"])
    def test_function_of_x_without_x(self, name):
        y = torch.ones(SIZE)
        for call in (PENALTIES[name].penalty, lambda y: PENALTIES[name].prox(y, 1.0)):
            with pytest.raises(TypeError, match="is a function of x, and x is not given"):
                call(y)

    def test_weights_that_do_not_fit(self):
        with pytest.raises(
            ValueError, match=r"L1: weight has shape \(3,\); .* broadcasts to \(2,\)"
        ):
            hl.L1(torch.ones(3)).prox(torch.ones(2), 1.0)
        with pytest.raises(ValueError, match=r"L1: weight is nested as"):
            hl.L1({"a": 1.0}).prox({"b": torch.ones(2)}, 1.0)
        with pytest.raises(TypeError, match=r"L1: weight is or holds a str"):
            hl.L1("1")
        with pytest.raises(ValueError, match=r"L1: weight holds no number"):
            hl.L1({})

    @pytest.mark.parametrize("name", [name for name in PENALTIES if name != "ball"])
    @pytest.mark.parametrize("step", [0.0, -1.0, math.nan])
    def test_steps(self, name, step):
        y, x = torch.ones(SIZE), torch.ones(SIZE)
        with pytest.raises(ValueError, match=r"step=.*; expected a positive number"):
            PENALTIES[name].prox(y, step, x)


def test_groups_made_inside_a_transform_are_of_use_to_a_solution():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    t = torch.randn(20, generator=generator, dtype=torch.float64)

    def f(x):
        return hl.argmin(
            lambda y, x: ((A @ y - t - x[1]) ** 2).mean(),
            torch.zeros(6, dtype=torch.float64),
            x,
            penalty=hl.GroupLasso(lambda x: x[0].exp(), [[0, 1, 2], [3, 4, 5]]),
        ).sum()

    x = torch.tensor([-1.0, 0.3], dtype=torch.float64)
    h = 1e-5
    units = torch.eye(2, dtype=torch.float64)
    central = torch.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in units])
    torch.testing.assert_close(torch.func.jacfwd(f)(x), central, rtol=1e-6, atol=1e-8)
    batch = torch.stack([x, x + 0.1])
    mapped = torch.func.vmap(torch.func.grad(f))(batch)
    torch.testing.assert_close(mapped[0], central, rtol=1e-6, atol=1e-8)
