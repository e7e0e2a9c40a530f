"""Many runs at a glance: what each file is, and those of them that meet conditions.

Of a file its head, its settings and its last record are read, so that a thousand are quick.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import operator
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from hyperlearn.runs import codec, guarded
from hyperlearn.runs.frames import flat
from hyperlearn.runs.guarded import FORMAT, DamagedError, RunFileError
from hyperlearn.runs.lock import is_written
from hyperlearn.settings import unknown_name

SUFFIXES = (".h5", ".hdf5")
STATUSES = (
    "finished",
    "running",
    "killed",
    "interrupted",
    "diverged",
    "failed",
    "recovered",
    "damaged",
    "refused",
)
# What can be asked of every run, beside its settings and metrics.
KEYS = ("file", "status", "problem", "method", "seed", "steps", "created", "modified", "size")


@dataclass(frozen=True)
class Entry:
    """A run file at a glance.

    Parameters
    ----------
    path
        Of the file.
    status
        As of a `Run`; ``"damaged"`` where it does not open or its head cannot be read, and
        ``"refused"`` where this version does not read it, as it is of another schema.
    message
        Why it ended, or what is wrong with the file.
    modified
        When the file was last written.
    size
        Bytes.
    problem, label, seed
        As of a `Run`; empty and None where that is not known.
    created
        When the run began; None where that is not known.
    metrics
        Names of all of them.
    values
        What was asked for by its key: see `read_entry`.
    """

    path: Path
    status: str
    message: str
    modified: datetime.datetime
    size: int
    problem: str = ""
    label: str = ""
    method_class: str = ""
    seed: int | None = None
    created: datetime.datetime | None = None
    metrics: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """What a condition or an order means by a key (`catalogue`); None where it has none."""
        facts = {
            "file": str(self.path),
            "status": self.status,
            "problem": self.problem or None,
            "method": self.label or None,
            "seed": self.seed,
            "steps": self.values.get("step"),
            "created": None if self.created is None else self.created.isoformat(),
            "modified": self.modified.isoformat(),
            "size": self.size,
        }
        return facts[key] if key in facts else self.values.get(key)


def run_files(folder: str | Path) -> Iterator[Path]:
    """Files below a folder that are called like runs, in order; links to folders are not followed.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    """
    folder = Path(folder)
    if folder.is_file():
        yield folder
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected one that holds run files")
    for place, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            if name.endswith(SUFFIXES):
                yield Path(place) / name


def read_entry(path: str | Path, keys: Collection[str] = ("step", "seconds")) -> Entry | None:
    """A run file at a glance; None for HDF5 that is no run.

    Parameters
    ----------
    path
        Of the file.
    keys
        What else to read, where the run has it: metrics, of the last record; settings, with dotted
        names; ``environment.<name>``.

    Notes
    -----
    Records before the last one are not looked at, nor are checkpoints and arrays: `load_run` finds
    damage in a file that seems sound here.
    """
    path = Path(path)
    facts = path.stat()
    modified = datetime.datetime.fromtimestamp(facts.st_mtime, datetime.UTC)
    if not os.access(path, os.R_OK):
        return Entry(path, "refused", f"{path} may not be read", modified, facts.st_size)
    try:
        with guarded.opened(path) as file:
            status, message = _status(file, path)
            return Entry(path, status, message, modified, facts.st_size, **_head(file, keys))
    except DamagedError as error:
        return Entry(path, "damaged", str(error), modified, facts.st_size)
    except RunFileError as error:
        if not h5py.is_hdf5(path):  # called like a run, and not even HDF5
            return Entry(path, "damaged", str(error), modified, facts.st_size)
        known = _is_ours(path)
        return Entry(path, "refused", str(error), modified, facts.st_size) if known else None


def catalogue(
    folder: str | Path = ".",
    *,
    statuses: Collection[str] = (),
    methods: Collection[str] = (),
    problems: Collection[str] = (),
    where: Iterable[str] = (),
    sort: str = "file",
    reverse: bool = False,
    metrics: Collection[str] = ("step", "seconds", "outer_loss"),
) -> list[Entry]:
    """The runs below a folder that meet every condition.

    Parameters
    ----------
    folder
        Looked through with all that is in it, for ``.h5`` and ``.hdf5``; other HDF5 is passed by.
    statuses, methods, problems
        Any of these; none for all. A method is known by its label and by its class, in upper or
        lower case.
    where
        Conditions ``"key<value"``, with ``=``, ``!=``, ``<``, ``<=``, ``>`` or ``>=``; a key is one
        of `KEYS`, a setting with its dotted name, or a metric of the last record. Numbers are
        compared as numbers. A run without the key does not meet it.
    sort
        Key to order by; runs without it come last.
    reverse
        The largest first.
    metrics
        Metrics to read of the last record, beside those that conditions name.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        A condition cannot be understood, or names a key that no run has.

    Examples
    --------
    >>> import tempfile, torch, hyperlearn as hl
    >>> folder = tempfile.TemporaryDirectory()
    >>> problem = hl.BilevelProblem(
    ...     lambda y, x: ((y - x) ** 2).sum(),
    ...     lambda y, x: ((y - 1) ** 2).sum(),
    ...     x0=torch.zeros(2),
    ...     y0=torch.zeros(2),
    ... )
    >>> for step_size in (0.1, 0.2):
    ...     method = hl.IdentityHessian(curvature=2.0, step_size=step_size)
    ...     record = f"{folder.name}/{step_size}.h5"
    ...     _ = hl.minimize(problem, method, budget=hl.Budget(steps=5), record=record)
    >>> [entry.path.name for entry in catalogue(folder.name, where=["method.step_size>0.1"])]
    ['0.2.h5']
    """
    conditions = [Condition.parse(text) for text in where]
    asked = dict.fromkeys([*(condition.key for condition in conditions), sort])
    needed = dict.fromkeys(["step", "seconds", *metrics, *(k for k in asked if k not in KEYS)])
    entries = []
    for path in run_files(folder):
        with contextlib.suppress(FileNotFoundError):  # gone since, or a link to nowhere
            entry = read_entry(path, needed)
            entries += [] if entry is None else [entry]
    for key in asked:
        if entries and all(entry.value(key) is None for entry in entries):
            _check_known("key", key, [*KEYS, *_known_keys(entries)])
    for metric in metrics:
        names = dict.fromkeys(name for entry in entries for name in entry.metrics)
        if names and metric not in names:
            _check_known("metric", metric, names)
    for status in statuses:
        _check_known("status", status, {*STATUSES, *(entry.status for entry in entries)})
    chosen = [
        entry
        for entry in entries
        if (not statuses or entry.status in statuses)
        and (
            not methods
            or {entry.label.lower(), entry.method_class.lower()} & {m.lower() for m in methods}
        )
        and (not problems or entry.problem in problems)
        and all(condition.met(entry.value(condition.key)) for condition in conditions)
    ]
    return _sorted(chosen, [entry.value(sort) for entry in chosen], reverse)


def _check_known(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))


def _known_keys(entries: Sequence[Entry]) -> list[str]:
    """Settings and metrics of the first few runs: what a key may have been meant to be."""
    found: dict[str, None] = {}
    for entry in [entry for entry in entries if entry.metrics][:10]:
        with guarded.opened(entry.path) as file:
            found |= dict.fromkeys([*flat(codec.read(file, "config")), *entry.metrics])
    return list(found)


_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_CONDITION = re.compile(r"\s*([^=<>!\s]+)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")


@dataclass(frozen=True)
class Condition:
    """A key, a comparison, and the text to compare with."""

    key: str
    comparison: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From ``key=value``, or with ``!=``, ``<``, ``<=``, ``>``, ``>=``.

        Raises
        ------
        ValueError
            It is none of these.

        Examples
        --------
        >>> Condition.parse("method.step_size<=0.1")
        Condition(key='method.step_size', comparison='<=', text='0.1')
        """
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r}: expected key=value, or with !=, <, <=, >, >=; e.g. method.step_size=0.1"
            )
        key, comparison, value = found.groups()
        return cls(key, "=" if comparison == "==" else comparison, value)

    def met(self, value: Any) -> bool:
        """Whether a value meets it; one that is missing does not.

        Raises
        ------
        ValueError
            A number is to be more or less than something that is no number.
        """
        if value is None:
            return False
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = _number(self.text)
        if self.comparison in ("=", "!="):
            if number and wanted is not None:
                same = value == wanted or (math.isnan(value) and math.isnan(wanted))
            else:
                same = str(value).lower() == self.text.lower()
            return same == (self.comparison == "=")
        if number and wanted is None:
            raise ValueError(
                f"{self.key}{self.comparison}{self.text}: {self.key} is a number; expected one"
            )
        if number != (wanted is not None):
            return False  # None, or a word, is neither more nor less than a number
        one: Any = value if number else str(value)
        other: Any = wanted if number else self.text
        return bool(_COMPARISONS[self.comparison](one, other))


