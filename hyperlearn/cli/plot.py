"""``hyperlearn plot``: pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperlearn.cli.app import app, user_errors
from hyperlearn.runs import load_run


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Runs of data-cleaning.")],
    out: Annotated[
        Path, typer.Option(help="The picture, .png or .pdf; replaced if it exists.")
    ] = Path("cleaning.png"),
) -> None:
    """Draw runs: success over time and oracle calls, the weights, the least trusted images."""
    with user_errors():
        from hyperlearn.plots import plot_cleaning

        typer.echo(str(plot_cleaning([load_run(file) for file in files], out)))
