"""What a sweep has found: medians with their spread over seeds, a row a method and grid point."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hyperlearn.sweep.execution import Outcome


@dataclass(frozen=True)
class Spread:
    """Of some numbers: the median, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """NaN if one of the values is."""
        return cls(float(np.median(values)), float(np.min(values)), float(np.max(values)))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Summary:
    """Of the runs that differ in nothing but their seed.

    Parameters
    ----------
    label
        Of the method.
    point
        Place in the grid.
    statuses
        ``status -> runs``.
    values
        ``metric -> spread`` of its last value, and ``seconds``: of the finished runs alone. Empty
        if there are none.
    """

    label: str
    point: Mapping[str, Any]
    statuses: Mapping[str, int]
    values: Mapping[str, Spread]


def summarise(outcomes: Iterable[Outcome]) -> list[Summary]:
    """A row a method and grid point, in the order of the outcomes.

    Metrics are the outer loss and those of the problem.
    """
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in outcomes:
        planned = outcome.planned
        groups.setdefault((planned.label, *planned.point.items()), []).append(outcome)
    rows = []
    for group in groups.values():
        finals = [o.final for o in group if o.status == "finished"]
        names = dict.fromkeys(name for o in group for name in (*o.metrics, "seconds"))
        values = {
            name: Spread.of([final[name] for final in finals if name in final])
            for name in names
            if any(name in final for final in finals)
        }
        planned = group[0].planned
        statuses = Counter(o.status for o in group)
        rows.append(Summary(planned.label, planned.point, statuses, values))
    return rows


def write_summary(rows: Sequence[Summary], path: str | Path) -> None:
    """The rows as CSV: method, settings, runs by status, then three columns a metric."""
    settings = dict.fromkeys(key for row in rows for key in row.point)
    statuses = dict.fromkeys(status for row in rows for status in row.statuses)
    metrics = dict.fromkeys(name for row in rows for name in row.values)
    lines: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {"method": row.label, **row.point}
        line |= {status: row.statuses.get(status, 0) for status in statuses}
        for name, spread in row.values.items():
            line |= {
                f"{name}_median": spread.median,
                f"{name}_min": spread.low,
                f"{name}_max": spread.high,
            }
        lines.append(line)
    columns = [f"{name}_{part}" for name in metrics for part in ("median", "min", "max")]
    # newline="": the csv module ends lines itself.
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", *settings, *statuses, *columns], restval="")
        writer.writeheader()
        writer.writerows(lines)
