"""``hyperlearn list``, ``compare``, ``export``, ``recover``, ``schema``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperlearn.cli.app import app, new_console, new_table, user_errors
from hyperlearn.cli.told import file_errors, length_of, number, size_of, when
from hyperlearn.runs import catalogue, load_run, summary
from hyperlearn.runs import recover as recover_run
from hyperlearn.runs import schema as described
from hyperlearn.runs.catalogue import Entry
from hyperlearn.runs.comparison import AXES, Comparison, Row
from hyperlearn.runs.comparison import compare as compare_runs
from hyperlearn.runs.export import WHAT
from hyperlearn.runs.export import export as export_run
from hyperlearn.runs.guarded import FORMAT, SCHEMA
from hyperlearn.runs.recovery import recovered
from hyperlearn.runs.summary import printable

if TYPE_CHECKING:
    pass


@app.command("list")
@app.command("ls", hidden=True)
def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Looked through with all that is in it.")
    ] = Path("."),
    status: Annotated[
        list[str] | None,
        typer.Option(help="Only such: finished, running, killed, diverged, ...; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only these, by label or class; repeatable.")
    ] = None,
    problem: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Only runs with this setting, e.g. method.step_size=0.1; also !=, <, <=, >, >= "
            "(in quotes), and metrics of the last record. Repeatable.",
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help="Whose last value to show.")] = "outer_loss",
    sort: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="file, status, problem, method, seed, steps, created, modified, size, a "
            "setting, or a metric.",
        ),
    ] = "file",
    reverse: Annotated[bool, typer.Option("--reverse", help="The largest first.")] = False,
) -> None:
    """List the runs in a folder. Other HDF5 is passed by; damaged files are listed as such."""
    with user_errors():
        found = catalogue.catalogue(
            folder,
            statuses=status or (),
            methods=method or (),
            problems=problem or (),
            where=where or (),
            sort=sort,
            reverse=reverse,
            metrics=(metric,),
        )
        if not found:
            chosen = status or method or problem or where
            typer.echo(f"no runs in {folder}{' that meet this' if chosen else ''}")
            return
        _print_entries(found, folder, metric)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Runs, at least two.")],
    metric: Annotated[str, typer.Option(help="What is compared.")] = "outer_loss",
    target: Annotated[
        float | None,
        typer.Option(help="Value to reach; by default the worst of the runs' best ones."),
    ] = None,
    maximize: Annotated[
        bool | None,
        typer.Option(help="Whether more is better; by default for an accuracy or an AUC."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The run that ratios refer to; by default the first."),
    ] = None,
    group: Annotated[
        bool,
        typer.Option(
            "--group", help="Runs that differ in their seeds only together: median [min, max]."
        ),
    ] = False,
) -> None:
    """Compare runs: their settings, where they ended, and what a target cost them."""
    with file_errors():
        if baseline is not None and not any(_same(file, baseline) for file in files):
            files = [baseline, *files]
        first = next((i for i, file in enumerate(files) if baseline and _same(file, baseline)), 0)
        runs = [load_run(file) for file in files]
        found = compare_runs(
            runs, metric=metric, target=target, maximize=maximize, baseline=first, group=group
        )
        _print_comparison(found, files)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run.")],
    out: Annotated[Path, typer.Option(help="NAME.csv, NAME.parquet or NAME.nc (NetCDF).")],
    what: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(WHAT)}; by default the history, in NetCDF both."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write the records of a run as CSV, Parquet or NetCDF."""
    with file_errors():
        if out.exists() and not force:
            raise FileExistsError(f"{out} exists; --force overwrites it")
        typer.echo(str(export_run(load_run(file), out, what=what, overwrite=force)))


