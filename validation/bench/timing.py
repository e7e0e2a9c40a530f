"""Rivals timed in turn, and the table and HDF5 record of what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
from rich.console import Console
from rich.table import Table

REPORT = Path("runs/validation/bench.h5")


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
    ) -> dict[str, float]:
        """Time the rivals A B C A B C ...; print and record medians and ratios.

        The first rival is ours: each ratio is rival / ours, pair by pair, so that above 1 is
        faster than the rival. `note` may use the medians, in seconds. The first round warms up.
        """
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for round_number in range(self.repeats + 1):
            for name, run in rivals.items():
                start = time.perf_counter()
                run()
                if round_number:
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours = next(iter(rivals))
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
            table.add_row(name, f"{1e3 * seconds:.2f}", *(f"{ratio:.2f}" for ratio in row))
        self.console.print(table)
        text = note if isinstance(note, str) else note(medians)
        self.console.print(f"{text}\n", highlight=False)
        self.record(title, medians, ratios)
        return medians

    def record(
        self, title: str, medians: Mapping[str, float], ratios: Mapping[str, list[float]]
    ) -> None:
        """Write one comparison to the report."""
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(REPORT, "a") as file:
            group = file.require_group(title.replace("/", " per "))
            group.clear()
            for name, values in ratios.items():
                group[f"ratio of {name}".replace("/", " per ")] = values
            for name, seconds in medians.items():
                group.attrs[f"{name}, median seconds"] = seconds
