"""What a sweep sees of an experiment: settings, methods by name, and how to run one of them."""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

from hyperlearn.budget import Budget
from hyperlearn.by_name import imported
from hyperlearn.experiments import BUILT_IN, data_cleaning
from hyperlearn.experiments.data_cleaning import METHODS, CleaningData, DataCleaning
from hyperlearn.methods import Method
from hyperlearn.outer import minimize
from hyperlearn.problem import BilevelProblem
from hyperlearn.runs import Run
from hyperlearn.settings import Setting, SettingsError, override, unknown_name

Make = Callable[..., tuple[BilevelProblem, Mapping[str, Method]]]


class Experiment(ABC):
    """A task with settings, and methods by name."""

    @abstractmethod
    def task(self, seed: int) -> Any:
        """The task's settings, a frozen dataclass, at their defaults."""

    @abstractmethod
    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:
        """The methods, at their defaults."""

    @abstractmethod
    def settings(self, task: Any, method: Method) -> dict[str, Any]:
        """What is known, before it runs, of the settings that the run will record."""

    @abstractmethod
    def run(
        self, task: Any, label: str, changes: Sequence[str], *, seed: int, **options: Any
    ) -> Run:
        """`hyperlearn.minimize` with a method and some ``key=value`` changes to it."""


class BuiltIn(Experiment):
    """One that this library has: ``hyperlearn run`` runs it, and resumes it from its file."""

    # What is run, and for how long, unless another is asked for.
    default_method: str
    default_budget: Budget

    @abstractmethod
    def problem(self, task: Any) -> BilevelProblem:
        """The problem of a task, with its data."""

    @abstractmethod
    def run_method(
        self, task: Any, label: str, method: Method, *, seed: int, **options: Any
    ) -> Run:
        """`hyperlearn.minimize` with a method as it is."""


