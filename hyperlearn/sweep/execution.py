"""A sweep's runs on joblib's worker processes or a dask cluster; whatever happens to a worker.

A process that dies takes its pool with it: joblib raises, and what was unfinished is submitted to a
fresh pool, where each run goes on from its checkpoint. Who died is not told, so each run that had
begun is suspected; the last of its tries a run has to itself, so that none fails for another. A
cluster's scheduler knows, and does the same by itself; not through joblib, whose dask backend waits
for ever for a task that the scheduler has given up (1.6).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import joblib
from tqdm.auto import tqdm

from hyperlearn.sweep.plan import PlannedRun, Sweep
from hyperlearn.sweep.worker import Job, Result, work

logger = logging.getLogger(__name__)


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
        How often a run is tried again after its worker died. On a cluster its scheduler says so:
        ``distributed.scheduler.allowed-failures``.
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
        _cluster(backend, workers, scheduler) as client,
    ):
        execution = _Execution(sweep, planned, Path(signs), workers, retry, client)
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
def _cluster(backend: str, workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of a dask cluster; None where there is none."""
    if backend == "loky":
        yield None
        return
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise ImportError(
            "distributed is not installed; it comes with hyperlearn's extra dask: "
            'pip install "hyperlearn[dask]"'
        ) from error
    new = {"n_workers": max(1, workers), "threads_per_worker": 1, "dashboard_address": None}
    with distributed.Client(scheduler, **({} if scheduler else new)) as client:
        yield client


class _Execution:
    """Runs in pools, until each has an outcome or somebody wants to stop."""

    def __init__(
        self,
        sweep: Sweep,
        planned: Sequence[PlannedRun],
        signs: Path,
        workers: int,
        retry: int,
        client: Any,
    ) -> None:
        self.sweep, self.planned, self.signs = sweep, planned, signs
        self.workers, self.retry, self.client = workers, retry, client
        self.tries: Counter[int] = Counter()
        self.pending = list(range(len(planned)))
        self.stop = signs / "stop"

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        if self.client is not None:
            yield from self._on_cluster()
            return
        while self.pending and not self.stop.exists():
            # Suspects come last: what they do to their pool, they do to one another.
            fewest = min(self.tries[index] for index in self.pending)
            now = [index for index in self.pending if self.tries[index] == fewest]
            alone = self.workers == 1 or 0 < fewest == self.retry
            for group in [[index] for index in now] if alone else [now]:
                for index, outcome in self._pooled(group):
                    self.pending.remove(index)
                    yield index, outcome

    def _on_cluster(self) -> Iterator[tuple[int, Outcome]]:
        import distributed

        submitted = {
            self.client.submit(work, self._job(index), pure=False): index for index in self.pending
        }
        for future in distributed.as_completed(list(submitted)):
            index = submitted.pop(future)
            error = future.exception()
            if error is None:
                yield index, self._outcome(*future.result())
            else:
                text = f"{type(error).__name__}: {error}"
                yield index, Outcome(self.planned[index], "failed", text)

    def left(self, index: int) -> Outcome:
        """Of a run that the sweep was stopped before or in."""
        begun = self._sign("begun", index).exists()
        return Outcome(self.planned[index], "interrupted" if begun else "not started", "stopped")

    def _outcome(
        self, index: int, found: Mapping[str, Any], records: Sequence[logging.LogRecord]
    ) -> Outcome:
        for record in records:
            logging.getLogger(record.name).handle(record)
        return Outcome(self.planned[index], **found)

    def _pooled(self, group: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """Outcomes of runs in one pool; where it dies, of those that have no try left."""
        unfinished = list(group)
        jobs = (self._job(index) for index in group if not self.stop.exists())
        try:
            for result in self._results(jobs):
                unfinished.remove(result[0])
                yield result[0], self._outcome(*result)
        except BrokenProcessPool as error:
            if not self.stop.exists():
                yield from self._suspected(unfinished, error)

    def _results(self, jobs: Iterator[Job]) -> Iterator[Result]:
        if self.workers == 0:
            yield from map(work, jobs)
            return
        with joblib.parallel_config(
            "loky",
            inner_max_num_threads=self.sweep.threads,
            # Ctrl-C in a terminal reaches each worker: one that waits would die of it, and with it
            # the pool.
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),
        ):
            pool = joblib.Parallel(
                # With one worker, joblib would run jobs in this process, which is to survive them.
                n_jobs=max(2, self.workers),
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch="n_jobs",
            )
        yield from pool(joblib.delayed(work)(job) for job in jobs)

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

    def _sign(self, kind: str, number: int) -> Path:
        return self.signs / f"{kind}-{number}"

    def _job(self, index: int) -> Job:
        planned, sweep = self.planned[index], self.sweep
        return Job(
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
            stop=self.stop.resolve(),
            process=os.getpid(),
            child=self.client is None and self.workers > 0,
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
