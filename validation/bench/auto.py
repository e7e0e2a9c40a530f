"""`Auto` beside every back-end that suits: within 1.5 times of the best?

    python -m validation.bench auto

A run is `prepare`, a solve, and a solve with the transpose: forward and adjoint. Back-ends that are
slower than twice `Auto` are stopped, as they cannot be the best: iterations by their limit,
factorisations by the fill that their analysis predicts.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator
from solvers import LinearSolver
from solvers.auto.choice import plan_for
from solvers.iterative import IterativeSolver
from validation.bench.forty import SystemCase, others, systems
from validation.bench.timing import Bench, recorded

RTOL = 1e-8
# Back-ends that may take longer than so many times as Auto are not waited for.
PATIENCE = 2.0


@dataclass(frozen=True)
class Run:
    """Seconds and worst residual of forward and adjoint; infinite where it failed."""

    seconds: float
    residual: float

    @property
    def solved(self) -> bool:
        """Whether the tolerance was met."""
        return self.residual <= RTOL


def rivals(A: LinearOperator) -> Iterator[tuple[str, LinearSolver]]:
    """Every back-end that suits an operator, in its usual settings."""
    s, n = solvers, A.shape[1]
    entries = getattr(A, "nnz", A.shape[0] * n)
    if A.shape[0] != n:
        yield "LSMR", s.LSMR(rtol=RTOL)
        if A.shape[0] * n <= 2e7:
            yield "QR", s.QR(rtol=RTOL)
            yield "SketchAndPrecondition", s.SketchAndPrecondition(rtol=RTOL)
            if n <= 300:
                yield "SVD", s.SVD(rtol=RTOL)
        return
    if n <= 3000:
        yield "DenseLU", s.DenseLU(rtol=RTOL)
        if A.symmetric:
            yield "DenseCholesky", s.DenseCholesky(rtol=RTOL)
            yield "DenseLDL", s.DenseLDL(rtol=RTOL)
    if isinstance(A, (ops.Kronecker, ops.KroneckerSum, ops.algebra.Sum)):
        yield "Kronecker", s.Kronecker(rtol=RTOL)
    if isinstance(A, ops.LowRankPlusDiagonal):
        yield "Woodbury", s.Woodbury(rtol=RTOL)
        if A.rank <= 100:
            yield "ShermanMorrison", s.ShermanMorrison(rtol=RTOL)
    if isinstance(A, ops.Saddle):
        yield "Saddle", s.Saddle(rtol=RTOL)
        yield "SparseLU", s.SparseLU(rtol=RTOL)
    if A.symmetric:
        yield "MINRES", s.MINRES(rtol=RTOL)
        if not isinstance(A, ops.Saddle):
            yield "CG", s.CG(rtol=RTOL)
    else:
        yield "GMRES", s.GMRES(rtol=RTOL)
        yield "BiCGStab", s.BiCGStab(rtol=RTOL)
    if isinstance(A, ops.Sparse):
        if A.symmetric:
            yield "SparseCholesky", s.SparseCholesky(rtol=RTOL)
            for P in (
                s.Jacobi(),
                s.preconditioners.ssor.SSOR(),
                s.AMG(),
                s.AMG(kind="ruge-stuben"),
            ):
                yield f"CG, {P!r}", s.CG(preconditioner=P, rtol=RTOL)
        elif entries < 1e6:
            yield "SparseLU", s.SparseLU(rtol=RTOL)
            yield "BiCGStab, IncompleteLU", s.BiCGStab(preconditioner=s.IncompleteLU(), rtol=RTOL)
            yield "GMRES, IncompleteLU", s.GMRES(preconditioner=s.IncompleteLU(), rtol=RTOL)
    if isinstance(A, ops.Dense) and A.positive_definite:
        for rank in (50, 200):
            P = s.Nystrom(rank=rank)
            yield f"CG, Nystrom {rank}", s.CG(preconditioner=P, rtol=RTOL)


def run(A: LinearOperator, solver: LinearSolver, b: Tensor, c: Tensor) -> Run:
    """Prepare, solve, solve with the transpose."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prepared = solver.prepare(A)
            infos = [prepared.solve(b).info, prepared.solve_transpose(c).info]
        except (solvers.StructureError, ValueError):
            return Run(math.inf, math.inf)
    seconds = time.perf_counter() - start
    return Run(seconds, RTOL if all(i.converged for i in infos) else max(i.residual for i in infos))


