"""The picture of data-cleaning runs: success over cost, the weights, the least trusted images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from hyperlearn import datasets
from hyperlearn.plots.picture import COLOURS, STYLES, destination, files_of, picture, say
from hyperlearn.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SHOWN_IMAGES, IMAGE_ROWS = 20, 2
ATTACHMENTS = ("given_labels", "true_labels", "train_index")
_CLEAN, _CORRUPTED = COLOURS[0], COLOURS[1]


def is_cleaning(run: Run) -> bool:
    """Whether it says which training samples have which label; reads nothing."""
    return all(name in run.attachments for name in ATTACHMENTS)


def plot_cleaning(runs: Sequence[Run], out: str | Path) -> Path:
    """Draw runs of the data-cleaning experiment into one picture.

    Test accuracy and outer loss over training time and over oracle calls x batch size; for the best
    run (lowest last outer loss) the weights of clean and corrupted samples, and the training images
    that it trusts least. Runs without a result (killed) have curves only.

    Parameters
    ----------
    runs
        From `hyperlearn.load_run` or `hyperlearn.minimize`. Runs of one method share a colour.
    out
        ``.png``, ``.pdf`` or ``.svg``; replaced if it exists, its folder is made.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        No runs, or another suffix.
    """
    out = destination(out)
    if not runs:
        raise ValueError("plot_cleaning: no runs given")
    with picture(out, (13, 9.5), font_size=10) as figure:
        halves: Any = figure.subfigures(2, 1, height_ratios=[2, 1])
        upper, lower = halves
        panels = upper.subplots(2, 3)
        _draw_curves(figure, panels[:, :2], runs)
        best = _best(runs)
        _draw_weights(panels[:, 2], best)
        _draw_images(lower, best)
    return out


def _draw_curves(figure: Figure, panels: Any, runs: Sequence[Run]) -> None:
    """Two measures of success (rows) over two measures of cost (columns)."""
    rows = (("test_accuracy", "test accuracy"), ("outer_loss", "outer loss"))
    columns = (
        ("seconds", "training time in seconds"),
        ("oracle_samples", "oracle calls × batch size (log scale)"),
    )
    methods = list(dict.fromkeys(run.label for run in runs))
    handles = {}
    for i, (metric, metric_label) in enumerate(rows):
        limits = _limits(runs, metric)
        for j, (cost, cost_label) in enumerate(columns):
            axes = panels[i, j]
            for run in runs:
                number = methods.index(run.label)
                abscissa, ordinate = run.history.get(cost), run.history.get(metric)
                if abscissa is None or ordinate is None:
                    continue
                shown = abscissa > 0 if cost == "oracle_samples" else slice(None)
                (handles[run.label],) = axes.plot(
                    abscissa[shown],
                    ordinate[shown],
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=STYLES[number // len(COLOURS) % len(STYLES)],
                    linewidth=1.6,
                    marker="o" if len(abscissa) <= 3 else None,  # a line of one point is none
                    alpha=0.9,
                )
            if not axes.lines:
                say(axes, f"no {metric_label} in {files_of(runs)}")
                continue
            if cost == "oracle_samples":
                _make_log(axes)
            if limits is not None:
                axes.set_ylim(limits)
            axes.set_xlabel(cost_label)
            axes.set_ylabel(metric_label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    seeds = {method: sum(run.label == method for run in runs) for method in methods}
    names = [f"{m} ({seeds[m]} runs)" if seeds[m] > 1 else m for m in handles]
    if handles:
        figure.legend(
            handles.values(), names, loc="outside upper center", ncols=len(names), frameon=False
        )


def _limits(runs: Sequence[Run], metric: str) -> tuple[float, float] | None:
    """Range of a metric after the starting point, which lies far off and is common to all."""
    if any(len(run.history.get(metric, ())) <= 3 for run in runs):
        return None  # too little else to show
    later = [run.history[metric][1:] for run in runs if metric in run.history]
    values = np.concatenate([np.empty(0), *later])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    margin = 0.05 * float(np.ptp(values)) or 0.01
    return float(values.min()) - margin, float(values.max()) + margin


def _make_log(axes: Axes) -> None:
    """Logarithmic abscissa whose tick labels never overlap, over one decade or many."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))  # 200 k, 1 M
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_weights(panels: Any, run: Run) -> None:
    """Histograms of sigmoid(x), above of the clean samples and below of the corrupted ones."""
    above, below = panels
    above.set_title(f"weights of the training samples, {run.name}", fontsize=10)
    cleaning = _Cleaning.of(run)
    if cleaning is None:
        for axes in panels:
            say(axes, f"no result in {files_of([run])}")
        return
    kinds = (
        (above, "clean", ~cleaning.corrupted, _CLEAN),
        (below, "corrupted", cleaning.corrupted, _CORRUPTED),
    )
    for axes, kind, chosen, colour in kinds:
        axes.hist(cleaning.weights[chosen], bins=np.linspace(0, 1, 51), color=colour)
        axes.set_xlim(0, 1)
        axes.set_xlabel("weight sigmoid(x)")
        axes.set_ylabel(f"number of {kind} samples")
        axes.spines[["top", "right"]].set_visible(False)
        mean = f", mean weight {cleaning.weights[chosen].mean():.2f}" if chosen.any() else ""
        axes.text(
            0.5, 0.97, f"{chosen.sum()} {kind}{mean}",
            transform=axes.transAxes, ha="center", va="top", color=colour,
        )  # fmt: skip
        axes.margins(y=0.12)


