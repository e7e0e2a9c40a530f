"""Hyper-data-cleaning on MNIST: the grid that chose the defaults, and the table of all methods.

    python -m validation.cleaning grid     # 9 settings a method, judged on held-out images
    python -m validation.cleaning table    # every method, seeds 0 to 4, 90 seconds of training each
    python -m validation.cleaning gap      # each method's hypergradient against the exact one

Every run is one HDF5 file under ``runs/``; a run that is there and finished is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import hyperlearn as hl
from hyperlearn.experiments.data_cleaning import (
    METHODS,
    DataCleaning,
    clean,
    cleaning_problem,
    load_data,
)
from hyperlearn.hypergradients import implicit_hypergradient

# The corruption and the split of the grid are not among those that are reported.
GRID_SEED = 100

_EXACT = {"step_size": [3e3, 1e4, 3e4], "inner_step_size": [0.3, 0.5, 0.8]}
# 9 settings a method: equal effort. Neumann's alpha is tied to the inner step, as in unrolling.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "nhgd": {"step_size": [3e3, 1e4, 3e4], "damping": [0.03, 0.1, 0.3]},
    "cg10": _EXACT,
    "cg40": _EXACT,
    "neumann10": _EXACT,
    "neumann40": _EXACT,
    "identity": _EXACT,
    "unrolled": _EXACT,
    "none": {"inner_step_size": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0]},
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: which method with which settings, for how long, into which file."""

    method: str
    overrides: tuple[tuple[str, Any], ...]
    seed: int
    seconds: float
    threads: int
    path: Path


def grid_jobs(methods: Iterable[str], seconds: float, threads: int, folder: Path) -> list[Job]:
    """Every setting of every method's grid."""
    jobs = []
    for name in methods:
        grid = GRIDS[name]
        for values in itertools.product(*grid.values()):
            overrides = tuple(zip(grid, values, strict=True))
            label = "-".join(f"{key}={value:g}" for key, value in overrides)
            path = folder / name / f"{label}.h5"
            jobs.append(Job(name, overrides, GRID_SEED, seconds, threads, path))
    return jobs


def table_jobs(
    methods: Iterable[str], seeds: Iterable[int], seconds: float, threads: int, folder: Path
) -> list[Job]:
    """Every method with its defaults and every seed; seeds outermost, so that methods alternate."""
    return [
        Job(name, (), seed, seconds, threads, folder / f"{name}-seed{seed}.h5")
        for seed in seeds
        for name in methods
    ]


def method_of(job: Job) -> hl.Method:
    """The method with the job's settings; Neumann's alpha follows the inner step."""
    method = dataclasses.replace(METHODS[job.method], **dict(job.overrides))
    solver = getattr(method, "solver", None)
    if isinstance(solver, hl.solvers.Neumann):
        solver = dataclasses.replace(solver, step_size=method.inner_step_size)
        method = dataclasses.replace(method, solver=solver)
    return method


def finished(job: Job) -> bool:
    """Whether the job's file holds a finished run of these settings, and not of others."""
    if not job.path.exists():
        return False
    run, method = hl.load_run(job.path), method_of(job)
    return (
        run.status == "finished"
        and run.setting("method") == method
        and run.setting("task") == DataCleaning(data_seed=job.seed)
        and run.config["budget"]["seconds"] == job.seconds
        and run.environment["threads"] == job.threads
    )


def run_job(job: Job) -> str:
    """Do one job unless it is done; returns what happened in a line."""
    torch.set_num_threads(job.threads)
    if finished(job):
        return f"{job.path}: there already"
    method = method_of(job)
    try:
        run = clean(
            method,
            DataCleaning(data_seed=job.seed),
            budget=hl.Budget(seconds=job.seconds),
            seed=job.seed,
            label=job.method,
            record=job.path,
            overwrite=True,
        )
    except hl.DivergedError as error:
        return f"{job.path}: diverged: {error}"
    last = {name: values[-1] for name, values in run.history.items()}
    return f"{job.path}: test {last['test_accuracy']:.4f}, outer {last['outer_loss']:.4f}"


