"""The outer loop: one for every method, with budget, record, progress and callbacks."""

from __future__ import annotations

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
from tqdm import tqdm

from hyperlearn.certificate import Certificate, Estimate
from hyperlearn.methods import Method
from hyperlearn.oracles import OracleCount
from hyperlearn.problem import BilevelProblem
from hyperlearn.run import Run, RunFile, environment
from solvers import (
    ConvergenceWarning,
    Info,
    LinearSolver,
    NotPositiveDefiniteError,
    SingularError,
)

Callback = Callable[[Mapping[str, float]], bool | None]


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
    every: int = 10,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    config: Mapping[str, Any] | None = None,
    attachments: Mapping[str, np.ndarray] | None = None,
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
        HDF5 file to write as the run goes (`hyperlearn.run`); None keeps the record in memory only.
    overwrite
        Replace an existing run file.
    every
        Record at step 0, at every `every`-th step and at the end: the outer loss on all its data,
        the problem's metrics, the oracle counts and a certificate.
    progress
        Show a progress bar with the latest record.
    callbacks
        ``f(record)``, called at each record; returning True ends the run.
    config, attachments
        More settings and arrays to store.

    Returns
    -------
    Run
        Also where Ctrl-C ended it (status ``"interrupted"``): the record up to then is kept.

    Raises
    ------
    DivergedError
        x, y or a hypergradient is no longer finite, or the adjoint system broke down.
    FileExistsError
        `record` exists and `overwrite` is False.
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
    ):
        if not isinstance(value, kind):
            got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            raise TypeError(f"minimize: {name} is {got}; expected an instance of {kind.__name__}")
    if every < 1:
        raise ValueError(f"every={every}; expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    oracles = problem.oracles()
    estimator = method.start(problem, oracles, generator)
    x_space, y_space = problem.x_space, problem.y_space
    x, y = x_space.ravel(problem.x0).detach(), y_space.ravel(problem.y0).detach()

    run = Run(
        config={
            "problem": problem.name,
            "method": {"class": type(method).__name__, **method.settings()},
            "budget": {f.name: getattr(budget, f.name) for f in fields(budget)},
            "every": every,
            **(config or {}),
        },
        environment=environment(seed),
        attachments=dict(attachments or {}),
    )
    file = None
    if record is not None:
        file = RunFile(
            record,
            config=run.config,
            environment=run.environment,
            attachments=run.attachments,
            overwrite=overwrite,
        )
        run.path = file.path

    clock = _Clock()
    velocity = torch.zeros_like(x)
    estimate: Estimate | None = None
    step, missed = 0, 0
    worst: tuple[int, Info] | None = None  # of the adjoint solves that failed: step, how
    rows: list[dict[str, float]] = []
    certificates: list[Certificate] = []

    def take_record() -> bool:
        """Evaluate off the clock and uncounted; True if a callback wants to stop."""
        with oracles.uncounted():
            row: dict[str, float] = {"step": step, "seconds": clock.seconds}
            row |= _counts(oracles.count)
            row["outer_loss"] = float(oracles.outer(y, x, problem.outer_data))
            row["hypergradient_norm"] = (
                math.nan if estimate is None else float(estimate.gradient.norm())
            )
            for name, metric in problem.metrics.items():
                row[name] = float(metric(y_space.unravel(y), x_space.unravel(x)))
            certificate = None if estimate is None else estimate.certify()
        with _undisturbed():
            rows.append(row)
            if certificate is not None:
                certificates.append(certificate)
            if file is not None:
                file.append(row, certificate)
        bar.set_postfix_str(_postfix(row, problem), refresh=False)
        wishes = [callback(row) for callback in callbacks]
        return any(wish is True for wish in wishes)

    def failures() -> str:
        """What is to be told of adjoint solves that failed; empty if none did."""
        if worst is None:
            return ""
        number, info = worst
        return (
            f"the adjoint solve missed its tolerance in {missed} of {step} steps, whose "
            f"hypergradients are inexact; worst in step {number}: {info.reason}"
        )

    def finish(status: str, message: str) -> Run:
        message = "; ".join(filter(None, [message, failures()]))
        run.status, run.message = status, message
        names = list(rows[0]) if rows else []
        run.history = {name: np.array([row[name] for row in rows]) for name in names}
        run.certificates = _columns(certificates)
        run.certificate = certificates[-1] if certificates else None
        run.x, run.y = x_space.unravel(x), y_space.unravel(y)
        if file is not None:
            with _undisturbed():
                file.finish(status, message, {"x": run.x, "y": run.y})
        return run

    bar = tqdm(
        total=100,
        disable=not progress,
        desc=str(run.config.get("label", problem.name)),
        bar_format=_BAR,
        dynamic_ncols=True,
    )
    # The estimator's own warnings are told once, with their number at the end, not at each step.
    # Losses may close over tensors that require grad: no graph of theirs may outlive a step.
    with bar, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            stop = take_record()
            while (
                not stop and (spent := budget.spent(step, clock.seconds, oracles.count.calls)) < 1
            ):
                bar.update(100 * spent - bar.n)
                with clock:
                    trajectory = estimator.solve_inner(y, x)
                    following_y = trajectory.y
                    _check_finite(following_y, "y")
                    estimate = estimator.estimate(x, trajectory)
                    _check_finite(estimate.gradient, "the hypergradient")
                    velocity = method.momentum * velocity + estimate.gradient
                    following_x = x - method.step_size * velocity
                    if problem.project_outer is not None:
                        projected = problem.project_outer(x_space.unravel(following_x))
                        following_x = x_space.ravel(projected, "project_outer(x)")
                    _check_finite(following_x, "x")
                    x, y, step = following_x, following_y, step + 1
                if (failure := _failure(estimate, method)) is not None:
                    missed += 1
                    if worst is None or not failure.residual <= worst[1].residual:
                        worst = (step, failure)
                if step % every == 0:
                    stop = take_record()
            bar.update(100 - bar.n)
            if rows[-1]["step"] != step:
                take_record()
        except KeyboardInterrupt:
            return finish("interrupted", f"stopped by Ctrl-C after {step} outer steps")
        except (FloatingPointError, SingularError, NotPositiveDefiniteError) as error:
            # An adjoint system that breaks down mostly does so on its way to infinity.
            text = (
                f"{error} (outer step {step}): reduce step_size or inner_step_size, or increase "
                "damping"
            )
            finish("diverged", text)
            raise DivergedError(run.message, run) from error
        except BaseException as error:
            finish("failed", f"{type(error).__name__}: {error}")
            raise
    if failures():
        warnings.warn(failures(), ConvergenceWarning, stacklevel=2)
    return finish("finished", f"{step} outer steps in {clock.seconds:.1f} s of training")


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


def _columns(certificates: Sequence[Certificate]) -> dict[str, np.ndarray]:
    """One array a field; None, for what was not measured, becomes NaN."""
    if not certificates:
        return {}
    columns = {f.name: [getattr(c, f.name) for c in certificates] for f in fields(Certificate)}
    return {
        name: np.array([math.nan if value is None else value for value in values])
        for name, values in columns.items()
    }


def _failure(estimate: Estimate, method: Method) -> Info | None:
    """How the adjoint solve failed, as opposed to being cut off where it was told to; or None."""
    info = estimate.info
    if info is None or info.converged:
        return None
    solver = getattr(method, "solver", None)
    told = info.status == "maxiter" and isinstance(solver, LinearSolver) and solver.truncated
    return None if told else info


def _check_finite(vector: Tensor, name: str) -> None:
    if not bool(torch.isfinite(vector).all()):
        raise FloatingPointError(f"{name} is no longer finite")
