"""Matrices of a run as pictures, each beside its spectrum: Gram matrices, Hessians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

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
from hyperlearn.runs import Field, Run
from hyperlearn.settings import unknown_name

# Eigenvalues of more rows take minutes.
LARGEST = 2000
_LETTERS = 54


def plot_kernel(run: Run, out: str | Path, *, names: Sequence[str] | None = None) -> Path:
    """Draw matrices of a run in colours, a row each, beside their eigenvalues.

    Eigenvalues are drawn by size in modulus, negative ones in another colour, of matrices that are
    square and symmetric up to rounding and have at most 2000 rows; of others it is said why not.
    Takes ``O(n^3)`` for them.

    Parameters
    ----------
    run
        From `hyperlearn.load_run` or `hyperlearn.minimize`.
    out
        ``.png``, ``.pdf`` or ``.svg``; replaced if it exists, its folder is made.
    names
        Matrices in `run.result` or `run.attachments`: tensors, arrays or fields on a grid. By
        default every square one but x and y.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        No matrices, a name that is not there or is none, or an unknown suffix.

    Examples
    --------
    >>> import tempfile, torch, hyperlearn as hl
    >>> points = torch.linspace(0, 1, 40)
    >>> gram = torch.exp(-((points[:, None] - points) ** 2) / 0.02)
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot_kernel(hl.Run(attachments={"gram": gram}), folder.name + "/kernel.png").name
    'kernel.png'
    """
    out = destination(out)
    matrices = _chosen(run, names)
    with picture(out, (7.6, 3.0 * len(matrices))) as figure:
        panels = figure.subplots(len(matrices), 2, squeeze=False)
        for (left, right), (name, (matrix, unit)) in zip(panels, matrices.items(), strict=True):
            _draw_matrix(left, name, matrix, unit)
            _draw_spectrum(right, name, matrix, unit)
    return out


def _chosen(run: Run, names: Sequence[str] | None) -> dict[str, tuple[NDArray[Any], str]]:
    """Matrices and their units."""
    trees: Mapping[str, Any] = {**run.attachments, **run.result} if names is None else {}
    found = {name: m for name, value in trees.items() if (m := _matrix(value)) is not None}
    if names is None:
        square = {
            name: m for name, m in found.items()
            if name not in ("x", "y") and m[0].shape[0] == m[0].shape[1]
        }  # fmt: skip
        if not square:
            others = f"; of other shapes there are {', '.join(found)}" if found else ""
            raise ValueError(f"plot_kernel: {run.name} has no square matrix{others}")
        return square
    chosen = {}
    for name in names:
        tree = run.result if name in run.result else run.attachments
        if name not in tree:
            known = [*run.result, *run.attachments]
            raise ValueError(f"plot_kernel: {unknown_name('matrix', name, known)}")
        matrix = _matrix(tree[name])
        if matrix is None:
            shape = getattr(tree[name], "shape", None)
            got = f"of shape {tuple(shape)}" if shape is not None else type(tree[name]).__name__
            raise ValueError(
                f"plot_kernel: {name!r} is {got}; expected a matrix of numbers that is not empty"
            )
        chosen[name] = matrix
    return chosen


def _matrix(value: Any) -> tuple[NDArray[Any], str] | None:
    unit = value.units if isinstance(value, Field) else ""
    value = value.values if isinstance(value, Field) else value
    if not isinstance(value, (Tensor, np.ndarray)) or value.ndim != 2 or 0 in value.shape:
        return None
    matrix = as_array(value)
    return (matrix, unit) if matrix.dtype.kind in "biufc" else None


def _draw_matrix(axes: Axes, name: str, matrix: NDArray[Any], unit: str) -> None:
    shown = np.abs(matrix) if matrix.dtype.kind == "c" else matrix.astype(np.float64)
    rows, columns = matrix.shape
    colours = Colours.of(shown)
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        aspect="equal" if 1 / 3 <= rows / columns <= 3 else "auto",
        **colours.options,
    )
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, label=label(name, unit), pad=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    missing = int(np.count_nonzero(~np.isfinite(shown)))
    also = f"; {missing} not finite" if missing else ""
    note(axes, f"{label(name)}, {rows} × {columns}{also}", _LETTERS)


def _draw_spectrum(axes: Axes, name: str, matrix: NDArray[Any], unit: str) -> None:
    reason = _no_spectrum(matrix)
    if reason:
        say(axes, f"no spectrum: {label(name)} {reason}")
        return
    values = np.linalg.eigvalsh(matrix.astype(np.result_type(matrix, np.float64)))
    values = values[np.argsort(-np.abs(values), kind="stable")]
    place = np.arange(1, len(values) + 1)
    # Rounding leaves this much of an eigenvalue that is zero.
    noise = np.abs(values[0]) * len(values) * _precision(matrix)
    for chosen, colour, sign in (
        (values > 0, COLOURS[0], "positive"),
        (values < 0, COLOURS[1], "negative"),
    ):
        if chosen.any():
            axes.plot(
                place[chosen], np.abs(values[chosen]),
                color=colour, linestyle="none", marker=".", ms=4, label=sign,
            )  # fmt: skip
    if not values.any():
        say(axes, f"{label(name)} is zero")
        return
    axes.set_yscale("log")
    if noise > np.abs(values).min():
        axes.axhline(noise, color="0.5", linestyle="--", linewidth=1, label="rounding")
        axes.set_ylim(bottom=noise / 100)  # what is far below it has no meaning
    axes.set_xlabel("number")
    axes.set_ylabel(label("|eigenvalue|", unit))
    tidy(axes)
    if (values <= 0).any() or axes.lines[-1].get_label() == "rounding":
        axes.legend(frameon=False, fontsize="small")
    rank = int(np.count_nonzero(np.abs(values) > noise))
    condition = f", condition {abs(values[0] / values[-1]):.1e}" if rank == len(values) else ""
    note(axes, f"eigenvalues; rank {rank} of {len(values)}{condition}", _LETTERS)


def _no_spectrum(matrix: NDArray[Any]) -> str:
    """Why none is drawn; empty if one is."""
    rows, columns = matrix.shape
    if rows != columns:
        return "is not square"
    if rows > LARGEST:
        return f"has {rows} rows;\nat most {LARGEST} are decomposed"
    if not np.isfinite(matrix).all():
        return "has entries that are not finite"
    largest = np.abs(matrix).max()
    skew = np.abs(matrix - matrix.conj().T).max() if matrix.dtype.kind != "b" else 0
    if skew > np.sqrt(_precision(matrix)) * largest:
        return f"is not symmetric\n(by {skew / largest:.1e} of its largest entry)"
    return ""


def _precision(matrix: NDArray[Any]) -> float:
    return float(np.finfo(matrix.dtype if matrix.dtype.kind in "fc" else np.float64).eps)
