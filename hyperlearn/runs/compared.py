"""How the settings of two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperlearn.runs.frames import flat
from hyperlearn.runs.guarded import RunFileError

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """A setting, its value there, and its value here; None for one that is missing."""

    name: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.there} there, {self.here} here"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """Settings that differ, nested ones with dotted names."""
    then, now = flat(there), flat(here)
    names = dict.fromkeys([*then, *now])
    return [
        Difference(name, then.get(name), now.get(name))
        for name in names
        if not _equal(then.get(name, _ABSENT), now.get(name, _ABSENT))
    ]


def _equal(one: Any, other: Any) -> bool:
    both_nan = one != one and other != other
    return bool(one == other or both_nan)


def refuse_differences(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise unless a run has these settings; its budget may be another.

    Raises
    ------
    RunFileError
        It has others, which the message names, or other data.
    """
    found = [d for d in differences(there, here) if d.name.partition(".")[0] != "budget"]
    if not found:
        return
    shown = "\n".join(f"  {difference}" for difference in found)
    raise RunFileError(
        f"{path} cannot be resumed: it is a run of other settings or data:\n{shown}\n"
        "give it what it had, or record another file"
    )
