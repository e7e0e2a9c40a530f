"""Order and nonzeros of the inverse factor, against the balls that define them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import operators as ops
from solvers import KLPattern, StructureError
from tests.solvers.kernel.grams import PointGram, cloud, grid, matern52, values_and_laplacians

# Boundary values, a Laplacian alone, a value twice, and value with Laplacian.
MIXED = (
    torch.cat([grid(5), cloud(30), grid(5)[:6], cloud(30)[:10]]),
    torch.tensor([0] * 25 + [2] * 30 + [0] * 6 + [2] * 10),
)
CASES = {
    "values": (cloud(150), None),
    "values and Laplacians": values_and_laplacians(grid(9)),
    "mixed": MIXED,
    "line": (cloud(80, 1), None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ordering", ["derivatives-last", "follow"])
@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("supernodes", [1.0, 1.5, 2.0])
def test_a_column_holds_its_ball_and_no_more_than_a_wider_one(
    case, ordering, neighbours, supernodes
):
    points, orders = CASES[case]
    pattern = KLPattern.of(
        points, orders, rho=2.5, supernodes=supernodes, neighbours=neighbours, ordering=ordering
    )
    n = len(points)
    assert sorted(pattern.order) == sorted(pattern.columns) == list(range(n))
    assert (pattern.order[pattern.inverse_order] == np.arange(n)).all()
    distances = cdist(points.numpy()[pattern.order], points.numpy()[pattern.order])
    assert len(pattern.indices) == pattern.nnz == pattern.pointers[-1]
    for c, j in enumerate(pattern.columns):
        rows = pattern.indices[pattern.pointers[c] : pattern.pointers[c + 1]]
        assert (np.diff(rows) > 0).all()
        assert rows[-1] == j
        ball = np.flatnonzero(distances[j, : j + 1] <= 2.5 * pattern.lengths[j])
        assert set(ball) <= set(rows)
        # The centre of a supernode is at most (ratio - 1) rho l from its columns, and lengths
        # differ by at most the ratio, or by 1.25.
        ratio = max(supernodes, 1.25)
        wider = ratio + 2 * (supernodes - 1)
        assert (distances[j, rows] <= 2.5 * wider * pattern.lengths[j] * (1 + 1e-6)).all()
        if supernodes == 1:
            assert set(ball) == set(rows)


@pytest.mark.parametrize("entries", [1, 500, 10**9])
def test_batches_hold_all_supernodes_once(entries):
    pattern = KLPattern.of(*MIXED)
    end = 0
    seen = []
    for batch in pattern.batches(entries):
        assert batch.first == end
        end = batch.end
        assert batch.entries.sum() == batch.end - batch.first
        rows = np.broadcast_to(batch.rows[:, None], batch.entries.shape)
        seen.append(rows[batch.entries])
        assert len(batch.rows) == 1 or len(batch.rows) * batch.rows.shape[1] ** 2 <= entries
    assert end == pattern.nnz
    np.testing.assert_array_equal(np.concatenate(seen), pattern.order[pattern.indices])


def test_values_come_first_and_derivatives_last_or_next():
    points, orders = values_and_laplacians(cloud(40))
    last = KLPattern.of(points, orders)
    assert (orders[last.order[:40]] == 0).all()
    next_to = KLPattern.of(points, orders, ordering="follow")
    assert (next_to.order[1::2] == next_to.order[::2] + 40).all()
    np.testing.assert_array_equal(next_to.lengths[1::2], next_to.lengths[::2])


def test_the_finest_scale_of_a_grid_is_its_spacing():
    points, orders = values_and_laplacians(grid(9))
    pattern = KLPattern.of(points, orders)
    inside = ((points > 0) & (points < 1)).all(1).numpy()[pattern.order]
    np.testing.assert_allclose(pattern.lengths[81:][inside[81:]], 1 / 8)
    # A corner has two neighbours at that distance.
    assert pattern.lengths[81:].max() <= 2**0.5 / 8 * (1 + 1e-12)


def test_laplacians_alone_take_part_in_the_ordering():
    # There are no values at their points that would screen them.
    pattern = KLPattern.of(grid(9), torch.full((81,), 2))
    alone = KLPattern.of(grid(9))
    np.testing.assert_array_equal(pattern.order, alone.order)
    np.testing.assert_array_equal(pattern.lengths, alone.lengths)


def test_the_pattern_of_an_operator_is_that_of_the_operand_with_points():
    points, orders = values_and_laplacians(cloud(20))
    K = PointGram(matern52, points, orders, 0.3)
    expected = KLPattern.of(points, orders, rho=2.0)
    for A in (K, 2.0 * K + 1e-6 * ops.Identity(40), ops.Diagonal(torch.ones(40).double()) + K):
        found = KLPattern.of_operator(A, rho=2.0)
        np.testing.assert_array_equal(found.order, expected.order)
        assert found.nnz == expected.nnz
    with pytest.raises(StructureError, match="hand over a pattern"):
        KLPattern.of_operator(ops.Identity(3))


def test_a_pattern_in_use_is_found_again():
    points, orders = values_and_laplacians(cloud(20))
    pattern = KLPattern.of(points, orders)
    assert KLPattern.of(points.clone(), orders.int()) is pattern
    others = [
        KLPattern.of(points + 1e-15, orders),
        KLPattern.of(points),
        KLPattern.of(points, orders, rho=2.0),
        KLPattern.of(points, orders, ordering="follow"),
    ]
    assert all(other is not pattern for other in others)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_functionals(n):
    pattern = KLPattern.of(cloud(n))
    assert pattern.nnz == n * (n + 1) // 2
    assert sum(len(batch.rows) for batch in pattern.batches(10)) >= min(n, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.0}, "rho=0.0"),
        ({"supernodes": 0.5}, "supernodes=0.5"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"ordering": "first"}, "ordering='first'"),
        ({"orders": [0, 0]}, r"orders has shape \(2,\); expected \(5,\)"),
        ({"points": torch.zeros(5)}, r"points has shape \(5,\)"),
        ({"points": torch.full((5, 2), torch.nan)}, "NaN"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KLPattern.of(**{"points": cloud(5), **settings})
