"""Properties that must hold, checked on this machine on cases drawn at random.

    python -m validation.suite [--examples N] [--seed S] [--only GROUP] [--device D] [--dtype T]

Four groups, ``--examples`` draws of each:

- operators: products against dense matrices and finite differences, and ``<u, A v> = <A^T u, v>``;
- solvers: the true residual against the one that is claimed, and derivatives of solutions against
  the dense formula;
- engine: roots, fixed points, minima, least squares, constraints, decorated solvers: implicit,
  unrolled, forward and reverse mode, finite differences, all against 80-bit references;
- algorithms: the first hypergradient of each bilevel method against the exact one, finite
  differences, or what its approximation is known to give.

Nothing is shrunk or stored between runs: one seed draws one set of cases. Each case is a row of the
report (HDF5), and a point of the picture beside it: claimed against true error. With the default 30
examples it takes about 3 minutes on one core of a 2-core machine, with 5 examples 45 seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import hyperlearn as hl
import operators as ops
import solvers
from hyperlearn.checks.differences import sweep, value_noise
from hyperlearn.oracles import Oracles
from operators import LinearOperator
from validation.bilevel import problems as zoo
from validation.bilevel.run import TELLING, Answer, Meeting, Mode, met
from validation.drawn import drawn, st
from validation.report import Case, by, failures, picture, show, stated, write

REPORT = Path("runs/validation/suite.h5")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Bench:
    """Where cases are made: a device and a dtype."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self.eps = float(torch.finfo(self.dtype).eps)

    def tensor(self, array: Any) -> Tensor:
        """On the device, in the dtype."""
        return torch.as_tensor(np.asarray(array), dtype=self.dtype, device=self.device)

    def case(
        self, group: str, name: str, run: Callable[[], tuple[float, float]], tolerance: float,
        **parameters: Any,
    ) -> Case:  # fmt: skip
        """``run`` returns the true and the claimed error; what it raises or warns is a flag."""
        start, flags, raised = time.perf_counter(), [], {}
        error = claimed = math.nan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                error, claimed = run()
            except TELLING as failure:
                flags.append(f"{type(failure).__name__}: {failure}")
            except Exception as failure:  # recorded, and the other cases are tried all the same
                raised = {"raised": f"{type(failure).__name__}: {failure}"}
        if not raised:
            flags += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        return Case(
            group, name, json.dumps(parameters), error, claimed, tolerance,
            flagged="; ".join(flags), seconds=time.perf_counter() - start, certificate=raised,
        )  # fmt: skip


def distance(found: Tensor, exact: Any) -> float:
    """``|found - exact| / |exact|``, infinite where it is not a number."""
    a = found.detach().cpu().double()
    b = torch.as_tensor(exact).detach().cpu().double()
    error = float((a - b).norm()) / (float(b.norm()) or 1.0)
    return error if math.isfinite(error) else math.inf


def slope(phi: Callable[[float], float], eps: float) -> tuple[float, float]:
    """``phi'(0)`` by central differences, and how far it may be off."""
    found = sweep(phi, value_noise(phi, eps), eps).best
    if found is None:
        raise ArithmeticError("there is no derivative to compare with")
    return found.slope, found.uncertainty


# --- operators ------------------------------------------------------------------------------------


