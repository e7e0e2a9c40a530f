"""Pictures of runs, fit for a paper: curves, certificates, fields, matrices, experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hyperlearn.plots.cleaning import is_cleaning, plot_cleaning
from hyperlearn.plots.curves import Abscissa, plot_certificates, plot_curves
from hyperlearn.plots.fields import plot_fields
from hyperlearn.plots.kernel import plot_kernel
from hyperlearn.plots.pde import is_pde, plot_pde
from hyperlearn.runs import Run
from hyperlearn.settings import unknown_name

__all__ = [
    "plot",
    "plot_certificates",
    "plot_cleaning",
    "plot_curves",
    "plot_fields",
    "plot_kernel",
    "plot_pde",
]

Kind = Literal["auto", "curves", "fields", "kernel", "certificates", "cleaning", "pde"]
# What each kind can be told.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "curves": ("x", "metrics", "log"),
    "certificates": ("x", "metrics", "log"),
    "fields": ("names",),
    "kernel": ("names",),
    "cleaning": (),
    "pde": (),
}


def plot(
    runs: Sequence[Run],
    out: str | Path,
    kind: Kind = "auto",
    *,
    x: Abscissa | None = None,
    metrics: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    log: bool | None = None,
) -> Path:
    """Draw runs in one of the ways that there are, each a function of its own.

    Parameters
    ----------
    runs
        From `hyperlearn.load_run` or `hyperlearn.minimize`; for fields, matrices and PDEs one run.
    out
        ``.png``, ``.pdf`` or ``.svg``; replaced if it exists, its folder is made.
    kind
        ``"curves"``, ``"certificates"``, ``"fields"``, ``"kernel"``, ``"cleaning"``, ``"pde"``, or
        ``"auto"``: if nothing else is asked for, the picture of data-cleaning if all are runs of
        that, and that of a PDE for one run with points of equations; otherwise curves.
    x, metrics, log
        For curves and certificates (see `plot_curves`).
    names
        For fields and matrices (see `plot_fields`, `plot_kernel`).

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        No runs, an unknown kind, or an argument that the kind does not take; and what the function
        of the kind raises.

    Examples
    --------
    >>> import tempfile, numpy as np, hyperlearn as hl
    >>> run = hl.Run(history={"step": np.arange(3), "outer_loss": np.array([4.0, 2.0, 1.0])})
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot([run], folder.name + "/run.svg", x="step").name
    'run.svg'
    """
    if kind != "auto" and kind not in _OPTIONS:
        raise ValueError(f"plot: {unknown_name('kind', kind, ['auto', *_OPTIONS])}")
    if not runs:
        raise ValueError("plot: no runs given")
    possible = {"x": x, "metrics": metrics, "names": names, "log": log}
    given: dict[str, Any] = {name: value for name, value in possible.items() if value is not None}
    if kind == "auto":
        kind = _fitting(runs) if not given else "curves"
    for name in given:
        if name not in _OPTIONS[kind]:
            takers = " and ".join(other for other, names in _OPTIONS.items() if name in names)
            raise ValueError(f"plot: {name} is for the kinds {takers}; the kind is {kind}")
    if kind == "cleaning":
        return plot_cleaning(runs, out)
    if kind in ("curves", "certificates"):
        return (plot_curves if kind == "curves" else plot_certificates)(runs, out, **given)
    if len(runs) > 1:
        raise ValueError(f"plot: the kind {kind} draws one run; {len(runs)} were given")
    drawn = {"fields": plot_fields, "kernel": plot_kernel, "pde": plot_pde}[kind]
    return drawn(runs[0], out, **given)


def _fitting(runs: Sequence[Run]) -> Kind:
    if all(map(is_cleaning, runs)):
        return "cleaning"
    return "pde" if len(runs) == 1 and is_pde(runs[0]) else "curves"
