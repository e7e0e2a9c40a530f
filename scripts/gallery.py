"""The pictures of docs/gallery.md, from small runs that take seconds.

    .venv/bin/python scripts/gallery.py [FOLDER]

writes them to docs/images, or to FOLDER. Times are those of the machine that it runs on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import hyperlearn as hl
from hyperlearn.experiments.elliptic import EllipticA
from hyperlearn.plots import plot_certificates, plot_curves, plot_fields, plot_kernel, plot_pde

FEATURES, TRAINING, VALIDATION = 30, 120, 60


def ridge(seed: int) -> hl.BilevelProblem:
    """A penalty for each feature, of which a third matters, learnt on validation data."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = draw(FEATURES) * (torch.arange(FEATURES) < FEATURES // 3)
    a, b = draw(TRAINING, FEATURES), draw(VALIDATION, FEATURES)
    train = (a, a @ truth + draw(TRAINING))
    check = (b, b @ truth + draw(VALIDATION))

    def loss(y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((batch[0] @ y - batch[1]) ** 2).mean()

    def inner(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * loss(y, batch) + 0.5 * (x.sigmoid() * y**2).sum()

    curvature = torch.linalg.eigvalsh(a.T @ a / TRAINING)
    return hl.BilevelProblem(
        inner,
        lambda y, x, batch: loss(y, batch),
        x0=torch.zeros(FEATURES, dtype=torch.float64),
        y0=torch.zeros(FEATURES, dtype=torch.float64),
        inner_data=train,
        outer_data=check,
        # |d_x d_y G| = max |sigmoid'(x) y| <= |y| / 4, and no y on the way is longer than 10.
        smoothness=hl.Smoothness(
            strong_convexity=float(curvature[0]),
            cross_norm=2.5,
            outer_smoothness=2 * float(torch.linalg.matrix_norm(b, 2) ** 2) / VALIDATION,
            cross_lipschitz=0.25,
        ),
        metrics={"distance_to_truth": lambda y, x: float((y - truth).norm())},
        name="ridge regression",
    )


METHODS: dict[str, hl.Method] = {
    "implicit, CG": hl.ImplicitDifferentiation(
        solver=hl.solvers.CG(maxiter=10, rtol=1e-3), step_size=3.0, inner_steps=10
    ),
    "unrolled": hl.Unrolled(step_size=3.0, inner_steps=10, unroll_steps=5),
    "identity": hl.IdentityHessian(step_size=3.0, inner_steps=10),
}


def run(label: str, method: hl.Method, seed: int, steps: int = 60) -> hl.Run:
    budget = hl.Budget(steps=steps)
    return hl.minimize(
        ridge(seed), method, budget=budget, seed=seed, every=2, config={"label": label}
    )


def curves(folder: Path) -> None:
    runs = [
        run(label, replace(method, inner_batch_size=30, outer_batch_size=30), seed)
        for label, method in METHODS.items()
        for seed in range(3 if label == "identity" else 5)
    ]
    plot_curves(runs, folder / "curves.png", x="oracle_calls", log=True)


def settings(folder: Path) -> None:
    runs = [
        run("implicit, CG", replace(METHODS["implicit, CG"], step_size=size), seed)
        for size in (0.3, 3.0, 30.0)
        for seed in range(3)
    ]
    plot_curves(
        runs, folder / "settings.png", x="step", metrics=["outer_loss", "hypergradient_norm"]
    )


def certificates(folder: Path) -> None:
    runs = [run(label, method, seed) for label, method in METHODS.items() for seed in range(3)]
    plot_certificates(runs, folder / "certificates.png", x="step")


def heat(intervals: int = 24, steps: int = 24, end: float = 0.1) -> tuple[hl.Field, hl.Field]:
    """``u_t = u_xx`` from ``sin pi x + sin(3 pi x) / 2``: implicit Euler, and the solution."""
    x = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    t = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    exact = sum(
        c * torch.outer((k * torch.pi * x).sin(), (-((k * torch.pi) ** 2) * t).exp())
        for k, c in ((1, 1.0), (3, 0.5))
    )
    n = intervals - 1
    second = (torch.diag(torch.ones(n - 1), 1) - torch.eye(n)).double()
    laplacian = (second + second.T) * intervals**2
    step = torch.eye(n).double() - end / steps * laplacian
    computed = torch.zeros_like(exact)
    computed[:, 0] = exact[:, 0]
    for i in range(steps):
        computed[1:-1, i + 1] = torch.linalg.solve(step, computed[1:-1, i])
    about = {"units": "K", "coordinate_units": {"x": "m", "t": "s"}}
    return hl.Field(computed, {"x": x, "t": t}, **about), hl.Field(exact, {"x": x, "t": t}, **about)


def fields(folder: Path) -> None:
    computed, exact = heat()
    x = {"x": computed.coordinates["x"]}
    about = {"units": "K", "coordinate_units": {"x": "m"}}
    last, last_exact = (hl.Field(u.values[:, -1], x, **about) for u in (computed, exact))
    solutions = {
        "u": computed,
        "u_reference": exact,
        "u_at_the_end": last,
        "u_at_the_end_reference": last_exact,
    }
    plot_fields(hl.Run(result=solutions), folder / "fields.png")

    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 300, generator=generator, dtype=torch.float64)
    inside = (a - 0.5) ** 2 + (b - 0.5) ** 2 < 0.25
    a, b = a[inside], b[inside]
    permeability = (2 + (3 * a).sin() + (5 * b).cos()) / 4
    about = {"units": "mD", "coordinate_units": {"a": "km", "b": "km"}}
    scattered = hl.Field(permeability, {"a": a, "b": b}, **about)
    plot_fields(hl.Run(result={"permeability": scattered}), folder / "scattered.png")


def kernel(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.linspace(0, 1, 60, dtype=torch.float64)
    distance = (points[:, None] - points).abs() / 0.2
    gram = (1 + 3**0.5 * distance) * (-(3**0.5) * distance).exp()
    start = 0.3 + 0.6 * torch.rand(30, generator=generator, dtype=torch.float64)
    hessian = torch.func.hessian(rosenbrock)(start)
    matrices = {"gram_matrix": gram, "hessian": hessian}
    plot_kernel(hl.Run(attachments=matrices), folder / "kernel.png")


def rosenbrock(y: Tensor) -> Tensor:
    """A banana in many dimensions; not convex."""
    return (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum()


def pde(folder: Path) -> None:
    experiment = EllipticA()
    task = replace(experiment.task(0), interior=500, boundary=160, validation=500)
    method = experiment.methods(task, 0)["learn"]
    budget = hl.Budget(steps=150)
    plot_pde(
        experiment.run_method(task, "learn", method, seed=0, budget=budget, every=5),
        folder / "pde.png",
    )


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    for draw in (curves, settings, certificates, fields, kernel, pde):
        draw(folder)


if __name__ == "__main__":
    main()
