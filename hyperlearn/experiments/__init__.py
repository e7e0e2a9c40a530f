"""Experiments: tasks with their data, models, settings and runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperlearn.problem import BilevelProblem
    from hyperlearn.runs import Run

# Those that this library has, by name: module and class, imported when asked for.
BUILT_IN = {
    "data-cleaning": "experiment:Cleaning",
    "elliptic-a": "elliptic:EllipticA",
    "elliptic-b": "elliptic:EllipticB",
    "eikonal": "eikonal:Eikonal",
    "burgers": "burgers:Burgers",
    "schroedinger": "schroedinger:Schroedinger",
    "gray-scott": "gray_scott:GrayScott",
    "darcy": "darcy:Darcy",
    "monge-ampere": "monge_ampere:MongeAmpere",
    "sum-of-sines": "sum_of_sines:SumOfSines",
}


def problem_of(run: Run) -> BilevelProblem:
    """The problem of a run of one of these experiments, made anew from its settings.

    Raises
    ------
    ValueError
        It is of another problem.
    """
    from hyperlearn.experiments.experiment import built_in_experiment

    name, task = run.config.get("problem"), run.config.get("task")
    made = built_in_experiment(name) if name in BUILT_IN else None
    if (
        made is None
        or not isinstance(task, dict)
        or task.get("class") != type(made.task(0)).__qualname__
    ):
        raise ValueError(
            f"{run.path or run.name} is a run of {name!r}, which is no "
            "experiment of this library: hand its problem over, hyperlearn.resume(path, problem)"
        )
    return made.problem(run.setting("task"))