def limited(A: LinearOperator, solver: LinearSolver, b: Tensor, budget: float) -> LinearSolver:
    """An iteration that stops when its time is up."""
    if not isinstance(solver, IterativeSolver):
        return solver
    few = replace(solver, maxiter=5, stop_at_maxiter=True)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            few.prepare(A).solve(b)
        except (solvers.StructureError, ValueError):
            return few
    each = (time.perf_counter() - start) / 5
    return replace(solver, maxiter=max(10, math.ceil(budget / each)))


def choice(bench: Bench) -> None:
    """All forty systems, and others."""
    table(bench, "forty systems", systems())
    table(bench, "systems that no constant was chosen by", others())


def table(bench: Bench, title: str, cases: list[SystemCase]) -> None:
    """Auto and the best of its rivals, system by system."""
    bench.console.print(f"Auto on {title}\n")
    rows: dict[str, dict[str, Any]] = {}
    for case in cases:
        rows[case.name] = judged(case, bench.repeats)
        row = rows[case.name]
        bench.console.print(
            f"{case.name:45} Auto: {row['auto']:>28} {1e3 * row['seconds']:9.1f} ms   best: "
            f"{row['best']:>28} {1e3 * row['least']:9.1f} ms   ratio {row['ratio']:.2f}",
            highlight=False,
        )
    ratios = torch.tensor([row["ratio"] for row in rows.values()])
    within = float((ratios <= 1.5).double().mean())
    failed = [name for name, row in rows.items() if not row["solved"]]
    bench.console.print(
        f"within 1.5 times of the best: {100 * within:.0f} %; median {float(ratios.median()):.2f}, "
        f"worst {float(ratios.max()):.2f}; not solved by Auto: {failed or 'none'}\n"
    )
    with recorded(f"Auto on {title}") as group:
        group.attrs["systems"] = list(rows)
        group["ratio"] = ratios.numpy()
        for key in ("auto", "best"):
            group.attrs[key] = [row[key] for row in rows.values()]


def judged(case: SystemCase, repeats: int) -> dict[str, Any]:
    """One system: the median of Auto, and of the best of its rivals."""
    A = case.build()
    b = case.right_hand_side(A)
    c = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if A.shape[0] != A.shape[1]:
        c = A.T @ b  # in the range of A^T, as the cotangent of a minimiser is
    A.check_claims()
    auto = solvers.Auto(rtol=RTOL)
    first = run(A, auto, b, c)  # warms up, and tells how long to wait for others
    mine = run(A, auto, b, c)
    budget = PATIENCE * mine.seconds
    entered: dict[str, LinearSolver] = {}
    times: dict[str, list[float]] = {}
    for name, solver in rivals(A):
        if _hopeless(A, solver, budget):
            continue
        solver = limited(A, solver, b, budget)
        once = run(A, solver, b, c)
        if once.solved:
            entered[name], times[name] = solver, [once.seconds]
    own = [mine.seconds]
    # What takes milliseconds is measured more often: the machine is noisy.
    for _ in range((repeats if mine.seconds > 0.2 else 4 * repeats) - 1):
        own.append(run(A, auto, b, c).seconds)
        for name, solver in entered.items():
            if min(times[name]) <= 2 * min(own):
                times[name].append(run(A, solver, b, c).seconds)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    seconds = sorted(own)[len(own) // 2]
    best = min(medians, key=lambda name: medians[name], default="none")
    least = medians.get(best, seconds)

    prepared = auto.prepare(A)
    prepared.solve(b)
    chosen = prepared.plan.candidates[prepared._used].name

    return {
        "auto": chosen,
        "best": best,
        "seconds": seconds,
        "least": least,
        "ratio": seconds / least,
        "solved": first.solved and mine.solved,
    }


def _hopeless(A: LinearOperator, solver: LinearSolver, budget: float) -> bool:
    """Whether the analysis of a factorisation predicts far more than the budget."""
    if not isinstance(solver, (solvers.SparseCholesky, solvers.SparseLU)):
        return False
    plan = plan_for(A, solvers.Auto(memory=1e12).request(A))
    for candidate in plan.candidates:
        if type(candidate.solver) is type(solver):
            return candidate.seconds(2) > 4 * budget
    return False
