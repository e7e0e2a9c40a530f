"""The zoo of failures: systems that solvers get wrong, and whether they say so.

    python -m validation.zoo [--seeds N] [--solvers NAME ...]

At least 200 systems: singular, indefinite under a claim of definiteness, not symmetric under a
claim of symmetry, not finite, badly scaled, ill-conditioned, capped in iterations. Each solver of
the package meets each of them. An answer is *wrong* where its relative residual, in extended
precision, is above 10 times the tolerance asked for. It is *flagged* where the solver raises, or
returns ``info.converged = False``. What is counted: wrong answers that are not flagged, which must
be none; and false alarms, flags on answers that meet the tolerance.

The relative residual is what a tolerance is about. What it leaves open is the error of x, at most
the condition number times larger; its median and largest are printed too.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator
from solvers import LinearSolver
from solvers.iterative import IterativeSolver
from validation.bench.timing import recorded

RTOL = {torch.float64: 1e-8, torch.float32: 1e-4}
N = 24


@dataclass(frozen=True)
class Specimen:
    """A system: how to build its operator, its true matrix, and the right-hand side."""

    kind: str
    build: Callable[[], LinearOperator]
    matrix: Tensor
    b: Tensor
    maxiter: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a specimen: an exception's name, or the word of `Info`; the true residual."""

    solver: str
    kind: str
    word: str
    flagged: bool
    rtol: float
    residual: float | None = None  # None where there was no answer
    error: float = np.nan

    @property
    def answered(self) -> bool:
        """Whether there was an answer."""
        return self.residual is not None

    @property
    def wrong(self) -> bool:
        """Whether the answer misses ten times the tolerance; one that is not finite does."""
        return self.residual is not None and not self.residual <= 10 * self.rtol

    @property
    def right(self) -> bool:
        """Whether the answer meets the tolerance."""
        return self.residual is not None and self.residual <= self.rtol


def specimens(seeds: int) -> Iterator[Specimen]:
    """The zoo; `seeds` of each kind."""
    for seed in range(seeds):
        for dtype in (torch.float64, torch.float32):
            yield from _of(np.random.default_rng([seed, dtype == torch.float32]), dtype)


