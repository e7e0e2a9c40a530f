"""`solvers.Permutation`: exact to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
from solvers import StructureError
from solvers.structured.permutation import Permutation


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.permutations(range(7)))
def test_exact(order):
    """Powers of two survive the scaling of the contract to the last bit."""
    P = ops.Permutation(torch.tensor(order), dtype=torch.float64)
    b = 2.0 ** torch.arange(7, dtype=torch.float64)
    block = torch.stack([b, -b.flip(0)], 1)
    prepared = Permutation().prepare(P)
    x, info = prepared.solve(block)
    torch.testing.assert_close(x, P.T @ block, rtol=1e-15, atol=0)
    torch.testing.assert_close(P @ x, block, rtol=1e-15, atol=0)
    assert info.residual <= 1e-15
    y = prepared.solve_transpose(block).value
    torch.testing.assert_close(y, P @ block, rtol=1e-15, atol=0)


def test_nested_and_half_precision():
    space = ops.Space.of(
        {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(1, dtype=torch.bfloat16)}
    )
    P = ops.Permutation(torch.tensor([2, 0, 1]), space)
    b = {"a": torch.tensor([1.0, 2.0]).bfloat16(), "b": torch.tensor([4.0]).bfloat16()}
    x = Permutation(rtol=0.05).prepare(P).solve(b).value
    torch.testing.assert_close(space.ravel(P @ x), space.ravel(b), rtol=0.05, atol=0)


def test_other_operators():
    with pytest.raises(StructureError, match=r"operators\.Permutation; got Identity"):
        Permutation().prepare(ops.Identity(3))