def _draw_images(figure: SubFigure, run: Run) -> None:
    """The training images of lowest weight, with their given and their true label."""
    cleaning = _Cleaning.of(run)
    if cleaning is None:
        say(figure.subplots(), f"no result in {files_of([run])}")
        return
    if np.ptp(cleaning.weights) == 0:
        say(figure.subplots(), f"{run.name} trusts all training images equally")
        return
    try:
        images = datasets.load(run.config["task"]["dataset"]).train_images
    except datasets.DatasetError as error:
        say(figure.subplots(), f"no images: {str(error).splitlines()[0]}")
        return
    least = np.argsort(cleaning.weights, kind="stable")[:SHOWN_IMAGES]
    wrong = int(cleaning.corrupted[least].sum())
    figure.suptitle(
        f"the {len(least)} training images that {run.name} trusts least; "
        f"{wrong} of these labels are wrong (orange)"
    )
    panels = list(figure.subplots(IMAGE_ROWS, SHOWN_IMAGES // IMAGE_ROWS).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, sample in zip(panels, least, strict=False):
        axes.imshow(images[cleaning.index[sample]], cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(
            f"given {cleaning.given[sample]} / true {cleaning.true[sample]}",
            fontsize=8.5,
            color=_CORRUPTED if cleaning.corrupted[sample] else _CLEAN,
        )


@dataclass(frozen=True)
class _Cleaning:
    """What a data-cleaning run says about each training sample."""

    weights: NDArray[np.floating[Any]]
    given: NDArray[np.integer[Any]]
    true: NDArray[np.integer[Any]]
    index: NDArray[np.integer[Any]]

    @classmethod
    def of(cls, run: Run) -> _Cleaning | None:
        """None for a run without a result, and for one of another experiment."""
        if not is_cleaning(run) or not isinstance(run.x, Tensor):
            return None
        return cls(expit(run.x.numpy()), *(run.attachments[name] for name in ATTACHMENTS))

    @property
    def corrupted(self) -> NDArray[np.bool_]:
        return self.given != self.true


def _best(runs: Sequence[Run]) -> Run:
    """Lowest last outer loss among the runs that can show weights; the first if none can."""

    def last_loss(run: Run) -> float:
        losses = run.history.get("outer_loss", np.empty(0))
        return float(losses[-1]) if len(losses) and np.isfinite(losses[-1]) else np.inf

    return min([run for run in runs if _Cleaning.of(run)] or runs[:1], key=last_loss)