def _of(rng: np.random.Generator, dtype: torch.dtype) -> Iterator[Specimen]:
    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array), dtype=dtype)

    def dense(M: np.ndarray, kind: str, b: np.ndarray | None = None, **claims: bool) -> Specimen:
        matrix = tensor(M)
        right = tensor(rng.standard_normal(len(M)) if b is None else b)
        return Specimen(kind, lambda: ops.Dense(matrix, **claims), matrix, right)

    def function(M: np.ndarray, kind: str, **claims: bool) -> Specimen:
        """Known by its products alone: no entry is there to be looked at."""
        matrix, b = tensor(M), tensor(rng.standard_normal(len(M)))
        zero = torch.zeros(len(M), dtype=dtype)

        def build() -> LinearOperator:
            return ops.FunctionOperator(
                lambda v, m: m @ v,
                zero,
                matrix,
                rmatvec=None if claims.get("symmetric") else lambda v, m: m.T @ v,
                **claims,
            )

        return Specimen(kind, build, matrix, b)

    def sparse(M: sp.spmatrix, kind: str, b: np.ndarray | None = None, **claims: bool) -> Specimen:
        csr = sp.csr_matrix(M)
        right = tensor(rng.standard_normal(csr.shape[0]) if b is None else b)
        return Specimen(
            kind,
            lambda: ops.Sparse.from_scipy(csr, dtype=dtype, **claims),
            tensor(csr.toarray()),
            right,
        )

    Q, _ = np.linalg.qr(rng.standard_normal((N, N)))
    R = rng.standard_normal((N, N))

    def spectrum(values: np.ndarray) -> np.ndarray:
        M = Q @ np.diag(values) @ Q.T
        return (M + M.T) / 2

    positive = np.linspace(1, 10, N)
    # --- singular ---------------------------------------------------------------------------------
    deficient = np.where(np.arange(N) < N - 3, positive, 0.0)
    S = spectrum(deficient)
    yield dense(S, "singular", symmetric=True)
    yield dense(S, "singular, consistent", S @ R[0], symmetric=True)
    yield dense(R[:, :4] @ R[:4], "singular")
    yield dense(R[:, :4] @ R[:4], "singular, consistent", R[:, :4] @ R[:4] @ R[0])
    path = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(N, N)).tolil()
    path[0, 0] = path[-1, -1] = 1.0
    yield sparse(path, "singular", symmetric=True)
    yield sparse(path, "singular, consistent", path @ R[1], symmetric=True)
    yield sparse(sp.csr_matrix((N, N)), "singular", symmetric=True)
    repeated = R.copy()
    repeated[3] = repeated[7]
    yield dense(repeated, "singular")
    # --- false claims -----------------------------------------------------------------------------
    for negative in (1, 3, N // 2):
        signs = np.where(np.arange(N) < negative, -1.0, 1.0)
        yield dense(spectrum(signs * positive), "indefinite, claimed definite",
                    positive_definite=True)  # fmt: skip
        yield function(spectrum(signs * positive), "indefinite, claimed definite",
                       positive_definite=True)  # fmt: skip
        yield dense(spectrum(signs * positive), "indefinite", symmetric=True)
    slight = np.where(np.arange(N) < 1, -1e-6, 1.0)
    yield function(spectrum(slight * positive), "indefinite, claimed definite",
                   positive_definite=True)  # fmt: skip
    for size in (1e-9, 1e-6, 1e-3, 1.0):
        yield function(spectrum(positive) + size * np.triu(R), "not symmetric, claimed symmetric",
                       symmetric=True)  # fmt: skip
    # --- not finite -------------------------------------------------------------------------------
    for bad in (np.nan, np.inf):
        broken = spectrum(positive)
        broken[2, 5] = broken[5, 2] = bad
        yield dense(broken, "not finite", symmetric=True)
        yield dense(broken, "not finite")
        right = rng.standard_normal(N)
        right[4] = bad
        yield dense(spectrum(positive), "not finite", right, positive_definite=True)
        spoilt = path.copy()
        spoilt[3, 3] = bad
        yield sparse(spoilt, "not finite", symmetric=True)
    # --- badly scaled -----------------------------------------------------------------------------
    decades = 15 if dtype == torch.float32 else 120
    for size in (10.0**-decades, 10.0**decades):
        yield dense(size * spectrum(positive), "badly scaled", positive_definite=True)
        yield dense(size * (R + 10 * np.eye(N)), "badly scaled")
        yield dense(spectrum(positive), "badly scaled", size * R[0], positive_definite=True)
    for span in (3, 6, 10):
        D = np.diag(10.0 ** np.linspace(-span / 2, span / 2, N)[rng.permutation(N)])
        DAD = D @ spectrum(positive) @ D
        yield dense((DAD + DAD.T) / 2, "badly scaled", positive_definite=True)
        yield dense(D @ (R + 10 * np.eye(N)), "badly scaled")
        yield sparse(D @ (path + sp.eye(N)).toarray() @ D, "badly scaled", symmetric=True)
    # --- ill-conditioned --------------------------------------------------------------------------
    for exponent in (4, 8, 12, 16):
        graded = spectrum(np.logspace(0, -exponent, N))
        yield dense(graded, "ill-conditioned", symmetric=True)
        yield dense(Q @ np.diag(np.logspace(0, -exponent, N)) @ np.linalg.qr(R)[0],
                    "ill-conditioned")  # fmt: skip
    hilbert = 1.0 / (np.arange(N)[:, None] + np.arange(N) + 1)
    yield dense(hilbert, "ill-conditioned", symmetric=True)
    # --- far from normal ------------------------------------------------------------------------
    jordan = np.eye(N) + 5 * np.eye(N, k=1)
    yield dense(jordan, "far from normal")
    grcar = sum(np.eye(N, k=k) for k in range(4)) - np.eye(N, k=-1)
    yield sparse(sp.csr_matrix(grcar), "far from normal")
    cycle = np.roll(np.eye(N), 1, axis=0)
    yield sparse(sp.csr_matrix(cycle), "zero diagonal")
    yield dense(R - R.T, "zero diagonal")

    # --- with a structure that has solvers of its own ---------------------------------------------
    def structured(kind: str, build: Callable[[], LinearOperator], M: Tensor) -> Specimen:
        return Specimen(f"structured, {kind}", build, M, tensor(rng.standard_normal(len(M))))

    d = tensor(np.where(np.arange(N) == 5, 0.0, positive))
    yield structured("singular", lambda: ops.Diagonal(d), torch.diag(d))
    graded_d = tensor(np.logspace(0, -14, N))
    yield structured("graded", lambda: ops.Diagonal(graded_d), torch.diag(graded_d))
    rows, signs_w = tensor(R[:3]), tensor([1.0, -1.0, 0.5])
    for shift in (1.0, 1e-6, 1e-12, 0.0):
        low = tensor(np.full(N, shift))
        yield structured(
            "low rank", lambda low=low: ops.LowRankPlusDiagonal(rows, low, signs_w),
            torch.diag(low) + rows.T @ torch.diag(signs_w) @ rows,
        )  # fmt: skip
    unit = tensor(R[0] / np.linalg.norm(R[0]))[None]
    cancelled = torch.eye(N, dtype=dtype) - unit.T @ unit
    yield structured(
        "low rank, singular",
        lambda: ops.LowRankPlusDiagonal(unit, 1.0, tensor([-1.0])), cancelled,
    )  # fmt: skip
    small, large = tensor(R[:4, :4] @ R[:4, :4].T), tensor(spectrum(positive)[:6, :6])
    for left in (small, small * 0, small + torch.eye(4, dtype=dtype)):
        yield structured(
            "Kronecker",
            lambda left=left: ops.Kronecker(ops.Dense(left, symmetric=True),
                                            ops.Dense(large, symmetric=True)),
            torch.kron(left.contiguous(), large.contiguous()),
        )  # fmt: skip
    signed = small - 3 * torch.eye(4, dtype=dtype)
    yield structured(
        "Kronecker sum",
        lambda: ops.KroneckerSum(ops.Dense(signed, symmetric=True),
                                 ops.Dense(large, symmetric=True)),
        torch.kron(signed, torch.eye(6, dtype=dtype))
        + torch.kron(torch.eye(4, dtype=dtype), large),
    )  # fmt: skip
    upper = tensor(np.eye(N) - np.triu(np.ones((N, N)), 1))  # condition 2^(N-1)
    yield structured("triangular", lambda: ops.Dense(upper, upper_triangular=True), upper)
    blocks = (tensor(R[:10, :10]), tensor(spectrum(deficient)[:14, :14]))
    yield structured(
        "blocks", lambda: ops.BlockDiagonal(*(ops.Dense(M) for M in blocks)),
        torch.block_diag(*blocks),
    )  # fmt: skip
    B, G = tensor(spectrum(positive)[:18, :18]), tensor(R[:6, :18])
    for constraint in (G, torch.cat([G[:5], G[:1]])):  # the second one twice the same row
        yield structured(
            "saddle", lambda g=constraint: ops.Saddle(ops.Dense(B, symmetric=True), ops.Dense(g)),
            torch.cat([torch.cat([B, constraint.T], 1),
                       torch.cat([constraint, torch.zeros(6, 6, dtype=dtype)], 1)]),
        )  # fmt: skip
    for column in (tensor(R[2]), torch.ones(N, dtype=dtype)):
        circulant = torch.stack([torch.roll(column, k) for k in range(N)], 1)
        yield structured("circulant", lambda c=column: ops.Circulant(c), circulant)
    line = tensor(0.5 ** np.arange(N))
    yield structured(
        "Toeplitz", lambda: ops.Toeplitz(line),
        tensor(0.5 ** np.abs(np.arange(N)[:, None] - np.arange(N))),
    )  # fmt: skip
    # --- least squares ----------------------------------------------------------------------------
    tall = rng.standard_normal((2 * N, 8))
    for M, kind in (
        (tall, "full rank"), (tall[:, [0, 1, 2, 2, 3, 3, 4, 5]], "rank deficient"),
        (tall @ np.diag(np.logspace(0, -10, 8)), "graded"), (tall.T, "wide"), (0 * tall, "zero"),
    ):  # fmt: skip
        yield dense(M, f"least squares, {kind}")
    # --- capped -----------------------------------------------------------------------------------
    for cap in (1, 2, 5):
        for M in (spectrum(np.logspace(0, -3, N)), R + 6 * np.eye(N)):
            symmetric = bool(np.array_equal(M, M.T))
            yield replace(dense(M, "capped", symmetric=symmetric), maxiter=cap)
    # --- healthy: a flag is a false alarm ------------------------------------------------------
    yield dense(spectrum(positive), "healthy", positive_definite=True)
    yield dense(R + 10 * np.eye(N), "healthy")
    yield sparse(path + sp.eye(N), "healthy", symmetric=True)
    yield dense(spectrum(np.where(np.arange(N) % 2, 1.0, -1.0) * positive), "healthy, indefinite",
                symmetric=True)  # fmt: skip


def everyone() -> dict[str, Callable[[float], LinearSolver]]:
    """Every solver of the package with its default settings."""
    found: dict[str, Callable[[float], LinearSolver]] = {}
    for name in solvers.__all__:
        kind = getattr(solvers, name)
        if not (isinstance(kind, type) and issubclass(kind, LinearSolver)):
            continue
        if getattr(kind, "__abstractmethods__", None):
            continue
        found[name] = lambda rtol, kind=kind: kind(rtol=rtol)
    return found


def met(name: str, factory: Callable[[float], LinearSolver], specimen: Specimen) -> Outcome:
    """One solver meets one specimen."""
    rtol = RTOL[specimen.matrix.dtype]
    solver = factory(rtol)
    if isinstance(solver, IterativeSolver):
        limit = specimen.maxiter or 50 * N
        solver = replace(solver, maxiter=limit, stop_at_maxiter=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prepared = solver.prepare(specimen.build())
            x, info = prepared.solve(specimen.b)
        except (ValueError, TypeError, ArithmeticError, RuntimeError, ImportError) as error:
            return Outcome(name, specimen.kind, type(error).__name__, True, rtol)
    measured = _measured(specimen, x, solver.minimises(prepared.A))
    return Outcome(name, specimen.kind, info.status, not info.converged, rtol, *measured)


def _measured(specimen: Specimen, x: Tensor, least_squares: bool) -> tuple[float, float]:
    """Relative residual in extended precision, and relative error where A is regular.

    Of least squares the smaller of it and ``|A^T r| / (|A| |r|)``.
    """
    A, b, y = (t.double().numpy().astype(np.longdouble) for t in (specimen.matrix, specimen.b, x))
    with np.errstate(all="ignore"):
        size = np.abs(b).max()
        r = (b - A @ y) / size
        residual = float(np.linalg.norm(r) / np.linalg.norm(b / size))
        matrix = specimen.matrix.double().numpy()
        if least_squares and A.any() and np.isfinite(residual):
            # At a minimum of |b - A x| the residual is orthogonal to the columns of A.
            scale = np.linalg.norm(matrix, 2) * np.linalg.norm(r)
            residual = min(residual, float(np.linalg.norm(A.T @ r) / scale)) if scale else 0.0
        elif least_squares:
            residual = 0.0 if np.isfinite(residual) else residual
        exact = np.full(A.shape[1], np.nan)
        regular = A.shape[0] == A.shape[1] and np.isfinite(matrix).all() and matrix.any()
        if regular and np.linalg.cond(matrix / np.abs(matrix).max()) < 1e13:
            exact = np.linalg.solve(matrix, specimen.b.double().numpy())
        error = float(np.linalg.norm(y.astype(float) - exact) / np.linalg.norm(exact))
    return residual, error


def run(seeds: int, names: list[str] | None = None) -> list[Outcome]:
    """Every solver meets every specimen."""
    table = everyone()
    chosen = {name: table[name] for name in (names or table)}
    zoo = list(specimens(seeds))
    return [met(name, factory, one) for name, factory in chosen.items() for one in zoo]


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Counts for each solver."""
    rows = {}
    for name in dict.fromkeys(outcome.solver for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.solver == name]
        answers = [outcome for outcome in mine if outcome.answered]
        errors = [o.error for o in answers if not o.flagged and np.isfinite(o.error)]
        rows[name] = {
            "met": len(mine),
            "raised": len(mine) - len(answers),
            "answers": len(answers),
            "wrong": sum(outcome.wrong for outcome in answers),
            "wrong, not flagged": sum(o.wrong and not o.flagged for o in answers),
            "flagged, but right": sum(o.flagged and o.right for o in answers),
            "median error of x": float(np.median(errors)) if errors else 0.0,
            "largest": max(errors, default=0.0),
        }
    return rows


def main(arguments: list[str] | None = None) -> bool:
    """Entry point; whether no wrong answer came back unflagged."""
    parser = argparse.ArgumentParser(prog="python -m validation.zoo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="of each kind (default 2)")
    parser.add_argument("--solvers", nargs="*", metavar="NAME")
    options = parser.parse_args(arguments)
    zoo = list(specimens(options.seeds))
    console = Console(width=150)
    kinds = Counter(one.kind for one in zoo)
    console.print(f"{len(zoo)} systems: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    outcomes = run(options.seeds, options.solvers)
    rows = summary(outcomes)
    table = Table(title="The zoo of failures", title_justify="left")
    columns = list(next(iter(rows.values())))
    for column in ("", *columns):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.2g}" if "x" in c or c == "largest" else str(row[c])
                              for c in columns))  # fmt: skip
    console.print(table)
    with recorded("zoo of failures") as group:
        group.attrs["solvers"] = list(rows)
        for column in columns:
            group[column] = [row[column] for row in rows.values()]
    silent = [o for o in outcomes if o.wrong and not o.flagged]
    for outcome in silent[:20]:
        console.print(f"NOT FLAGGED: {outcome}")
    total = sum(row["answers"] for row in rows.values())
    alarms = sum(row["flagged, but right"] for row in rows.values())
    console.print(
        f"{len(outcomes)} meetings, {total:.0f} answers, {len(silent)} wrong and not flagged, "
        f"{alarms:.0f} flagged but right"
    )
    return not silent


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