def run_all(jobs: list[Job], workers: int, console: Console) -> None:
    """Run the jobs on worker processes, a line each as they end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for number, line in enumerate(pool.map(run_job, jobs), start=1):
            console.print(f"[{number}/{len(jobs)}] {line}", highlight=False, markup=False)


def grid_table(jobs: list[Job], console: Console) -> None:
    """Print each method's settings, best held-out accuracy first, and mark the one to take.

    Accuracies within one binomial standard error of the best are ties (the one-standard-error rule
    of Breiman et al., 1984); among ties the smallest outer step fits the validation set least, and
    after that accuracy decides.
    """
    for name in dict.fromkeys(job.method for job in jobs):
        table = Table(title=f"{name}: by accuracy on {DataCleaning.selection_size} held-out images")
        for column in ("setting", "held-out", "outer loss", "AUC", "outer steps", "status", "take"):
            table.add_column(column)
        rows = []
        for job in (job for job in jobs if job.method == name):
            run = hl.load_run(job.path)
            last = {key: values[-1] for key, values in run.history.items()}
            score = last["selection_accuracy"] if run.status == "finished" else -1.0
            rows.append((score, dict(job.overrides), last, run.status))
        rows.sort(key=lambda row: -row[0])
        best = rows[0][0]
        error = (best * (1 - best) / DataCleaning.selection_size) ** 0.5
        ties = [row for row in rows if row[0] >= best - error]
        taken = min(ties, key=lambda row: (row[1].get("step_size", 0.0), -row[0]))
        for row in rows:
            score, setting, last, status = row
            table.add_row(
                ", ".join(f"{key}={value:g}" for key, value in setting.items()),
                f"{score:.4f}",
                f"{last['outer_loss']:.4f}",
                f"{last['weight_auc']:.4f}",
                f"{last['step']:.0f}",
                status,
                "<-" if row is taken else "",
            )
        console.print(table)


_COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "test accuracy, %": ("test_accuracy", 100.0, ".2f"),
    "outer loss": ("outer_loss", 1.0, ".4f"),
    "AUC": ("weight_auc", 1.0, ".4f"),
    "outer steps": ("step", 1.0, ".0f"),
    "gradients": ("gradients", 1.0, ".0f"),
    "Hessian products": ("hessian_products", 1.0, ".0f"),
    "cross products": ("cross_products", 1.0, ".0f"),
    "samples, 1e6": ("oracle_samples", 1e-6, ".0f"),
}


def results_table(jobs: list[Job], console: Console) -> None:
    """Print mean and sample standard deviation over the seeds, a row a method."""
    table = Table(title="mean ± standard deviation over seeds, at the end of the budget")
    table.add_column("method")
    table.add_column("seeds")
    for column in _COLUMNS:
        table.add_column(column)
    table.add_column("residual in the exact Hessian")
    for name in dict.fromkeys(job.method for job in jobs):
        runs = [hl.load_run(job.path) for job in jobs if job.method == name and finished(job)]
        if not runs:
            continue
        cells = []
        for metric, scale, form in _COLUMNS.values():
            values = np.array([run.history[metric][-1] for run in runs]) * scale
            spread = values.std(ddof=1) if len(values) > 1 else float("nan")
            cells.append(f"{values.mean():{form}} ± {spread:{form}}")
        residuals = np.concatenate([run.certificates["hessian_residual"] for run in runs])
        measured = residuals[~np.isnan(residuals)]
        cells.append(f"{np.median(measured):.2g}" if len(measured) else "-")
        table.add_row(name, str(len(runs)), *cells)
    console.print(table)


def gap_table(path: Path, console: Console, draws: int = 5) -> None:
    """Print how far each method's hypergradient is from the exact one, where a run has ended.

    Exact: Hessian and cross derivative on all training samples at the run's last y, CG to a true
    relative residual of 1e-3. Each method starts from that y with its own inner steps and batches.
    It sees some samples only, so the two are compared on those: cosine, and ratio of the norms
    after the share of samples is put right.
    """
    run = hl.load_run(path)
    settings = run.setting("task")
    problem = cleaning_problem(load_data(settings), settings)
    y0, x = problem.y_space.ravel(run.y), problem.x_space.ravel(run.x)
    exact = implicit_hypergradient(
        problem.oracles(),
        y0,
        x,
        inner_batch=problem.inner_data,
        outer_batch=problem.outer_data,
        operator=None,
        solver=hl.solvers.CG(rtol=1e-3, maxiter=2000),
    )
    console.print(str(exact.certify()), markup=False, highlight=False)
    table = Table(title=f"hypergradients at the end of {path}, mean ± deviation of {draws} draws")
    for column in ("method", "cosine to the exact one", "ratio of norms"):
        table.add_column(column)
    for name, method in METHODS.items():
        if name == "none":
            continue
        cosines, ratios = [], []
        for draw in range(draws):
            oracles = problem.oracles()
            estimator = method.start(problem, oracles, torch.Generator().manual_seed(draw))
            trajectory = estimator.solve_inner(y0, x)
            estimate = estimator.estimate(x, trajectory).gradient
            seen = estimate != 0
            share = float(seen.float().mean())
            there, found = exact.gradient[seen], estimate[seen] * share
            cosines.append(float(there @ found / (there.norm() * found.norm())))
            ratios.append(float(found.norm() / there.norm()))
        cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in (cosines, ratios)]
        table.add_row(name, *cells)
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m validation.cleaning", description=__doc__)
    parser.add_argument("what", choices=["grid", "table", "gap"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, help="training time a run (grid: 30, table: 90)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a run")
    parser.add_argument("--folder", type=Path, default=Path("runs/cleaning"))
    parser.add_argument(
        "--print-only", action="store_true", help="print what is there; run nothing"
    )
    options = parser.parse_args(arguments)
    console = Console(width=180)
    if options.what == "gap":
        torch.set_num_threads(options.threads)
        gap_table(options.folder / "table" / "nhgd-seed0.h5", console)
        return
    if options.what == "grid":
        seconds = options.seconds or 30.0
        jobs = grid_jobs(options.methods, seconds, options.threads, options.folder / "grid")
    else:
        seconds = options.seconds or 90.0
        folder = options.folder / "table"
        jobs = table_jobs(options.methods, options.seeds, seconds, options.threads, folder)
    if not options.print_only:
        run_all(jobs, options.workers, console)
    (grid_table if options.what == "grid" else results_table)(jobs, console)


if __name__ == "__main__":
    main()
