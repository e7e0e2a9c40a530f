"""What the commands that look at runs share: errors of files, and numbers as text."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperlearn.cli.app import user_errors
from hyperlearn.runs import DamagedError
from hyperlearn.runs.summary import printable

if TYPE_CHECKING:
    pass


RESCUE = '\n"hyperlearn recover FILE --out NEW.h5" saves what can be read'


@contextmanager
def file_errors() -> Iterator[None]:
    """As `user_errors`, and of a damaged file what to do about it."""
    with user_errors():
        try:
            yield
        except DamagedError as error:
            raise DamagedError(f"{error}{RESCUE}", error.recovered) from error


def length_of(table: Any) -> int:
    """Records of a table."""
    return len(next(iter(table.values()), ()))


def number(value: Any) -> str:
    """As short as it can be told; empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return printable(value if len(value) <= 24 else f"{value[:24]}...")
    # Not 1e+05 steps, and no digits that are not known either.
    return f"{value:.5g}" if isinstance(value, (float, np.floating)) else f"{int(value)}"


def when(moment: datetime.datetime) -> str:
    """To the minute, here."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def size_of(size: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
