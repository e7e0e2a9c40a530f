"""`solvers.Diagonal`: a division, and what it is refused for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
from operators import Space
from solvers import Diagonal, SingularError, StructureError

numbers = st.floats(1e-100, 1e100) | st.floats(-1e100, -1e-100)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
def test_is_a_division(pairs):
    values, b = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    solver = Diagonal().prepare(ops.Diagonal(values))
    for solve in (solver.solve, solver.solve_transpose):
        x, info = solve(b)
        # The contract scales b there and back: a few roundings.
        torch.testing.assert_close(x, b / values, rtol=1e-14, atol=1e-300)
        assert info.converged
        assert info.iterations == 0


def test_identity_gives_the_right_hand_side():
    b = torch.tensor([3.0, -4.0], dtype=torch.float64)
    x, info = Diagonal().prepare(ops.Identity(2, torch.float64)).solve(b)
    torch.testing.assert_close(x, b, rtol=1e-15, atol=0)
    assert info.residual <= 1e-15


def test_nested():
    space = Space.of({"a": torch.zeros(2, 1), "b": torch.zeros(())})
    A = 4.0 * ops.Identity(space)
    x, _ = Diagonal().prepare(A).solve({"a": torch.full((2, 1), 2.0), "b": torch.tensor(8.0)})
    torch.testing.assert_close(x["a"], torch.full((2, 1), 0.5))
    torch.testing.assert_close(x["b"], torch.tensor(2.0))


def test_zero_on_the_diagonal():
    with pytest.raises(SingularError, match=r"Diagonal\(2, 2\) has a zero on its diagonal"):
        Diagonal().prepare(ops.Diagonal(torch.tensor([1.0, 0.0])))
    with pytest.raises(SingularError, match=r"zero on its diagonal"):
        Diagonal().prepare(0.0 * ops.Identity(2))


def test_other_operators():
    with pytest.raises(
        StructureError, match=r"Diagonal needs an operators\.Diagonal; got Dense\(2, 2\)"
    ):
        Diagonal().prepare(ops.Dense(torch.eye(2), symmetric=True))
    A = ops.Dense(torch.eye(2), symmetric=True, lower_triangular=True)  # not held entry by entry
    assert A.diagonal
    with pytest.raises(StructureError, match=r"operators\.Diagonal.*; got Dense"):
        Diagonal().prepare(A)
