"""The picture of a PDE run: solution and error, points, what the kernel learnt, convergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import (
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)
from numpy.typing import NDArray

from hyperlearn.plots.colours import DIVERGING, SEQUENTIAL, Colours
from hyperlearn.plots.picture import (
    COLOURS,
    STYLES,
    as_array,
    destination,
    label,
    note,
    picture,
    say,
    tidy,
)
from hyperlearn.plots.thinning import kept
from hyperlearn.runs import Field, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
Panel = Callable[[Axes], None]
POINTS = "points/"
COLUMNS = 3
# Of a panel in inches, and the letters of a remark that fit above it.
_WIDTH, _HEIGHT, _LETTERS = 3.5, 2.9, 42
_ERRORS = "magma"
_MARKS = "os^Dv"
# Beyond this ratio of its values a curve is drawn on a logarithmic axis.
_FAR = 5


def is_pde(run: Run) -> bool:
    """Whether it says at which points its equations hold; reads nothing."""
    return any(name.startswith(POINTS) for name in run.attachments)


def plot_pde(run: Run, out: str | Path) -> Path:
    """Draw a run of an experiment with a PDE into one picture.

    A row for each field that has a reference: the solution, and the size of its error in colours on
    a logarithmic scale, whose lowest colour is that of the smallest 2 %; above it the root mean
    square and the largest error. Then the points at which each equation holds; other fields that
    were found; the learnt length-scales where they are functions, and otherwise the path of the
    kernel's parameters over the steps, if it was recorded; errors and the outer loss over training
    time. A run without a result (killed) has points and curves only.

    Parameters
    ----------
    run
        From `hyperlearn.load_run` or `hyperlearn.minimize`. Its result holds `hyperlearn.Field` s
        ``NAME`` with ``NAME_reference`` or ``NAME_error``, its attachments ``points/EQUATION``.
    out
        ``.png``, ``.pdf`` or ``.svg``; replaced if it exists, its folder is made.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        The run has neither points nor fields, or another suffix.

    Examples
    --------
    >>> import tempfile, torch, hyperlearn as hl
    >>> x = torch.linspace(0, 1, 20)
    >>> u = hl.Field(torch.outer(x, x), {"x": x, "y": x})
    >>> run = hl.Run(
    ...     result={"u": u, "u_error": hl.Field(1e-3 * torch.outer(1 + x, x), {"x": x, "y": x})},
    ...     attachments={"points/interior": torch.rand(50, 2)},
    ...     history={"seconds": np.arange(3.0), "outer_loss": np.array([4.0, 2.0, 1.0])},
    ... )
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot_pde(run, folder.name + "/pde.png").name
    'pde.png'
    """
    out = destination(out)
    found = _Found.of(run)
    if not found.solutions and not is_pde(run):
        raise ValueError(
            f"plot_pde: {run.name} of {run.config.get('problem', 'a problem')!s} has neither "
            "points of equations nor fields with a reference; the kinds curves and fields draw it"
        )
    panels = _panels(run, found)
    rows = -(-len(panels) // COLUMNS)
    with picture(out, (_WIDTH * COLUMNS, _HEIGHT * rows)) as figure:
        _lay_out(figure, panels, rows)
        figure.draw_without_rendering()  # the layout takes two turns
    return out


def _lay_out(figure: Figure, panels: Sequence[Panel], rows: int) -> None:
    """Row by row; the last panel is as wide as what is left of its row."""
    grid = figure.add_gridspec(rows, COLUMNS)
    for k, draw in enumerate(panels):
        row, column = divmod(k, COLUMNS)
        wide = k == len(panels) - 1
        draw(figure.add_subplot(grid[row, column:] if wide else grid[row, column]))


# --- what there is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Fields of a result, by what they are."""

    solutions: Mapping[str, tuple[Field, Field | None, Field]]  # with reference and error
    lengths: Mapping[str, Field]
    others: Mapping[str, Field]

    @classmethod
    def of(cls, run: Run) -> _Found:
        fields = {name: value for name, value in run.result.items() if isinstance(value, Field)}
        solutions: dict[str, tuple[Field, Field | None, Field]] = {}
        for name, field in fields.items():
            reference, error = fields.get(f"{name}_reference"), fields.get(f"{name}_error")
            if error is None and reference is not None:
                values = as_array(field.values) - as_array(reference.values)
                error = Field(values, field.coordinates, field.units, field.coordinate_units)
            if error is not None:
                solutions[name] = (field, reference, error)
        taken = {f"{name}{end}" for name in solutions for end in ("", "_reference", "_error")}
        rest = {name: field for name, field in fields.items() if name not in taken}
        return cls(
            solutions,
            {name: field for name, field in rest.items() if "lengthscale" in name},
            {name: field for name, field in rest.items() if "lengthscale" not in name},
        )

    @property
    def domain(self) -> dict[str, Array]:
        """The coordinates, by name, if any field tells them."""
        for field, *_ in self.solutions.values():
            return {name: as_array(place) for name, place in field.coordinates.items()}
        return {}