def _status(file: h5py.File, path: Path) -> tuple[str, str]:
    status = guarded.attribute(file, "status", str)
    message = guarded.attribute(file, "message", str, "")
    if status == "running" and not is_written(path):
        return "killed", "no process is writing it"
    return status, message


def _head(file: h5py.File, keys: Collection[str]) -> dict[str, Any]:
    config, environment, history = (
        guarded.group_of(file, name) for name in ("config", "environment", "history")
    )
    count = int(guarded.array(guarded.dataset_of(guarded.group_of(file, "records"), "history")))
    metrics = guarded.names_of(history)
    values: dict[str, Any] = {}
    for key in keys:
        if key in metrics:
            if count > 0:
                values[key] = _last(history, key, count)
        elif key.startswith("environment."):
            values[key] = _setting(environment, key.split(".")[1:])
        else:
            values[key] = _setting(config, key.split("."))
    method_class = _setting(config, ["method", "class"])
    seed = _setting(environment, ["seed"])
    return {
        "problem": _text(_setting(config, ["problem"])),
        "label": _text(_text(_setting(config, ["label"])) or method_class),
        "method_class": _text(method_class),
        "seed": seed if isinstance(seed, int) else None,
        "created": _moment(guarded.attribute(file, "created", str, "")),
        "metrics": tuple(metrics),
        "values": values,
    }


