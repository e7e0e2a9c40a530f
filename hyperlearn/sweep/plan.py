"""What a sweep is made of: read from TOML, checked as a whole, and spread out into runs."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from hyperlearn.budget import Budget, Checkpoints
from hyperlearn.experiments.experiment import Experiment, experiment
from hyperlearn.methods import Method
from hyperlearn.runs import load_run
from hyperlearn.runs.compared import refuse_differences
from hyperlearn.runs.state import as_stored
from hyperlearn.settings import Setting, SettingsError, known_settings, override, unknown_name

Value = bool | int | float | str
T = TypeVar("T")


class SweepError(ValueError):
    """A sweep that cannot be run as it is written."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Parameters
    ----------
    label
        Of the method.
    point
        Its place in the grid: ``setting -> value``.
    seed
        Of its random draws.
    task, method
        With its settings.
    task_changes, method_changes
        The same as ``"key=value"`` onto their defaults.
    path
        Of its file.
    """

    label: str
    point: Mapping[str, Value]
    seed: int
    task: Any
    method: Method
    task_changes: tuple[str, ...]
    method_changes: tuple[str, ...]
    path: Path

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return self.path.stem

    def state(self) -> str:
        """What its file says: a status, and the last step on record; ``"new"`` without one."""
        if not self.path.exists():
            return "new"
        run = load_run(self.path)
        if "step" not in run.history:
            return run.status
        return f"{run.status} at step {run.history['step'][-1]:.0f}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid of runs: every method, with every combination of settings, with every seed.

    A setting is known by its key (`hyperlearn.settings`), ``"solver.maxiter"``. ``task.KEY`` and
    ``method.KEY`` say whose it is, where both have it, and ``LABEL.KEY`` is for one method only.

    Parameters
    ----------
    experiment
        ``"data-cleaning"``; or ``"module:function"`` or ``"file.py:function"``, which names a
        function of your own, ``make(seed, **settings) -> (problem, methods)``: a `BilevelProblem`
        and a dictionary of methods by name. Its parameters after the seed are its settings. It is
        called once to plan the sweep, and once for each run, in the process of that run.
    methods
        Names of methods; ``("all",)`` for every one.
    budget
        Of each run.
    seeds
        Of data-cleaning also the data seed, where that is no setting.
    settings
        ``key -> value`` for all runs.
    grid
        ``key -> values``.
    folder
        For the files.
    every, checkpoints
        As for `hyperlearn.minimize`.
    threads
        Of PyTorch, in each worker.

    Examples
    --------
    >>> sweep = Sweep(
    ...     experiment="data-cleaning",
    ...     methods=("nhgd", "cg10"),
    ...     budget=Budget(steps=200),
    ...     seeds=(0, 1),
    ...     settings={"train_size": 5000},
    ...     grid={"step_size": (1e2, 1e3), "nhgd.damping": (0.03, 0.1)},
    ... )
    >>> runs = sweep.runs()
    >>> len(runs), runs[0].name
    (12, 'nhgd-step_size=100-damping=0.03-seed0')
    >>> runs[0].task.train_size, runs[0].method.step_size
    (5000, 100.0)
    """

    experiment: str
    methods: tuple[str, ...]
    budget: Budget
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Value] = field(default_factory=dict)
    grid: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    folder: Path = Path("runs")
    every: int = 10
    threads: int = 1
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise SweepError(f"{name}={list(values)}; expected at least one, and each once")
        if min(self.seeds) < 0:
            raise SweepError(f"seeds={list(self.seeds)}; expected numbers >= 0")
        for name in ("every", "threads"):
            if getattr(self, name) < 1:
                raise SweepError(f"{name}={getattr(self, name)}; expected at least 1")
        for key, axis in self.grid.items():
            if not axis:
                raise SweepError(f"grid: {key} has no values; expected a list of at least one")
        if both := self.settings.keys() & self.grid.keys():
            raise SweepError(f"{sorted(both)[0]} is in settings and in grid; expected it in one")

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """A sweep from a TOML file: the parameters as keys, `budget` and the like as tables.

        The folder, and an experiment's file, are relative to the TOML file.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        SweepError
            It is not TOML, or has an unknown key or a value of the wrong type.
        """
        path = Path(path)
        with path.open("rb") as file:
            try:
                return cls(**_parameters(tomllib.load(file), path.resolve().parent))
            except ValueError as error:
                raise SweepError(f"{path}: {error}") from error

    def runs(self) -> list[PlannedRun]:
        """Every run, in order: methods, then the grid, its last axis fastest, then seeds.

        Raises
        ------
        ValueError
            There is no such experiment, method or setting, or one has a value that it refuses.
        """
        made = experiment(self.experiment)
        task = made.task(self.seeds[0])
        methods = made.methods(self._probed(task), self.seeds[0])
        for label in self.methods:
            if label not in methods and label != "all":
                raise SweepError(unknown_name("method", label, [*methods, "all"]))
        labels = list(methods) if "all" in self.methods else list(self.methods)
        found = [
            run
            for label in labels
            for run in self._runs(made, label, methods[label], list(methods), labels)
        ]
        for run in found:
            if len(run.path.name.encode()) > _LONGEST_NAME:
                raise SweepError(f"{run.path.name} is too long for a file; expected fewer axes")
        return found

    def refuse_other_runs(self, planned: Sequence[PlannedRun]) -> None:
        """Raise where a file of a planned run's name is none, or one of other settings.

        What only the run itself can tell, as the checksums of its data, is compared when it starts.

        Raises
        ------
        hyperlearn.RunFileError
            With the difference.
        """
        made = experiment(self.experiment)
        for run in planned:
            if not run.path.exists():
                continue
            stored = load_run(run.path)
            known = made.settings(run.task, run.method)
            here = as_stored({"label": run.label, "every": self.every, **known})
            there = {name: stored.config[name] for name in here if name in stored.config}
            here["seed"], there["seed"] = run.seed, stored.environment.get("seed")
            refuse_differences(run.path, there, here)

    def _probed(self, task: Any) -> Any:
        """The task at the first point of the grid, as far as the keys are its own."""
        own = {setting.key: setting for setting in known_settings(task)}
        first = {**self.settings, **{key: axis[0] for key, axis in self.grid.items()}}
        keys = {key: key.removeprefix("task.") for key in first}
        changes = [
            f"{keys[key]}={_text(own[keys[key]], value)}"
            for key, value in first.items()
            if keys[key] in own
        ]
        return override([task], changes)[0]

    def _runs(
        self,
        made: Experiment,
        label: str,
        method: Method,
        known: Sequence[str],
        labels: Sequence[str],
    ) -> Iterator[PlannedRun]:
        """Those of one method."""
        for key in (*self.settings, *self.grid):
            scope = key.partition(".")[0]
            if scope in known and scope not in labels:
                raise SweepError(f"{key}: {scope} is not among the methods of this sweep")
        axes = self._axes(label, made.task(self.seeds[0]), method, known)
        for texts in itertools.product(*(axis.texts for axis in axes)):
            point = {axis.key: axis.values[axis.texts.index(text)]
                     for axis, text in zip(axes, texts, strict=True) if axis.in_grid}  # fmt: skip
            changes: dict[str, list[str]] = {"task": [], "method": []}
            for axis, text in zip(axes, texts, strict=True):
                changes[axis.owner].append(f"{axis.key}={text}")
            (changed,) = override([method], changes["method"])
            place = "".join(f"-{key}={_short(value)}" for key, value in point.items())
            for seed in self.seeds:
                (task,) = override([made.task(seed)], changes["task"])
                name = f"{quote(label, safe='=+,')}{place}-seed{seed}.h5"
                yield PlannedRun(
                    label,
                    point,
                    seed,
                    task,
                    changed,
                    tuple(changes["task"]),
                    tuple(changes["method"]),
                    Path(self.folder) / name,
                )

    def _axes(self, label: str, task: Any, method: Method, known: Sequence[str]) -> list[_Axis]:
        """Settings and grid as they concern one method; one for it alone replaces one for all."""
        own = {
            "task": {setting.key: setting for setting in known_settings(task)},
            "method": {setting.key: setting for setting in known_settings(method)},
        }
        found: dict[tuple[str, str], tuple[bool, _Axis]] = {}
        lists = {key: (value,) for key, value in self.settings.items()} | dict(self.grid)
        for key, values in lists.items():
            scope, _, rest = key.partition(".")
            if scope in known and scope != label:
                continue
            alone = scope in known
            owner, plain = ("method", rest) if alone else _owner(key, own, label)
            if plain not in own[owner]:
                raise SettingsError(unknown_name(f"setting of {label}", key, own[owner]))
            setting = own[owner][plain]
            axis = _Axis(
                owner, plain, values, [_text(setting, v) for v in values], key in self.grid
            )
            names = [_short(value) for value in values]
            if len(set(names)) < len(names):
                raise SweepError(f"grid: {key}={list(values)}; expected each value once")
            before = found.get((owner, plain))
            if before is not None and before[0] == alone:
                raise SweepError(f"{plain} of the {owner} of {label} is given twice")
            if before is None or alone:
                found[owner, plain] = (alone, axis)
        return [axis for _, axis in found.values()]


