"""`DenseLU`: when a matrix is singular; what all dense solvers share is in `test_dense.py`."""

from __future__ import annotations

import pytest
import torch

import operators as ops
from solvers import DenseLU, SingularError


class TestSingularToRounding:
    def test_is_refused_whatever_the_units(self):
        n = 5
        rcond = n * torch.finfo(torch.float64).eps
        generator = torch.Generator().manual_seed(0)
        regular = torch.randn(n, n, generator=generator, dtype=torch.float64)
        units = torch.logspace(-12, 12, n, dtype=torch.float64)
        scaled = units[:, None] * regular * units.flip(0)
        factor = DenseLU(rcond=rcond).prepare(ops.Dense(scaled))
        b = scaled @ torch.ones(n, dtype=torch.float64)
        assert factor.solve(b).info.converged
        singular = regular.clone()
        singular[0] = singular[1] + singular[2]
        DenseLU().prepare(ops.Dense(singular))  # no pivot is exactly zero
        for matrix in (singular, units[:, None] * singular):
            with pytest.raises(SingularError, match="singular to rounding"):
                DenseLU(rcond=rcond).prepare(ops.Dense(matrix))

    def test_names_the_member_of_a_batch(self):
        good = torch.eye(3, dtype=torch.float64)
        bad = torch.tensor([[1.0, 1, 0], [1, 1 + 1e-15, 0], [0, 0, 1]], dtype=torch.float64)
        stack = ops.Stacked([ops.Dense(good), ops.Dense(bad), ops.Dense(good)])
        DenseLU().prepare(stack)
        with pytest.raises(SingularError, match="member 1"):
            DenseLU(rcond=1e-14).prepare(stack)

    @pytest.mark.parametrize("rcond", [-1.0, 1.0])
    def test_bad_settings(self, rcond):
        with pytest.raises(ValueError, match="rcond"):
            DenseLU(rcond=rcond)
