"""A sweep's runs on worker processes or a cluster, through joblib; whatever happens to a worker.

A worker that dies takes its pool with it: joblib raises, and what was unfinished is submitted to a
fresh pool, where each run goes on from its checkpoint. Who died is not told, so each run that had
begun is suspected; the last of its tries a run has to itself, so that none fails for another.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import joblib
import torch
from tqdm.auto import tqdm

from hyperlearn.experiments.experiment import experiment
from hyperlearn.outer import DivergedError
from hyperlearn.runs import Run, RunInUseError
from hyperlearn.settings import override
from hyperlearn.sweep.plan import PlannedRun, Sweep

logger = logging.getLogger(__name__)
# A run may still be written for a while by a worker whose sweep has died, until its next record.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep has ended.

    Parameters
    ----------
    planned
        The run.
    status
        As of a `Run`; ``"failed"`` also where it never came to be one, or its worker died too
        often; ``"not started"`` where the sweep was stopped before.
    message
        Why.
    final
        The last record: ``metric -> value``.
    metrics
        Those in `final` that are the problem's own, and ``outer_loss``.
    warnings
        What it has warned of.
    """

    planned: PlannedRun
    status: str
    message: str = ""
    final: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def stopped(self) -> bool:
        """Whether somebody stopped it: neither success nor failure."""
        return self.status in ("interrupted", "not started")

    @property
    def failed(self) -> bool:
        """Whether it ended, and not as it should."""
        return self.status != "finished" and not self.stopped