class Cleaning(BuiltIn):
    """`hyperlearn.experiments.data_cleaning`, as ``hyperlearn run`` runs it."""

    default_method = "nhgd"
    default_budget = Budget(seconds=60)

    def __init__(self) -> None:
        self._load = functools.lru_cache(maxsize=1)(_loaded)

    def task(self, seed: int) -> DataCleaning:  # noqa: D102
        return DataCleaning(data_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return METHODS

    def settings(self, task: Any, method: Method) -> dict[str, Any]:  # noqa: D102
        return {"task": task, "method": method}

    def run(  # noqa: D102
        self, task: Any, label: str, changes: Sequence[str], *, seed: int, **options: Any
    ) -> Run:
        (method,) = override([METHODS[label]], changes)
        return data_cleaning.clean(
            method, task, seed=seed, label=label, data=_last_data(task), **options
        )

    def problem(self, task: Any) -> BilevelProblem:  # noqa: D102
        return data_cleaning.cleaning_problem(self._load(task), task)

    def run_method(  # noqa: D102
        self, task: Any, label: str, method: Method, *, seed: int, **options: Any
    ) -> Run:
        data = self._load(task)
        return data_cleaning.clean(method, task, seed=seed, label=label, data=data, **options)


def _loaded(task: DataCleaning) -> CleaningData:
    return data_cleaning.load_data(task)


# A worker mostly has runs of one task after the other, each with an experiment of its own.
_last_data = functools.lru_cache(maxsize=1)(_loaded)


class FunctionExperiment(Experiment):
    """A function ``make(seed, **settings) -> (problem, methods)`` of the user's.

    Parameters
    ----------
    make
        Its first parameter is the seed. The others are the settings: whole numbers, numbers, texts,
        truth values, literals or None, by annotation or default. Others keep their defaults.
    name
        What to call it in errors.

    Raises
    ------
    ValueError
        It cannot be called so, or a parameter without default is of another type.
    """

    def __init__(self, make: Make, name: str) -> None:
        if not callable(make):
            raise ValueError(f"{name} is a {type(make).__name__}; expected a function {_SIGNATURE}")
        self.make, self.name = make, name
        self._settings = _settings_class(make, name)

    def task(self, seed: int) -> Any:  # noqa: D102
        return self._settings()

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return self._made(task, seed)[1]

    def settings(self, task: Any, method: Method) -> dict[str, Any]:  # noqa: D102
        return {"task": dict(vars(task))}  # the method may depend on the seed: `run` will see

    def run(  # noqa: D102
        self, task: Any, label: str, changes: Sequence[str], *, seed: int, **options: Any
    ) -> Run:
        problem, methods = self._made(task, seed)
        if label not in methods:
            raise ValueError(unknown_name("method", label, methods))
        (method,) = override([methods[label]], changes)
        return minimize(
            problem, method, seed=seed, config={"label": label, "task": vars(task)}, **options
        )

    def _made(self, task: Any, seed: int) -> tuple[BilevelProblem, Mapping[str, Method]]:
        missing = [f.name for f in fields(task) if getattr(task, f.name) is _MISSING]
        if missing:
            raise SettingsError(f"{self.name} needs {', '.join(missing)}: give it as a setting")
        made = self.make(seed, **vars(task))
        if (
            not isinstance(made, tuple)
            or len(made) != 2
            or not isinstance(made[0], BilevelProblem)
            or not isinstance(made[1], Mapping)
            or not all(isinstance(method, Method) for method in made[1].values())
        ):
            raise ValueError(f"{self.name} returned {made!r:.200}; expected {_SIGNATURE}")
        return made


_SIGNATURE = "make(seed, **settings) -> (BilevelProblem, dict of a Method by name)"


def built_in_experiment(name: str) -> BuiltIn:
    """One of `hyperlearn.experiments.BUILT_IN`.

    Raises
    ------
    ValueError
        There is none of the name.
    """
    if name not in BUILT_IN:
        raise ValueError(unknown_name("experiment", name, BUILT_IN))
    module, _, cls = BUILT_IN[name].partition(":")
    made: BuiltIn = getattr(importlib.import_module(f"hyperlearn.experiments.{module}"), cls)()
    return made


def experiment(name: str) -> Experiment:
    """A built-in experiment, or ``module:function`` or ``file.py:function``.

    Raises
    ------
    ValueError
        There is none of the name, or it is no function that makes a problem and methods.
    FileNotFoundError
        There is no such file.
    """
    if name in BUILT_IN:
        return built_in_experiment(name)
    if ":" not in name:
        known = [*BUILT_IN, "MODULE:FUNCTION", "FILE.py:FUNCTION"]
        raise ValueError(unknown_name("experiment", name, known))
    return FunctionExperiment(imported(name), name)


class _Missing:
    """Stands for a value that has to be given."""

    def __repr__(self) -> str:
        return "?"


_MISSING = _Missing()


def _settings_class(make: Make, name: str) -> type:
    """The parameters after the first as a frozen dataclass, which text can set."""
    try:
        parameters = list(inspect.signature(make).parameters.values())
        hints = get_type_hints(make)
    except (TypeError, ValueError, NameError) as error:
        raise ValueError(f"{name}: {error}; expected a function {_SIGNATURE}") from error
    if not parameters or parameters[0].kind is parameters[0].KEYWORD_ONLY:
        raise ValueError(f"{name} takes no seed; expected a function {_SIGNATURE}")
    found: list[tuple[str, Any, Any]] = []
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"{name} takes *{parameter.name}: name the settings one by one, so that a wrong "
                "one can be told"
            )
        given = parameter.default is not parameter.empty
        hint = hints.get(parameter.name, type(parameter.default) if given else Any)
        if Setting(parameter.name, name, None, hint, "").expected:
            default = parameter.default if given else _MISSING
            found.append((parameter.name, hint, field(default=default)))
        elif not given:
            raise ValueError(
                f"{name}: the setting {parameter.name} has no default, and no annotation that text "
                "can express; expected one of int, float, bool, str, a Literal, or these or None"
            )
    return make_dataclass("Settings", found, frozen=True)