@dataclass(frozen=True)
class _Axis:
    owner: str
    key: str
    values: Sequence[Value]
    texts: list[str]
    in_grid: bool


_LONGEST_NAME = 240  # of the 255 bytes that a name may have; .lock and .part are appended


def _owner(key: str, own: Mapping[str, Mapping[str, Setting]], label: str) -> tuple[str, str]:
    """Whose setting it is, and its key there."""
    scope, dot, rest = key.partition(".")
    if dot and scope in own:
        return scope, rest
    owners = [owner for owner, settings in own.items() if key in settings]
    if len(owners) == 2:
        raise SettingsError(
            f"setting {key!r} is ambiguous: the task and {label} both have it; expected "
            f"task.{key} or method.{key}"
        )
    if not owners:
        every = [name for settings in own.values() for name in settings]
        raise SettingsError(unknown_name(f"setting of the task and {label}", key, every))
    return owners[0], key


def _text(setting: Setting, value: Any) -> str:
    """A value as the text that stands for it, if it is of the setting's type."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    parsed = setting.parse(text)
    if parsed is not None and isinstance(parsed, str) != isinstance(value, str):
        raise SettingsError(f"{setting.key}={value!r}: expected {setting.expected}")
    return text


def _short(value: Value) -> str:
    """A value in the name of a file: the same for 100, 1e2 and 100.0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        short = format(value, "g")
        return short if float(short) == value else repr(value)
    return quote(str(value).lower() if isinstance(value, bool) else value, safe="=+,")


