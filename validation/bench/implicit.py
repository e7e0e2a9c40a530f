"""Solutions and their derivatives: overhead, a large sparse problem, memory of unrolling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import hyperlearn as hl
import operators as ops
from validation.bench import memory
from validation.bench.timing import Bench, recorded

# --- a root of ten unknowns -------------------------------------------------------------------


def _coefficients(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(n, n, generator=generator, dtype=torch.float64) / 10
    return M + 2 * torch.eye(n), torch.randn(n, generator=generator, dtype=torch.float64)


def overhead(bench: Bench) -> None:
    """``M y + x tanh(y) = b``: the root by Newton's method and its gradient by x."""
    n = 10
    M, b = _coefficients(n)
    y0, point = torch.zeros(n, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)

    def F(y: Tensor, x: Tensor) -> Tensor:
        return M @ y + x * torch.tanh(y) - b

    def ours() -> Tensor:
        x = point.clone().requires_grad_()
        hl.root(F, y0, x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    def by_hand() -> Tensor:
        """The least that torch can do: no line search, no certificate, one attempt."""
        y, x = y0, point
        for _ in range(50):
            value = F(y, x)
            if value.norm() <= 1e-11 * b.norm():
                break
            y = y - torch.linalg.solve(torch.func.jacrev(F)(y, x), value)
        q = torch.linalg.solve(torch.func.jacrev(F)(y, x).mT, 2 * y)
        return -torch.func.vjp(lambda x: F(y, x), x)[1](q)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return hl.root(F, y0, point)

    def residual() -> Tensor:
        return F(y0, point)

    rivals: dict[str, Callable[[], object]] = {"hyperlearn": ours, "torch by hand": by_hand}
    rivals.update(_jaxopt(M, b))
    bench.compare(
        "Root of 10 unknowns, forward and backward",
        rivals,
        lambda t: (
            f"{1e6 * t['hyperlearn']:.0f} us, of which forward {1e6 * t['forward alone']:.0f} us; "
            f"one F takes {1e6 * t['one F']:.1f} us, its Jacobian {1e6 * t['one Jacobian']:.0f} us"
        ),
        tolerance=1e-8,
        beside={
            "forward alone": forward,
            "one F": residual,
            "one Jacobian": lambda: torch.func.jacrev(F)(y0, point),
        },
    )


def _jaxopt(M: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    """The same Newton's method under ``custom_root``, compiled and warm; nothing without JAXopt."""
    try:
        import jax
        import jax.numpy as jnp
        from jaxopt import implicit_diff, linear_solve
    except ImportError:
        return {}
    jax.config.update("jax_enable_x64", True)
    matrix, right = jnp.asarray(M.numpy()), jnp.asarray(b.numpy())

    def F(y: Any, x: Any) -> Any:
        return matrix @ y + x * jnp.tanh(y) - right

    @implicit_diff.custom_root(F, solve=linear_solve.solve_lu)
    def newton(y0: Any, x: Any) -> Any:
        def going(y: Any) -> Any:
            return jnp.linalg.norm(F(y, x)) > 1e-11 * jnp.linalg.norm(right)

        def step(y: Any) -> Any:
            return y - jnp.linalg.solve(jax.jacobian(F)(y, x), F(y, x))

        return jax.lax.while_loop(going, step, y0)

    start = jnp.zeros(len(b))
    gradient = jax.jit(jax.grad(lambda x: (newton(start, x) ** 2).sum()))
    return {"JAXopt, compiled": lambda: torch.tensor(np.asarray(gradient(1.0).block_until_ready()))}


# --- 1e5 unknowns through CHOLMOD -------------------------------------------------------------


def sparse(bench: Bench, side: int = 316) -> None:
    """``min sum |grad y|^2 / 2 + x y^4 / 4 - f y`` on a grid: Newton with a sparse Cholesky."""
    f = torch.ones(side, side, dtype=torch.float64) / side**2

    def energy(y: Tensor, x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(y, (1, 1, 1, 1))
        slopes = (padded[1:] - padded[:-1]).square().sum() + (
            padded[:, 1:] - padded[:, :-1]
        ).square().sum()
        return slopes / 2 + (x * y**4).sum() / (4 * side**2) - (f * y).sum()

    y0, point = torch.zeros_like(f), torch.full_like(f, 1000.0)
    plan = ops.SparseHessian(energy, y0, point).plan
    settings: dict[str, Any] = {
        "method": hl.inner.Newton(),
        "linear_solver": hl.solvers.SparseCholesky(),
        "operator": lambda y, x: ops.SparseHessian(energy, y, x, plan=plan, positive_definite=True),
    }
    answer = hl.argmin(energy, y0, point, return_info=True, **settings)

    def both() -> Tensor:
        x = point.clone().requires_grad_()
        hl.argmin(energy, y0, x, **settings).square().sum().backward()
        assert x.grad is not None
        return x.grad

    x = point.clone().requires_grad_()
    loss = hl.argmin(energy, y0, x, **settings).square().sum()

    def gradient() -> object:
        return torch.autograd.grad(loss, x, retain_graph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return hl.argmin(energy, y0, point, **settings)

    bench.compare(
        f"Minimiser on a {side} x {side} grid ({side**2} unknowns), SparseCholesky",
        {"forward solve": forward, "gradient": gradient, "both": both},
        f"{answer.info.iterations} steps of Newton; the adjoint is solved with the last factor",
        tolerance=None,
    )


# --- memory -----------------------------------------------------------------------------------


def _descent(n: int, steps: int, differentiate: Any) -> Callable[[], object]:
    """Gradient descent with so many steps on a quadratic of n unknowns, and its gradient."""
    curvature = torch.linspace(0.1, 1.0, n, dtype=torch.float64)

    def loss(y: Tensor, x: Tensor) -> Tensor:
        return (curvature * y.square()).sum() / 2 - (x * y).sum()

    method = hl.inner.GradientDescent(step_size=0.5, maxiter=steps, rtol=0.0)
    x = torch.ones(n, dtype=torch.float64, requires_grad=True)

    def run() -> object:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so many steps, converged or not
            y = hl.argmin(
                loss,
                torch.zeros(n, dtype=torch.float64),
                x,
                method=method,
                linear_solver=hl.solvers.CG(),
                differentiate=differentiate,
            )
            return torch.autograd.grad(y.square().sum(), x)

    return run


def unrolling(bench: Bench, n: int = 100_000) -> None:
    """Peak memory of one gradient against the number of inner steps."""
    if not memory.can_measure():
        bench.console.print("memory: needs /proc, left out")
        return
    modes = {
        "implicit": "implicit",
        "unrolled": hl.Unroll(checkpoint=False),
        "with checkpoints": hl.Unroll(),
    }
    table = Table(
        title=f"Peak memory of a gradient, {n} unknowns of {8 * n / 2**20:.2f} MiB, in MiB",
        title_justify="left",
    )
    counts = (16, 64, 256, 1024)
    for column in ("", *(f"T = {count}" for count in counts)):
        table.add_column(column)
    with recorded("memory of unrolling") as group:
        group.attrs["steps"] = counts
        for name, mode in modes.items():
            peaks = [memory.peak(_descent, n, count, mode) / 2**20 for count in counts]
            group[name] = peaks
            table.add_row(name, *(f"{peak:.0f}" for peak in peaks))
    bench.console.print(table)
    growth = math.sqrt(counts[-1] / counts[0])
    bench.console.print(f"from T = {counts[0]} to {counts[-1]}: sqrt(T) grows {growth:.0f} times\n")
