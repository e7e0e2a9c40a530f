"""Settings of a solver for each value of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from solvers.linear_solver import LinearSolver


def candidates(
    solver: LinearSolver | Callable[[float], LinearSolver],
    knob: str | None,
    values: Sequence[float] | None,
) -> list[LinearSolver]:
    """The solvers to choose from: one for each value, or the one that there is.

    Parameters
    ----------
    solver
        Settings, or a function ``value -> settings``.
    knob
        Name of the setting that takes the values, dotted where it is one of a setting's own.
    values
        Its candidates.

    Raises
    ------
    TypeError
        `solver`, or what it returns, is no such thing.
    ValueError
        There is no such setting, a value is out of its range, or one argument lacks the other.

    Examples
    --------
    >>> import solvers
    >>> [one.step_size for one in candidates(solvers.Neumann(), "step_size", [0.5, 1.0])]
    [0.5, 1.0]
    """
    if isinstance(solver, LinearSolver):
        if (knob is None) != (values is None):
            raise ValueError(f"knob={knob!r} with values={values}; expected both or neither")
        if knob is None or values is None:
            return [solver]
        made = [turned(solver, knob, value) for value in values]
    elif callable(solver) and not isinstance(solver, type):
        if knob is not None or values is None:
            raise ValueError(
                f"knob={knob!r} with values={values}; a function that makes the solver of a value "
                "needs values, and no knob"
            )
        made = [solver(value) for value in values]
        wrong = [one for one in made if not isinstance(one, LinearSolver)]
        if wrong:
            raise TypeError(f"solver(value) returned {wrong[0]!r}; expected settings of a solver")
    else:
        raise TypeError(
            f"solver is {solver!r}; expected settings of a solver, as solvers.CG(), or a function "
            "that makes them of a value"
        )
    if not made:
        raise ValueError("values is empty; expected the candidates for the knob")
    return made


def turned(settings: Any, knob: str, value: float) -> Any:
    """A copy of the settings with another value where the dotted name leads."""
    name, _, rest = knob.partition(".")
    known = [field.name for field in fields(settings)] if is_dataclass(settings) else []
    if name not in known:
        raise ValueError(
            f"knob: {settings!r} has no setting {name!r}; it has {', '.join(known) or 'none'}"
        )
    changed = turned(getattr(settings, name), rest, value) if rest else value
    return replace(settings, **{name: changed})
