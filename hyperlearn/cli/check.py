"""``hyperlearn check``: derivatives of a problem or function against finite differences."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

import hyperlearn
from hyperlearn.by_name import imported
from hyperlearn.cli.app import CHECK_FAILED, app, new_console, user_errors


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:OBJECT",
            help="Or FILE.py:OBJECT. A BilevelProblem; a function f(x), with --x; a pair "
            "(function, x); or a function without arguments that returns one of these.",
        ),
    ],
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            metavar="MODULE:OBJECT",
            help="Where to check: a tensor, a nested structure, or a function without arguments "
            "that returns one. Of a problem, x0 by default.",
        ),
    ] = None,
    directions: Annotated[int, typer.Option(min=1, help="Random directions.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the directions.")] = 0,
    rtol: Annotated[float, typer.Option(help="Relative error to accept.")] = 1e-5,
) -> None:
    """Compare derivatives with finite differences, over a sweep of step sizes.

    Exit codes: 0 passed, 1 failed or could not be decided, 2 wrong input.
    """
    with user_errors():
        found, point = _check_target(target, x)
        try:
            report = hyperlearn.check(found, point, directions=directions, seed=seed, rtol=rtol)
        except TypeError as error:
            raise ValueError(str(error)) from error
        new_console().print(report.table())
        for line in report.remarks():
            typer.echo(line)
    raise typer.Exit(0 if report.passed else CHECK_FAILED)


def _check_target(name: str, x: str | None) -> tuple[Any, Any]:
    """Function or problem, and x or None; factories are called."""
    found = imported(name)
    if _is_factory(found):
        found = found()
    pair = isinstance(found, tuple) and len(found) == 2
    if pair and x is not None:
        raise ValueError(f"{name} has an x of its own: leave out --x {x}")
    if pair:
        return found
    if x is not None:
        point = imported(x)
        return found, point() if _is_factory(point) else point
    if not isinstance(found, hyperlearn.BilevelProblem):
        raise ValueError(
            f"{name} is a {type(found).__name__} and no x is given; expected a BilevelProblem, "
            "--x MODULE:OBJECT, or a function without arguments that returns (function, x)"
        )
    return found, None


def _is_factory(found: Any) -> bool:
    """Whether it is called without arguments, and cannot be called with one."""
    if not callable(found):
        return False
    try:
        parameters = inspect.signature(found)
        parameters.bind()
    except (TypeError, ValueError):
        return False
    try:
        parameters.bind(None)
    except TypeError:
        return True
    return False