@app.command()
def recover(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A damaged run; it is not changed.")],
    out: Annotated[Path, typer.Option(metavar="NEW.h5", help="The new file.")],
) -> None:
    """Write what can be read of a damaged run to a new file."""
    with user_errors():
        recover_run(file, out)
        saved, found = load_run(out), recovered(file)
        counts = {
            "records": lambda run: length_of(run.history),
            "certificates": lambda run: length_of(run.certificates),
            "checkpoints": lambda run: len(run.checkpoints),
        }
        told = []
        for name, count in counts.items():
            new, old = count(saved), 0 if found is None else count(found)
            told.append(f"{new} {name}" if new >= old else f"{new} of {old} {name}")
        for lost in summary.losses(replace(saved, path=file)):
            typer.echo(f"lost: {lost}")
        typer.echo(f"{out}: {', '.join(told)}")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """Describe what a run file holds, and how to read it in Python, MATLAB and Julia."""
    if markdown:
        typer.echo(described.markdown())
        return
    console = new_console()
    table = new_table(f"A run file: HDF5, format {FORMAT}, schema {SCHEMA}")
    for heading in ("place", "type", "shape", "meaning"):
        table.add_column(heading, overflow="fold", ratio=1 if heading == "meaning" else None)
    for part in described.PARTS:
        table.add_row(f"/{part.path}", part.dtype, part.shape, part.meaning)
    console.print(table)
    trees = ", ".join(f"/{tree}" for tree in described.TREES)
    for title, headings, entries in (
        (f"Values, in {trees}", ("kind", "stored as"), described.VALUES),
        ("Attributes of values", ("attribute", "meaning"), described.VALUE_ATTRIBUTES),
    ):
        table = new_table(title)
        table.add_column(headings[0], no_wrap=True)
        table.add_column(headings[1], overflow="fold", ratio=1)
        for row in entries.items():
            table.add_row(*row)
        console.print(table)
    for note in described.NOTES:
        console.print(f"{note}\n")
    for name, code in described.READING.items():
        console.print(f"{name}\n")
        for line in code.splitlines():
            console.print(f"    {line}", soft_wrap=True)
        console.print()


# --- show -------------------------------------------------------------------------------------


def _print_entries(entries: Sequence[Entry], folder: Path, metric: str) -> None:
    base = folder.parent if folder.is_file() else folder
    table = new_table()
    right = ("seed", "steps", "seconds", metric, "size")
    table.add_column("file", overflow="fold")
    for heading in (
        "status",
        "problem",
        "method",
        "seed",
        "steps",
        "seconds",
        metric,
        "created",
        "size",
    ):
        table.add_column(
            heading.replace("_", " "),
            justify="right" if heading in right else "left",
            no_wrap=heading != "problem",
        )
    for entry in entries:
        name = entry.path.relative_to(base)
        seconds = entry.values.get("seconds")
        table.add_row(
            printable(name),
            printable(entry.status),
            printable(entry.problem),
            printable(entry.label),
            "" if entry.seed is None else printable(entry.seed),
            number(entry.values.get("step")),
            "" if seconds is None else f"{seconds:.1f}",
            number(entry.values.get(metric)),
            "" if entry.created is None else when(entry.created),
            size_of(entry.size),
        )
    new_console().print(table)


def _print_comparison(found: Comparison, files: Sequence[Path]) -> None:
    console = new_console()
    grouped = len(found.rows) < len(files)
    names = [printable(row.name) for row in found.rows]
    if found.settings:
        table = new_table("settings that differ")
        table.add_column("setting", overflow="fold")
        for file in files:
            table.add_column(file.name, overflow="fold")
        for name, values in found.settings.items():
            # Of a checksum its first digits tell as much.
            short = name.startswith(("checksums.", "environment.git_revision"))
            shown = [printable(value) if value is not None else "" for value in values]
            table.add_row(printable(name), *(text[:8] if short else text for text in shown))
        console.print(table)
    else:
        console.print("the settings are the same")
    table = new_table("median [min, max] of the last records" if grouped else "last records")
    table.add_column("metric", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    metrics = dict.fromkeys(name for row in found.rows for name in row.final)
    for metric in metrics:
        shown = [str(row.final[metric]) if metric in row.final else "" for row in found.rows]
        table.add_row(printable(metric), *shown)
    console.print(table)
    sign = "≥" if found.maximize else "≤"
    table = new_table(f"cost of {found.metric} {sign} {found.target:.6g}")
    table.add_column("run", overflow="fold")
    table.add_column(f"best {found.metric}".replace("_", " "), justify="right")
    for axis in AXES:
        table.add_column(axis.replace("_", " "), justify="right")
        table.add_column("ratio", justify="right")
    for row in found.rows:
        table.add_row(*_costs(row, baseline=row is found.rows[found.baseline]))
    console.print(table)


def _costs(row: Row, baseline: bool) -> list[str]:
    name, count = printable(row.name), len(row.members)
    if count > 1:
        name += f", {count} runs"
    if 0 < row.reached < count:
        name += f", {row.reached} reach it"
    cells = [name, str(row.best)]
    for axis in AXES:
        cost, ratio = row.costs[axis], row.ratios[axis]
        if math.isnan(cost.median):
            cells += ["not recorded", ""]
        elif math.isinf(cost.low):
            cells += ["not reached", ""]
        else:
            text = "1" if baseline else "" if not math.isfinite(ratio) else f"{ratio:.3g}"
            cells += [str(cost).replace("inf", "not reached"), text]
    return cells


# --- words ------------------------------------------------------------------------------------


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))
