"""``hyperlearn show``, ``list``, ``compare``, ``export``, ``recover``, ``schema``."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from hyperlearn.cli.app import USER_ERROR, app, new_console, new_table, user_errors
from hyperlearn.cli.run import EXPERIMENTS
from hyperlearn.runs import DamagedError, Run, catalogue, frames, load_run, summary
from hyperlearn.runs import recover as recover_run
from hyperlearn.runs import schema as described
from hyperlearn.runs.catalogue import Entry
from hyperlearn.runs.comparison import AXES, Comparison, Row
from hyperlearn.runs.comparison import compare as compare_runs
from hyperlearn.runs.export import WHAT
from hyperlearn.runs.export import export as export_run
from hyperlearn.runs.guarded import FORMAT, SCHEMA
from hyperlearn.runs.lock import is_written
from hyperlearn.runs.recovery import recovered
from hyperlearn.runs.summary import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Of values of a result or among attachments; a network has hundreds.
MOST_ITEMS = 20


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Runs.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Look again each second, until the run ends or Ctrl-C.")
    ] = False,
    config: Annotated[
        bool, typer.Option("--config", help="Only the settings, one key = value a line.")
    ] = False,
) -> None:
    """Show runs: status, settings, metrics, certificate, checkpoints, what they hold.

    Exit codes: 0; 2 wrong input or a damaged file, of which is shown what can be read.
    """
    with user_errors():
        if follow and (config or len(files) > 1):
            raise ValueError("--follow is for one file, and without --config")
        if follow:
            with _file_errors():
                _follow(files[0])
            return
        damaged: list[str] = []
        for i, file in enumerate(files):
            if i and not config:
                typer.echo()
            try:
                _show(load_run(file), config, heading=len(files) > 1)
            except DamagedError as error:
                # Damage may be met only where something is read.
                damaged.append(f"{error}{_RESCUE}")
                run = error.recovered or recovered(file)
                if run is not None:
                    _show(run, config, heading=len(files) > 1)
        for message in damaged:
            typer.echo(f"error: {message}", err=True)
    if damaged:
        raise typer.Exit(USER_ERROR)


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
    with _file_errors():
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
    with _file_errors():
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
            "records": lambda run: _count(run.history),
            "certificates": lambda run: _count(run.certificates),
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


def _show(run: Run, config: bool, heading: bool) -> None:
    if config:
        _print_config(run, heading)
        return
    parts = _pictured(run)  # all of it before the first is printed
    for part in parts:
        new_console().print(part)


def _follow(file: Path) -> None:
    """In a terminal the picture is drawn anew; elsewhere each new record is a line."""
    console = new_console()
    try:
        run = _drawn(console, file) if console.is_terminal else _told(file)
    except KeyboardInterrupt:
        typer.echo("stopped following; the run itself goes on", err=True)
        return
    if not console.is_terminal:
        for part in _pictured(run):
            console.print(part)


def _drawn(console: Console, file: Path) -> Run:
    from rich.console import Group
    from rich.live import Live

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for run in _states(file):
            live.update(Group(*_pictured(run, brief=run.status == "running")), refresh=True)
    return run


def _told(file: Path) -> Run:
    count = 0
    for run in _states(file):
        for i in range(count, _count(run.history)):
            values = ", ".join(
                f"{name} {_number(run.history[name][i])}"
                for name in ("step", "seconds", "outer_loss")
                if name in run.history
            )
            typer.echo(values)
        count = _count(run.history)
    return run


def _states(file: Path) -> Iterator[Run]:
    """The run as it is now, and a second later, until it ends."""
    while True:
        try:
            run = load_run(file)
        except DamagedError:
            # Two reads of a file that is being written may not fit together; the next ones do.
            if not is_written(file):
                raise
        else:
            yield run
            if run.status != "running":
                return
        time.sleep(1)


def _pictured(run: Run, brief: bool = False) -> list[RenderableType]:
    """All that is shown of a run; briefly, what changes as it goes on."""
    parts: list[RenderableType] = [_head(run)]
    if run.history:
        parts.append(_metrics(run))
    if brief:
        return parts
    parts += _certified(run)
    for group in ("result", "attachments"):
        items = summary.contents(run, group)
        if items:
            parts.append(_items(group, items))
    if run.status == "damaged":
        parts += [f"lost: {loss}" for loss in summary.losses(run)]
    return parts


def _head(run: Run) -> RenderableType:
    environment = run.environment
    versions = ", ".join(
        f"{name} {environment[name]}"
        for name in ("hyperlearn", "python", "torch", "numpy", "h5py")
        if name in environment
    )
    method = run.config.get("method")
    label = run.config.get("label")
    rows = {
        "file": "" if run.path is None else str(run.path),
        "status": run.status,
        "message": run.message,
        "problem": run.config.get("problem", ""),
        "method": "" if method is None else summary.expression(method),
        "label": "" if label is None else label,
        "seed": environment.get("seed", ""),
        "budget": summary.expression(run.config["budget"]) if "budget" in run.config else "",
        "versions": versions,
        "begun": _begun(run),
        "spent": _spent(run),
        "stored": f"{_count(run.history)} records, {_count(run.certificates)} certificates",
        "resume": _resumption(run),
    }
    table = _grid()
    for name, text in rows.items():
        if str(text):
            table.add_row(name, printable(text))
    return table


def _grid() -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _begun(run: Run) -> str:
    if run.path is None or run.status == "damaged":
        return ""
    entry = catalogue.read_entry(run.path, ())
    if entry is None or entry.created is None:
        return ""
    return f"{_when(entry.created)}, last written {_when(entry.modified)}"


def _spent(run: Run) -> str:
    def last(name: str) -> str:
        return _number(run.history[name][-1]) if name in run.history else "?"

    if not run.history:
        return ""
    counts = ", ".join(
        f"{last(name)} {name.replace('_', ' ')}"
        for name in ("gradients", "hessian_products", "cross_products")
        if name in run.history
    )
    calls = f", {last('oracle_calls')} oracle calls ({counts})" if counts else ""
    return f"{last('step')} outer steps, {last('seconds')} s of training{calls}"


def _resumption(run: Run) -> str:
    """From which step, and how."""
    if not run.checkpoints or run.status in ("running", "damaged"):
        return ""
    steps = ", ".join(map(str, run.checkpoints))
    ways = [f'hyperlearn.resume("{run.path}", problem)']
    task = run.config.get("task")
    if run.config.get("problem") in EXPERIMENTS and isinstance(task, dict) and "class" in task:
        ways.insert(0, f"hyperlearn resume {run.path}")
    return f"from step {steps}: {' or '.join(ways)}"


def _metrics(run: Run) -> RenderableType:
    table = new_table()
    table.add_column("metric", no_wrap=True)
    for heading in ("first", "best", "last"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("course", no_wrap=True)
    for m in summary.metrics(run):
        best = "" if m.best is None else f"{_number(m.best)} {'max' if m.maximize else 'min'}"
        course = f"{m.curve} log" if m.logarithmic else m.curve
        table.add_row(
            printable(m.name), _number(m.first), best, _number(m.last), printable(m.unit), course
        )
    return table


def _certified(run: Run) -> list[RenderableType]:
    if run.certificate is None:
        return []
    doubt = run.certificate.doubt()
    verdict = f"not to be trusted to 0.1 %: {doubt}" if doubt else "to be trusted to 0.1 %"
    table = _grid()
    for line in printable(run.certificate).splitlines():
        name, _, value = line.partition(": ")
        table.add_row(f"  {name.strip()}", value)
    return [f"last certificate: {verdict}", table]


def _items(group: str, items: Sequence[summary.Item]) -> RenderableType:
    table = new_table()
    table.add_column(group, overflow="fold")
    for heading in ("kind", "shape", "dtype"):
        table.add_column(heading, no_wrap=True)
    table.add_column("", overflow="fold")
    for item in items[:MOST_ITEMS]:
        shape = "" if item.shape is None else " × ".join(map(str, item.shape)) or "()"
        table.add_row(
            printable(item.name),
            printable(item.kind),
            shape,
            printable(item.dtype),
            printable(item.note),
        )
    if len(items) > MOST_ITEMS:
        table.add_row(f"and {len(items) - MOST_ITEMS} more")
    return table


def _print_config(run: Run, heading: bool) -> None:
    if heading:
        typer.echo(f"# {run.path}")
    for name, value in frames.flat(run.config).items():
        typer.echo(printable(f"{name} = {value}"))


# --- list and compare -------------------------------------------------------------------------


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
            _number(entry.values.get("step")),
            "" if seconds is None else f"{seconds:.1f}",
            _number(entry.values.get(metric)),
            "" if entry.created is None else _when(entry.created),
            _size(entry.size),
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


_RESCUE = '\n"hyperlearn recover FILE --out NEW.h5" saves what can be read'


@contextmanager
def _file_errors() -> Iterator[None]:
    """As `user_errors`, and of a damaged file what to do about it."""
    with user_errors():
        try:
            yield
        except DamagedError as error:
            raise DamagedError(f"{error}{_RESCUE}", error.recovered) from error


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _count(table: Any) -> int:
    return len(next(iter(table.values()), ()))


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return printable(value if len(value) <= 24 else f"{value[:24]}...")
    # Not 1e+05 steps, and no digits that are not known either.
    return f"{value:.5g}" if isinstance(value, (float, np.floating)) else f"{int(value)}"


def _when(moment: datetime.datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