def run_sweep(
    sweep: Sweep,
    *,
    workers: int | None = None,
    backend: Literal["loky", "dask"] = "loky",
    scheduler: str | None = None,
    retry: int = 3,
    progress: bool = False,
) -> list[Outcome]:
    """Run what is not finished yet; runs that were begun go on from their last checkpoint.

    Ctrl-C ends each run at its next record, and then the sweep; a second one ends it at once.
    Called again, it goes on.

    Parameters
    ----------
    sweep
        What to run.
    workers
        Processes; by default as many as there are cores for, with the threads of each. 0 for none:
        one run after the other in this process, for a debugger.
    backend
        ``"loky"``: processes on this machine. ``"dask"``: the workers of a cluster, which see the
        same folder; with one thread each, as PyTorch has its own.
    scheduler
        Address of a `distributed` scheduler; None for a cluster of `workers` on this machine.
    retry
        How often a run is tried again after its worker died.
    progress
        Show a progress bar over the runs.

    Returns
    -------
    list
        One outcome a run, in the order of `Sweep.runs`. A run that raises is a failed one, and
        does not keep the others from running.

    Raises
    ------
    ValueError
        The sweep or an argument is wrong; nothing has run.
    hyperlearn.RunFileError
        A file of a run's name is a run of other settings, or none; nothing has run.

    Examples
    --------
    >>> import tempfile, hyperlearn as hl
    >>> source = '''
    ... import torch, hyperlearn as hl
    ...
    ... def make(seed: int, size: int = 2):
    ...     torch.manual_seed(seed)
    ...     target = torch.randn(size)
    ...     problem = hl.BilevelProblem(
    ...         lambda y, x: ((y - x) ** 2).sum(),
    ...         lambda y, x: ((y - target) ** 2).sum(),
    ...         x0=torch.zeros(size),
    ...         y0=torch.zeros(size),
    ...     )
    ...     return problem, {"identity": hl.IdentityHessian(curvature=2.0, step_size=0.1)}
    ... '''
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = Path(folder.name, "mine.py")
    >>> _ = file.write_text(source)
    >>> sweep = Sweep(
    ...     experiment=f"{file}:make",
    ...     methods=("identity",),
    ...     budget=hl.Budget(steps=20),
    ...     grid={"size": (2, 4)},
    ...     folder=Path(folder.name),
    ... )
    >>> for outcome in run_sweep(sweep, workers=0):
    ...     print(outcome.planned.name, outcome.status)
    identity-size=2-seed0 finished
    identity-size=4-seed0 finished
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers}; expected at least 0, or None for all cores")
    if retry < 0:
        raise ValueError(f"retry={retry}; expected at least 0")
    if backend not in ("loky", "dask"):
        raise ValueError(f"backend={backend!r}; expected 'loky' or 'dask'")
    if scheduler is not None and backend != "dask":
        raise ValueError(f"scheduler={scheduler!r} is of a cluster; expected backend='dask'")
    planned = sweep.runs()
    sweep.refuse_other_runs(planned)
    if workers is None:
        workers = max(1, joblib.cpu_count() // sweep.threads)
    Path(sweep.folder).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".sweep-", dir=sweep.folder) as signs,
        _pools(backend, workers, scheduler, sweep.threads) as (pools, deaths),
    ):
        execution = _Execution(sweep, planned, Path(signs), pools, deaths, workers, retry)
        logger.info("sweep of %d runs in %s", len(planned), sweep.folder)
        bar = tqdm(
            total=len(planned), disable=not progress, desc="runs", unit="run", dynamic_ncols=True
        )
        outcomes: dict[int, Outcome] = {}
        with bar, execution.stopped_by_interrupt():
            for index, outcome in execution.outcomes():
                outcomes[index] = outcome
                _tell(outcome)
                bar.set_postfix(failed=sum(o.failed for o in outcomes.values()), refresh=False)
                bar.update()
        return [
            outcomes[index] if index in outcomes else execution.left(index)
            for index in range(len(planned))
        ]


def _tell(outcome: Outcome) -> None:
    name = outcome.planned.name
    for text in outcome.warnings:
        logger.warning("%s: %s", name, text)
    level = logging.ERROR if outcome.failed else logging.INFO
    logger.log(level, "%s: %s: %s", name, outcome.status, outcome.message)


@contextmanager
def _pools(
    backend: str, workers: int, scheduler: str | None, threads: int
) -> Iterator[tuple[Mapping[str, Any], tuple[type[Exception], ...]]]:
    """Settings of joblib, and the exceptions by which it tells that a worker has died."""
    if backend == "loky":
        # Ctrl-C in a terminal reaches each worker: one that waits would die of it, and the pool.
        ignoring = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        yield (
            {"backend": "loky", "inner_max_num_threads": threads, **ignoring},
            (BrokenProcessPool,),
        )
        return
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise ImportError(
            "distributed is not installed; it comes with hyperlearn's extra dask: "
            'pip install "hyperlearn[dask]"'
        ) from error
    new = {"n_workers": max(1, workers), "threads_per_worker": 1}
    with distributed.Client(scheduler, **({} if scheduler else new)) as client:
        yield {"backend": "dask", "client": client}, (distributed.KilledWorker,)


class _Execution:
    """Runs in pools, until each has an outcome or somebody wants to stop."""

    def __init__(
        self,
        sweep: Sweep,
        planned: Sequence[PlannedRun],
        signs: Path,
        pools: Mapping[str, Any],
        deaths: tuple[type[Exception], ...],
        workers: int,
        retry: int,
    ) -> None:
        self.sweep, self.planned, self.signs = sweep, planned, signs
        self.pools, self.deaths, self.workers, self.retry = pools, deaths, workers, retry
        self.tries: Counter[int] = Counter()
        self.pending = list(range(len(planned)))
        self.stop = signs / "stop"
        self.pool = 0

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        while self.pending and not self.stop.exists():
            # Suspects come last: what they do to their pool, they do to one another.
            fewest = min(self.tries[index] for index in self.pending)
            now = [index for index in self.pending if self.tries[index] == fewest]
            one = self.workers == 1 and self.pools["backend"] == "loky"
            alone = one or 0 < fewest == self.retry
            for group in [[index] for index in now] if alone else [now]:
                for index, outcome in self._pooled(group):
                    self.pending.remove(index)
                    yield index, outcome

    def left(self, index: int) -> Outcome:
        """Of a run that the sweep was stopped before or in."""
        begun = self._sign("begun", index).exists()
        return Outcome(self.planned[index], "interrupted" if begun else "not started", "stopped")

    def _pooled(self, group: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """Outcomes of runs in one pool; where it dies, of those that have no try left."""
        self.pool += 1
        unfinished = list(group)
        jobs = (self._job(index) for index in group if not self.stop.exists())
        try:
            for index, found, records in self._results(jobs):
                for record in records:
                    logging.getLogger(record.name).handle(record)
                unfinished.remove(index)
                yield index, Outcome(self.planned[index], **found)
        except self.deaths as error:
            self._sign("end", self.pool).touch()  # to those that outlive their pool, on a cluster
            if not self.stop.exists():
                yield from self._suspected(unfinished, error)

    def _results(self, jobs: Iterator[_Job]) -> Iterator[_Result]:
        if self._in_this_process:
            yield from map(_work, jobs)
            return
        with joblib.parallel_config(**self.pools):
            pool = joblib.Parallel(
                # With one worker, joblib would run jobs in this process, which is to survive them.
                n_jobs=max(2, self.workers),
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch="n_jobs",
            )
        yield from pool(joblib.delayed(_work)(job) for job in jobs)

    def _suspected(
        self, unfinished: Sequence[int], error: Exception
    ) -> Iterator[tuple[int, Outcome]]:
        begun = [i for i in unfinished if self._sign("begun", i).exists()] or unfinished
        names = ", ".join(self.planned[index].name for index in begun)
        how = ", ".join(re.findall(r"\w+\(-?\d+\)", str(error))) or type(error).__name__
        logger.warning("a worker process died (%s); it had one of: %s", how, names)
        for index in begun:
            self._sign("begun", index).unlink(missing_ok=True)
            self.tries[index] += 1
            if self.tries[index] > self.retry:
                text = (
                    f"its worker process died ({how}), {self.tries[index]} times in all; after "
                    "SIGKILL, memory may have run out: try fewer workers"
                )
                yield index, Outcome(self.planned[index], "failed", text)

    @property
    def _in_this_process(self) -> bool:
        return self.workers == 0 and self.pools["backend"] == "loky"

    def _sign(self, kind: str, number: int) -> Path:
        return self.signs / f"{kind}-{number}"

    def _job(self, index: int) -> _Job:
        planned, sweep = self.planned[index], self.sweep
        return _Job(
            index=index,
            experiment=sweep.experiment,
            label=planned.label,
            seed=planned.seed,
            task_changes=planned.task_changes,
            method_changes=planned.method_changes,
            options={
                "budget": sweep.budget,
                "every": sweep.every,
                "checkpoints": sweep.checkpoints,
                "record": planned.path.resolve(),
                "resume": True,
            },
            threads=sweep.threads,
            begun=self._sign("begun", index).resolve(),
            ends=(self.stop.resolve(), self._sign("end", self.pool).resolve()),
            process=os.getpid(),
            child=self.pools["backend"] == "loky" and not self._in_this_process,
            log_level=logging.getLogger("hyperlearn").getEffectiveLevel(),
        )

    @contextmanager
    def stopped_by_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C asks the runs to end; the second raises, as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: object) -> None:
            self.stop.touch()
            signal.signal(signal.SIGINT, before)
            logger.warning("stopping: runs end at their next record; Ctrl-C again stops at once")

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


# --- in the worker ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
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
    ends: tuple[Path, ...]
    process: int
    child: bool
    log_level: int

    def check_wanted(self, record: object = None) -> None:
        """A callback: end where the sweep was stopped, or is no more."""
        if self.orphaned or any(end.exists() for end in self.ends):
            raise KeyboardInterrupt

    @property
    def orphaned(self) -> bool:
        """Whether the sweep's own process is no more."""
        return self.child and os.getppid() != self.process


_Result = tuple[int, dict[str, Any], list[logging.LogRecord]]


def _work(job: _Job) -> _Result:
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


def _patient_run(job: _Job) -> Run:
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
def _interruptible(job: _Job) -> Iterator[None]:
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
def _logged(job: _Job) -> Iterator[list[logging.LogRecord]]:
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