def _panels(run: Run, found: _Found) -> list[Panel]:
    rest: list[Panel] = []
    if is_pde(run):
        rest.append(partial(_draw_points, run=run, domain=found.domain))
    several = len(found.solutions) > 1
    rest += [partial(_draw_field, name=name, field=f) for name, f in found.others.items()]
    rest += [partial(_draw_field, name=name, field=f) for name, f in found.lengths.items()]
    parameters = [] if found.lengths else _parameters(run)
    if parameters:
        rest.append(partial(_draw_parameters, run=run, names=parameters))
    first: list[Panel] = []
    for name, (field, reference, error) in found.solutions.items():
        title = name if several else ""
        first += [
            partial(_draw_field, name=name, field=field, reference=reference),
            partial(_draw_error, name=title, field=error),
        ]
        if several and rest:
            first.append(rest.pop(0))
    if not run.result:
        first.append(partial(say, text="no result in this file"))
    apart: list[Panel] = [partial(_draw_errors, run=run), partial(_draw_loss, run=run)]
    if (len(first) + len(rest) + 2) % COLUMNS == 1:  # one of them would have a row of its own
        apart = [partial(_draw_both, run=run)]
    return [*first, *rest, *apart]


_NOT_PARAMETERS = ("error", "rmse")


def _parameters(run: Run) -> list[str]:
    """Numbers of the result whose way there was recorded, and which are no errors."""
    numbers = [name for name, value in run.result.items() if isinstance(value, (int, float))]
    return [n for n in numbers if n in run.history and not n.endswith(_NOT_PARAMETERS)]


# --- functions of place -------------------------------------------------------------------------


def _draw_field(axes: Axes, name: str, field: Field, reference: Field | None = None) -> None:
    values = as_array(field.values)
    if len(field.coordinates) == 1:
        _draw_line(axes, field, label(name, field.units), label=label(name))
        if reference is not None:
            look: dict[str, Any] = {"color": COLOURS[1], "linestyle": STYLES[1]}
            _draw_line(axes, reference, label(name, field.units), label="reference", **look)
            axes.legend(frameon=False, fontsize="small")
        return
    colours = Colours.of(values)
    if colours.map == DIVERGING and _almost_one_sign(values):
        # Not half of the scale for what a solution should not have.
        colours = Colours(float(np.nanmin(values)), float(np.nanmax(values)), SEQUENTIAL)
    norm = Normalize(colours.low, colours.high)
    _draw_colours(axes, name, field, values, norm, colours.map)
    note(axes, label(name), _LETTERS)


def _almost_one_sign(values: Array) -> bool:
    low, high = abs(float(np.nanmin(values))), abs(float(np.nanmax(values)))
    return min(low, high) <= 0.05 * max(low, high)


def _draw_error(axes: Axes, name: str, field: Field) -> None:
    error = np.abs(as_array(field.values))
    finite = error[np.isfinite(error)]
    what = f"|error| of {label(name)}" if name else "|error|"
    if not finite.size or finite.max() == 0:
        say(axes, f"{what}: {'exactly zero' if finite.size else 'no finite values'}")
        return
    told = f"{what}: {np.sqrt((finite**2).mean()):.1e} r.m.s., ≤ {finite.max():.1e}"
    if len(field.coordinates) == 1:
        _draw_line(axes, field, what, values=np.where(error > 0, error, np.nan))
        axes.set_yscale("log")
    else:
        # The error's zeros are lines that no one looks for.
        low = max(float(np.quantile(finite, 0.02)), 1e-6 * finite.max())
        norm = LogNorm(low, finite.max() if finite.max() > low else 10 * low)
        _draw_colours(axes, what, field, error, norm, _ERRORS)
    note(axes, told, _LETTERS)