def _last(history: h5py.Group, name: str, count: int) -> Any:
    column = guarded.array(guarded.dataset_of(history, name), slice(count - 1, count))
    if len(column) != 1:
        raise DamagedError(f"{history.file.filename} is damaged: {name} has no record {count}")
    return column[0].item()


def _setting(group: h5py.Group, parts: Sequence[str]) -> Any:
    """What `flat` would call by these parts, joined by dots; None for what there is not."""
    for i in range(len(parts), 0, -1):  # a key may have dots of its own
        name, rest = ".".join(parts[:i]), parts[i:]
        if name == "class" and not rest and "class" in group.attrs:
            return guarded.attribute(group, "class", str)
        link = _link(name)
        if not name:
            continue
        if rest and link in group:
            below = guarded.child(group, link)
            found = _setting(below, rest) if isinstance(below, h5py.Group) else None
            if found is not None:
                return found
        elif not rest and (link in group.attrs or link in group):
            value = codec.read(group, name)
            return None if isinstance(value, dict) else flat({name: value})[name]
    return None


def _link(name: str) -> str:
    """What `codec` calls it in the file."""
    if name in ("kind", "class"):
        return f"%{ord(name[0]):02x}{name[1:]}"
    return guarded.link_name(name)


def _text(value: Any) -> str:
    return "" if value in (None, "None") else str(value)


def _is_ours(path: Path) -> bool:
    """Whether HDF5 that cannot be used says that it is a run."""
    try:
        with guarded.LOCK, h5py.File(path, "r", locking=False) as file:
            return bool(guarded.attribute(file, "format", str, "") == FORMAT)
    except (OSError, RuntimeError, RunFileError):
        return True  # nobody can tell; it is better shown


def _moment(text: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return None


def _sorted(entries: Sequence[Entry], values: Sequence[Any], reverse: bool) -> list[Entry]:
    """By value, numbers before text; without one last, in either direction."""
    pairs = list(zip(values, entries, strict=True))
    missing = [entry for value, entry in pairs if _absent(value)]
    present = [(value, entry) for value, entry in pairs if not _absent(value)]
    present.sort(
        key=lambda pair: (
            (0, pair[0], "") if isinstance(pair[0], (int, float)) else (1, 0, str(pair[0]))
        ),
        reverse=reverse,
    )
    return [entry for _, entry in present] + missing


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
