"""What a study has found, case by case: verdicts, an HDF5 report, a table, a picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hyperlearn import Certificate

# A claim is violated where the error is more than so many times as large.
FACTOR = 10.0
# A hypergradient is wrong above this relative error: then it must be flagged.
WRONG = 1e-2
# A flag is a false alarm where the error is below this.
RIGHT = 1e-5
FAILURES = ("claim violated", "wrong, not flagged", "disagrees", "no answer")
PACKAGES = ("torch", "numpy", "scipy", "h5py", "hypothesis", "hyperlearn", "jax", "jaxopt")


@dataclass(frozen=True)
class Case:
    """One number that was checked.

    Parameters
    ----------
    group, name, parameters
        What was checked, where, and with which settings.
    error
        True relative error; NaN where there was no answer, infinite where it was not finite.
    claimed
        The relative error that was claimed; NaN where nothing was.
    tolerance
        What the error must not exceed unless it is flagged; NaN where nothing is expected.
    uncertainty
        Relative error of the reference itself, which no one is blamed for.
    flagged
        What warned of it: an exception, a warning, the certificate's doubt; empty for nothing.
    biased
        Whether an approximation was asked for, so that an error need not be flagged.
    valid
        Whether there is a hypergradient: at a saddle point there is a number only, by the formula,
        and an answer that is not flagged is wrong whatever its error.
    seconds
        Of the computation under test.
    certificate
        The fields of a certificate, or of what else was said.
    """

    group: str
    name: str
    parameters: str
    error: float
    claimed: float = math.nan
    tolerance: float = math.nan
    uncertainty: float = 0.0
    flagged: str = ""
    biased: bool = False
    valid: bool = True
    seconds: float = 0.0
    certificate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """Whether there was an answer."""
        return not math.isnan(self.error)

    @property
    def excess(self) -> float:
        """The part of the error that the reference's own does not explain."""
        return max(self.error - self.uncertainty, 0.0)

    @property
    def wrong(self) -> bool:
        """Whether the answer is one that must be flagged."""
        return self.answered and not self.biased and not (self.valid and self.excess <= WRONG)

    @property
    def verdict(self) -> str:
        """What to make of it; one of `FAILURES` is one."""
        if self.answered and self.excess > FACTOR * self.claimed:
            return "claim violated"
        if self.flagged:
            return "false alarm" if self.valid and self.error < RIGHT else "flagged"
        if not self.answered:
            return "no answer"
        if self.biased:
            return "biased, as asked"
        if self.wrong:
            return "wrong, not flagged"
        return "disagrees" if self.excess > self.tolerance else "ok"

    @property
    def failed(self) -> bool:
        """Whether it is a failure of what was checked."""
        return self.verdict in FAILURES


def stated(certificate: Certificate) -> dict[str, Any]:
    """A certificate's fields as numbers and text."""
    fields = asdict(certificate) | {"relative_error": certificate.relative_error}
    return {name: value for name, value in fields.items() if value is not None}


def environment(**more: Any) -> dict[str, Any]:
    """Versions, machine and settings."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


def write(cases: Sequence[Case], path: Path, **attributes: Any) -> None:
    """One dataset a column under ``/cases`` and ``/certificates``; the environment in attributes.

    A number that a certificate does not hold is NaN, a text empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({name for case in cases for name in case.certificate})
    with h5py.File(path, "w") as file:
        file.attrs.update({key: str(value) for key, value in environment(**attributes).items()})
        for column in (
            "group", "name", "parameters", "error", "claimed", "tolerance", "uncertainty",
            "flagged", "biased", "valid", "seconds", "verdict", "failed",
        ):  # fmt: skip
            _column(file, f"cases/{column}", [getattr(case, column) for case in cases])
        for name in names:
            _column(file, f"certificates/{name}", [c.certificate.get(name) for c in cases])


def _column(file: h5py.File, name: str, values: list[Any]) -> None:
    if any(isinstance(value, str) for value in values):
        text = h5py.string_dtype()
        file.create_dataset(name, data=["" if v is None else str(v) for v in values], dtype=text)
    else:
        file[name] = np.array([math.nan if value is None else float(value) for value in values])


