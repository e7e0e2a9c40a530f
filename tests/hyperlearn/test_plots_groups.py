"""Which runs are one line, what it is called, its band against numpy, and long curves thinned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hyperlearn as hl
from hyperlearn.plots.groups import Curve, band, grouped
from hyperlearn.plots.thinning import kept


def run(label: str = "nhgd", seed: int = 0, status: str = "finished", **settings: Any) -> hl.Run:
    config = {"label": label, "method": {"class": "NHGD", **settings}}
    return hl.Run(config=config, environment={"seed": seed}, status=status)


class TestGroups:
    def test_seeds_of_one_method_are_one_line(self):
        runs = [run(seed=0), run("cg10"), run(seed=1), run(seed=2)]
        assert [group.legend for group in grouped(runs)] == [
            "nhgd, median and range of 3 seeds",
            "cg10, seed 0",
        ]

    def test_five_have_quartiles(self):
        (group,) = grouped([run(seed=seed) for seed in range(5)])
        assert group.legend == "nhgd, median and quartiles of 5 seeds"

    def test_one_seed_twice(self):
        (group,) = grouped([run(), run()])
        assert group.legend == "nhgd, median and range of 2 runs"

    def test_other_settings_are_told(self):
        runs = [run(step_size=0.1), run(step_size=0.1, seed=1), run(step_size=1.0), run("cg10")]
        assert [group.name for group in grouped(runs)] == [
            "nhgd, step_size=0.1",
            "nhgd, step_size=1",
            "cg10",
        ]

    def test_settings_of_one_short_name_are_told_in_full(self):
        runs = [run(rtol=0.1, solver={"rtol": 1}), run(rtol=0.2, solver={"rtol": 2})]
        assert grouped(runs)[0].name == "nhgd, method.rtol=0.1, method.solver.rtol=1"

    def test_data_drawn_with_the_seed_are_no_other_setting(self):
        one, other = run(seed=0), run(seed=1)
        one.config |= {"task": {"data_seed": 0}, "checksums": {"inner_data": "a"}}
        other.config |= {"task": {"data_seed": 1}, "checksums": {"inner_data": "b"}}
        assert len(grouped([one, other])) == 1

    def test_alone(self):
        groups = grouped([run(seed=0), run(seed=1)], alone=True)
        assert [group.legend for group in groups] == ["nhgd, seed 0", "nhgd, seed 1"]

    def test_how_runs_ended(self):
        runs = [run(), run(seed=1, status="diverged"), run("cg10", status="killed")]
        assert [group.legend for group in grouped(runs)] == [
            "nhgd, median and range of 2 seeds (1 diverged)",
            "cg10, seed 0 (killed)",
        ]


class TestBand:
    @pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9])
    def test_same_places(self, count):
        x = np.arange(20.0)
        y = np.random.default_rng(0).normal(size=(count, 20))
        found = band([Curve(x, row) for row in y])
        assert found is not None
        low, high = (0.25, 0.75) if count >= 5 else (0, 1)
        np.testing.assert_array_equal(found.x, x)
        np.testing.assert_allclose(found.low, np.quantile(y, low, axis=0))
        np.testing.assert_allclose(found.median, np.median(y, axis=0))
        np.testing.assert_allclose(found.high, np.quantile(y, high, axis=0))

    def test_lines_over_other_places_are_met_exactly(self):
        # Linear interpolation of a line is the line.
        places = [np.array([0.0, 4, 10]), np.linspace(1, 9, 30), np.array([-3.0, 12])]
        found = band([Curve(x, slope * x) for slope, x in zip((1, 2, 5), places, strict=True)])
        assert found is not None
        np.testing.assert_array_equal(found.x, places[1])  # the common range, where most are
        np.testing.assert_allclose(found.low, found.x)
        np.testing.assert_allclose(found.median, 2 * found.x)
        np.testing.assert_allclose(found.high, 5 * found.x)

    def test_range_ends_where_the_shortest_does(self):
        x = np.arange(10.0)
        found = band([Curve(x, x), Curve(x[2:4] + 0.5, np.zeros(2))])
        assert found is not None
        np.testing.assert_array_equal(found.x, [2.5, 3, 3.5])

    def test_nothing_in_common(self):
        assert band([Curve(np.arange(2.0), np.ones(2)), Curve(np.array([5.0]), np.ones(1))]) is None

    def test_one_place_in_common(self):
        found = band(
            [Curve(np.arange(3.0), np.arange(3.0)), Curve(np.array([1.0]), np.ones(1) * 3)]
        )
        assert found is not None
        assert (found.x, found.low, found.median, found.high) == (1, 1, 2, 3)

    def test_a_gap_of_one_is_a_gap(self):
        x = np.arange(5.0)
        y = np.array([1.0, 1, np.nan, 1, 1])
        found = band([Curve(x, y), Curve(x, x)])
        assert found is not None
        for part in (found.low, found.median, found.high):
            assert np.isnan(part[2])
            np.testing.assert_array_equal(np.isnan(part[[0, 4]]), False)


class TestCurve:
    def test_what_is_not_finite(self):
        curve = Curve.of(np.arange(6.0), np.array([np.nan, 1, np.inf, 3, 4, -np.inf]))
        np.testing.assert_array_equal(curve.x, [1, 2, 3, 4])
        np.testing.assert_array_equal(curve.y, [1, np.nan, 3, 4])

    def test_places_in_disorder_or_missing(self):
        curve = Curve.of(np.array([2.0, np.nan, 1]), np.array([20, 0, 10]))
        np.testing.assert_array_equal(curve.x, [1, 2])
        np.testing.assert_array_equal(curve.y, [10, 20])

    def test_for_a_logarithm(self):
        curve = Curve.of(np.arange(5.0), np.array([0.0, 1, -1, 2, 0])).positive()
        np.testing.assert_array_equal(curve.x, [1, 2, 3])
        np.testing.assert_array_equal(curve.y, [1, np.nan, 2])


class TestThinning:
    def test_few_points_stay(self):
        x = np.arange(100.0)
        np.testing.assert_array_equal(kept(x, x), np.arange(100))

    def test_a_million_keep_the_extremes_of_every_column(self):
        generator = np.random.default_rng(0)
        x = np.cumsum(generator.random(1_000_000))
        y, z = generator.normal(size=(2, 1_000_000))
        y[777_777], z[123_456] = 50, -50
        chosen = kept(x, y, z, columns=100)
        assert len(chosen) <= 800
        assert {0, 777_777, 123_456, 999_999} <= set(chosen)
        assert (np.diff(chosen) > 0).all()
        column = np.minimum((100 * (x - x[0]) / (x[-1] - x[0])).astype(int), 99)
        for curve in (y, z):
            for extreme in (np.minimum, np.maximum):
                full, thin = np.zeros(100), np.zeros(100)
                extreme.at(full, column, curve)
                extreme.at(thin, column[chosen], curve[chosen])
                np.testing.assert_array_equal(thin, full)

    def test_gaps_stay(self):
        x = np.arange(10_000.0)
        y = np.sin(x)
        y[5000:5003] = np.nan
        y[2000:2500] = np.nan  # whole columns
        chosen = kept(x, y, columns=50)
        shown = y[chosen]
        assert np.isnan(shown[(chosen >= 5000) & (chosen < 5003)]).any()
        assert np.isnan(shown[(chosen > 2000) & (chosen < 2499)]).all()

    def test_clustered_places(self):
        x = np.concatenate([np.zeros(9000), [1.0]])
        y = np.arange(9001.0)
        assert list(kept(x, y, columns=10)) == [0, 8999, 9000]

    def test_one_place(self):
        assert {0, 500, 8999} <= set(kept(np.ones(9000), np.eye(1, 9000, 500)[0], columns=10))
