"""Runs side by side: how their settings differ, how far they came, and what a target cost them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperlearn.runs.compared import differences
from hyperlearn.runs.frames import flat
from hyperlearn.runs.run import Run
from hyperlearn.runs.summary import COSTS, is_maximized
from hyperlearn.settings import unknown_name

# What a target costs, of the metrics.
AXES = ("step", "seconds", "oracle_calls")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest over runs; of a single one, its number three times.

    NaN where one of them is NaN.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some numbers, infinite ones too."""
        numbers = np.sort(np.asarray(values, dtype=np.float64))
        if np.isnan(numbers).any():
            return cls(math.nan, math.nan, math.nan)
        # Not np.median: that of -inf and inf, or of two that are infinite, would be NaN.
        low, high = numbers[(len(numbers) - 1) // 2], numbers[len(numbers) // 2]
        median = low if low == high else (low + high) / 2
        return cls(float(median), float(numbers[0]), float(numbers[-1]))

    def __str__(self) -> str:
        if self.low == self.high or math.isnan(self.median):
            return f"{self.median:.4g}"
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Row:
    """One run, or several that differ in their seed only.

    Parameters
    ----------
    name
        Method and seed, or method.
    members
        Which runs, as positions among those that were compared.
    final
        Metric -> its value in the last record.
    best
        The best value of the metric that is compared.
    costs
        ``"step"``, ``"seconds"``, ``"oracle_calls"`` -> that of the first record that meets the
        target. Infinite for a run that never does, so also a median where half of them do not;
        NaN where it was not recorded.
    reached
        How many of the runs meet the target.
    ratios
        The median costs, relative to the baseline's. Infinite where the target is not reached; NaN
        where the baseline does not reach it, or both cost nothing.
    """

    name: str
    members: tuple[int, ...]
    final: dict[str, Spread]
    best: Spread
    costs: dict[str, Spread]
    reached: int
    ratios: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Parameters
    ----------
    metric, maximize, target
        What is compared, whether more of it is better, and the value that costs are counted to.
    settings
        Those in which the runs differ: dotted name -> the value in each run, in their order; None
        where a run has none. What is not a setting is called ``environment.``....
    rows
        A run each, or a group of runs.
    baseline
        Position of the row that ratios refer to.
    """

    metric: str
    maximize: bool
    target: float
    settings: dict[str, tuple[Any, ...]]
    rows: tuple[Row, ...]
    baseline: int


def compare(
    runs: Sequence[Run],
    *,
    metric: str = "outer_loss",
    target: float | None = None,
    maximize: bool | None = None,
    baseline: int = 0,
    group: bool = False,
) -> Comparison:
    """How runs differ in their settings, what they reached, and what a target cost them.

    Parameters
    ----------
    runs
        At least two; all have the metric.
    metric
        What is compared.
    target
        Value to reach: costs are those of the first record at which the metric is at most this, or
        at least this where `maximize`. By default the worst of the runs' best values, which all of
        them reach.
    maximize
        Whether more is better; by default where the name has ``accuracy`` or ``auc`` in it.
    baseline
        Position of the run that ratios refer to.
    group
        Take runs together whose settings are the same but for seeds and what follows from them,
        the checksums of data.

    Raises
    ------
    ValueError
        Fewer than two runs, a run without the metric, no value at all, or no such baseline.

    Examples
    --------
    >>> import numpy as np
    >>> fast, slow = (
    ...     Run(history={"step": np.arange(4), "outer_loss": np.array(losses)})
    ...     for losses in ([8.0, 2.0, 1.0, 0.5], [8.0, 4.0, 2.0, 1.0])
    ... )
    >>> comparison = compare([fast, slow])
    >>> comparison.target, [row.costs["step"].median for row in comparison.rows]
    (1.0, [2.0, 3.0])
    >>> comparison.rows[1].ratios["step"]
    1.5
    """
    if len(runs) < 2:
        raise ValueError(f"compare: {len(runs)} runs; expected at least two")
    if not 0 <= baseline < len(runs):
        raise ValueError(f"compare: baseline={baseline}; expected 0 to {len(runs) - 1}")
    if target is not None and math.isnan(target):
        raise ValueError("compare: target=nan; expected a number")
    maximize = is_maximized(metric) if maximize is None else maximize
    curves = [_numbers(run, metric) for run in runs]
    bests = [_best(curve, maximize) for curve in curves]
    if target is None:
        known = [best for best in bests if not math.isnan(best)]
        if not known:
            raise ValueError(f"compare: {metric} is NaN in all records; give a target, or another")
        target = min(known) if maximize else max(known)
    firsts = [_first(curve, target, maximize) for curve in curves]
    costs = [_costs(run, first) for run, first in zip(runs, firsts, strict=True)]
    members = _groups(runs) if group else [(i,) for i in range(len(runs))]
    where = next(i for i, group_ in enumerate(members) if baseline in group_)
    totals = [{a: Spread.of([costs[i][a] for i in m]) for a in AXES} for m in members]
    rows = [
        Row(
            name,
            m,
            _final([runs[i] for i in m]),
            Spread.of([bests[i] for i in m]),
            total,
            sum(firsts[i] is not None for i in m),
            {a: _ratio(total[a].median, totals[where][a].median) for a in AXES},
        )
        for name, m, total in zip(_names(runs, members, group), members, totals, strict=True)
    ]
    return Comparison(metric, maximize, target, _settings(runs), tuple(rows), where)


def _numbers(run: Run, metric: str) -> NDArray[np.float64]:
    if metric not in run.history:
        known = [name for name in run.history if name not in COSTS]
        where = run.name if run.path is None else str(run.path)
        if not known:
            raise ValueError(f"{where} has no records yet")
        raise ValueError(f"{where}: {unknown_name('metric', metric, known)}")
    values = np.asarray(run.history[metric])
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{metric} is text; expected a metric of numbers")
    return values.astype(np.float64)


def _best(curve: NDArray[np.float64], maximize: bool) -> float:
    known = curve[~np.isnan(curve)]
    if not len(known):
        return math.nan
    return float(known.max() if maximize else known.min())


def _first(curve: NDArray[np.float64], target: float, maximize: bool) -> int | None:
    """The first record that meets the target; NaN meets none."""
    met = np.flatnonzero(curve >= target if maximize else curve <= target)
    return int(met[0]) if len(met) else None


def _costs(run: Run, first: int | None) -> dict[str, float]:
    def cost(axis: str) -> float:
        if axis not in run.history:
            return math.nan
        return math.inf if first is None else float(run.history[axis][first])

    return {axis: cost(axis) for axis in AXES}


def _final(runs: Sequence[Run]) -> dict[str, Spread]:
    """Of the metrics that all have, as numbers."""
    names = [
        name
        for name in runs[0].history
        if all(name in r.history and np.asarray(r.history[name]).dtype.kind in "biuf" for r in runs)
    ]
    return {name: Spread.of([float(run.history[name][-1]) for run in runs]) for name in names}


def _ratio(cost: float, reference: float) -> float:
    if not math.isfinite(reference) or (reference == 0 and not cost > 0):
        return math.nan
    return cost / reference if reference else math.inf


def _settings(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    held = [_named(run) for run in runs]
    names = dict.fromkeys(d.name for other in held[1:] for d in differences(held[0], other))
    return {name: tuple(settings.get(name) for settings in held) for name in names}


def _named(run: Run) -> dict[str, Any]:
    surroundings = {f"environment.{name}": v for name, v in flat(run.environment).items()}
    return {**flat(run.config), **surroundings}


def _groups(runs: Sequence[Run]) -> list[tuple[int, ...]]:
    found: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, run in enumerate(runs):
        key = tuple(sorted((k, repr(v)) for k, v in flat(run.config).items() if not _of_seed(k)))
        found.setdefault(key, []).append(i)
    return [tuple(members) for members in found.values()]


def _of_seed(name: str) -> bool:
    first, last = name.split(".")[0], name.split(".")[-1]
    return first == "checksums" or last == "seed" or last.endswith("_seed")


def _names(runs: Sequence[Run], members: Sequence[tuple[int, ...]], group: bool) -> list[str]:
    """Label, or label and seed; what else tells apart those that share it."""
    names = [runs[m[0]].label if group else runs[m[0]].name for m in members]
    return [
        name if names.count(name) == 1 else f"{name} ({tell})"
        for name, tell in zip(names, _telling(runs, members, names), strict=True)
    ]


def _telling(
    runs: Sequence[Run], members: Sequence[tuple[int, ...]], names: Sequence[str]
) -> Iterable[str]:
    for name, m in zip(names, members, strict=True):
        alike = [runs[o[0]] for other, o in zip(names, members, strict=True) if other == name]
        own = _named(runs[m[0]])
        telling = [
            key
            for key in _settings(alike)
            if not key.startswith(("environment.", "checksums.")) and not _of_seed(key)
        ]
        parts = [f"{key.rpartition('.')[2]}={own.get(key)}" for key in telling]
        path = runs[m[0]].path
        yield ", ".join(parts) or ("" if path is None else path.stem) or f"run {m[0] + 1}"