# --- TOML -------------------------------------------------------------------------------------

_TEXT, _WHOLE, _TABLE = "text", "a whole number", "a table"
_TEXTS, _WHOLES = "a list of texts", "a list of whole numbers"
_EXPECTED = {
    "experiment": _TEXT,
    "folder": _TEXT,
    "methods": _TEXTS,
    "seeds": _WHOLES,
    "every": _WHOLE,
    "threads": _WHOLE,
    "budget": _TABLE,
    "checkpoints": _TABLE,
    "settings": _TABLE,
    "grid": _TABLE,
}


def _parameters(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of `Sweep`, from parsed TOML."""
    for name, value in tables.items():
        if name not in _EXPECTED:
            raise SweepError(unknown_name("key", name, _EXPECTED))
        if not _is(value, _EXPECTED[name]):
            raise SweepError(f"{name}={value!r}; expected {_EXPECTED[name]}")
    required = [f.name for f in fields(Sweep)][:3]
    if missing := [name for name in required if name not in tables]:
        raise SweepError(f"{missing[0]} is missing; expected {', '.join(required)}")
    found = dict(tables)
    for name in ("methods", "seeds"):
        if name in found:
            found[name] = tuple(found[name])
    found["budget"] = _filled(Budget, Budget(steps=1), "budget", found["budget"])
    found["checkpoints"] = _filled(
        Checkpoints, Checkpoints(), "checkpoints", found.get("checkpoints", {})
    )
    found["settings"] = dict(_values(found.get("settings", {}), "settings"))
    found["grid"] = dict(_axes(found.get("grid", {})))
    found["folder"] = folder / found.get("folder", "runs")
    where, colon, name = found["experiment"].rpartition(":")
    if where.endswith(".py"):
        found["experiment"] = f"{folder / where}{colon}{name}"
    return found


def _is(value: Any, expected: str) -> bool:
    if expected in (_TEXTS, _WHOLES):
        one = _TEXT if expected == _TEXTS else _WHOLE
        return isinstance(value, list) and all(_is(part, one) for part in value)
    kind = {_TEXT: str, _WHOLE: int, _TABLE: dict}[expected]
    return isinstance(value, kind) and not isinstance(value, bool)


def _filled(cls: type[T], example: T, name: str, table: Mapping[str, Any]) -> T:
    """A settings class from a table of its fields."""
    known = {setting.key: setting for setting in known_settings(example)}
    values = {}
    for key, value in table.items():
        if key not in known:
            raise SweepError(unknown_name(f"key of {name}", key, known))
        values[key] = known[key].parse(_text(known[key], value))
    return cls(**values)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``solver.maxiter`` may be written without quotes, which nests it."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _values(table: Mapping[str, Any], where: str) -> Iterator[tuple[str, Value]]:
    for key, value in _flat(table):
        if not isinstance(value, Value):
            raise SweepError(f"{where}: {key}={value!r}; expected one number, text or truth value")
        yield key, value


def _axes(table: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Value, ...]]]:
    for key, axis in _flat(table):
        if not isinstance(axis, list) or not all(isinstance(value, Value) for value in axis):
            raise SweepError(
                f"grid: {key}={axis!r}; expected a list of numbers, texts or truth values"
            )
        yield key, tuple(axis)
