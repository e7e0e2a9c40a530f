"""Fields of a run as pictures: on grids and at scattered points, beside their references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hyperlearn.plots.colours import Colours
from hyperlearn.plots.picture import (
    COLOURS,
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
from hyperlearn.settings import unknown_name

Array = NDArray[Any]
# Places along an axis of a grid, and scattered points, beyond which a picture shows no more.
MOST_PLACES, MOST_POINTS = 1000, 50_000
_REFERENCE = "_reference"
_LETTERS = 44
_LEVELS = 24


def plot_fields(run: Run, out: str | Path, *, names: Sequence[str] | None = None) -> Path:
    """Draw the fields of a run, a row each: functions of one or two coordinates.

    On a grid of one coordinate a line, of two a picture in colours; at scattered points the points
    in order, or filled contours between them. Axes of length 1 do not count. Next to ``NAME`` stand
    ``NAME_reference``, if there is one, and the difference, in colours of their own. Colours are
    uniform in lightness; where values change sign they are centred on 0. Fields of more coordinates
    are not drawn, and it is said.

    Parameters
    ----------
    run
        From `hyperlearn.load_run` or `hyperlearn.minimize`.
    out
        ``.png``, ``.pdf`` or ``.svg``; replaced if it exists, its folder is made.
    names
        In `run.result`, inside of nested ones with a dot, or in `run.attachments`. By default every
        `hyperlearn.Field` in the result.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        No fields, a name that is not there or is no field, or an unknown suffix.

    Examples
    --------
    >>> import tempfile, torch, hyperlearn as hl
    >>> x = torch.linspace(0, 1, 50)
    >>> field = hl.Field(torch.sin(6 * x), {"x": x}, units="K", coordinate_units={"x": "m"})
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot_fields(hl.Run(result={"u": field}), folder.name + "/fields.png").name
    'fields.png'
    """
    out = destination(out)
    shown = _chosen(run, names)
    width = 4.0 if all(one.reference is None for one in shown) else 9.4
    with picture(out, (width, 2.9 * len(shown))) as figure:
        rows: Any = figure.subfigures(len(shown), 1, squeeze=False)
        for part, one in zip(rows[:, 0], shown, strict=True):
            _draw_row(part, one)
    return out


@dataclass(frozen=True)
class _Shown:
    name: str
    field: Field
    reference: Field | None = None


def _chosen(run: Run, names: Sequence[str] | None) -> list[_Shown]:
    """The fields to draw; a reference is drawn with what it is the reference of."""
    if names is None:
        found = dict(_fields(run.result))
        if not found:
            raise ValueError(
                f"plot_fields: {run.name} has no fields in its result, which holds "
                f"{', '.join(run.result) or 'nothing'}; store solutions as hyperlearn.Field"
            )
        paired = {name + _REFERENCE for name in found}
        return [
            _Shown(name, field, found.get(name + _REFERENCE))
            for name, field in found.items()
            if name not in paired
        ]
    chosen = []
    for name in names:
        field = _look_up(run, name)
        if not isinstance(field, Field):
            known = [*dict(_fields(run.result)), *dict(_fields(run.attachments))]
            if field is None:
                raise ValueError(f"plot_fields: {unknown_name('field', name, known)}")
            raise ValueError(
                f"plot_fields: {name!r} is a {type(field).__name__}; expected a hyperlearn.Field, "
                f"such as {', '.join(known) or 'there is none in this run'}"
            )
        reference = _look_up(run, name + _REFERENCE)
        chosen.append(_Shown(name, field, reference if isinstance(reference, Field) else None))
    return chosen


def _fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Field]]:
    for name, value in tree.items():
        if isinstance(value, Field):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")


def _look_up(run: Run, name: str) -> Any:
    """In the result or the attachments; reads nothing else."""
    for tree in (run.result, run.attachments):
        found: Any = tree
        for part in (name,) if name in tree else name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


# --- a row ------------------------------------------------------------------------------------


def _draw_row(figure: FigureBase, shown: _Shown) -> None:
    field, reference = _plain(shown.field), shown.reference
    if reference is None:
        _draw(figure.subplots(), shown.name, field)
        return
    reference = _plain(reference)
    name = label(shown.name)
    if len(field.coordinates) == len(reference.coordinates) == 1:
        panels: Any = figure.subplots(1, 2)
        _draw(panels[0], shown.name, field, title=f"{name} and reference")
        _draw_line(panels[0], shown.name, reference, color=COLOURS[1], linestyle="--")
        for line, what in zip(panels[0].lines, (name, "reference"), strict=False):
            line.set_label(what)
        panels[0].legend(frameon=False, fontsize="small")
    else:
        panels = figure.subplots(1, 3)
        colours = Colours.of(as_array(field.values), as_array(reference.values))
        _draw(panels[0], shown.name, field, colours)
        _draw(panels[1], shown.name, reference, colours, title=f"{name}, reference")
    if not _same_places(field, reference):
        say(panels[-1], "no difference: the reference\nis given at other points")
        return
    error = field.values - reference.values
    size, most = np.linalg.norm(reference.values), np.abs(error).max(initial=0)
    relative = f", {np.linalg.norm(error) / size:.1e} of the norm" if size > 0 else ""
    title = f"difference ≤ {most:.1e}{relative}"
    _draw(panels[-1], "difference", replace(field, values=error), title=title)


def _plain(field: Field) -> Field:
    """Arrays of real numbers, in ascending order of the coordinates, without axes of length 1."""
    values = as_array(field.values)
    values = np.abs(values) if values.dtype.kind == "c" else values.astype(np.float64)
    places = {n: as_array(c).astype(np.float64) for n, c in field.coordinates.items()}
    if field.is_grid:
        for axis, (name, place) in enumerate(places.items()):
            order = np.argsort(place, kind="stable")
            values, places[name] = np.take(values, order, axis), place[order]
        long = [name for name, place in places.items() if len(place) > 1]
        long = long or list(places)[:1]
        if values.size:
            values = values.reshape([len(places[name]) for name in long])
            places = {name: places[name] for name in long}
    units = {name: unit for name, unit in field.coordinate_units.items() if name in places}
    return Field(values, places, field.units, units)


def _same_places(one: Field, other: Field) -> bool:
    return (
        one.values.shape == other.values.shape
        and list(one.coordinates) == list(other.coordinates)
        and all(np.array_equal(c, other.coordinates[n]) for n, c in one.coordinates.items())
    )


def _draw(
    axes: Axes, name: str, field: Field, colours: Colours | None = None, title: str | None = None
) -> None:
    values, number = np.asarray(field.values), len(field.coordinates)
    if not np.isfinite(values).any():
        say(axes, f"{label(name)}: no finite values")
        return
    if number > 2:
        shape = " × ".join(map(str, values.shape))
        across = ", ".join(field.coordinates)
        say(
            axes, f"{label(name)}: not drawn, a function of\n{across} ({shape}); draw a slice of it"
        )
        return
    remarks = [title if title is not None else label(name)]
    missing = int(np.count_nonzero(~np.isfinite(values)))
    if missing:
        remarks.append(f"{missing} not finite")
    colours = colours or Colours.of(values)
    if number == 1:
        _draw_line(axes, name, field)
    elif field.is_grid:
        _draw_grid(axes, name, field, colours, remarks)
    else:
        _draw_scattered(axes, name, field, colours, remarks)
    note(axes, "; ".join(remarks), _LETTERS)


def _coordinate(field: Field, number: int) -> str:
    name = list(field.coordinates)[number]
    return label(name, field.coordinate_units.get(name, ""))


def _draw_line(axes: Axes, name: str, field: Field, **other_look: Any) -> None:
    (place,) = (np.asarray(c) for c in field.coordinates.values())
    values = np.where(np.isfinite(field.values), field.values, np.nan)
    # Of one coordinate a grid and scattered points look alike; where the latter are is shown.
    steps = np.diff(place)
    marker = "" if len(steps) and np.ptp(steps) < 1e-3 * np.mean(steps) else "."
    shown = kept(place, values)
    look: dict[str, Any] = {
        "color": COLOURS[0],
        "linewidth": 1.4,
        "marker": marker,
        "markersize": 4,
    }
    axes.plot(place[shown], values[shown], **look | other_look)
    axes.set_xlabel(_coordinate(field, 0))
    axes.set_ylabel(label(name, field.units))
    tidy(axes)


def _draw_grid(axes: Axes, name: str, field: Field, colours: Colours, remarks: list[str]) -> None:
    across, up = (np.asarray(c) for c in field.coordinates.values())
    steps = [max(1, -(-len(c) // MOST_PLACES)) for c in (across, up)]
    if max(steps) > 1:
        remarks.append(f"one value in {steps[0]} × {steps[1]} is shown")
    across, up = across[:: steps[0]], up[:: steps[1]]
    values = np.ma.masked_invalid(np.asarray(field.values)[:: steps[0], :: steps[1]])
    mesh = axes.pcolormesh(
        across, up, values.T, shading="nearest", rasterized=values.size > 10_000, **colours.options
    )
    _finish(axes, name, field, mesh, (across, up))


def _draw_scattered(
    axes: Axes, name: str, field: Field, colours: Colours, remarks: list[str]
) -> None:
    finite = np.isfinite(field.values)
    step = max(1, -(-int(finite.sum()) // MOST_POINTS))
    if step > 1:
        remarks.append(f"one point in {step} is shown")
    across, up = (np.asarray(c)[finite][::step] for c in field.coordinates.values())
    values = np.asarray(field.values)[finite][::step]
    size = float(np.clip(300 / np.sqrt(len(values)), 0.2, 14))
    try:
        drawn: Any = axes.tricontourf(
            across,
            up,
            values,
            levels=np.linspace(colours.low, colours.high, _LEVELS + 1),
            cmap=colours.map,
            extend="neither",
        )
        drawn.set_edgecolor("face")  # no hairlines between the levels in a PDF
        axes.scatter(across, up, s=size / 2, color="black", alpha=0.5, linewidth=0)
    except (RuntimeError, ValueError):  # no triangles: too few points, or all on a line
        drawn = axes.scatter(across, up, c=values, s=4 * size, **colours.options)
    _finish(axes, name, field, drawn, (across, up))


def _finish(axes: Axes, name: str, field: Field, drawn: Any, places: tuple[Array, Array]) -> None:
    """Colour bar and labels; true proportions where they are of one kind and not extreme."""
    figure: Any = axes.figure
    bar = figure.colorbar(drawn, ax=axes, label=label(name, field.units), pad=0.02)
    bar.locator = MaxNLocator(6, steps=[1, 2, 5, 10])  # round numbers, whatever the levels
    bar.update_ticks()
    axes.set_xlabel(_coordinate(field, 0))
    axes.set_ylabel(_coordinate(field, 1))
    width, height = (float(np.ptp(place)) for place in places)
    units = [field.coordinate_units.get(c, "") for c in field.coordinates]
    if units[0] == units[1] and 1 / 3 <= width / (height or 1) <= 3:
        axes.set_aspect("equal")
