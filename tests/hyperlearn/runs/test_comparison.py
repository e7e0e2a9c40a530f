"""The numbers of a comparison against ones worked out by hand or by a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hyperlearn.runs import Run
from hyperlearn.runs.comparison import Spread, compare


def run(losses: list[float], *, every: int = 1, metric: str = "outer_loss", **config: Any) -> Run:
    steps = every * np.arange(len(losses))
    seed = config.pop("seed", 0)
    history = {
        "step": steps,
        "seconds": steps * 0.5,
        "oracle_calls": steps * 12,
        metric: np.array(losses, dtype=float),
    }
    return Run(history=history, config={"label": "a", **config}, environment={"seed": seed})


def costs(comparison: Any, axis: str = "step") -> list[float]:
    return [row.costs[axis].median for row in comparison.rows]


class TestTarget:
    def test_by_hand(self):
        found = compare([run([8, 4, 2, 1]), run([8, 6, 4, 2], every=3)], target=4.0)
        assert costs(found) == [1, 6]
        assert costs(found, "seconds") == [0.5, 3.0]
        assert costs(found, "oracle_calls") == [12, 72]
        assert found.rows[1].ratios == {"step": 6, "seconds": 6, "oracle_calls": 6}
        assert found.rows[0].ratios == {"step": 1, "seconds": 1, "oracle_calls": 1}

    @pytest.mark.parametrize("maximize", [False, True])
    def test_first_record_that_meets_it(self, maximize):
        rng = np.random.default_rng(0)
        runs = [run(list(rng.normal(size=50))) for _ in range(5)]
        for target in rng.normal(size=20):
            found = compare(runs, target=target, maximize=maximize)
            for one, row in zip(runs, found.rows, strict=True):
                expected = math.inf
                for step, value in zip(one.history["step"], one.history["outer_loss"], strict=True):
                    if (value >= target) if maximize else (value <= target):
                        expected = step
                        break
                assert row.costs["step"].median == expected
                assert row.reached == math.isfinite(expected)

    def test_default_is_the_worst_of_the_best(self):
        found = compare([run([8, 1, 3]), run([8, 4, 2]), run([9, 7, 8])])
        assert found.target == 7
        assert [row.best.median for row in found.rows] == [1, 2, 7]
        assert costs(found) == [1, 1, 1]
        assert all(row.reached for row in found.rows)

    def test_accuracies_are_maximized(self):
        runs = [
            run([0.1, 0.5, 0.9], metric="test_accuracy"),
            run([0.1, 0.8], metric="test_accuracy"),
        ]
        found = compare(runs, metric="test_accuracy")
        assert (found.maximize, found.target) == (True, 0.8)
        assert costs(found) == [2, 1]
        assert compare(runs, metric="test_accuracy", maximize=False).target == 0.1

    def test_not_reached(self):
        found = compare([run([8, 4]), run([8, 7])], target=5.0)
        assert costs(found) == [1, math.inf]
        assert [row.reached for row in found.rows] == [1, 0]
        assert found.rows[1].ratios["step"] == math.inf
        # Nothing is known of a ratio to what never came.
        other = compare([run([8, 4]), run([8, 7])], target=5.0, baseline=1)
        assert [math.isnan(row.ratios["step"]) for row in other.rows] == [True, True]

    def test_not_a_number_meets_no_target(self):
        found = compare([run([math.nan, 4, 1]), run([math.nan, math.nan, 2])], target=5.0)
        assert costs(found) == [1, 2]

    def test_a_run_of_nan_alone_does_not_set_the_target(self):
        found = compare([run([8, 4]), run([math.nan])])
        assert found.target == 4
        assert [row.reached for row in found.rows] == [1, 0]

    def test_reached_at_no_cost(self):
        found = compare([run([1, 1]), run([8, 1]), run([1, 8])], target=1.0)
        assert math.isnan(found.rows[0].ratios["step"])
        assert found.rows[1].ratios["step"] == math.inf

    def test_cost_that_was_not_recorded(self):
        bare = Run(history={"step": np.arange(2), "outer_loss": np.array([2.0, 1.0])})
        found = compare([bare, run([2, 1])])
        assert math.isnan(found.rows[0].costs["seconds"].median)
        assert found.rows[0].costs["step"].median == 1


class TestGroups:
    def test_seeds_together(self):
        finals = {0: 3.0, 1: 1.0, 2: 2.0}
        runs = [
            run(
                [8, last],
                label=label,
                seed=seed,
                task={"data_seed": seed},
                checksums={"x0": str(seed)},
            )
            for label in ("a", "b")
            for seed, last in finals.items()
        ]
        found = compare(runs, group=True)
        assert [row.name for row in found.rows] == ["a", "b"]
        assert [row.members for row in found.rows] == [(0, 1, 2), (3, 4, 5)]
        assert found.rows[0].final["outer_loss"] == Spread(2.0, 1.0, 3.0)
        assert str(found.rows[0].final["outer_loss"]) == "2 [1, 3]"

    def test_runs_that_do_not_reach_count_as_infinite(self):
        runs = [run([8, 4, 1], seed=0), run([8, 1, 1], seed=1), run([8, 8, 8], seed=2)]
        found = compare(runs, target=1.0, group=True)
        assert found.rows[0].costs["step"] == Spread(2.0, 1.0, math.inf)
        assert found.rows[0].reached == 2

    def test_other_settings_are_other_groups(self):
        runs = [run([2, 1], method={"step_size": s}, seed=i) for i, s in enumerate([1, 1, 2])]
        found = compare(runs, group=True)
        assert [row.members for row in found.rows] == [(0, 1), (2,)]
        assert [row.name for row in found.rows] == ["a (step_size=1)", "a (step_size=2)"]

    def test_baseline_is_the_group_of_the_run(self):
        runs = [run([2, 1], label="a"), run([2, 1], label="b"), run([2, 1], label="b", seed=1)]
        assert compare(runs, group=True, baseline=2).baseline == 1


class TestSpread:
    def test_against_numpy(self):
        rng = np.random.default_rng(1)
        for count in range(1, 8):
            values = rng.normal(size=count)
            found = Spread.of(list(values))
            assert found.median == pytest.approx(np.median(values), rel=1e-15)
            assert (found.low, found.high) == (values.min(), values.max())

    def test_infinities(self):
        assert Spread.of([math.inf, math.inf]) == Spread(math.inf, math.inf, math.inf)
        assert Spread.of([1, math.inf, 2, math.inf]).median == math.inf

    def test_nan_is_not_hidden(self):
        assert math.isnan(Spread.of([1, math.nan]).median)


class TestSettings:
    def test_those_that_differ(self):
        runs = [
            run([1, 1], method={"class": "A", "step_size": 1.0, "damping": 0}),
            run([1, 1], method={"class": "A", "step_size": 2.0}, seed=4),
            run([1, 1], method={"class": "A", "step_size": 1.0, "damping": 0}),
        ]
        assert compare(runs).settings == {
            "method.step_size": (1.0, 2.0, 1.0),
            "method.damping": (0, None, 0),
            "environment.seed": (0, 4, 0),
        }

    def test_none(self):
        assert compare([run([1]), run([2])]).settings == {}


class TestRefusals:
    @pytest.mark.parametrize(
        ("runs", "options", "message"),
        [
            ([run([1])], {}, "1 runs; expected at least two"),
            ([run([1]), run([1])], {"metric": "outer_los"}, "did you mean 'outer_loss'"),
            ([run([1]), run([1])], {"baseline": 2}, "baseline=2; expected 0 to 1"),
            ([run([1]), run([1])], {"target": math.nan}, "target=nan"),
            ([run([math.nan]), run([math.nan])], {}, "is NaN in all records"),
            ([run([1]), Run()], {}, "has no records yet"),
        ],
    )
    def test_messages(self, runs, options, message):
        with pytest.raises(ValueError, match=message):
            compare(runs, **options)
