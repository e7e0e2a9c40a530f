"""The sheet that every picture is drawn on: formats, fonts, colours, labels.

On matplotlib's object interface: no window, and no setting outlives the picture.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from hyperlearn.runs import Run

FORMATS = (".png", ".pdf", ".svg")
# Dots per inch of a PNG, and of what is an image inside a PDF.
DPI = 150

# Okabe and Ito's palette, with grey for its yellow, which white paper swallows.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999",
)  # fmt: skip
STYLES = ("-", "--", ":", "-.")


def destination(out: str | Path) -> Path:
    """Where to, if pictures of that kind can be written.

    Raises
    ------
    ValueError
        Its suffix is none of `FORMATS`.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        got = out.suffix or "no suffix"
        raise ValueError(f"{out}: cannot write {got}; expected {' or '.join(FORMATS)}")
    return out


@contextmanager
def picture(out: Path, size: tuple[float, float], font_size: float = 9) -> Iterator[Figure]:
    """A figure to draw on, which is written when the block is left without an exception.

    Parameters
    ----------
    out
        From `destination`; its folder is made.
    size
        Width and height in inches.
    font_size
        In points; the smaller texts follow it.
    """
    # Journals refuse the bitmap fonts ("Type 3") that PDFs have by default.
    with mpl.rc_context(
        {"pdf.fonttype": 42, "font.size": font_size, "axes.formatter.use_mathtext": True}
    ):
        # The label of a colour bar would touch the axis of the next panel.
        layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.04)
        figure = Figure(figsize=size, layout=layout)
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=DPI)


def tidy(axes: Axes) -> None:
    """A light grid, and no frame where there is no axis."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def say(axes: Axes, text: str) -> None:
    """A panel that has nothing to show says so."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", wrap=True)


def note(axes: Axes, text: str, width: int) -> None:
    """A remark above a panel, where it covers nothing, in lines of `width` characters."""
    axes.set_title(textwrap.fill(text, width), fontsize="small", color="0.35", loc="left")


def label(name: str, unit: str = "") -> str:
    """A quantity with its unit.

    Examples
    --------
    >>> label("outer_loss", "m/s")
    'outer loss (m/s)'
    """
    return name.replace("_", " ").replace("hessian", "Hessian") + (f" ({unit})" if unit else "")


def legend(figure: FigureBase, handles: Sequence[Any], names: Sequence[str], width: float) -> None:
    """Above the panels, in as many columns as `width`, in inches, has room for."""
    inches = 0.7 + 0.068 * max(map(len, names), default=0)  # of an entry: line, gap, letters
    columns = max(1, min(len(names), int(width / inches)))
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize="medium" if len(names) <= 12 else "small",
    )


def files_of(runs: Sequence[Run]) -> str:
    """What to call where they come from."""
    return "these files" if len(runs) > 1 else "this file"


def as_array(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    """A tensor or an array, of whatever device and precision, as an array that can be drawn."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no half precision of the other kind.
        values = values.float().numpy() if str(values.dtype).endswith("float16") else values.numpy()
    return np.asarray(values)
