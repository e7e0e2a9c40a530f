"""Histories and certificates over cost: a panel a metric, a line a method, a band its seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)
from numpy.typing import NDArray

from hyperlearn.plots.groups import Curve, Group, band, grouped
from hyperlearn.plots.picture import (
    COLOURS,
    STYLES,
    destination,
    files_of,
    label,
    legend,
    note,
    picture,
    say,
    tidy,
)
from hyperlearn.plots.thinning import kept
from hyperlearn.runs import Run
from hyperlearn.settings import unknown_name

# What can stand below, and what to call it.
ABSCISSAS = {
    "step": "outer step",
    "seconds": "training time (s)",
    "oracle_calls": "oracle calls",
    "oracle_samples": "oracle calls × batch size",
}
COSTS = (*ABSCISSAS, "gradients", "hessian_products", "cross_products")
CERTIFIED = ("inner_stationarity", "adjoint_residual", "hessian_residual", "error_bound")
Abscissa = Literal["step", "seconds", "oracle_calls", "oracle_samples"]
# A panel's width and height in inches, and the letters of a remark that fit above it.
_WIDTH, _HEIGHT, _LETTERS = 3.2, 2.4, 50
# Beyond so many decades a linear axis shows nothing of the lower ones.
_DECADES = 2


def plot_curves(
    runs: Sequence[Run],
    out: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    x: Abscissa = "seconds",
    spread: Literal["seeds", "none"] = "seeds",
    log: bool | None = None,
) -> Path:
    """Draw metrics of runs over their cost, a panel each.

    Runs of one label and the same settings, whatever their seeds, are one line: the median, in a
    band from the lowest to the highest (2 to 4 runs) or between the quartiles (more), over the
    range of the abscissa that is common to all, interpolated linearly. The legend says which. Runs
    of one label and other settings have these settings in the legend.

    What cannot be drawn (NaN after the first value, infinity, on a logarithmic axis what is not
    positive, runs without records) is counted above the panel. Only the columns that are drawn are
    read; a long curve is thinned out to what can be seen of it, with its spikes.

    Parameters
    ----------
    runs
        From `hyperlearn.load_run` or `hyperlearn.minimize`.
    out
        ``.png``, ``.pdf`` or ``.svg``; replaced if it exists, its folder is made.
    metrics
        Columns of the history. By default all that are not costs: the outer loss, the norm of the
        hypergradient, the problem's own.
    x
        Cost on the abscissa.
    spread
        ``"none"`` draws every run by itself.
    log
        Whether the ordinates are logarithmic; by default those whose values are positive and span
        more than two decades.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        No runs, an unknown metric, abscissa or suffix, or runs whose units differ.

    Examples
    --------
    >>> import tempfile, hyperlearn as hl
    >>> run = hl.Run(history={"seconds": np.arange(3.0), "outer_loss": np.array([4.0, 2.0, 1.0])})
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot_curves([run], folder.name + "/curves.pdf").name
    'curves.pdf'
    """
    source = _Source("metric", lambda run: run.history, lambda run: run.history.get(x))
    if metrics is None:
        known = dict.fromkeys(name for run in runs for name in run.history if name not in COSTS)
        first = [name for name in ("outer_loss", "hypergradient_norm") if name in known]
        metrics = list(dict.fromkeys([*first, *known]))
    return _plot("plot_curves", source, runs, out, metrics, x, spread, log)


def plot_certificates(
    runs: Sequence[Run],
    out: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    x: Abscissa = "seconds",
    spread: Literal["seeds", "none"] = "seeds",
    log: bool | None = True,
) -> Path:
    """Draw how far the hypergradients of runs can be trusted, over their cost.

    Like `plot_curves`, of the certificates; the costs are those of the records that they belong to.

    Parameters
    ----------
    runs, out, x, spread
        As for `plot_curves`.
    metrics
        Fields of `hyperlearn.Certificate`. By default the inner stationarity, the residuals of the
        adjoint in the operator that was used and in the exact Hessian, and the bound on the error.
    log
        As for `plot_curves`; by default all ordinates are logarithmic.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        As for `plot_curves`.

    Examples
    --------
    >>> import tempfile, hyperlearn as hl
    >>> steps = np.arange(3)
    >>> run = hl.Run(
    ...     history={"step": steps, "seconds": 0.1 * steps},
    ...     certificates={"step": steps[1:], "adjoint_residual": np.array([0.1, 0.01])},
    ... )
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot_certificates([run], folder.name + "/certificates.png").name
    'certificates.png'
    """
    source = _Source(
        "field of the certificates",
        lambda run: run.certificates,
        lambda run: _cost_of_certificates(run, x),
    )
    return _plot("plot_certificates", source, runs, out, metrics or CERTIFIED, x, spread, log)


@dataclass(frozen=True)
class _Source:
    """Where columns come from, and where on the abscissa they belong."""

    kind: str
    columns: Callable[[Run], Mapping[str, NDArray[Any]]]
    abscissa: Callable[[Run], NDArray[Any] | None]


def _cost_of_certificates(run: Run, x: str) -> NDArray[Any] | None:
    """What had been spent at each certificate, NaN where there is no record of its step."""
    steps = run.certificates.get("step")
    if steps is None or x == "step":
        return steps
    recorded, costs = run.history.get("step"), run.history.get(x)
    if recorded is None or costs is None or not len(recorded):
        return None
    record = np.minimum(np.searchsorted(recorded, steps), len(recorded) - 1)
    return np.where(recorded[record] == steps, costs[record], np.nan)


def _plot(
    caller: str,
    source: _Source,
    runs: Sequence[Run],
    out: str | Path,
    metrics: Sequence[str],
    x: str,
    spread: str,
    log: bool | None,
) -> Path:
    out = destination(out)
    if not runs:
        raise ValueError(f"{caller}: no runs given")
    for name, value, choices in (
        ("x", x, tuple(ABSCISSAS)),
        ("spread", spread, ("seeds", "none")),
    ):
        if value not in choices:
            raise ValueError(f"{caller}: {unknown_name(name, value, choices)}")
    known = dict.fromkeys(name for run in runs for name in source.columns(run))
    unknown = [name for name in metrics if known and name not in known]
    if unknown and metrics is not CERTIFIED:
        raise ValueError(f"{caller}: {unknown_name(source.kind, unknown[0], known)}")
    names = list(dict.fromkeys(metrics)) if known else []
    units = {name: _unit(runs, name) for name in names}
    groups = grouped(runs, alone=spread == "none")

    columns = 2 if len(names) == 4 else max(1, min(3, len(names)))
    rows = math.ceil(len(names) / columns) or 1
    size = _WIDTH * max(columns, 1.4), _HEIGHT * rows + 0.3 + 0.17 * min(len(groups), 12)
    with picture(out, size) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        if not names:
            say(panels[0], f"no records in {files_of(runs)}")
            return out
        for axes, name in zip(panels, names, strict=False):
            if _draw(axes, source, groups, name, log):
                _label_cost(axes, x)
                axes.set_ylabel(label(name, units[name]))
                tidy(axes)
        handles = [_handle(number, group) for number, group in enumerate(groups)]
        legend(figure, handles, [group.legend for group in groups], size[0])
    return out


def _unit(runs: Sequence[Run], name: str) -> str:
    """The one that all runs have which say one."""
    units = list(dict.fromkeys(run.units[name] for run in runs if run.units.get(name)))
    if len(units) > 1:
        raise ValueError(
            f"{name} is in {' and in '.join(units)} in these runs, which cannot share an axis; "
            "draw them apart, or record one unit"
        )
    return units[0] if units else ""


def _look(number: int) -> dict[str, Any]:
    """Colour and dashes: told apart by either, and 32 of them by both."""
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[(number + turn) % len(STYLES)],
        "linewidth": 1.4,
    }


def _handle(number: int, group: Group) -> Any:
    look = _look(number)
    line = Line2D([], [], **look)
    shade = Patch(color=look["color"], alpha=0.2, linewidth=0)
    return (shade, line) if len(group.runs) > 1 else line


# --- a panel ----------------------------------------------------------------------------------


@dataclass
class _Omitted:
    """What a panel does not show, and why; told above it."""

    values: dict[str, Counter[str]] = field(default_factory=dict)
    runs: dict[str, Counter[str]] = field(default_factory=dict)

    def some(self, why: str, group: Group, count: int) -> None:
        if count:
            self.values.setdefault(why, Counter())[group.name] += count

    def all_of(self, why: str, group: Group, count: int = 1) -> None:
        self.runs.setdefault(why, Counter())[group.name] += count

    def __str__(self) -> str:
        values = [
            f"{count} {why} ({name})"
            for why, counts in self.values.items()
            for name, count in counts.items()
        ]
        runs = [
            f"{why}: {name} ({count} run{'s'[: count > 1]})"
            for why, counts in self.runs.items()
            for name, count in counts.items()
        ]
        return "; ".join(["values not drawn: " + ", ".join(values)] * bool(values) + runs)


def _draw(
    axes: Axes, source: _Source, groups: Sequence[Group], name: str, log: bool | None
) -> bool:
    """One metric of all runs; False, and a text, if there is nothing to draw."""
    omitted = _Omitted()
    curves = [_curves(source, group, name, omitted) for group in groups]
    if log is None:
        log = _wants_log([curve for members in curves for curve in members])
    if log:
        curves = [_positive(*pair, omitted) for pair in zip(groups, curves, strict=True)]
    if not any(curves):
        say(axes, "\n".join(filter(None, [f"no {label(name)} to draw", str(omitted)])))
        return False
    if log:
        _make_log(axes, [curve for members in curves for curve in members])
    for number, (group, members) in enumerate(zip(groups, curves, strict=True)):
        _draw_group(axes, group, members, _look(number), omitted)
    if str(omitted):
        note(axes, str(omitted), _LETTERS)
    return True


def _curves(source: _Source, group: Group, name: str, omitted: _Omitted) -> list[Curve]:
    """A column of each run over its abscissa; of those that have it."""
    curves = []
    for run in group.runs:
        x, y = source.abscissa(run), source.columns(run).get(name)
        if x is None or y is None or not len(y):
            omitted.all_of("no values", group)
            continue
        x, y = np.asarray(x), np.asarray(y)
        if y.dtype.kind not in "biuf":
            omitted.all_of("not numbers", group)
            continue
        if x.shape != y.shape or y.ndim != 1:
            raise ValueError(
                f"{run.name}: {name} has shape {y.shape} and its abscissa {x.shape}; "
                "expected a number for each record"
            )
        curve = Curve.of(x, y)
        if len(curve):
            curves.append(curve)
            # Before its first value a metric was not measured: there is no hypergradient before
            # the first step. What comes after and is not finite went wrong.
            measured = np.flatnonzero(~np.isnan(y))[0]
            gaps = int(np.count_nonzero(~np.isfinite(y[measured:])))
            omitted.some("not finite", group, gaps)
        else:
            omitted.all_of("not measured" if np.isnan(y).all() else "nothing finite", group)
    return curves


def _positive(group: Group, curves: Sequence[Curve], omitted: _Omitted) -> list[Curve]:
    """What a logarithmic axis can show of them."""
    shown = []
    for curve in curves:
        omitted.some("not positive", group, int(np.count_nonzero(curve.y <= 0)))
        positive = curve.positive()
        if len(positive):
            shown.append(positive)
    return shown


def _make_log(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic ordinate; over few decades labelled 0.2 and not 2 × 10⁻¹."""
    axes.set_yscale("log")
    low, high = _range(curves)
    if low > 1e-3 and high < 1e4 and high <= 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    return (
        min(float(np.nanmin(curve.y)) for curve in curves),
        max(float(np.nanmax(curve.y)) for curve in curves),
    )


