"""``hyperlearn sweep``: a grid of runs on several processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hyperlearn.cli.app import INTERRUPTED, app, new_console, new_table, user_errors

if TYPE_CHECKING:
    from hyperlearn.sweep import Outcome, PlannedRun, Summary

SOME_FAILED = 1


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to run.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Worker processes; by default as many as there are cores for. 0: none, the runs "
            "go on one after the other in this process.",
        ),
    ] = None,
    backend: Annotated[
        Literal["loky", "dask"],
        typer.Option(help="Processes on this machine, or the workers of a dask cluster."),
    ] = "loky",
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of the dask cluster; by default a local one."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what there is of them, and stop.")
    ] = False,
    retry: Annotated[
        int, typer.Option(min=0, help="How often a run is tried again after its worker died.")
    ] = 3,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no table.")] = False,
) -> None:
    """Run a grid over methods, seeds and settings; each run is stored in an HDF5 file.

    The same command goes on with what is not finished. Ctrl-C ends the runs at their next record;
    a second one, at once.

    Exit codes: 0 all finished, 1 some failed, 2 wrong input, 130 stopped by Ctrl-C.
    """
    with user_errors():
        from hyperlearn.sweep import Sweep, run_sweep, summarise, write_summary

        plan = Sweep.read(config)
        if dry_run:
            planned = plan.runs()
            plan.refuse_other_runs(planned)
            _print_plan(planned)
            return
        outcomes = run_sweep(
            plan,
            workers=workers,
            backend=backend,
            scheduler=scheduler,
            retry=retry,
            # A log file would get a line for every refresh.
            progress=not quiet and sys.stderr.isatty(),
        )
        rows = summarise(outcomes)
        write_summary(rows, plan.folder / "summary.csv")
        _tell(outcomes)
        if not quiet:
            _print_summary(rows)
            typer.echo(plan.folder / "summary.csv")
    if any(outcome.stopped for outcome in outcomes):
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(SOME_FAILED if any(outcome.failed for outcome in outcomes) else 0)


def _tell(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        name = outcome.planned.name
        for text in outcome.warnings:
            typer.echo(f"warning: {name}: {text}", err=True)
        if outcome.failed:
            typer.echo(f"error: {name}: {outcome.status}: {outcome.message}", err=True)
    left = sum(outcome.stopped for outcome in outcomes)
    if left:
        typer.echo(
            f"interrupted: {left} of {len(outcomes)} runs are not finished; the same command goes "
            "on with them",
            err=True,
        )


def _print_plan(planned: Sequence[PlannedRun]) -> None:
    settings = list(dict.fromkeys(key for run in planned for key in run.point))
    table = new_table()
    for heading in ("method", *settings, "seed", "file", "state"):
        table.add_column(heading, overflow="fold")
    for run in planned:
        point = [str(run.point.get(key, "-")) for key in settings]
        table.add_row(run.label, *point, str(run.seed), run.path.name, run.state())
    new_console().print(table)
    typer.echo(f"{len(planned)} runs in {planned[0].path.parent}")


def _print_summary(rows: Sequence[Summary]) -> None:
    settings = list(dict.fromkeys(key for row in rows for key in row.point))
    metrics = list(dict.fromkeys(name for row in rows for name in row.values))
    table = new_table()
    for heading in ("method", *settings):
        table.add_column(heading, overflow="fold")
    for name in metrics:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    table.add_column("runs", overflow="fold")
    for row in rows:
        table.add_row(
            row.label,
            *(str(row.point.get(key, "-")) for key in settings),
            *(str(row.values.get(name, "-")) for name in metrics),
            ", ".join(f"{count} {status}" for status, count in row.statuses.items()),
        )
    new_console().print(table)
    typer.echo("Median [min, max], over the seeds, of the last values of the finished runs.")
