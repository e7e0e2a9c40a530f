"""`BilevelProblem`'s checks, and the penalty."""

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
