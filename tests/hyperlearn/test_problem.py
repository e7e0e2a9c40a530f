"""`BilevelProblem`'s checks, the projections and the penalty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hyperlearn as hl

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def problem(**changes: Any) -> hl.BilevelProblem:
    arguments = {
        "inner_loss": lambda y, x: ((y - x) ** 2).sum(),
        "outer_loss": lambda y, x: (y**2).sum(),
        "x0": torch.zeros(2),
        "y0": torch.zeros(2),
    }
    return hl.BilevelProblem(**arguments | changes)


class TestValidation:
    def test_spaces(self):
        found = problem(y0={"a": torch.zeros(2, 3), "b": torch.zeros(())}, x0=[torch.zeros(4)])
        assert (found.y_space.size, found.x_space.size) == (7, 4)

    @pytest.mark.parametrize("name", ["inner_loss", "outer_loss"])
    def test_loss_that_is_none(self, name):
        with pytest.raises(TypeError, match=rf"{name} is a Tensor; expected f\(y, x\)"):
            problem(**{name: torch.zeros(())})

    def test_dtypes(self):
        with pytest.raises(TypeError, match=r"x0 is torch.float64 .* y0 is torch.float32"):
            problem(x0=torch.zeros(2, dtype=FLOAT64))

    @pytest.mark.parametrize("name", ["x0", "y0"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_start_that_is_not_finite(self, name, value):
        start = [torch.zeros(2), torch.tensor([0.0, value, value])]
        with pytest.raises(ValueError, match=f"{name} holds 2 NaN or infinite entries"):
            problem(**{name: start})

    @pytest.mark.parametrize("name", ["x0", "y0"])
    def test_starts_that_are_no_floating_tensors(self, name):
        with pytest.raises(TypeError, match=f"{name} has a leaf of dtype torch.int64"):
            problem(**{name: torch.zeros(2, dtype=torch.long)})
        with pytest.raises(TypeError, match=f"{name} has a leaf of type float"):
            problem(**{name: [1.0]})
        with pytest.raises(TypeError, match=f"{name} is a Linear module"):
            problem(**{name: torch.nn.Linear(2, 2)})

    @pytest.mark.parametrize("name", ["inner_data", "outer_data"])
    def test_data(self, name):
        cases = [
            ((torch.zeros(3), torch.zeros(4)), ValueError, r"lengths \[3, 4\]"),
            (torch.zeros(0, 2), ValueError, "is empty; expected at least one sample"),
            ({"a": torch.tensor([0.0, math.nan])}, ValueError, "holds 1 NaN"),
            (torch.tensor(1.0), TypeError, "without samples"),
            ((torch.zeros(3), [1, 2, 3]), TypeError, "without samples"),
        ]
        for data, error, message in cases:
            with pytest.raises(error, match=f"{name}.*{message}"):
                problem(**{name: data})

    def test_integer_data_are_welcome(self):
        labels = torch.tensor([1, 2, 3])
        found = problem(
            inner_loss=lambda y, x, batch: ((y - x) ** 2).sum(),
            inner_data=(torch.zeros(3, 2), labels),
        )
        assert found.inner_data[1] is labels

    @pytest.mark.parametrize("side", ["inner", "outer"])
    def test_losses_take_a_batch_where_there_is_data_and_only_there(self, side):
        with pytest.raises(
            TypeError, match=rf"{side}_loss\(y, x, batch\), and {side}_data is given"
        ):
            problem(**{f"{side}_data": torch.zeros(3)})
        with pytest.raises(TypeError, match=rf"{side}_loss\(y, x\), and there is no {side}_data"):
            problem(**{f"{side}_loss": lambda y, x, batch: (y**2).sum()})
        problem(**{f"{side}_loss": lambda y, x, *batch: (y**2).sum()})

    def test_data_without_a_tensor(self):
        with pytest.raises(ValueError, match="inner_data holds no tensor"):
            problem(inner_data={})


def nested(vector: Tensor) -> Any:
    return {"a": vector[:2].reshape(1, 2), "b": (vector[2:],)}


class TestBall:
    @PROPERTY
    @given(st.integers(0, 99), st.floats(0.1, 5.0), st.floats(-3, 3))
    def test_closest_point(self, seed, radius, exponent):
        """Inside it is the point itself; outside y - P(y) is normal: <y - Py, z - Py> <= 0."""
        y = 10.0**exponent * sampled(5, seed=seed)
        tree = hl.Ball(radius)(nested(y))
        projected = torch.cat([tree["a"].reshape(-1), tree["b"][0]])
        if y.norm() <= radius:
            assert torch.equal(projected, y)
        else:
            assert float(projected.norm()) == pytest.approx(radius, rel=1e-14)
            for z in sampled(20, 5, seed=seed + 1):
                z = radius * z / z.norm()
                assert (y - projected) @ (z - projected) <= 1e-12 * y.norm()
        again = hl.Ball(radius)(projected)
        torch.testing.assert_close(again, projected, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("scale", [0.2, 0.9, 1.1, 5.0])
    def test_derivative(self, scale):
        y, radius, step = sampled(4), 1.0, 1e-6
        y = scale * y / y.norm()
        jacobian = torch.func.jacrev(hl.Ball(radius))(y)
        columns = [
            (hl.Ball(radius)(y + step * e) - hl.Ball(radius)(y - step * e)) / (2 * step)
            for e in torch.eye(4, dtype=FLOAT64)
        ]
        torch.testing.assert_close(jacobian, torch.stack(columns).T, rtol=1e-8, atol=1e-8)
        if scale > 1:  # the radial direction is lost, the others shrink
            unit = y / y.norm()
            expected = (torch.eye(4, dtype=FLOAT64) - torch.outer(unit, unit)) / scale
            torch.testing.assert_close(jacobian, expected)

    def test_derivative_at_the_centre(self):
        jacobian = torch.func.jacrev(hl.Ball(1.0))(torch.zeros(3, dtype=FLOAT64))
        assert torch.equal(jacobian, torch.eye(3, dtype=FLOAT64))

    def test_dtype(self):
        assert hl.Ball(1.0)(torch.ones(3)).dtype == torch.float32

    @pytest.mark.parametrize("radius", [0.0, -1.0, math.nan])
    def test_radius(self, radius):
        with pytest.raises(ValueError, match="expected a positive number"):
            hl.Ball(radius)


class TestBox:
    @PROPERTY
    @given(st.integers(0, 99), st.floats(-2, 0), st.floats(0.01, 2))
    def test_closest_point(self, seed, lower, width):
        y = 2 * sampled(5, seed=seed)
        tree = hl.Box(lower, lower + width)(nested(y))
        projected = torch.cat([tree["a"].reshape(-1), tree["b"][0]])
        upper = lower + width
        for value, result in zip(y.tolist(), projected.tolist(), strict=True):
            assert result == (lower if value < lower else upper if value > upper else value)

    def test_derivative(self):
        y, box, step = torch.tensor([-2.0, -0.5, 0.3, 2.0], dtype=FLOAT64), hl.Box(-1, 1), 1e-6
        jacobian = torch.func.jacrev(box)(y)
        columns = [
            (box(y + step * e) - box(y - step * e)) / (2 * step)
            for e in torch.eye(4, dtype=FLOAT64)
        ]
        torch.testing.assert_close(jacobian, torch.stack(columns).T, rtol=1e-9, atol=1e-9)
        assert torch.equal(jacobian.diagonal(), torch.tensor([0.0, 1, 1, 0], dtype=FLOAT64))

    @pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
    def test_bounds(self, bounds):
        with pytest.raises(ValueError, match="expected lower < upper"):
            hl.Box(*bounds)


class TestL2:
    @PROPERTY
    @given(st.floats(0, 10), st.integers(0, 20))
    def test_against_autograd(self, weight, seed):
        """``weight |y|^2`` without a half, so that its Hessian is ``2 weight I``."""
        y, penalty = sampled(4, seed=seed), hl.L2(weight)
        assert float(penalty(y)) == pytest.approx(weight * float(y.norm()) ** 2, rel=1e-14)
        torch.testing.assert_close(penalty.gradient(y), torch.func.grad(penalty)(y))
        hessian = torch.func.hessian(penalty)(y)
        torch.testing.assert_close(hessian, penalty.curvature * torch.eye(4, dtype=FLOAT64))

    @pytest.mark.parametrize("weight", [-1e-9, math.nan, math.inf])
    def test_weight(self, weight):
        with pytest.raises(ValueError, match="expected a number >= 0"):
            hl.L2(weight)
