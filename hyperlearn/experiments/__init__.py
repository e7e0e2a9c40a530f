"""Experiments: tasks with their data, models, settings and runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperlearn.problem import BilevelProblem
    from hyperlearn.runs import Run


def problem_of(run: Run) -> BilevelProblem:
    """The problem of a run of one of these experiments, made anew from its settings.

    Raises
    ------
    ValueError
        It is of another problem.
    """
    from hyperlearn.experiments.data_cleaning import DataCleaning, cleaning_problem, load_data

    task = run.config.get("task")
    if not isinstance(task, dict) or task.get("class") != DataCleaning.__qualname__:
        raise ValueError(
            f"{run.path or run.name} is a run of {run.config.get('problem')!r}, which is no "
            "experiment of this library: hand its problem over, hyperlearn.resume(path, problem)"
        )
    settings = run.setting("task")
    return cleaning_problem(load_data(settings), settings)
