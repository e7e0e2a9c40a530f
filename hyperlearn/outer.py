"""The outer loop: one for every method, with budget, record, progress and callbacks."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperlearn.certificate import Certificate, Estimate
from hyperlearn.methods import Method
from hyperlearn.oracles import OracleCount
from hyperlearn.problem import BilevelProblem
from hyperlearn.runs import RecordError, Run, RunFile, RunFileError, load_run
from hyperlearn.runs import state as saved
from hyperlearn.runs.compared import differences, refuse_differences
from hyperlearn.runs.environment import environment
from solvers import (
    ConvergenceWarning,
    Info,
    LinearSolver,
    NotPositiveDefiniteError,
    SingularError,
)

Callback = Callable[[Mapping[str, float]], bool | None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """When to stop: at whichever limit comes first.

    Parameters
    ----------
    steps
        Outer steps.
    seconds
        Training time: recording and evaluation are off this clock.
    oracle_calls
        Gradients, Hessian and cross products together.
    """

    steps: int | None = None
    seconds: float | None = None
    oracle_calls: int | None = None

    def __post_init__(self) -> None:
        limits = {f.name: getattr(self, f.name) for f in fields(self)}
        if all(limit is None for limit in limits.values()):
            raise ValueError(
                "Budget needs a limit: steps=, seconds= or oracle_calls=; with none it never ends"
            )
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"Budget: {name}={limit}; expected a positive number")

    def spent(self, step: int, seconds: float, calls: int) -> float:
        """Largest share of a limit that is used up; the run ends at 1."""
        shares = [
            used / limit
            for used, limit in (
                (step, self.steps),
                (seconds, self.seconds),
                (calls, self.oracle_calls),
            )
            if limit is not None
        ]
        return max(shares)


@dataclass(frozen=True)
class Checkpoints:
    """When a recorded run writes what it needs to be resumed, and how much of that it keeps.

    A checkpoint costs a rewrite of the file: the size of x, y and the method's state, and of the
    compressed history.

    Parameters
    ----------
    seconds
        Of wall-clock time between two; None for no such rule.
    steps
        Outer steps between two; None for no such rule.
    keep
        How many of the newest to keep.
    """

    seconds: float | None = 60.0
    steps: int | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"Checkpoints: seconds={self.seconds}; expected a number >= 0 or None")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Checkpoints: steps={self.steps}; expected at least 1, or None")
        if self.keep < 1:
            raise ValueError(f"Checkpoints: keep={self.keep}; expected at least 1")

    def due(self, steps: int, seconds: float) -> bool:
        """Whether it is time, so long after the last one."""
        return (self.steps is not None and steps >= self.steps) or (
            self.seconds is not None and seconds >= self.seconds
        )


class DivergedError(FloatingPointError):
    """A run met NaN or infinity; `run` holds everything until then."""

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


class _Clock:
    """Training time: runs only inside ``with clock:``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


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
    loop = _Loop(problem, method, budget, every, run, callbacks)
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
    problem: BilevelProblem,
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
        As it was.
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
        Its method is of a class that is not known here: import it, or hand it over.

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


@dataclass
class _Failures:
    """Adjoint solves that failed, as opposed to being cut off where they were told to."""

    missed: int = 0
    step: int = 0
    residual: float = 0.0
    reason: str = ""

    def note(self, step: int, info: Info) -> None:
        self.missed += 1
        if self.missed == 1 or not info.residual <= self.residual:
            self.step, self.residual, self.reason = step, float(info.residual), info.reason

    def told(self, steps: int) -> str:
        """In a sentence; empty if none did."""
        if not self.missed:
            return ""
        return (
            f"the adjoint solve missed its tolerance in {self.missed} of {steps} steps, whose "
            f"hypergradients are inexact; worst in step {self.step}: {self.reason}"
        )


