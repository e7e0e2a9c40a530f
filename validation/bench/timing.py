"""Rivals timed in turn, and the table and HDF5 record of what came out."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

REPORT = Path("runs/validation/bench.h5")

# What takes less, in seconds, is timed as a loop of about this length.
SHORTEST = 0.02


@dataclass
class Bench:
    """Where to print, and how often to repeat."""

    repeats: int = 5
    console: Console = field(default_factory=lambda: Console(width=120))

    def compare(
        self,
        title: str,
        rivals: Mapping[str, Callable[[], object]],
        note: str | Callable[[dict[str, float]], str] = "",
        *,
        tolerance: float | None,
        beside: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, float]:
        """Time the rivals A B C A B C ...; print and record medians and ratios.

        The first rival is ours: each ratio is rival / ours, pair by pair, so that above 1 is
        faster than the rival. `note` may use the medians, in seconds. What the rivals return must
        agree within `tolerance` (relative 2-norm; None where there is nothing to compare); what is
        `beside` them, limits for instance, is only timed.
        """
        if tolerance is not None:
            agree(rivals, tolerance)
        timed = {**rivals, **(beside or {})}
        loops = {name: _loop(run) for name, run in timed.items()}
        times: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(self.repeats):
            for name, run in timed.items():
                times[name].append(_seconds(run, loops[name]))
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours = next(iter(timed))
        ratios = {
            name: [theirs / mine for theirs, mine in zip(values, times[ours], strict=True)]
            for name, values in times.items()
            if name != ours
        }
        table = Table(title=title, title_justify="left")
        for column in ("", "median, ms", f"time / {ours}", "from", "to"):
            table.add_column(column)
        for name, seconds in medians.items():
            spread = ratios.get(name, [1.0])
            row = (statistics.median(spread), min(spread), max(spread))
            table.add_row(name, _digits(1e3 * seconds), *(f"{ratio:.2f}" for ratio in row))
        self._show(table, note if isinstance(note, str) else note(medians))
        with recorded(title) as group:
            for name, values in ratios.items():
                group[f"ratio of {name}".replace("/", " per ")] = values
            for name, seconds in medians.items():
                group.attrs[f"{name}, median seconds"] = seconds
        return medians

    def table(self, title: str, rows: Mapping[str, Mapping[str, float]], note: str = "") -> None:
        """Print and record numbers that are no times: errors, counts, memory."""
        columns = list(next(iter(rows.values())))
        table = Table(title=title, title_justify="left")
        for column in ("", *columns):
            table.add_column(column)
        for name, row in rows.items():
            table.add_row(name, *(_short(row[column]) for column in columns))
        self._show(table, note)
        with recorded(title) as group:
            group.attrs["rows"] = list(rows)
            for column in columns:
                group[column.replace("/", " per ")] = [row[column] for row in rows.values()]

    def optional(self, package: str) -> Any:
        """The package of a rival; where it is not installed None, and a line that says so."""
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
            self.console.print(f"{package} is not installed: its rows are left out\n")
            return None

    def _show(self, table: Table, note: str) -> None:
        self.console.print(table)
        self.console.print(f"{note}\n", highlight=False)


@contextmanager
def recorded(title: str) -> Iterator[h5py.Group]:
    """The group of one comparison in the report, emptied."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    name = title.replace("/", " per ")
    with h5py.File(REPORT, "a") as file:
        file.pop(name, None)
        yield file.create_group(name)


def agree(rivals: Mapping[str, Callable[[], object]], tolerance: float) -> None:
    """Raise unless each rival returns what the first returns: tensors, arrays, nested alike."""
    (ours, first), *others = rivals.items()
    expected = _numbers(first())
    for name, run in others:
        error = float((_numbers(run()) - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise AssertionError(f"{name} is {error:.1e} off {ours}; expected {tolerance:.0e}")


def _numbers(result: object) -> Tensor:
    leaves = [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(result)]
    return torch.cat([leaf.detach().reshape(-1).double() for leaf in leaves])


def _digits(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _loop(run: Callable[[], object]) -> int:
    """Warm up; runs that make up `SHORTEST`."""
    if _seconds(run, 1) > 1:
        return 1
    return math.ceil(SHORTEST / max(_seconds(run, 1), 1e-6))


def _seconds(run: Callable[[], object], loop: int) -> float:
    start = time.perf_counter()
    for _ in range(loop):
        run()
    return (time.perf_counter() - start) / loop
