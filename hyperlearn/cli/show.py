"""``hyperlearn show``: settings, metrics, certificate and contents of a run, also as it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperlearn.cli.app import USER_ERROR, app, new_console, new_table, user_errors
from hyperlearn.cli.run import EXPERIMENTS
from hyperlearn.cli.told import RESCUE, file_errors, length_of, number, when
from hyperlearn.runs import DamagedError, Run, catalogue, frames, load_run, summary
from hyperlearn.runs.lock import is_written
from hyperlearn.runs.recovery import recovered
from hyperlearn.runs.summary import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


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
            with file_errors():
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
                damaged.append(f"{error}{RESCUE}")
                run = error.recovered or recovered(file)
                if run is not None:
                    _show(run, config, heading=len(files) > 1)
        for message in damaged:
            typer.echo(f"error: {message}", err=True)
    if damaged:
        raise typer.Exit(USER_ERROR)


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
        for i in range(count, length_of(run.history)):
            values = ", ".join(
                f"{name} {number(run.history[name][i])}"
                for name in ("step", "seconds", "outer_loss")
                if name in run.history
            )
            typer.echo(values)
        count = length_of(run.history)
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
        "stored": f"{length_of(run.history)} records, {length_of(run.certificates)} certificates",
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
    return f"{when(entry.created)}, last written {when(entry.modified)}"


def _spent(run: Run) -> str:
    def last(name: str) -> str:
        return number(run.history[name][-1]) if name in run.history else "?"

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
        best = "" if m.best is None else f"{number(m.best)} {'max' if m.maximize else 'min'}"
        course = f"{m.curve} log" if m.logarithmic else m.curve
        table.add_row(
            printable(m.name), number(m.first), best, number(m.last), printable(m.unit), course
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
