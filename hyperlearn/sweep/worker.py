"""One run of a sweep, in whatever process does it: it may be stopped, and tells what it had."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hyperlearn.experiments.experiment import experiment
from hyperlearn.loop import DivergedError
from hyperlearn.runs import Run, RunInUseError
from hyperlearn.settings import override

logger = logging.getLogger(__name__)
# A run may still be written for a while by a worker whose sweep has died, until its next record.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Job:
    """A run as plain values: what a worker needs, and any worker can read."""

    index: int
    experiment: str
    label: str
    seed: int
    task_changes: tuple[str, ...]
    method_changes: tuple[str, ...]
    options: Mapping[str, Any]
    threads: int
    begun: Path
    stop: Path
    process: int
    child: bool
    log_level: int

    def check_wanted(self, record: object = None) -> None:
        """A callback: end where the sweep was stopped, or is no more."""
        if self.orphaned or self.stop.exists():
            raise KeyboardInterrupt

    @property
    def orphaned(self) -> bool:
        """Whether the sweep's own process is no more."""
        return self.child and os.getppid() != self.process


Result = tuple[int, dict[str, Any], list[logging.LogRecord]]


def work(job: Job) -> Result:
    """Do one run; returns its index, the parameters of an `Outcome`, and what was logged."""
    with ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        stack.enter_context(_threads(job.threads))
        stack.enter_context(_interruptible(job))
        records = stack.enter_context(_logged(job))
        try:
            job.check_wanted()
            job.begun.touch()
            found = _of_run(_patient_run(job))
        except DivergedError as error:
            found = _of_run(error.run)
        except KeyboardInterrupt:
            found = {"status": "interrupted", "message": "stopped before its first step"}
        except Exception as error:
            logger.debug("run %d", job.index, exc_info=True)
            found = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    if job.orphaned:
        os._exit(1)  # nobody reads the result, and joblib's worker would wait for more to do
    told = dict.fromkeys(f"{warning.message}" for warning in caught)
    return job.index, {**found, "warnings": tuple(told)}, records


def _patient_run(job: Job) -> Run:
    made = experiment(job.experiment)
    (task,) = override([made.task(job.seed)], job.task_changes)
    # Losses may draw from torch's own generator: let them not depend on what ran here before.
    torch.manual_seed(job.seed)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return made.run(
                task,
                job.label,
                job.method_changes,
                seed=job.seed,
                callbacks=[job.check_wanted],
                **job.options,
            )
        except RunInUseError:
            if time.monotonic() > deadline:
                raise
            job.check_wanted()
            time.sleep(0.5)


_COSTS = ("step", "seconds", "hypergradient_norm", "gradients", "hessian_products",
          "cross_products", "oracle_calls", "oracle_samples")  # fmt: skip


def _of_run(run: Run) -> dict[str, Any]:
    final = {name: float(values[-1]) for name, values in run.history.items() if len(values)}
    metrics = tuple(name for name in final if name not in _COSTS)
    return {"status": run.status, "message": run.message, "final": final, "metrics": metrics}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before != number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if before != number:
            torch.set_num_threads(before)


@contextmanager
def _interruptible(job: Job) -> Iterator[None]:
    """While it runs, a process of ours takes Ctrl-C as any run does."""
    if not job.child:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Collected(logging.Handler):
    """Keeps what is logged as it can be sent to another process."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


@contextmanager
def _logged(job: Job) -> Iterator[list[logging.LogRecord]]:
    """What the library logs while a run goes on in another process than the sweep's."""
    handler = _Collected()
    if job.process == os.getpid():
        yield handler.records
        return
    package = logging.getLogger("hyperlearn")
    package.setLevel(job.log_level)
    package.addHandler(handler)
    try:
        yield handler.records
    finally:
        package.removeHandler(handler)