class _Loop:
    """One run: what it is at, and how it goes on, records, and saves what it needs to go on."""

    checkpoints = Checkpoints()

    def __init__(
        self,
        problem: BilevelProblem,
        method: Method,
        budget: Budget,
        every: int,
        run: Run,
        callbacks: Sequence[Callback],
    ) -> None:
        self.problem, self.method, self.budget = problem, method, budget
        self.every, self.run, self.callbacks = every, run, callbacks
        self.generator = torch.Generator().manual_seed(run.environment["seed"])
        self.oracles = problem.oracles()
        self.estimator = method.start(problem, self.oracles, self.generator)
        self.x_space, self.y_space = problem.x_space, problem.y_space
        self.x = self.x_space.ravel(problem.x0).detach()
        self.y = self.y_space.ravel(problem.y0).detach()
        self.velocity = torch.zeros_like(self.x)
        self.step, self.clock = 0, _Clock()
        self.failures = _Failures()
        self.estimate: Estimate | None = None
        self.file: RunFile | None = None
        # Records of this process, after those of the ones before it.
        self.earlier: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        self.rows: list[dict[str, float]] = []
        self.certificates: list[tuple[int, Certificate]] = []
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.between = True  # two steps, and not inside of one

    # --- the file -----------------------------------------------------------------------------

    def create(self, path: Path, overwrite: bool) -> None:
        run = self.run
        self.file = RunFile(
            path,
            config=run.config,
            environment=run.environment,
            attachments=run.attachments,
            units=run.units,
            overwrite=overwrite,
        )
        run.path = path
        try:
            self.file.checkpoint(0, self.state())
        except BaseException:
            self.file.close()
            raise

    def reopen(self, path: Path) -> Run | None:
        """Go on from the last checkpoint; returns the run where nothing is left to do."""
        stored = load_run(path)
        there, here = (
            {"seed": surroundings.get("seed"), **config}
            for config, surroundings in (
                (stored.config, stored.environment),
                (saved.as_stored(self.run.config), self.run.environment),
            )
        )
        refuse_differences(path, there, here)
        for change in differences(stored.environment, self.run.environment):
            if change.name.partition(".")[0] not in ("git_revision", "git_dirty"):
                logger.warning("%s is resumed with another %s", path, change)
        state, step, lengths = saved.last_checkpoint(path)
        finished = stored.status == "finished" and step == stored.history["step"][-1]
        if finished and self.budget.spent(step, state["seconds"], _calls(state["count"])) >= 1:
            logger.info("%s is finished", path)
            return stored
        self.file = RunFile.reopened(path, step, self.run.config)
        try:
            self.restore(state, step)
            stored = load_run(path)
            self.earlier = (dict(stored.history), dict(stored.certificates))
            assert len(self.earlier[0].get("step", ())) == lengths["history"]
            self.run.path, self.run.attachments = path, stored.attachments
        except BaseException:
            self.file.close()
            raise
        logger.info("%s: resumed at step %d", path, step)
        return None

    def state(self) -> dict[str, Any]:
        """All that the following steps depend on."""
        return {
            "x": self.x,
            "y": self.y,
            "velocity": self.velocity,
            "seconds": self.clock.seconds,
            "count": vars(self.oracles.count).copy(),
            "failures": vars(self.failures).copy(),
            "estimator": self.estimator.state(),
            "generator": self.generator.get_state(),
            "random": saved.random_state(self.method),
        }

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        for name in ("x", "y", "velocity"):
            now = getattr(self, name)
            then = state[name]
            if then.shape != now.shape or then.dtype != now.dtype:
                raise RunFileError(
                    f"the checkpoint's {name} is {tuple(then.shape)} {then.dtype}; the problem's "
                    f"is {tuple(now.shape)} {now.dtype}"
                )
            setattr(self, name, then.to(now.device))
        self.clock.seconds = state["seconds"]
        self.oracles.count = OracleCount(**state["count"])
        self.failures = _Failures(**state["failures"])
        self.estimator.restore(state["estimator"])
        self.generator.set_state(state["generator"])
        saved.restore_random_state(self.method, state["random"])
        self.step = self.saved_step = step

    def save(self) -> None:
        """A checkpoint, if it is time; where it cannot be written the run goes on without."""
        if self.file is None or not self.checkpoints.due(
            self.step - self.saved_step, time.monotonic() - self.saved_at
        ):
            return
        self.saved_step, self.saved_at = self.step, time.monotonic()
        try:
            with _undisturbed():
                self.file.checkpoint(self.step, self.state(), keep=self.checkpoints.keep)
        except OSError as error:
            message = (
                f"no checkpoint at step {self.step}: {error}; the run goes on, and what was "
                "written before is untouched"
            )
            logger.warning(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    # --- the loop -----------------------------------------------------------------------------

    def go(self, progress: bool) -> Run:
        self.bar = tqdm(
            total=100,
            disable=not progress,
            desc=str(self.run.config.get("label", self.problem.name)),
            bar_format=_BAR,
            dynamic_ncols=True,
        )
        logger.info("%s: %s from step %d", self.problem.name, self.run.label, self.step)
        # The estimator's own warnings are told once, with their number at the end, not at each
        # step. Losses may close over tensors that require grad: no graph of theirs may outlive one.
        with self.bar, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                self._steps()
            except KeyboardInterrupt:
                message = f"stopped by Ctrl-C after {self.step} outer steps"
                return self.finish("interrupted", message, whole=self.between)
            except RecordError as error:
                if self.file is not None:
                    self.file.close()
                self._conclude("failed", str(error))
                error.run = self.run
                raise
            except (FloatingPointError, SingularError, NotPositiveDefiniteError) as error:
                # An adjoint system that breaks down mostly does so on its way to infinity.
                text = (
                    f"{error} (outer step {self.step}): reduce step_size or inner_step_size, or "
                    "increase damping"
                )
                self.finish("diverged", text)
                raise DivergedError(self.run.message, self.run) from error
            except BaseException as error:
                self.finish("failed", f"{type(error).__name__}: {error}")
                raise
        if told := self.failures.told(self.step):
            warnings.warn(told, ConvergenceWarning, stacklevel=3)
        return self.finish(
            "finished",
            f"{self.step} outer steps in {self.clock.seconds:.1f} s of training",
            whole=True,
        )

    def _steps(self) -> None:
        stop = self.recorded() is None and self.take_record()
        while not stop and (spent := self.spent()) < 1:
            self.bar.update(100 * spent - self.bar.n)
            self.save()
            self.between = False
            with self.clock:
                self.advance()
            if (failure := _failure(self.estimate, self.method)) is not None:
                self.failures.note(self.step, failure)
            if self.step % self.every == 0:
                stop = self.take_record()
            self.between = True
        self.bar.update(100 - self.bar.n)
        if self.recorded() != self.step:
            self.take_record()

    def spent(self) -> float:
        return self.budget.spent(self.step, self.clock.seconds, self.oracles.count.calls)

    def recorded(self) -> int | None:
        """Step of the last record; None before the first."""
        if self.rows:
            return int(self.rows[-1]["step"])
        steps = self.earlier[0].get("step")
        return None if steps is None or not len(steps) else int(steps[-1])

    def advance(self) -> None:
        """One outer step: the inner solve, the hypergradient, a step on x."""
        estimator, method, problem = self.estimator, self.method, self.problem
        trajectory = estimator.solve_inner(self.y, self.x)
        _check_finite(trajectory.y, "y")
        self.estimate = estimator.estimate(self.x, trajectory)
        _check_finite(self.estimate.gradient, "the hypergradient")
        velocity = method.momentum * self.velocity + self.estimate.gradient
        x = self.x - method.step_size * velocity
        if problem.project_outer is not None:
            projected = problem.project_outer(self.x_space.unravel(x))
            x = self.x_space.ravel(projected, "project_outer(x)")
        _check_finite(x, "x")
        self.velocity, self.x, self.y, self.step = velocity, x, trajectory.y, self.step + 1

    def take_record(self) -> bool:
        """Evaluate off the clock and uncounted; True if a callback wants to stop."""
        problem, estimate = self.problem, self.estimate
        with self.oracles.uncounted():
            row: dict[str, float] = {"step": self.step, "seconds": self.clock.seconds}
            row |= _counts(self.oracles.count)
            row["outer_loss"] = float(self.oracles.outer(self.y, self.x, problem.outer_data))
            row["hypergradient_norm"] = (
                math.nan if estimate is None else float(estimate.gradient.norm())
            )
            for name, metric in problem.metrics.items():
                row[name] = float(
                    metric(self.y_space.unravel(self.y), self.x_space.unravel(self.x))
                )
            certificate = None if estimate is None else estimate.certify()
        with _undisturbed():
            self.rows.append(row)
            if certificate is not None:
                self.certificates.append((self.step, certificate))
            if self.file is not None:
                self.file.append(row, certificate)
            self.between = True  # callbacks may end it here
        logger.debug("step %d: outer loss %.6g", self.step, row["outer_loss"])
        self.bar.set_postfix_str(_postfix(row, problem), refresh=False)
        wishes = [callback(row) for callback in self.callbacks]
        return any(wish is True for wish in wishes)

    def finish(self, status: str, message: str, whole: bool = False) -> Run:
        """End the run; `whole` says that it stands between two steps, and can go on from there."""
        self._conclude(status, "; ".join(filter(None, [message, self.failures.told(self.step)])))
        run = self.run
        if self.file is not None:
            state = (self.step, self.state(), self._on_cadence()) if whole else None
            with _undisturbed():
                try:
                    self.file.finish(
                        run.status, run.message, run.result, state, self.checkpoints.keep
                    )
                except OSError as error:
                    raise RecordError(
                        f"{run.path}: the result could not be written ({error}); the records are "
                        "in the file",
                        run,
                    ) from error
        return run

    def _conclude(self, status: str, message: str) -> None:
        run = self.run
        run.status, run.message = status, message
        names = list(self.rows[0]) if self.rows else []
        new = {name: np.array([row[name] for row in self.rows]) for name in names}
        run.history = _joined(self.earlier[0], new)
        run.certificates = _joined(self.earlier[1], _columns(self.certificates))
        run.certificate = self.certificates[-1][1] if self.certificates else run.certificate
        run.result = {"x": self.x_space.unravel(self.x), "y": self.y_space.unravel(self.y)}
        logger.log(
            logging.INFO if status in ("finished", "interrupted") else logging.ERROR,
            "%s: %s: %s", self.problem.name, status, message,
        )  # fmt: skip

    def _on_cadence(self) -> dict[str, int]:
        """Records that a longer run would have too: without the last, if only the end made it."""
        extra = int(self.step % self.every != 0 and self.recorded() == self.step)
        lengths = {
            "history": len(self.run.history.get("step", ())),
            "certificates": len(self.run.certificates.get("converged", ())),
        }
        return {name: max(0, length - extra) for name, length in lengths.items()}


def _joined(
    earlier: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    if not earlier or not new:
        return dict(earlier or new)
    return {name: np.concatenate([earlier[name], new[name]]) for name in earlier if name in new}


def _calls(count: Mapping[str, int]) -> int:
    return OracleCount(**count).calls


# tqdm puts a comma before the postfix.
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def _postfix(row: Mapping[str, float], problem: BilevelProblem) -> str:
    """The outer loss and the first metric: what fits beside a bar in 80 columns."""
    shown = ["outer_loss", *list(problem.metrics)[:1]]
    return ", ".join(f"{name.replace('_', ' ')} {row[name]:#.4g}" for name in shown)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put Ctrl-C off until the block is left, so that a record is written whole or not at all."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield  # Ctrl-C does not arrive here, or somebody else deals with it
        return
    pressed = False

    def remember(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _counts(count: OracleCount) -> dict[str, float]:
    return {
        "gradients": count.gradients,
        "hessian_products": count.hessian_products,
        "cross_products": count.cross_products,
        "oracle_calls": count.calls,
        "oracle_samples": count.samples,
    }


def _columns(certificates: Sequence[tuple[int, Certificate]]) -> dict[str, np.ndarray]:
    """One array a field, and their steps; None, for what was not measured, becomes NaN."""
    if not certificates:
        return {}
    columns = {f.name: [getattr(c, f.name) for _, c in certificates] for f in fields(Certificate)}
    return {"step": np.array([step for step, _ in certificates])} | {
        name: np.array([math.nan if value is None else value for value in values])
        for name, values in columns.items()
    }


def _failure(estimate: Estimate | None, method: Method) -> Info | None:
    """How the adjoint solve failed, as opposed to being cut off where it was told to; or None."""
    info = None if estimate is None else estimate.info
    if info is None or info.converged:
        return None
    solver = getattr(method, "solver", None)
    told = info.status == "maxiter" and isinstance(solver, LinearSolver) and solver.truncated
    return None if told else info


def _check_finite(vector: Tensor, name: str) -> None:
    if not bool(torch.isfinite(vector).all()):
        raise FloatingPointError(f"{name} is no longer finite")
