"""The ordering of points, against the definition of the maximin ordering."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from solvers.kernel.maximin import RATIO, maximin
from tests.solvers.kernel.grams import cloud, grid

CLOUDS = {
    "grid": grid(17).numpy(),
    "cloud": cloud(300).numpy(),
    "line": cloud(100, 1).numpy(),
    "space": cloud(300, 3).numpy(),
    "two scales": np.concatenate([cloud(100).numpy(), 1e-9 * cloud(100, seed=1).numpy()]),
    "far off": 1e6 + cloud(100).numpy(),
}
SLACK = 1 + 1e-6


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("given", [0, 20])
def test_each_point_is_as_far_as_possible_from_those_before_it(name, given):
    before, points = CLOUDS[name][:given], CLOUDS[name][given:]
    order, lengths = maximin(points, before)
    n = len(points)
    assert sorted(order) == list(range(n))
    placed = np.concatenate([before, points[order]])
    distances = cdist(points[order], placed)
    for j in range(n if given else 1, n):
        to_those_before = distances[j:, : given + j].min(axis=1)
        own, widest = to_those_before[0], to_those_before.max()
        assert own * SLACK >= RATIO * widest
        assert own <= lengths[j] * SLACK
        assert lengths[j] * RATIO <= own * SLACK


def test_the_first_of_all_has_the_length_of_the_box():
    _, lengths = maximin(np.array([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(lengths, [5, 5])


@pytest.mark.parametrize("n", [0, 1])
def test_few_points(n):
    order, lengths = maximin(np.zeros((n, 2)))
    assert order.tolist() == list(range(n))
    assert len(lengths) == n


def test_two_runs_agree():
    first, second = maximin(CLOUDS["cloud"]), maximin(CLOUDS["cloud"])
    np.testing.assert_array_equal(first[0], second[0])