def _draw_line(
    axes: Axes, field: Field, name: str, values: Array | None = None, **look: Any
) -> None:
    ((where, place),) = field.coordinates.items()
    place, values = as_array(place), as_array(field.values) if values is None else values
    order = np.argsort(place, kind="stable")
    default: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1.4}
    axes.plot(place[order], values[order], **default | look)
    axes.set_xlabel(label(where, field.coordinate_units.get(where, "")))
    axes.set_ylabel(name)
    tidy(axes)


def _draw_colours(
    axes: Axes, name: str, field: Field, values: Array, norm: Normalize, colours: str
) -> None:
    if len(field.coordinates) != 2:
        across = ", ".join(field.coordinates)
        say(axes, f"{label(name)}: not drawn, a function of\n{across}")
        return
    x, y = (as_array(place) for place in field.coordinates.values())
    if field.is_grid:
        drawn: Any = axes.pcolormesh(
            x, y, values.T, norm=norm, cmap=colours, shading="gouraud", rasterized=True
        )
    else:
        drawn = axes.scatter(x, y, c=values, norm=norm, cmap=colours, s=8)
    bar = axes.figure.colorbar(drawn, ax=axes, label=label("", field.units).strip(), pad=0.02)
    if isinstance(norm, LogNorm):
        _few_decades(bar.ax.yaxis, float(norm.vmin or 0), float(norm.vmax or 1))
    else:
        bar.locator = MaxNLocator(6, steps=[1, 2, 5, 10])
        bar.update_ticks()
    names = [label(n, field.coordinate_units.get(n, "")) for n in field.coordinates]
    _frame(axes, names, x, y)


def _frame(axes: Axes, names: Sequence[str], x: Array, y: Array) -> None:
    """Labels of the axes, and true proportions where they are not extreme."""
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if 1 / 3 <= np.ptp(x) / (np.ptp(y) or 1) <= 3:
        axes.set_aspect("equal")


def _draw_points(axes: Axes, run: Run, domain: Mapping[str, Any]) -> None:
    """A colour and a mark for each equation; the frame is the fields' domain, where it is known."""
    places = {
        name.removeprefix(POINTS): as_array(value)
        for name, value in run.attachments.items()
        if name.startswith(POINTS)
    }
    dimensions = {place.shape[1] for place in places.values()}
    if len(dimensions) != 1 or not dimensions <= {1, 2}:
        say(axes, f"points not drawn: of {dimensions} coordinates")
        return
    flat = dimensions == {1}
    most = max(map(len, places.values()))
    size = float(np.clip(4000 / most, 2, 16))
    for k, (name, place) in enumerate(places.items()):
        height = np.full(len(place), k) if flat else place[:, 1]
        axes.scatter(
            place[:, 0], height, s=size, color=COLOURS[k % len(COLOURS)],
            marker=_MARKS[k % len(_MARKS)], linewidth=0, label=f"{label(name)} ({len(place)})",
            rasterized=len(place) > 5000, zorder=2 + k / 10, clip_on=False,
        )  # fmt: skip
    names = list(domain)
    if flat:
        axes.set_xlabel(names[0] if names else "coordinate")
        axes.set_yticks([])
        axes.margins(y=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    else:
        known = len(names) == 2
        columns = [
            np.concatenate(
                [
                    *(place[:, k] for place in places.values()),
                    *([domain[names[k]]] if known else []),
                ]
            )
            for k in range(2)
        ]
        _frame(axes, names if known else ("coordinate 1", "coordinate 2"), *columns)
        axes.set_xlim(columns[0].min(), columns[0].max())
        axes.set_ylim(columns[1].min(), columns[1].max())
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize="small",
        handletextpad=0.1, columnspacing=0.8, borderpad=0.1, markerscale=1.5,
    )  # fmt: skip