def _wants_log(curves: Sequence[Curve]) -> bool:
    if not curves:
        return False
    low, high = _range(curves)
    return low > 0 and math.log10(high) - math.log10(low) > _DECADES


def _label_cost(axes: Axes, x: str) -> None:
    """The abscissa; large numbers as 200 k, few enough for none to touch another."""
    axes.set_xlabel(ABSCISSAS[x])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=x != "seconds"))
    if x != "seconds" or axes.get_xlim()[1] > 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _draw_group(
    axes: Axes,
    group: Group,
    curves: Sequence[Curve],
    look: Mapping[str, Any],
    omitted: _Omitted,
) -> None:
    if not curves:
        return
    if len(curves) == 1:
        _draw_line(axes, curves[0].x, curves[0].y, look)
        return
    found = band(curves)
    if found is None:
        omitted.all_of("drawn apart, with no range in common", group, len(curves))
        for curve in curves:
            _draw_line(axes, curve.x, curve.y, look)
        return
    shown = kept(found.x, found.low, found.median, found.high)
    x, low, high = found.x[shown], found.low[shown], found.high[shown]
    axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
    if len(x) == 1:  # an area of no width
        axes.vlines(x, low, high, color=look["color"], alpha=0.4, linewidth=3)
    _draw_line(axes, found.x, found.median, look)


def _draw_line(axes: Axes, x: NDArray[Any], y: NDArray[Any], look: Mapping[str, Any]) -> None:
    shown = kept(x, y)
    x, y = x[shown], y[shown]
    axes.plot(x, y, **look)
    # A point between two gaps, or the only one, is no line.
    present = np.concatenate([[False], ~np.isnan(y), [False]])
    alone = present[1:-1] & ~present[:-2] & ~present[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], color=look["color"], linestyle="none", marker="o", ms=3.5)