def made_operators(bench: Bench, rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Operators, each with its matrix: worked out densely, and not by the operator."""
    M, G = rng.normal(size=(n, n)), rng.normal(size=(3, n))
    d, c = rng.uniform(0.5, 2, n), rng.normal(size=n)
    small = rng.normal(size=(2, 2))
    toeplitz = c[np.abs(np.arange(n)[:, None] - np.arange(n))]
    tensor = bench.tensor
    A, y, loss = curved(bench, rng, n)
    sech = 1 - torch.tanh(A @ y) ** 2
    hessian = A.T @ (sech[:, None] * A) / (2 * n) + torch.diag(3 * y**2)
    Md = tensor(M)
    return {
        "Dense": (ops.Dense(Md), Md),
        "transposed": (ops.Dense(Md).T, Md.T),
        "Diagonal": (ops.Diagonal(tensor(d)), tensor(np.diag(d))),
        "Identity, scaled": (2.5 * ops.Identity(n, bench.dtype, bench.device),
                             2.5 * tensor(np.eye(n))),
        "sum": (ops.Dense(Md) + ops.Diagonal(tensor(d)), Md + tensor(np.diag(d))),
        "product": (ops.Dense(Md) @ ops.Dense(Md.T), tensor(M @ M.T)),
        "low rank": (ops.LowRankPlusDiagonal(tensor(G), tensor(d), tensor(np.ones(3))),
                     tensor(np.diag(d) + G.T @ G)),
        "Kronecker": (ops.Kronecker(ops.Dense(tensor(small)), ops.Dense(Md)),
                      tensor(np.kron(small, M))),
        "Toeplitz": (ops.Toeplitz(tensor(c)), tensor(toeplitz)),
        "Hessian": (ops.Hessian(loss, y), hessian),
        "Jacobian": (ops.Jacobian(lambda y: torch.tanh(A @ y), y), sech[:, None] * A),
    }  # fmt: skip


def curved(
    bench: Bench, rng: np.random.Generator, n: int
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A, y, and the loss ``mean log cosh(A y) + |y|_4^4 / 4``."""
    A, y = bench.tensor(rng.normal(size=(2 * n, n))), bench.tensor(rng.normal(size=n) / n**0.5)
    return A, y, lambda y: torch.log(torch.cosh(A @ y)).mean() + (y**4).sum() / 4


def operators_hold(bench: Bench, *, kind: str, n: int, draw: int) -> Iterator[Case]:
    """Products, by vectors and blocks, their transposes, and the adjoint identity."""
    rng = np.random.default_rng(draw)
    A, dense = made_operators(bench, rng, n)[kind]
    rows, columns = dense.shape
    v, V, u = (bench.tensor(rng.normal(size=s)) for s in ((columns,), (columns, 3), (rows,)))
    size = float(torch.linalg.matrix_norm(dense, 2)) or 1.0
    # Each product rounds n times.
    tolerance = 8 * (rows + columns) * bench.eps
    checks: dict[str, Callable[[], float]] = {
        "product": lambda: float((A @ v - dense @ v).norm() / (size * v.norm())),
        "block": lambda: float((A @ V - dense @ V).norm() / (size * V.norm())),
        "transpose": lambda: float((A.T @ u - dense.T @ u).norm() / (size * u.norm())),
        "adjoint identity": lambda: float(
            (u @ (A @ v) - (A.T @ u) @ v).abs() / (size * u.norm() * v.norm())
        ),
    }
    for name, check in checks.items():
        yield bench.case("operators", name, lambda c=check: (c(), math.nan), tolerance,
                         kind=kind, n=n, draw=draw)  # fmt: skip
    _, y, loss = curved(bench, rng, n)
    along = bench.tensor(rng.normal(size=n))

    def differences() -> tuple[float, float]:
        gradient = torch.func.grad(loss)
        exact, unsure = slope(lambda t: float(gradient(y + t * along) @ along), bench.eps)
        found = float(along @ (ops.Hessian(loss, y) @ along))
        return max(abs(found - exact) - unsure, 0.0) / abs(exact), math.nan

    yield bench.case("operators", "Hessian: finite differences", differences,
                     1e3 * bench.eps ** (2 / 3), n=n, draw=draw)  # fmt: skip


# --- solvers --------------------------------------------------------------------------------------

SOLVERS = ("CG", "MINRES", "GMRES", "BiCGStab", "LSMR", "QR", "SVD", "DenseCholesky", "DenseLDL",
           "DenseLU", "Neumann", "Auto")  # fmt: skip


def solvers_hold(
    bench: Bench, *, solver: str, n: int, condition: float, scale: int, draw: int
) -> Iterator[Case]:
    """The residual that is claimed, and the derivative of ``w^T A(t)^-1 b(t)`` along a line."""
    rng = np.random.default_rng(draw)
    M = zoo.spectrum(rng, np.logspace(0, -condition, n)) * 10.0**scale
    direction = zoo.spectrum(rng, rng.uniform(0.5, 1, n)) * 10.0**scale
    A, D, b, w = (bench.tensor(v) for v in (M, direction, rng.normal(size=n), rng.normal(size=n)))
    made = getattr(solvers, solver)()
    parameters = {"solver": solver, "n": n, "condition": condition, "scale": scale, "draw": draw}

    def operator(A: Tensor) -> LinearOperator:
        return ops.Dense(A, positive_definite=True)

    def residual() -> tuple[float, float]:
        x, info = made.prepare(operator(A)).solve(b)
        if not info.converged:
            warnings.warn(info.reason, solvers.ConvergenceWarning, stacklevel=2)
        wide = [v.double().cpu().numpy().astype(np.longdouble) for v in (A, b, x)]
        true = float(np.linalg.norm(wide[1] - wide[0] @ wide[2]) / np.linalg.norm(wide[1]))
        # Measured in the dtype itself: what rounding makes of A x is in it.
        rounding = n * bench.eps * float(np.linalg.norm(M, 2) * x.norm() / b.norm())
        return true, info.residual + rounding

    yield bench.case("solvers", "residual", residual, math.nan, **parameters)

    def derivative() -> tuple[float, float]:
        def value(t: Tensor) -> Tensor:
            moved = operator(A + 0.1 * 10.0**-condition * t * D)
            return w @ solvers.solve(moved, (1 + t) * b, made)

        t = torch.zeros((), dtype=bench.dtype, device=bench.device, requires_grad=True)
        (found,) = torch.autograd.grad(value(t), t)
        # By the dense formula in doubles: t is a number in both A and b.
        wide = A.double(), 0.1 * 10.0**-condition * D.double(), b.double(), w.double()
        x, q = torch.linalg.solve(wide[0], wide[2]), torch.linalg.solve(wide[0].T, wide[3])
        parts = q @ wide[2], q @ (wide[1] @ x)
        exact = float(parts[0] - parts[1])
        size = float(q.norm() * (wide[2].norm() + (wide[1] @ x).norm()))
        return abs(float(found) - exact) / size, math.nan

    tolerance = 10 * 10**condition * made.tolerance(bench.dtype)
    yield bench.case("solvers", "derivative", derivative, tolerance, **parameters)


# --- engine ---------------------------------------------------------------------------------------

ENGINE: dict[str, Callable[[np.random.Generator, int], zoo.Problem]] = {
    "root": lambda rng, n: zoo.midpoint("drawn", rng, n),
    "equation": lambda rng, n: zoo.bratu("drawn", rng, n),
    "fixed point": lambda rng, n: zoo.equilibrium("drawn", rng, n, rng.uniform(0.2, 0.9)),
    "argmin": lambda rng, n: zoo.quadratic("drawn", rng, np.linspace(0.2, 1, n), 3, curved=1.0),
    "logistic": lambda rng, n: zoo.regression("logistic", "drawn", rng, 4 * n, n),
    "least squares": lambda rng, n: zoo.network("drawn", rng, 4 * n, n),
    "lasso": lambda rng, n: zoo.penalised("lasso", "drawn", rng, 6 * n, 3 * n),
    "box": lambda rng, n: zoo.constrained("box", "drawn", rng, n + 1),
    "ball": lambda rng, n: zoo.constrained("ball", "drawn", rng, n + 1),
    "simplex": lambda rng, n: zoo.constrained("simplex", "drawn", rng, n + 1),
    "equality": lambda rng, n: zoo.programme("equality", "drawn", rng, n + 3),
    "inequality": lambda rng, n: zoo.programme("inequality", "drawn", rng, n + 3),
}


def engine_holds(bench: Bench, *, kind: str, n: int, draw: int) -> Iterator[Case]:
    """Each way to differentiate one solution against its reference."""
    problem = ENGINE[kind](np.random.default_rng(draw), n)
    if bench.dtype == torch.float32:
        problem = problem.single()
    meeting = Meeting(problem, str(bench.device))
    for mode in (*meeting.differentiated(), meeting.finite_differences()):
        yield met("engine", mode.name, problem, mode, kind=kind, n=n, draw=draw)


# --- algorithms -----------------------------------------------------------------------------------


def algorithms_hold(
    bench: Bench, *, n: int, p: int, steps: int, damping: float, draw: int
) -> Iterator[Case]:
    """The first hypergradient of each method on a quadratic problem, from y = 0."""
    rng = np.random.default_rng(draw)
    made = zoo.quadratic("drawn", rng, np.linspace(0.2, 1, n), p)
    problem = made if bench.dtype == torch.float64 else made.single()
    meeting, data = Meeting(problem, str(bench.device)), problem.data
    norms = {name: float(np.linalg.norm(data[name].astype(float), 2)) for name in "CEG"}
    lowest = np.linalg.eigvalsh(data["H"].astype(float))[0]
    bilevel = hl.BilevelProblem(
        meeting.loss,
        meeting.outer,
        x0=meeting.x,
        y0=meeting.y0,
        smoothness=hl.Smoothness(lowest, norms["C"], norms["G"], norms["E"]),
    )
    parameters = {"n": n, "p": p, "steps": steps, "damping": damping, "draw": draw}
    rate = {"inner_steps": steps, "inner_step_size": 0.5}

    def first(method: hl.Method) -> tuple[Any, Oracles, Any]:
        oracles = bilevel.oracles()
        estimator = method.start(bilevel, oracles, torch.Generator().manual_seed(0))
        trajectory = estimator.solve_inner(bilevel.y_space.ravel(meeting.y0), meeting.x)
        return estimator.estimate(meeting.x, trajectory), oracles, trajectory

    def certified() -> Answer:
        estimate = first(hl.ImplicitDifferentiation(solver=solvers.CG(), **rate))[0]
        certificate = estimate.certify()
        claimed = certificate.relative_error
        return Answer(
            estimate.gradient,
            math.nan if claimed is None else claimed,
            certificate.doubt(1e-3),
            stated(certificate),
        )

    yield met("algorithms", "ImplicitDifferentiation", problem,
              Mode("ImplicitDifferentiation", certified), **parameters)  # fmt: skip

    def surrogate(estimate: Any, trajectory: Any, A: Tensor) -> float:
        y, x = trajectory.y, meeting.x
        b, direct = torch.func.grad(meeting.outer, (0, 1))(y, x)
        exact = direct - meeting.data.C.T @ torch.linalg.solve(A, b)
        return distance(estimate.gradient, exact)

    identity = torch.eye(n, dtype=bench.dtype, device=bench.device)

    def by_identity() -> tuple[float, float]:
        estimate, _, trajectory = first(hl.IdentityHessian(curvature=0.7, **rate))
        return surrogate(estimate, trajectory, 0.7 * identity), math.nan

    def by_fisher() -> tuple[float, float]:
        estimate, _, trajectory = first(hl.NHGD(damping=damping, **rate))
        rows = torch.stack([step.score for step in trajectory.steps])
        A = damping * identity + rows.T @ rows / len(rows)
        return surrogate(estimate, trajectory, A), math.nan

    def by_unrolling() -> tuple[float, float]:
        found = first(hl.Unrolled(**rate))[0].gradient

        def value(t: float) -> float:
            x = meeting.x + t * along
            y = meeting.y0
            for _ in range(steps):
                y = y - 0.5 * torch.func.grad(meeting.loss)(y, x)
            return float(meeting.outer(y, x))

        along = bench.tensor(rng.normal(size=p))
        exact, unsure = slope(value, bench.eps)
        size = float(found.norm() * along.norm())
        return max(abs(float(found @ along) - exact) - unsure, 0.0) / size, math.nan

    # The mean of squared scores over damping is what rounding is amplified by.
    loose = 1e4 * bench.eps / min(damping, 1.0)
    for name, check, tolerance in (
        ("IdentityHessian: its known bias", by_identity, 1e3 * bench.eps),
        ("NHGD: its operator, dense", by_fisher, loose),
        ("Unrolled: finite differences", by_unrolling, 1e3 * bench.eps ** (2 / 3)),
    ):
        yield bench.case("algorithms", name, check, tolerance, **parameters)


# --- all ------------------------------------------------------------------------------------------

DRAW = st.integers(0, 2**31)
GROUPS: dict[str, tuple[Callable[..., Iterator[Case]], dict[str, Any]]] = {
    "operators": (
        operators_hold,
        {
            "kind": st.sampled_from(
                ["Dense", "transposed", "Diagonal", "Identity, scaled", "sum", "product",
                 "low rank", "Kronecker", "Toeplitz", "Hessian", "Jacobian"]
            ),
            "n": st.integers(1, 40),
            "draw": DRAW,
        },
    ),
    "solvers": (
        solvers_hold,
        {
            "solver": st.sampled_from(SOLVERS),
            "n": st.integers(1, 40),
            "condition": st.floats(0, 6),
            "scale": st.integers(-6, 6),
            "draw": DRAW,
        },
    ),
    "engine": (
        engine_holds,
        {"kind": st.sampled_from(sorted(ENGINE)), "n": st.integers(2, 6), "draw": DRAW},
    ),
    "algorithms": (
        algorithms_hold,
        {
            "n": st.integers(1, 12),
            "p": st.integers(1, 6),
            "steps": st.integers(1, 40),
            "damping": st.floats(1e-3, 10),
            "draw": DRAW,
        },
    ),
}  # fmt: skip


def run(
    examples: int, seed: int, device: str = "cpu", dtype: str = "float64", only: str = ""
) -> list[Case]:
    """The cases of every group, or of one."""
    bench, found = Bench(device, dtype), []
    for name, (check, strategies) in GROUPS.items():
        if only in ("", name):
            found += drawn(
                lambda check=check, **settings: check(bench, **settings),
                examples,
                seed,
                **strategies,
            )
    return found


def main(arguments: list[str] | None = None) -> bool:
    """Entry point; whether nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=30, help="draws a group (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *GROUPS], metavar="GROUP")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float64", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("seed", "device", "dtype", "only")}
    console = Console(width=200)
    cases = run(options.examples, **settings)
    for group in dict.fromkeys(case.group for case in cases):
        show(group, by([case for case in cases if case.group == group], "name"), console)
    write(cases, options.out, examples=options.examples, **settings)
    picture(cases, options.out)
    sound = failures(cases, console)
    console.print(
        f"{len(cases)} cases, {sum(case.failed for case in cases)} failures; written to "
        f"{options.out}, and a picture beside it"
    )
    return sound


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
