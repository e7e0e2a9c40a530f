"""What a check of derivatives found: rows, a verdict, and a table that people can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["passed", "failed", "noisy", "refused"]

# Without one of these there is no gradient at all: its refusal is a failure.
ESSENTIAL = frozenset({"reverse mode", "backward()", "implicit"})

_ADVICE: dict[Verdict, str] = {
    "failed": "the values have a clear slope and the derivative is another. Look for a detached "
    "tensor, a wrong backward or jvp of an autograd.Function, or a term that is in the values only."
    " An inner solver that always stops at the same early step gives smooth values too, of another"
    " function than the one whose derivative this is: let it converge.",
    "noisy": "the values are too rough for a verdict. Solve inner problems to a tighter tolerance, "
    "from the same start each time; fix seeds; compute in float64; move x off a kink. Or ask for "
    "less with a larger rtol.",
    "refused": "the check could not run; where you need what it tests, its message says what is "
    "missing.",
}


class CheckFailedError(AssertionError):
    """Derivatives did not pass a check; the message is the table."""


@dataclass(frozen=True)
class CheckRow:
    """One comparison.

    Parameters
    ----------
    check
        What was compared.
    direction
        Number of the random direction, or None for a check that has none.
    error, tolerance
        Relative to the size of the directional derivative; None where nothing was measured.
    verdict
        ``"passed"``; ``"failed"``: the error is above the tolerance; ``"noisy"``: the values are
        too rough to tell; ``"refused"``: the check could not run.
    detail
        In words: what was found.
    """

    check: str
    direction: int | None
    error: float | None
    tolerance: float | None
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class CheckReport:
    """Rows of a check of derivatives; ``str`` gives a table, and what to do about it.

    Parameters
    ----------
    rows
        In the order of the checks.
    notes
        What else was noticed.
    allow_refusals
        Whether a check that could not run leaves `passed` as it is. The reverse mode may never
        refuse.

    Examples
    --------
    >>> report = CheckReport((CheckRow("reverse mode", 0, 2e-9, 1e-5, "passed"),))
    >>> report.passed
    True
    >>> print(report)
    check         direction    error  tolerance  verdict
    reverse mode          0  2.0e-09    1.0e-05  passed
    """

    rows: tuple[CheckRow, ...]
    notes: tuple[str, ...] = ()
    allow_refusals: bool = True

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing stayed undecided."""
        return all(
            row.verdict == "passed"
            or (row.verdict == "refused" and self.allow_refusals and row.check not in ESSENTIAL)
            for row in self.rows
        )

    def raise_for_failure(self) -> None:
        """Do nothing if the check passed.

        Raises
        ------
        CheckFailedError
            It did not; the message is the table.
        """
        __tracebackhide__ = True  # under pytest the table is what to look at
        if not self.passed:
            raise CheckFailedError(f"derivatives did not pass the check\n\n{self}")

    def __str__(self) -> str:
        lines = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADINGS))]
        numbers = (1, 2, 3)
        text = "\n".join(
            "  ".join(
                cell.rjust(width) if i in numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join([text, *self.remarks()])

    def remarks(self) -> list[str]:
        """Lines below the table: what each row that did not pass has to say, notes, and advice."""
        lines = [*_details(self.rows), *(f"note: {note}" for note in self.notes)]
        seen = {row.verdict for row in self.rows}
        lines += [f"{verdict}: {text}" for verdict, text in _ADVICE.items() if verdict in seen]
        return lines

    def table(self) -> Table:
        """The rows as a table of `rich`, without the remarks."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in _HEADINGS:
            number = heading in ("direction", "error", "tolerance")
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            style = {"passed": "green", "failed": "red"}.get(row.verdict, "yellow")
            table.add_row(*_cells(row)[:-1], Text(row.verdict, style))
        return table


_HEADINGS = ("check", "direction", "error", "tolerance", "verdict")


def _cells(row: CheckRow) -> tuple[str, str, str, str, str]:
    return (
        row.check,
        "-" if row.direction is None else str(row.direction),
        "-" if row.error is None else f"{row.error:.1e}",
        "-" if row.tolerance is None else f"{row.tolerance:.1e}",
        row.verdict,
    )


def _details(rows: tuple[CheckRow, ...]) -> list[str]:
    """What several checks have to say about the same direction is told once."""
    told: dict[tuple[int | None, str], list[str]] = {}
    for row in rows:
        if row.verdict != "passed" and row.detail:
            told.setdefault((row.direction, row.detail), []).append(row.check)
    return [
        ", ".join(checks) + ("" if direction is None else f", direction {direction}") + f": {text}"
        for (direction, text), checks in told.items()
    ]
