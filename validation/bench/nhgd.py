"""Hypergradients of NHGD by dense recursion and factor form; Hessians with and without a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hyperlearn as hl
from hyperlearn.batches import Minibatches
from hyperlearn.experiments.data_cleaning import DataCleaning, cleaning_problem, load_data
from hyperlearn.methods.trajectory import projected_sgd
from validation.bench.timing import Bench


def fisher_inverse(bench: Bench) -> None:
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

    p = y.numel()
    traffic = count * 3 * 4 * p * p / 1e9
    bench.compare(
        f"One NHGD hypergradient, p = {p}, T = {count}, float32",
        {
            "factor form": lambda: hypergradient(factor_inverse),
            "dense recursion": lambda: hypergradient(dense_inverse),
        },
        lambda medians: (
            f"The dense form moves at least {traffic:.0f} GB (a read for P g, a read and a write "
            f"for the update, T times); here {traffic / medians['dense recursion']:.0f} GB/s. The "
            "factor form spends most of its time on the outer gradient and the cross product."
        ),
        tolerance=1e-4,
    )
    b = oracles.outer_gradients(y, x, problem.outer_data)[0]
    gram = 2 * count**2 * p / 1e9
    bench.compare(
        f"Its inverse alone, T = {count} gradients taken in and one solve",
        {
            "factor form": lambda: factor_inverse()(b),
            "dense recursion": lambda: dense_inverse()(b),
        },
        lambda medians: (
            f"The factor form computes {gram:.2f} Gflop for the {count} x {count} matrix: "
            f"{gram / medians['factor form']:.0f} Gflop/s."
        ),
        tolerance=1e-4,
    )


def hessian_modes(bench: Bench) -> None:
    """Ten Hessian products of the softmax problem: with the gradient's graph kept, and without."""
    settings = DataCleaning()
    problem = cleaning_problem(load_data(settings), settings)
    oracles = problem.oracles()
    y, x = problem.y_space.ravel(problem.y0), problem.x_space.ravel(problem.x0)
    batch = Minibatches(problem.inner_data, 5120, torch.Generator().manual_seed(0)).draw()
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

    def products(mode: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hessian = hl.operators.Hessian(lambda u: oracles.inner(u, x, batch), y, mode=mode)
            for _ in range(9):
                hessian @ v
            return hessian @ v

        return run

    passes = 20 * 5120 * 784 * 4 / 1e9
    bench.compare(
        "Ten Hessian products, softmax regression 5120 x 784 x 10, float32",
        {"graph kept": products("reverse"), "forward over reverse": products("forward")},
        lambda medians: (
            f"At least 2 passes over the images a product, {1e3 * passes:.0f} MB in ten: "
            f"{passes / medians['graph kept']:.0f} GB/s with the graph kept."
        ),
        tolerance=1e-4,
    )
