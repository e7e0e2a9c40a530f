"""Projections: the closest point of the set, and the derivative of the active set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

import hyperlearn as hl
import solvers
from tests.hyperlearn.problems import FLOAT64, central, flat, nested, sampled

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SIZE = 6


MATRIX = sampled(2, SIZE, seed=70)
LOWER, UPPER = -sampled(SIZE, seed=71).abs(), 0.5 * sampled(SIZE, seed=72).abs()
LOWER[1], UPPER[2], LOWER[3], UPPER[3] = -math.inf, math.inf, -math.inf, math.inf


def weights_on_simplex(*shape: int, seed: int) -> Tensor:
    return torch.softmax(3 * sampled(*shape, seed=seed), -1)


# Each with points of its set (k, SIZE): that P(y) is in the set too is tested apart.
SETS: dict[str, tuple[Callable[..., Any], Callable[[int], Tensor]]] = {
    "ball": (
        hl.Ball(0.8),
        lambda k: 0.8 * sampled(k, SIZE, seed=1) / sampled(k, SIZE, seed=1).norm(dim=1)[:, None],
    ),
    "l1": (
        hl.L1Ball(0.9),
        lambda k: (
            0.9
            * weights_on_simplex(k, SIZE, seed=2)
            * torch.where(sampled(k, SIZE, seed=3) > 0, 1.0, -1.0)
        ),
    ),
    "simplex": (hl.Simplex(1.7), lambda k: 1.7 * weights_on_simplex(k, SIZE, seed=4)),
    "nonnegative": (hl.NonNegative(), lambda k: sampled(k, SIZE, seed=5).relu()),
    "box": (
        hl.Box(LOWER, UPPER),
        lambda k: torch.minimum(torch.maximum(3 * sampled(k, SIZE, seed=6), LOWER), UPPER),
    ),
    "affine": (
        hl.AffineSet(MATRIX, torch.tensor([1.0, -2.0], dtype=FLOAT64)),
        lambda k: (
            torch.linalg.lstsq(MATRIX, torch.tensor([[1.0], [-2.0]], dtype=FLOAT64)).solution.T
            + sampled(k, SIZE, seed=7)
            @ torch.linalg.svd(MATRIX).Vh[2:].T
            @ torch.linalg.svd(MATRIX).Vh[2:]
        ),
    ),
}
every_set = pytest.mark.parametrize("name", list(SETS))


def feasible(name: str, point: Tensor, atol: float) -> bool:
    constraints = {
        "ball": lambda y: [y.norm() - 0.8],
        "l1": lambda y: [y.abs().sum() - 0.9],
        "simplex": lambda y: [(y.sum() - 1.7).abs(), -y.min()],
        "nonnegative": lambda y: [-y.min()],
        "box": lambda y: [(LOWER.to(y) - y).max(), (y - UPPER.to(y)).max()],
        "affine": lambda y: [(MATRIX.to(y) @ y - y.new_tensor([1.0, -2.0])).abs().max()],
    }
    return all(float(excess) <= atol for excess in constraints[name](point))


class TestEverySet:
    @every_set
    @PROPERTY
    @given(seed=st.integers(0, 999), exponent=st.floats(-2, 3))
    def test_closest_point(self, name, seed, exponent):
        """P(y) is in the set, and ``<y - P(y), z - P(y)> <= 0`` for all z of the set."""
        project, points = SETS[name]
        y = 10.0**exponent * sampled(SIZE, seed=seed)
        projected = project(y)
        scale = 1 + float(y.norm())
        assert feasible(name, projected, 1e-14 * scale)
        others = points(30)
        assert all(feasible(name, z, 1e-13) for z in others)
        assert ((others - projected) @ (y - projected)).max() <= 1e-12 * scale**2

    @every_set
    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_idempotent_and_nonexpansive(self, name, seed):
        project, _ = SETS[name]
        y, z = 3 * sampled(2, SIZE, seed=seed)
        torch.testing.assert_close(project(project(y)), project(y), rtol=1e-13, atol=1e-14)
        difference = project(y) - project(z)
        # Firmly so: |P y - P z|^2 <= <P y - P z, y - z>.
        assert difference @ difference <= difference @ (y - z) + 1e-13

    @every_set
    def test_points_of_the_set_stay(self, name):
        project, points = SETS[name]
        for z in points(5):
            torch.testing.assert_close(project(z), z, rtol=1e-13, atol=1e-14)

    @every_set
    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_derivative(self, name, seed):
        """Against central differences; symmetric, as the Jacobian of a gradient is."""
        project, _ = SETS[name]
        y = 2 * sampled(SIZE, seed=seed)
        numerical = central(project, y)
        reverse, forward = torch.func.jacrev(project)(y), torch.func.jacfwd(project)(y)
        torch.testing.assert_close(reverse, numerical, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(reverse, reverse.T, rtol=1e-12, atol=1e-13)

    @every_set
    def test_adjoint_identity_and_vmap(self, name):
        project, _ = SETS[name]
        ys, vs, ws = 2 * sampled(3, 5, SIZE, seed=11)
        _, tangents = torch.func.vmap(lambda y, v: torch.func.jvp(project, (y,), (v,)))(ys, vs)
        gradients = torch.func.vmap(lambda y, w: torch.func.vjp(project, y)[1](w)[0])(ys, ws)
        torch.testing.assert_close((tangents * ws).sum(1), (gradients * vs).sum(1))
        one_by_one = torch.stack([project(y) for y in ys])
        torch.testing.assert_close(torch.func.vmap(project)(ys), one_by_one, rtol=1e-14, atol=1e-15)

    @every_set
    def test_second_derivative(self, name):
        project, _ = SETS[name]
        y = 2 * sampled(SIZE, seed=12)
        second = torch.func.jacfwd(torch.func.jacrev(project))(y)
        numerical = central(torch.func.jacrev(project), y)
        torch.testing.assert_close(second, numerical, rtol=1e-7, atol=1e-8)
        for outer in (torch.func.jacrev, torch.func.jacfwd):
            for inner in (torch.func.jacrev, torch.func.jacfwd):
                torch.testing.assert_close(outer(inner(project))(y), second)

    @every_set
    def test_plain_autograd(self, name):
        project, _ = SETS[name]
        y, w = 2 * sampled(SIZE, seed=13), sampled(SIZE, seed=14)
        leaf = y.clone().requires_grad_()
        project(leaf).backward(w)
        torch.testing.assert_close(leaf.grad, torch.func.jacrev(project)(y).T @ w)

    @pytest.mark.parametrize("name", ["ball", "l1", "affine"])
    def test_nested_is_the_flat_vector(self, name):
        project, _ = SETS[name]
        y = 2 * sampled(SIZE, seed=15)
        assert torch.equal(flat(project(nested(y))), project(y))

    @every_set
    def test_derivatives_of_every_order_are_finite_on_kinks(self, name):
        project, points = SETS[name]
        if name == "box":
            kinks = [torch.where(UPPER.isfinite(), UPPER, 0.0), torch.zeros(SIZE, dtype=FLOAT64)]
        else:
            kinks = [
                torch.zeros(SIZE, dtype=FLOAT64),
                points(1)[0],
                torch.ones(SIZE, dtype=FLOAT64),
            ]
        for y in kinks:
            for outer in (torch.func.jacrev, torch.func.jacfwd):
                for inner in (torch.func.jacrev, torch.func.jacfwd):
                    assert torch.isfinite(inner(project)(y)).all()
                    assert torch.isfinite(outer(inner(project))(y)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    @pytest.mark.parametrize(
        "make",
        [
            lambda dtype: hl.Ball(0.8),
            lambda dtype: hl.L1Ball(0.9),
            lambda dtype: hl.Simplex(1.7),
            lambda dtype: hl.NonNegative(),
            lambda dtype: hl.Box(LOWER.to(dtype), UPPER.to(dtype)),
            lambda dtype: hl.AffineSet(MATRIX.to(dtype), torch.tensor([1.0, -2.0], dtype=dtype)),
        ],
        ids=["ball", "l1", "simplex", "nonnegative", "box", "affine"],
    )
    def test_dtype(self, make, dtype, request):
        name = request.node.callspec.id.split("-")[0]
        y = 2 * sampled(SIZE, seed=16).to(dtype)
        projected = make(dtype)(y)
        assert projected.dtype == dtype
        expected = SETS[name][0](y.double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(projected.double(), expected, rtol=30 * eps, atol=30 * eps)


class TestParameters:
    """What is given as a function of x, and derivatives in x."""

    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_derivative_in_x(self, seed):
        y = 2 * sampled(SIZE, seed=seed)
        matrix = sampled(3, 2, seed=1)
        cases = {
            "ball": (hl.Ball(lambda x: x[0].exp()), 1),
            "l1": (hl.L1Ball(lambda x: x[0].exp()), 1),
            "simplex": (hl.Simplex(lambda x: x[0].exp()), 1),
            "box": (hl.Box(lambda x: -x.exp(), lambda x: x.sin() + 1), SIZE),
            "affine": (hl.AffineSet(sampled(3, SIZE, seed=2), lambda x: matrix @ x), 2),
        }
        for name, (project, size) in cases.items():
            x = 0.3 * sampled(size, seed=seed + 1)
            jacobian = torch.func.jacfwd(lambda x, project=project: project(y, x))(x)
            numerical = central(lambda x, project=project: project(y, x), x)
            torch.testing.assert_close(jacobian, numerical, rtol=1e-7, atol=1e-8, msg=name)
            reverse = torch.func.jacrev(lambda x, project=project: project(y, x))(x)
            torch.testing.assert_close(reverse, jacobian, rtol=1e-12, atol=1e-13)

    def test_a_tensor_is_differentiated_where_the_projection_is_made(self):
        y = 2 * sampled(SIZE)
        for make in (hl.Ball, hl.L1Ball, hl.Simplex):
            radius = torch.tensor(0.7, dtype=FLOAT64)
            jacobian = torch.func.jacrev(lambda r, make=make: make(r)(y))(radius)
            numerical = central(lambda r, make=make: make(r)(y), radius)
            torch.testing.assert_close(jacobian, numerical, rtol=1e-7, atol=1e-8)
            radii = torch.tensor([0.3, 0.7, 9.0], dtype=FLOAT64)
            together = torch.func.vmap(lambda r, make=make: make(r)(y))(radii)
            torch.testing.assert_close(together, torch.stack([make(r)(y) for r in radii]))

    @pytest.mark.parametrize(
        "project",
        [
            hl.Ball(lambda x: x),
            hl.L1Ball(lambda x: x),
            hl.Simplex(lambda x: x),
            hl.Box(0.0, lambda x: x),
            hl.AffineSet(torch.ones(1, 3), lambda x: x),
        ],
    )
    def test_function_of_x_without_x(self, project):
        with pytest.raises(TypeError, match="is a function of x, and x is not given"):
            project(torch.ones(3))

    def test_unsuitable_value_at_x_is_nan(self):
        y, minus = torch.ones(3), torch.tensor(-1.0)
        for project in (
            hl.Ball(lambda x: x),
            hl.L1Ball(lambda x: x),
            hl.Simplex(lambda x: x),
            hl.Box(0.0, lambda x: x),
            hl.AffineSet(torch.ones(1, 3), lambda x: x * math.nan),
        ):
            assert project(y, minus).isnan().all()
        # Only where it is unsuitable: the other members of a batch have their values.
        radii = torch.tensor([-1.0, 1.0])
        found = torch.func.vmap(lambda x: hl.Ball(lambda x: x)(y, x))(radii)
        assert found[0].isnan().all()
        torch.testing.assert_close(found[1], y / 3**0.5)
        # A number can be read at no cost, and is refused.
        with pytest.raises(ValueError, match=r"Ball: radius=-1\.0; expected a positive number"):
            hl.Ball(lambda x: -1.0)(y, minus)

    @pytest.mark.parametrize("make", [hl.Ball, hl.L1Ball, hl.Simplex])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_values(self, make, value):
        with pytest.raises(ValueError, match="expected a positive number"):
            make(value)
        with pytest.raises(ValueError, match=r"1 unsuitable entries of 1; .* a positive number"):
            make(torch.tensor(value))

    @pytest.mark.parametrize("make", [hl.Ball, hl.L1Ball, hl.Simplex, lambda r: hl.Box(r, 1.0)])
    def test_types(self, make):
        with pytest.raises(TypeError, match=r"a str; expected numbers, tensors"):
            make("1")
        with pytest.raises(TypeError, match=r"dtype torch.int64; expected a floating dtype"):
            make(torch.tensor(1))
        with pytest.raises(TypeError, match=r"has dtype torch.float64 on cpu; expected that of y"):
            make(torch.tensor(1.0, dtype=FLOAT64))(torch.ones(3))

    @pytest.mark.parametrize("make", [hl.Ball, hl.L1Ball])
    def test_radius_is_one_number(self, make):
        with pytest.raises(ValueError, match=r"shape \(2,\); expected one that broadcasts to \(\)"):
            make(torch.ones(2))(torch.ones(2))

    def test_y_is_nested_tensors(self):
        for project in (hl.Ball(1.0), hl.Box(0, 1), hl.Simplex(), hl.L1Ball(1.0)):
            with pytest.raises(TypeError, match="y has a leaf of type float"):
                project([1.0])


class TestBall:
    @PROPERTY
    @given(st.integers(0, 99), st.floats(0.1, 5.0), st.floats(-3, 3))
    def test_closed_form(self, seed, radius, exponent):
        """Inside it is the point itself, bit for bit."""
        y = 10.0**exponent * sampled(5, seed=seed)
        tree = hl.Ball(radius)(nested(y))
        if y.norm() <= radius:
            assert torch.equal(flat(tree), y)
        else:
            torch.testing.assert_close(flat(tree), radius * y / y.norm(), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("scale", [0.2, 0.9, 1.1, 5.0])
    def test_derivative(self, scale):
        y, radius = sampled(4), 1.0
        y = scale * y / y.norm()
        jacobian = torch.func.jacrev(hl.Ball(radius))(y)
        expected = torch.eye(4, dtype=FLOAT64)
        if scale > 1:  # the radial direction is lost, the others shrink
            unit = y / y.norm()
            expected = (expected - torch.outer(unit, unit)) / scale
        torch.testing.assert_close(jacobian, expected)

    def test_derivative_at_the_centre(self):
        jacobian = torch.func.jacrev(hl.Ball(1.0))(torch.zeros(3, dtype=FLOAT64))
        assert torch.equal(jacobian, torch.eye(3, dtype=FLOAT64))

    def test_second_derivative_at_the_centre(self):
        def loss(y: Tensor) -> Tensor:
            return (hl.Ball(1.0)(y) ** 2).sum()

        centre, twice = torch.zeros(3, dtype=FLOAT64), 2 * torch.eye(3, dtype=FLOAT64)
        for outer in (torch.func.jacrev, torch.func.jacfwd):
            assert torch.equal(outer(torch.func.jacrev(loss))(centre), twice)


class TestBox:
    @PROPERTY
    @given(st.integers(0, 99), st.floats(-2, 0), st.floats(0.01, 2))
    def test_closed_form(self, seed, lower, width):
        y = 2 * sampled(5, seed=seed)
        upper = lower + width
        projected = flat(hl.Box(lower, upper)(nested(y)))
        for value, result in zip(y.tolist(), projected.tolist(), strict=True):
            assert result == (lower if value < lower else upper if value > upper else value)

    def test_derivative(self):
        y = torch.tensor([-2.0, -0.5, 0.3, 2.0], dtype=FLOAT64)
        jacobian = torch.func.jacrev(hl.Box(-1, 1))(y)
        assert torch.equal(jacobian, torch.diag(torch.tensor([0.0, 1, 1, 0], dtype=FLOAT64)))

    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_bounds_of_each_entry(self, seed):
        y, one, two = 2 * sampled(3, 5, seed=seed)
        lower, upper = torch.minimum(one, two), torch.maximum(one, two)
        expected = torch.from_numpy(np.clip(y.numpy(), lower.numpy(), upper.numpy()))
        assert torch.equal(hl.Box(lower, upper)(y), expected)
        assert torch.equal(flat(hl.Box(nested(lower), nested(upper))(nested(y))), expected)
        half = flat(hl.Box(nested(lower), math.inf)(nested(y)))
        assert torch.equal(half, torch.from_numpy(np.maximum(y.numpy(), lower.numpy())))
        mixed = {"a": -1.0, "b": (lower[2:],)}  # numbers and tensors
        expected = torch.cat([y[:2].clamp(-1.0), torch.maximum(y[2:], lower[2:])])
        assert torch.equal(flat(hl.Box(mixed, math.inf)(nested(y))), expected)

    def test_bound_that_broadcasts(self):
        y = 2 * sampled(4, 3)
        expected = torch.stack(
            [row.clamp(*b) for row, b in zip(y.T, [(0, 1), (-1, 0), (0, 2)], strict=True)], 1
        )
        box = hl.Box(y.new_tensor([0.0, -1.0, 0.0]), y.new_tensor([1.0, 0.0, 2.0]))
        assert torch.equal(box(y), expected)

    def test_equal_bounds_follow_both(self):
        """An entry that both bounds fix moves with them, and not with y."""
        y, x = torch.tensor([-1.0, 3.0], dtype=FLOAT64), torch.tensor(0.5, dtype=FLOAT64)
        box = hl.Box(lambda x: x, lambda x: x)
        assert torch.equal(box(y, x), torch.full((2,), 0.5, dtype=FLOAT64))
        assert torch.equal(torch.func.jacrev(lambda x: box(y, x))(x), torch.ones_like(y))
        assert torch.equal(torch.func.jacrev(lambda y: box(y, x))(y), torch.zeros(2, 2).double())

    def test_infinite_bounds_are_no_bounds(self):
        y = sampled(4)
        free = hl.Box(-math.inf, torch.full((4,), math.inf, dtype=FLOAT64))
        assert torch.equal(free(y), y)
        assert torch.equal(torch.func.jacrev(free)(y), torch.eye(4, dtype=FLOAT64))

    @pytest.mark.parametrize(
        "bounds", [(2.0, 1.0), (math.inf, 0.0), (1.0, torch.tensor([2.0, 0.0]))]
    )
    def test_bounds_that_cross(self, bounds):
        with pytest.raises(ValueError, match=r"Box: lower=.*, upper=.*; expected lower <= upper"):
            hl.Box(*bounds)

    @pytest.mark.parametrize(
        "bounds", [(math.nan, 1.0), (0.0, {"a": torch.tensor([1.0, math.nan])})]
    )
    def test_bounds_that_are_nan(self, bounds):
        with pytest.raises(ValueError, match=r"expected.* a number, not NaN"):
            hl.Box(*bounds)

    def test_bounds_that_do_not_fit(self):
        one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
        with pytest.raises(ValueError, match="cannot be compared"):
            hl.Box(-two, three)
        with pytest.raises(ValueError, match="lower is nested as"):
            hl.Box({"a": -two}, [two])
        with pytest.raises(ValueError, match=r"lower has shape \(3,\); .* broadcasts to \(2,\)"):
            hl.Box(-three, three)(two)
        with pytest.raises(ValueError, match=r"shape \(2,\); expected one that broadcasts to \(1,"):
            hl.Box(-two, two)(one)
        with pytest.raises(ValueError, match=r"lower is nested as"):
            hl.Box({"a": -two}, 1.0)({"b": two})


class TestSimplex:
    @PROPERTY
    @given(
        seed=st.integers(0, 999),
        size=st.integers(1, 9),
        total=st.floats(0.01, 10),
        exponent=st.floats(-2, 3),
    )
    def test_against_bisection(self, seed, size, total, exponent):
        """``max(y - tau, 0)`` sums to the total, with tau from a root finder that sorts nothing."""
        y = 10.0**exponent * sampled(size, seed=seed)
        tau = optimize.brentq(
            lambda tau: float((y - tau).relu().sum()) - total,
            float(y.min()) - 2 * total,
            float(y.max()),
            xtol=1e-15,
            rtol=1e-15,
            maxiter=500,
        )
        scale = 1 + 10.0**exponent
        expected = (y - tau).relu()
        torch.testing.assert_close(hl.Simplex(total)(y), expected, rtol=0, atol=1e-13 * scale)

    def test_one_simplex_a_row(self):
        y = sampled(3, 4, 5)
        totals = 1 + sampled(3, 4).abs()
        found = hl.Simplex(totals)({"a": y})["a"]
        for i in range(3):
            for j in range(4):
                alone = hl.Simplex(float(totals[i, j]))(y[i, j])
                torch.testing.assert_close(found[i, j], alone, rtol=1e-13, atol=1e-15)

    def test_total_of_each_leaf(self):
        y = {"a": sampled(3), "b": sampled(2, 4)}
        found = hl.Simplex({"a": 2.0, "b": torch.tensor([1.0, 3.0], dtype=FLOAT64)})(y)
        assert float(found["a"].sum()) == pytest.approx(2)
        assert found["b"].sum(1).tolist() == pytest.approx([1, 3])

    def test_derivative_is_that_of_the_support(self):
        """``I - 1 1^T / k`` on the k entries that are positive, 0 elsewhere."""
        y = torch.tensor([0.9, -3.0, 0.8, 0.5], dtype=FLOAT64)
        on = (hl.Simplex()(y) > 0).double()
        expected = torch.diag(on) - torch.outer(on, on) / on.sum()
        assert on.tolist() == [1, 0, 1, 1]
        torch.testing.assert_close(torch.func.jacrev(hl.Simplex())(y), expected)

    def test_an_offset_costs_no_digits(self):
        y, offset, simplex = sampled(1000, dtype=torch.float32), 1024.0, hl.Simplex(1000.0)
        y = (y * 1024).round() / 1024  # so that the sum with the offset is exact
        assert torch.equal(simplex(y + offset), simplex(y))
        assert float(simplex(y + offset).sum()) == pytest.approx(1000, rel=1e-5)

    def test_ties_are_shared(self):
        assert hl.Simplex(3.0)(torch.ones(3)).tolist() == [1, 1, 1]

    @pytest.mark.parametrize("shape", [(), (3, 0)])
    def test_leaf_without_a_last_axis(self, shape):
        with pytest.raises(ValueError, match="expected a last axis to project"):
            hl.Simplex()(torch.ones(shape))

    def test_total_that_does_not_fit(self):
        with pytest.raises(
            ValueError, match=r"shape \(3,\); expected one that broadcasts to \(2,\)"
        ):
            hl.Simplex(torch.ones(3))(torch.ones(2, 3))


class TestL1Ball:
    @PROPERTY
    @given(seed=st.integers(0, 999), radius=st.floats(0.05, 6))
    def test_soft_threshold(self, seed, radius):
        """Inside bit for bit; outside one threshold for all, and the norm is the radius."""
        y = sampled(5, seed=seed)
        projected = hl.L1Ball(radius)(y)
        if y.abs().sum() <= radius:
            assert torch.equal(projected, y)
            return
        assert float(projected.abs().sum()) == pytest.approx(radius, rel=1e-14)
        assert (projected * y >= 0).all()
        taken = (y - projected).abs()
        threshold = float(taken[projected != 0][0])
        assert threshold > 0
        torch.testing.assert_close(taken, y.abs().clamp_max(threshold), rtol=1e-12, atol=1e-15)

    def test_derivative_inside_where_entries_are_zero(self):
        y = torch.tensor([0.0, 0.3, 0.0], dtype=FLOAT64)
        assert torch.equal(torch.func.jacrev(hl.L1Ball(1.0))(y), torch.eye(3, dtype=FLOAT64))


class TestNonNegative:
    def test_it_is_a_box(self):
        y = sampled(7)
        assert torch.equal(hl.NonNegative()(nested(y))["a"], hl.Box(0.0, math.inf)(nested(y))["a"])
        assert torch.equal(hl.NonNegative()(y), y * (y > 0))


class TestAffineSet:
    @PROPERTY
    @given(seed=st.integers(0, 999), rows=st.integers(1, 6))
    def test_closed_form(self, seed, rows):
        A, b, y = sampled(rows, 6, seed=seed), sampled(rows, seed=seed + 1), sampled(6, seed=seed)
        pseudoinverse = torch.from_numpy(np.linalg.pinv(A.numpy()))
        expected = y - pseudoinverse @ (A @ y - b)
        tolerance = 1e-14 * float(torch.linalg.cond(A)) ** 2
        found = hl.AffineSet(A, b)(y)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        jacobian = torch.eye(6, dtype=FLOAT64) - pseudoinverse @ A
        found = torch.func.jacrev(hl.AffineSet(A, b))(y)
        torch.testing.assert_close(found, jacobian, rtol=tolerance, atol=tolerance)

    def test_made_inside_a_transform(self):
        A = sampled(2, 5)
        found = torch.func.jacrev(lambda y: hl.AffineSet(A, 1.0)(y))(sampled(5, seed=1))
        torch.testing.assert_close(found, torch.func.jacrev(hl.AffineSet(A, 1.0))(sampled(5)))

    def test_dependent_rows(self):
        with pytest.raises(solvers.SingularError, match="full rank 2: row 1"):
            hl.AffineSet(torch.ones(2, 3), 1.0)

    def test_matrices_that_do_not_fit(self):
        with pytest.raises(TypeError, match=r"A is a torch.float32 \(3,\); expected a floating"):
            hl.AffineSet(torch.ones(3), 1.0)
        with pytest.raises(TypeError, match=r"A is a list; expected a floating"):
            hl.AffineSet([[1.0]], 1.0)
        with pytest.raises(TypeError, match=r"A is a torch.int64 \(1, 2\)"):
            hl.AffineSet(torch.ones(1, 2, dtype=torch.long), 1.0)
        with pytest.raises(ValueError, match=r"shape \(3, 2\); expected no more rows than columns"):
            hl.AffineSet(sampled(3, 2), 1.0)
        with pytest.raises(ValueError, match=r"(?i)nan"):
            hl.AffineSet(torch.tensor([[1.0, math.nan]]), 1.0)
        with pytest.raises(ValueError, match="A has 2 columns, y 3 coordinates"):
            hl.AffineSet(torch.ones(1, 2), 1.0)(torch.ones(3))
        with pytest.raises(TypeError, match=r"A is torch.float32 on cpu; expected that of y"):
            hl.AffineSet(torch.ones(1, 2), 1.0)(torch.ones(2, dtype=FLOAT64))

    def test_right_hand_sides_that_do_not_fit(self):
        with pytest.raises(ValueError, match="b=nan; expected a finite number"):
            hl.AffineSet(torch.ones(1, 2), math.nan)
        with pytest.raises(ValueError, match=r"b has shape \(2,\); .* broadcasts to \(1,\)"):
            hl.AffineSet(torch.ones(1, 2), torch.ones(2))(torch.ones(2))

    def test_matrix_that_is_differentiated_is_refused(self):
        """It would get no derivative from factors made before."""
        with pytest.raises(ValueError, match="A is differentiated or mapped over"):
            hl.AffineSet(torch.ones(1, 2, requires_grad=True), 1.0)
        with pytest.raises(ValueError, match="A is differentiated or mapped over"):
            torch.func.grad(lambda A: hl.AffineSet(A, 1.0)(torch.ones(2)).sum())(torch.ones(1, 2))