# --- functions of cost --------------------------------------------------------------------------


def _draw_parameters(axes: Axes, run: Run, names: Sequence[str]) -> None:
    """Paths over the steps, on a logarithmic axis if they are positive and far apart."""
    columns = {name: as_array(run.history[name]) for name in names}
    for k, (name, values) in enumerate(columns.items()):
        _draw_path(axes, as_array(run.history["step"]), values, k, label(name))
    _scale(axes, *columns.values())
    axes.set_xlabel("outer step")
    if len(names) == 1:
        axes.set_ylabel(label(names[0]))
    else:
        axes.legend(frameon=False, fontsize="small")
    note(axes, "parameters of the kernel" if len(names) > 1 else "learnt", _LETTERS)
    tidy(axes)


_KINDS = {"l2_error": "root mean square error", "linf_error": "largest error"}


def _draw_errors(axes: Axes, run: Run) -> None:
    shown = [name for name in _KINDS if _has(run, name)]
    if not shown:
        say(axes, "no errors in this file")
        return
    for k, name in enumerate(shown):
        _draw_path(axes, as_array(run.history["seconds"]), _column(run, name), k, _KINDS[name])
    _scale(axes, *(_column(run, name) for name in shown))
    axes.set_ylabel("error")
    axes.legend(frameon=False, fontsize="small")
    _label_seconds(axes)


def _draw_loss(axes: Axes, run: Run, number: int = 0, name: str = "") -> None:
    if not _has(run, "outer_loss"):
        say(axes, "no outer loss in this file")
        return
    values = _column(run, "outer_loss")
    _draw_path(axes, as_array(run.history["seconds"]), values, number, name)
    _scale(axes, values)
    axes.set_ylabel(label("outer_loss", run.units.get("outer_loss", "")))
    _label_seconds(axes)


def _draw_both(axes: Axes, run: Run) -> None:
    """Errors, and the outer loss on an axis of its own at the right."""
    if not _has(run, "outer_loss") or not any(_has(run, name) for name in _KINDS):
        (_draw_loss if _has(run, "outer_loss") else _draw_errors)(axes, run)
        return
    _draw_errors(axes, run)
    twin = axes.twinx()
    number = len(axes.lines)
    _draw_loss(twin, run, number, "outer loss (right)")
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    twin.yaxis.label.set_color(COLOURS[number])
    twin.tick_params(axis="y", which="both", colors=COLOURS[number])
    handles = [*axes.lines, *twin.lines]
    axes.legend(
        handles, [str(line.get_label()) for line in handles], loc="lower center",
        bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small", borderpad=0.1,
        columnspacing=0.8, handlelength=1.5,
    )  # fmt: skip


def _has(run: Run, name: str) -> bool:
    return name in run.history and len(run.history[name]) > 0 and "seconds" in run.history


def _column(run: Run, name: str) -> Array:
    return as_array(run.history[name]).astype(np.float64)


def _draw_path(axes: Axes, x: Array, y: Array, number: int, name: str) -> None:
    shown = kept(x, y)
    axes.plot(
        x[shown], y[shown], color=COLOURS[number], linestyle=STYLES[number % len(STYLES)],
        linewidth=1.4, marker="o" if len(x) <= 40 else "", markersize=2.5, label=name,
    )  # fmt: skip


def _label_seconds(axes: Axes) -> None:
    axes.set_xlabel("training time (s)")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    tidy(axes)


def _scale(axes: Axes, *columns: Array) -> None:
    """Logarithmic where values are positive and far apart."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns])
    if values.size and values.min() > 0 and values.max() > _FAR * values.min():
        axes.set_yscale("log")
        _few_decades(axes.yaxis, *axes.get_ylim())
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))


def _few_decades(axis: Any, low: float, high: float) -> None:
    """Labels of a logarithmic axis: powers of ten or, where it spans few, also 2 and 5."""
    axis.set_minor_formatter(NullFormatter())
    if high > 300 * low:
        return
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 50 * low else (1, 3)))
    if low >= 1e-3 and high <= 1e4:
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
