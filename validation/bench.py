"""Benchmarks: ratios in one process, the rivals in turn, medians of several runs.

    python -m validation.bench [--threads N] [--repeats N]

Machines are noisy: quote the ratio, not the seconds. The ratios are also written to
``runs/validation/bench.h5``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import threadpoolctl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import hyperlearn as hl
from hyperlearn.batches import Minibatches
from hyperlearn.experiments.data_cleaning import DataCleaning, cleaning_problem, load_data
from hyperlearn.inner import projected_sgd

REPORT = Path("runs/validation/bench.h5")


def in_turn(
    rivals: Mapping[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, float], list[float]]:
    """Time the rivals A B A B ...: medians in seconds, and first / second pair by pair."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for round_number in range(repeats + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    first, second = times.values()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians, [a / b for a, b in zip(first, second, strict=True)]


def report(
    console: Console, title: str, medians: Mapping[str, float], ratios: list[float], note: str
) -> None:
    """Print one comparison."""
    table = Table(title=title, title_justify="left")
    for column in ("rival", "median, ms"):
        table.add_column(column)
    for name, seconds in medians.items():
        table.add_row(name, f"{1e3 * seconds:.2f}")
    console.print(table)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(REPORT, "a") as file:
        group = file.require_group(title.split(",")[0])
        group.clear()
        group["ratios"] = ratios
        for name, seconds in medians.items():
            group.attrs[f"{name}, median seconds"] = seconds
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    first, second = medians
    console.print(f"ratio {first} / {second}: {middle:.1f} (from {low:.1f} to {high:.1f})")
    console.print(note + "\n", highlight=False)


def fisher_inverse(console: Console, repeats: int) -> None:
    """One NHGD hypergradient at p = 7,850 and T = 100: dense recursion against factor form."""
    settings = DataCleaning()
    problem = cleaning_problem(load_data(settings), settings)
    oracles = problem.oracles()
    y, x = problem.y_space.ravel(problem.y0), problem.x_space.ravel(problem.x0)
    batches = Minibatches(problem.inner_data, 1024, torch.Generator().manual_seed(0))
    trajectory = projected_sgd(oracles, y, x, batches, steps=100, step_size=0.5)
    gradients = [32.0 * step.score for step in trajectory.steps]  # sqrt(1024): the batch factor
    y, fresh = trajectory.y, batches.draw(5)
    initial, count = 1.0, len(gradients)

    def dense_inverse() -> Callable[[Tensor], Tensor]:
        recursion = hl.solvers.InverseRecursion(y.numel(), initial=initial, dtype=y.dtype)
        for gradient in gradients:
            recursion.update(gradient)
        return recursion.solve

    def factor_inverse() -> Callable[[Tensor], Tensor]:
        stream = hl.operators.FisherStream(hl.operators.Space.of(y), damping=0.0, initial=initial)
        for gradient in gradients:
            stream.push(gradient)
        prepared = hl.solvers.Woodbury().prepare(stream.operator())
        return lambda b: prepared.solve(b).value

    def hypergradient(inverse: Callable[[], Callable[[Tensor], Tensor]]) -> Tensor:
        solve = inverse()
        b, direct = oracles.outer_gradients(y, x, problem.outer_data)
        return direct - oracles.cross(y, x, fresh) @ solve(b)

    dense, factor = hypergradient(dense_inverse), hypergradient(factor_inverse)
    difference = float((dense - factor).norm() / factor.norm())
    p = y.numel()
    medians, ratios = in_turn(
        {
            "dense recursion": lambda: hypergradient(dense_inverse),
            "factor form": lambda: hypergradient(factor_inverse),
        },
        repeats,
    )
    traffic = count * 3 * 4 * p * p / 1e9
    report(
        console,
        f"One NHGD hypergradient, p = {p}, T = {count}, float32 (difference {difference:.1e})",
        medians,
        ratios,
        f"The dense form moves at least {traffic:.0f} GB (a read for P g, a read and a write "
        f"for the update, T times); here {traffic / medians['dense recursion']:.0f} GB/s. The "
        "factor form spends most of its time on the outer gradient and the cross product.",
    )
    b = oracles.outer_gradients(y, x, problem.outer_data)[0]
    medians, ratios = in_turn(
        {
            "dense recursion": lambda: dense_inverse()(b),
            "factor form": lambda: factor_inverse()(b),
        },
        repeats,
    )
    report(
        console,
        f"Its inverse alone, T = {count} gradients taken in and one solve",
        medians,
        ratios,
        f"The factor form computes {2 * count**2 * p / 1e9:.2f} GFlop for the {count} x {count} "
        f"matrix: {2 * count**2 * p / 1e9 / medians['factor form']:.0f} GFlop/s.",
    )


def hessian_modes(console: Console, repeats: int) -> None:
    """Ten Hessian products of the softmax problem: with the gradient's graph kept, and without."""
    settings = DataCleaning()
    problem = cleaning_problem(load_data(settings), settings)
    oracles = problem.oracles()
    y, x = problem.y_space.ravel(problem.y0), problem.x_space.ravel(problem.x0)
    batch = Minibatches(problem.inner_data, 5120, torch.Generator().manual_seed(0)).draw()
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

    def products(mode: str) -> Callable[[], None]:
        def run() -> None:
            hessian = hl.operators.Hessian(lambda u: oracles.inner(u, x, batch), y, mode=mode)
            for _ in range(10):
                hessian @ v

        return run

    medians, ratios = in_turn(
        {"forward over reverse": products("forward"), "graph kept": products("reverse")}, repeats
    )
    report(
        console,
        "Ten Hessian products, softmax regression 5120 x 784 x 10, float32",
        medians,
        ratios,
        f"At least 2 passes over the images a product, 10 x {2 * 5120 * 784 * 4 / 1e6:.0f} MB: "
        f"{20 * 5120 * 784 * 4 / 1e9 / medians['graph kept']:.0f} GB/s with the graph kept.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m validation.bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    console.print(
        f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats\n"
    )
    for pool in threadpoolctl.threadpool_info():
        console.print(f"{pool['internal_api']}: {pool['num_threads']} threads")
    fisher_inverse(console, options.repeats)
    hessian_modes(console, options.repeats)


if __name__ == "__main__":
    main()
