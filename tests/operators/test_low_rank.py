"""`LowRankPlusDiagonal` against ``diag(d) + U^T diag(w) U`` written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
from operators import LowRankPlusDiagonal, Space

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def operators(draw, size=None):
    """Pair of an operator and its matrix; T from 0 to beyond n, weights and d of any sign."""
    n = size or draw(st.integers(1, 6))
    count = draw(st.integers(0, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, weights = normal(count, n), normal(count)
    if draw(st.booleans()):
        weights = weights.abs()
    scalar = draw(st.booleans())
    d = normal() if scalar else normal(n)
    if draw(st.booleans()):
        d = d.abs()
    matrix = torch.diag(d.expand(n)) + rows.T @ torch.diag(weights) @ rows
    return LowRankPlusDiagonal(rows, d, weights), matrix


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@PROPERTY
@given(operators())
def test_is_its_matrix(pair):
    A, matrix = pair
    close(A.to_dense(), matrix)
    assert A.T is A
    assert A.low_rank_plus_diagonal
    smallest = float(torch.linalg.eigvalsh(matrix).min())
    if A.positive_definite:
        assert smallest > 0
    if A.positive_semidefinite:
        assert smallest >= -1e-13


@PROPERTY
@given(st.data(), st.integers(1, 5), st.floats(-3, 3))
def test_closed_under_sums_diagonals_and_multiples(data, n, factor):
    (A, a), (B, b) = data.draw(operators(n)), data.draw(operators(n))
    values = torch.linspace(-1, 1, n, dtype=torch.float64)
    D, d = ops.Diagonal(values), torch.diag(values)
    for result, matrix, rank in (
        (A + B, a + b, A.rank + B.rank),
        (A - B, a - b, A.rank + B.rank),
        (A + D, a + d, A.rank),
        (D + A, d + a, A.rank),
        (factor * A, factor * a, A.rank),
        (D - factor * A, d - factor * a, A.rank),
    ):
        assert isinstance(result, LowRankPlusDiagonal)
        assert result.rank == rank
        close(result.to_dense(), matrix)
        smallest = float(torch.linalg.eigvalsh(matrix).min())
        assert not result.positive_definite or smallest > 0
        assert not result.positive_semidefinite or smallest >= -1e-12


def test_definiteness_is_looked_up_from_weights_and_diagonal():
    rows = torch.tensor([[1.0, 1.0]])
    definite = LowRankPlusDiagonal(rows, 0.5)
    assert definite.positive_definite
    semidefinite = LowRankPlusDiagonal(rows, 0.0)
    assert semidefinite.positive_semidefinite
    assert not semidefinite.positive_definite
    mixed = LowRankPlusDiagonal(rows, 0.5, torch.tensor([-0.1]))
    assert mixed.symmetric
    assert not mixed.positive_semidefinite  # it is definite, but that takes a factorisation


def test_a_sum_may_gain_definiteness():
    rows = torch.tensor([[1.0, 1.0]])
    total = LowRankPlusDiagonal(rows, -1.0) + 1.5 * ops.Identity(2)
    assert total.positive_definite
    assert (LowRankPlusDiagonal(rows, 0.0) + 0.1 * ops.Identity(2)).positive_definite


def test_multiples_of_a_semidefinite_one_stay_so():
    A = LowRankPlusDiagonal(torch.tensor([[1.0, 1.0]]), 0.0)
    assert (2.0 * A).positive_semidefinite
    assert (0.0 * A).positive_semidefinite
    assert not (-1.0 * A).positive_semidefinite
    assert not (torch.tensor(2.0) * A).positive_semidefinite  # of a sign not known before tracing


def test_nested_space_is_kept_by_the_algebra():
    space = Space.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
    rows = torch.arange(10.0).reshape(2, 5)
    A = LowRankPlusDiagonal(rows, 1.0, space=space)
    for result in (2.0 * A, A + ops.Identity(5), ops.Identity(5) + A, A + A):
        assert result.domain == space


def test_gradients_with_respect_to_every_part():
    generator = torch.Generator().manual_seed(0)
    rows, d, weights, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 4), (4,), (3,), (4,))
    )

    def product(rows, d, weights):
        return LowRankPlusDiagonal(rows, d, weights) @ v

    arguments = [part.requires_grad_() for part in (rows, d, weights)]
    assert torch.autograd.gradcheck(product, arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), 1.0), ValueError, r"rows has shape \(3,\); expected \(T, n\)"),
        (
            (torch.ones(2, 3), torch.ones(2)),
            ValueError,
            r"diagonal has shape \(2,\).*\(\) or \(3,\)",
        ),
        ((torch.ones(2, 3), 1.0, torch.ones(3)), ValueError, r"weights has shape \(3,\).*\(2,\)"),
        ((torch.ones(2, 3), 1.0, torch.ones(2).double()), TypeError, r"weights has dtype.*float64"),
    ],
)
def test_parts_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        LowRankPlusDiagonal(*arguments)


def test_spaces_that_do_not_fit():
    with pytest.raises(ValueError, match=r"rows has length 3, but the space has size 4"):
        LowRankPlusDiagonal(torch.ones(2, 3), 1.0, space=Space.flat(4, torch.float32))
    with pytest.raises(TypeError, match=r"the space has dtype torch.float64"):
        LowRankPlusDiagonal(torch.ones(2, 3), 1.0, space=Space.flat(3, torch.float64))
