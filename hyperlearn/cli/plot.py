"""``hyperlearn plot``: pictures of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperlearn.cli.app import app, user_errors
from hyperlearn.runs import load_run


@app.command()
def plot(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Runs; a folder stands for all *.h5 in it."),
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="curves; certificates; fields, kernel or pde (of one run); cleaning; or auto: "
            "cleaning for runs of data-cleaning, pde for one run of an experiment with a PDE, else "
            "curves."
        ),
    ] = "auto",
    x: Annotated[
        str | None,
        typer.Option(
            "--x", help="step, seconds (default), oracle_calls or oracle_samples, below the curves."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="What to draw curves of. Repeatable; else all there is."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Which field or matrix to draw. Repeatable.")
    ] = None,
    log: Annotated[
        bool | None,
        typer.Option("--log/--linear", help="Ordinates of curves; by default as their range is."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The picture, .png, .pdf or .svg; replaced if it exists.")
    ] = Path("plot.png"),
) -> None:
    """Draw runs: their curves, one line for all seeds of a method; what they found; how exactly."""
    with user_errors():
        from hyperlearn import plots

        runs = [load_run(file) for file in _run_files(files)]
        # What is not a known kind or abscissa is told by the library, with what is near.
        options: dict[str, Any] = {"kind": kind, "x": x, "metrics": metric, "names": name}
        typer.echo(str(plots.plot(runs, out, log=log, **options)))


def _run_files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.glob("*.h5") if not file.name.startswith("."))
            if not found:
                raise ValueError(f"{path} has no run files (*.h5) in it")
        files += found
    return files
