"""The command itself, and what its parts share: exit codes, errors in a line, tables."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hyperlearn
from hyperlearn import logs
from hyperlearn.datasets import DatasetError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CHECK_FAILED, USER_ERROR, DIVERGED, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="hyperlearn",
    help="Bilevel optimisation: run experiments, look at runs, check derivatives, find data sets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can put right is told in a line; any other exception keeps its traceback."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    except (ValueError, OSError, ImportError, DatasetError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hyperlearn {hyperlearn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Log on standard error how runs start, go on and end; -vv also each record and "
            "checkpoint. Before the command.",
        ),
    ] = 0,
) -> None:
    """Bilevel optimisation: run experiments, look at runs, check derivatives, find data sets."""
    if verbose:
        context.with_resource(logs.shown(logging.INFO if verbose == 1 else logging.DEBUG))


def new_table(title: str | None = None) -> Table:
    """An empty one, in the style of all."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)


def new_console() -> Console:
    """Standard output, as wide as the terminal."""
    from rich.console import Console

    # Into a file or a pipe there is no width to respect.
    return Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
