"""Runs that differ in nothing but their seeds as one: who belongs together, and their spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperlearn.runs import Run
from hyperlearn.runs.compared import differences
from hyperlearn.runs.frames import flat

Array = NDArray[np.floating[Any]]
# So many runs have quartiles; of fewer the range is shown.
QUARTILES = 5
_MOST_SETTINGS = 3


@dataclass(frozen=True)
class Group:
    """Runs of one method and the same settings.

    Parameters
    ----------
    name
        Its method, and the settings that tell it from another group of that name.
    runs
        At least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def legend(self) -> str:
        """What to call its line: with the seed, or with what the band around the line is."""
        return f"{self.name}, {self._which}{self._ends}"

    @property
    def _which(self) -> str:
        seeds = [run.environment.get("seed", "?") for run in self.runs]
        if len(seeds) == 1:
            return f"seed {seeds[0]}"
        spread = "quartiles" if len(seeds) >= QUARTILES else "range"
        kind = "seeds" if len(set(map(str, seeds))) == len(seeds) else "runs"
        return f"median and {spread} of {len(seeds)} {kind}"

    @property
    def _ends(self) -> str:
        """How the runs ended that did not finish."""
        ends = Counter(run.status for run in self.runs if run.status != "finished")
        if len(self.runs) == 1:
            return "".join(f" ({status})" for status in ends)
        return "".join(f" ({count} {status})" for status, count in ends.items())


def grouped(runs: Sequence[Run], *, alone: bool = False) -> list[Group]:
    """Runs of the same label and settings together, in the order of their first ones.

    Parameters
    ----------
    runs
        In any order.
    alone
        Every run in a group of its own.
    """
    members: list[list[Run]] = []
    for run in runs:
        same = (
            g for g in members if not alone and g[0].label == run.label and not _told(g[0], run)
        )
        group = next(same, None)
        if group is None:
            members.append([run])
        else:
            group.append(run)
    return [Group(_name(group[0], [g[0] for g in members]), tuple(group)) for group in members]


def _told(one: Run, other: Run) -> list[str]:
    """Settings in which two runs differ, but for seeds and the data that were drawn with them."""
    names = [difference.name for difference in differences(one.config, other.config)]
    return [
        name
        for name in names
        if not name.endswith("seed") and name.partition(".")[0] != "checksums"
    ]


def _name(run: Run, all_runs: Sequence[Run]) -> str:
    """The label and, where others of that label have other settings, these."""
    others = [other for other in all_runs if other.label == run.label]
    names = list(dict.fromkeys(name for other in others for name in _told(others[0], other)))
    short = Counter(name.rpartition(".")[2] for name in names)
    settings = flat(run.config)
    told = []
    for name in names:
        if name in settings:
            last = name.rpartition(".")[2]
            told.append(f"{last if short[last] == 1 else name}={_shown(settings[name])}")
    more = [f"{len(told) - _MOST_SETTINGS} more"] if len(told) > _MOST_SETTINGS else []
    return ", ".join([run.label, *told[:_MOST_SETTINGS], *more])


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


@dataclass(frozen=True)
class Curve:
    """A line: ascending places, and values there, NaN for a gap; neither end is a gap."""

    x: Array
    y: Array

    @classmethod
    def of(cls, x: Array, y: Array) -> Curve:
        """From records: without infinities, and without what has no place."""
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        placed = np.isfinite(x)
        if not placed.all():
            x, y = x[placed], y[placed]
        if (np.diff(x) < 0).any():
            order = np.argsort(x, kind="stable")
            x, y = x[order], y[order]
        return cls(x, np.where(np.isfinite(y), y, np.nan)).trimmed()

    def trimmed(self) -> Curve:
        """Without gaps at its ends."""
        measured = np.flatnonzero(~np.isnan(self.y))
        shown = slice(measured[0], measured[-1] + 1) if len(measured) else slice(0, 0)
        return Curve(self.x[shown], self.y[shown])

    def positive(self) -> Curve:
        """With gaps where a logarithm has no value."""
        return Curve(self.x, np.where(self.y > 0, self.y, np.nan)).trimmed()

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Band:
    """The median of curves, and how far they spread around it."""

    x: Array
    low: Array
    median: Array
    high: Array


def band(curves: Sequence[Curve]) -> Band | None:
    """Median and range of 2 to 4 curves, median and quartiles of more, place by place.

    Taken at the places of the curve that has most, within the range common to all; the others are
    interpolated linearly. A gap in one curve is a gap.

    Parameters
    ----------
    curves
        None of them empty.

    Returns
    -------
    Band or None
        None if there is no common range.

    Examples
    --------
    >>> x = np.arange(3.0)
    >>> found = band([Curve(x, x), Curve(x, 2 * x), Curve(x, 9 * x)])
    >>> found.median, found.high
    (array([0., 2., 4.]), array([ 0.,  9., 18.]))
    """
    first, last = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    if first > last:
        return None
    densest = max(curves, key=len).x
    inside = densest[(densest > first) & (densest < last)]
    x = np.concatenate([[first], inside, [last] if last > first else []])
    values = np.sort([np.interp(x, curve.x, curve.y) for curve in curves], axis=0)
    gaps = np.isnan(values[-1])  # sorted last
    values[:, gaps] = np.nan
    if len(curves) < QUARTILES:
        return Band(x, values[0], _quantile(values, 0.5), values[-1])
    low, median, high = (_quantile(values, q) for q in (0.25, 0.5, 0.75))
    return Band(x, low, median, high)


def _quantile(ordered: NDArray[np.floating[Any]], q: float) -> Array:
    """As `numpy.quantile` along the first axis, of what is sorted already: much faster."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above, weight = min(below + 1, len(ordered) - 1), place - below
    return (1 - weight) * ordered[below] + weight * ordered[above]