def summary(cases: Iterable[Case]) -> dict[str, float]:
    """Counts, and what is claimed by what is true where both are known."""
    cases = list(cases)
    ratios = [
        case.claimed / case.error
        for case in cases
        if math.isfinite(case.claimed) and 0 < case.error < math.inf and not case.flagged
    ]
    return {
        "cases": len(cases),
        "answers": sum(case.answered for case in cases),
        "claims": sum(not math.isnan(case.claimed) for case in cases),
        "claim violated": sum(case.verdict == "claim violated" for case in cases),
        "wrong": sum(case.wrong for case in cases),
        "wrong, not flagged": sum(case.verdict == "wrong, not flagged" for case in cases),
        "disagrees": sum(case.verdict == "disagrees" for case in cases),
        "no answer": sum(case.verdict == "no answer" for case in cases),
        "flagged": sum(bool(case.flagged) for case in cases),
        "false alarms": sum(case.verdict == "false alarm" for case in cases),
        "median claimed/true": float(np.median(ratios)) if ratios else math.nan,
        "largest": max(ratios, default=math.nan),
        "seconds": sum(case.seconds for case in cases),
    }


def show(title: str, rows: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print a row of numbers for each name."""
    table = Table(title=title, title_justify="left")
    columns = list(next(iter(rows.values())))
    for column in ("", *columns):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, *(_short(row[column]) for column in columns))
    console.print(table)


def _short(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if math.isnan(value) else f"{value:.2g}"


def by(cases: Iterable[Case], key: str) -> dict[str, dict[str, float]]:
    """`summary` of the cases that share an attribute, and of all."""
    cases = list(cases)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(getattr(case, key), []).append(case)
    return {name: summary(mine) for name, mine in groups.items()} | {"all": summary(cases)}


def failures(cases: Iterable[Case], console: Console, most: int = 20) -> bool:
    """Print what failed; whether nothing did."""
    failed = [case for case in cases if case.failed]
    for case in failed[:most]:
        console.print(
            f"{case.verdict.upper()}: {case.group}, {case.name} ({case.parameters}): error "
            f"{case.error:.3g}, claimed {case.claimed:.3g}, tolerance {case.tolerance:.3g}, "
            f"reference within {case.uncertainty:.1g} {case.certificate.get('raised', '')}",
            highlight=False,
            markup=False,
        )
    if len(failed) > most:
        console.print(f"... and {len(failed) - most} more")
    return not failed


def picture(cases: Iterable[Case], path: Path) -> None:
    """Claimed against true relative error, log-log, as PNG and PDF next to `path`.

    Above the diagonal a claim is true; below the line of ten times less it is violated. Colours of
    Okabe and Ito, markers besides.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = 1e-17, 1e4
    span = np.array([low, high])
    axes.plot(span, span, color="black", lw=1, label="claimed = true")
    axes.plot(span, span / FACTOR, color="black", lw=1, ls="--", label=f"true = {FACTOR:g} claimed")
    chosen = [case for case in cases if case.answered and not math.isnan(case.claimed)]
    styles = (
        ("not flagged", "#0072B2", "o", lambda case: not case.failed and not case.flagged),
        ("flagged", "#E69F00", "^", lambda case: not case.failed and bool(case.flagged)),
        ("failed", "#D55E00", "X", lambda case: case.failed),
    )
    for label, colour, marker, belongs in styles:
        mine = [case for case in chosen if belongs(case)]
        true = np.clip([case.error for case in mine], low, high)
        claimed = np.clip([case.claimed for case in mine], low, high)
        axes.scatter(
            true, claimed, s=16, c=colour, marker=marker, alpha=0.6, lw=0,
            label=f"{label} ({len(mine)})",
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal",
        xlabel="true relative error", ylabel="claimed relative error",
    )  # fmt: skip
    axes.legend(loc="lower right", frameon=False)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=160)
