"""The loop itself: an outer step after the other, recorded, saved, and told where it fails."""

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

from hyperlearn.budget import Budget, Checkpoints
from hyperlearn.certificate import Certificate, Estimate
from hyperlearn.methods import Method
from hyperlearn.oracles import OracleCount
from hyperlearn.problem import BilevelProblem
from hyperlearn.runs import RecordError, Run, RunFile, RunFileError, load_run
from hyperlearn.runs import state as saved
from hyperlearn.runs.compared import differences, refuse_differences
from solvers import (
    ConvergenceWarning,
    Info,
    LinearSolver,
    NotPositiveDefiniteError,
    SingularError,
)

Callback = Callable[[Mapping[str, float]], bool | None]
logger = logging.getLogger(__name__)


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


class Loop:
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
        """Begin a file, with a checkpoint of the start."""
        run = self.run
        self.file = RunFile(
            path,
            config=run.config,
            environment=run.environment,
            attachments=run.attachments,
            units=run.units,
            state=self.state(),
            overwrite=overwrite,
        )
        run.path = path

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
        """Be where a `state` was taken."""
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
        """Run to the end of the budget, and conclude the run, however it ends."""
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
        took = f"{self.step} outer steps in {self.clock.seconds:.1f} s of training"
        return self.finish(
            "finished",
            "; ".join(filter(None, [took, self.estimator.settled])),
            whole=True,
        )

    def _steps(self) -> None:
        stop = self.recorded() is None and self.take_record()
        while not stop and self.estimator.settled is None and (spent := self.spent()) < 1:
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
        """Share of the budget."""
        return self.budget.spent(self.step, self.clock.seconds, self.oracles.count.calls)

    def recorded(self) -> int | None:
        """Step of the last record; None before the first."""
        if self.rows:
            return int(self.rows[-1]["step"])
        steps = self.earlier[0].get("step")
        return None if steps is None or not len(steps) else int(steps[-1])

    def advance(self) -> None:
        """One outer step: the inner solve, the hypergradient, a step on x."""
        estimator, problem = self.estimator, self.problem
        trajectory = estimator.solve_inner(self.y, self.x)
        _check_finite(trajectory.y, "y")
        self.estimate = estimator.estimate(self.x, trajectory)
        _check_finite(self.estimate.gradient, "the hypergradient")
        x, velocity = estimator.move(self.x, self.velocity, self.estimate.gradient)
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
        told = [message, self.failures.told(self.step), self.estimator.told()]
        self._conclude(status, "; ".join(filter(None, told)))
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
        x, y = self.x_space.unravel(self.x), self.y_space.unravel(self.y)
        run.result = {"x": x, "y": y}
        if status in ("finished", "interrupted"):
            try:
                run.result |= self.problem.conclude(y, x)
            except (ArithmeticError, ValueError, RuntimeError) as error:
                # What was learnt is not lost with what should have been told of it.
                told = f"the result was not evaluated: {type(error).__name__}: {error}"
                run.message = f"{message}; {told}"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
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
