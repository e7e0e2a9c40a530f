"""`minimize` and `resume`: one loop for every method, with budget, record and callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperlearn.budget import Budget, Checkpoints
from hyperlearn.loop import Callback, Loop
from hyperlearn.methods import Method
from hyperlearn.problem import BilevelProblem
from hyperlearn.runs import Run, load_run
from hyperlearn.runs import state as saved
from hyperlearn.runs.environment import environment


def minimize(
    problem: BilevelProblem,
    method: Method,
    *,
    budget: Budget,
    seed: int = 0,
    record: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoints: Checkpoints | None = None,
    every: int = 10,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    config: Mapping[str, Any] | None = None,
    attachments: Mapping[str, Any] | None = None,
) -> Run:
    """Minimise the outer loss over x with any method.

    Parameters
    ----------
    problem, method
        What to solve, and how.
    budget
        When to stop.
    seed
        Of every random draw: with a budget of steps, two runs agree bit for bit on one machine.
    record
        HDF5 file to write as the run goes (`hyperlearn.runs`); None keeps the record in memory
        only.
    overwrite
        Replace an existing run file.
    resume
        Where `record` exists, go on from its last checkpoint, to the budget as it is now; the same
        arguments and data are expected. On a CPU, and with a budget of steps, the history is then
        that of a run that was never stopped, bit for bit but for the seconds.
    checkpoints
        When to write what `resume` needs: each minute by default. Only with `record`.
    every
        Record at step 0, at every `every`-th step and at the end: the outer loss on all its data,
        the problem's metrics, the oracle counts and a certificate.
    progress
        Show a progress bar with the latest record.
    callbacks
        ``f(record)``, called at each record, when it is in the file; returning True ends the run.
    config, attachments
        More settings; and arrays, fields and other values to store.

    Returns
    -------
    Run
        Also where Ctrl-C ended it (status ``"interrupted"``): the record up to then is kept.

    Raises
    ------
    DivergedError
        x, y or a hypergradient is no longer finite, or the adjoint system broke down.
    FileExistsError
        `record` exists, and `overwrite` and `resume` are False.
    hyperlearn.RunFileError
        `record` cannot be resumed: it is no run, is damaged, or is one with other settings or data,
        which are named.
    hyperlearn.RunInUseError
        Another process writes `record`.
    hyperlearn.RecordError
        A record could not be written, as the disk is full; `run` holds everything until then.
    solvers.NotConvergedError
        With a solver that is ``strict``.
    TypeError, ValueError
        An argument of the wrong kind, a batch larger than its data, or a bad setting.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> problem = hl.BilevelProblem(
    ...     inner_loss=lambda y, x: 0.5 * ((y - x) ** 2).sum(),
    ...     outer_loss=lambda y, x: ((y - 1) ** 2).sum() + 0.5 * (x**2).sum(),
    ...     x0=torch.zeros(1, dtype=torch.float64),
    ...     y0=torch.zeros(1, dtype=torch.float64),
    ... )
    >>> method = hl.ImplicitDifferentiation(step_size=0.1, inner_step_size=0.5)
    >>> run = hl.minimize(problem, method, budget=hl.Budget(steps=200))
    >>> run.x  # the minimum of (x - 1)^2 + x^2 / 2 is at 2/3
    tensor([0.6667], dtype=torch.float64)
    """
    for name, value, kind in (
        ("problem", problem, BilevelProblem),
        ("method", method, Method),
        ("budget", budget, Budget),
        ("checkpoints", checkpoints or Checkpoints(), Checkpoints),
    ):
        if not isinstance(value, kind):
            got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            raise TypeError(f"minimize: {name} is {got}; expected an instance of {kind.__name__}")
    if every < 1:
        raise ValueError(f"every={every}; expected at least 1")
    if record is None and (resume or overwrite or checkpoints is not None):
        raise ValueError("resume, overwrite and checkpoints are about a file: give record=")
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: give one of them")
    run = Run(
        config={
            "problem": problem.name,
            "method": method,
            "budget": budget,
            "every": every,
            **(config or {}),
        },
        environment=environment(seed),
        attachments=dict(attachments or {}),
        units=dict(problem.units),
    )
    loop = Loop(problem, method, budget, every, run, callbacks)
    if record is not None:
        run.config["checksums"] = saved.checksums(problem)
        loop.checkpoints = checkpoints or Checkpoints()
        path = Path(record)
        if resume and path.exists():
            if (finished := loop.reopen(path)) is not None:
                return finished
        else:
            loop.create(path, overwrite)
    run.config = saved.as_stored(run.config)
    return loop.go(progress)


def resume(
    path: str | Path,
    problem: BilevelProblem | None = None,
    *,
    method: Method | None = None,
    budget: Budget | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Go on with a run that was interrupted, from its last checkpoint, or give it more to do.

    Settings come from the file. Losses are code, which a file does not hold: so the problem is
    handed over; its data and starting points are compared with the run's.

    Parameters
    ----------
    path
        Of the run.
    problem
        As it was. None for a run of an experiment that this library has, which is made anew.
    method
        Only where the file cannot hold it, as it has functions among its settings.
    budget
        A new one; by default that of the file.
    checkpoints, progress, callbacks
        As for `minimize`.

    Raises
    ------
    hyperlearn.RunFileError
        The file is no run, is damaged, has no checkpoint, or is of another problem, method or data.
    ValueError
        Its method is of a class that is not known here: import it, or hand it over. Or `problem` is
        None, and the run is of no experiment of this library.

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
    >>> path = folder.name + "/run.h5"
    >>> method = hl.IdentityHessian(curvature=2.0, step_size=0.1)
    >>> _ = hl.minimize(problem, method, budget=hl.Budget(steps=20), record=path)
    >>> run = hl.resume(path, problem, budget=hl.Budget(steps=40))
    >>> run.history["step"]
    array([ 0, 10, 20, 30, 40])
    """
    stored = load_run(path)
    if problem is None:
        from hyperlearn.experiments import problem_of

        problem = problem_of(stored)
    known = ("problem", "method", "budget", "every", "checksums")
    return minimize(
        problem,
        method if method is not None else stored.setting("method"),
        budget=budget if budget is not None else stored.setting("budget"),
        seed=stored.environment["seed"],
        record=path,
        resume=True,
        checkpoints=checkpoints,
        every=stored.config["every"],
        progress=progress,
        callbacks=callbacks,
        config={name: value for name, value in stored.config.items() if name not in known},
    )
