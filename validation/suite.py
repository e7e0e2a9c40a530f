"""Properties that must hold, checked on this machine on cases drawn at random.

    python -m validation.suite [--examples N] [--seed S] [--only GROUP] [--device D] [--dtype T]

Four groups, ``--examples`` draws of each:

- operators: products against dense matrices and finite differences, and ``<u, A v> = <A^T u, v>``;
- solvers: the true residual against the one that is claimed, and derivatives of solutions against
  finite differences;
- engine: roots, fixed points, minima, least squares, constraints, decorated solvers: implicit,
  unrolled, forward and reverse mode, finite differences, all against 80-bit references;
- algorithms: the first hypergradient of each bilevel method against the exact one, finite
  differences, or what its approximation is known to give.

Nothing is shrunk or stored between runs: one seed draws one set of cases. Each case is a row of the
report (HDF5), and a point of the picture beside it: claimed against true error.
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
from validation.bilevel.run import ERRORS, Answer, Meeting, Mode, met
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
        start, flags = time.perf_counter(), []
        error = claimed = math.nan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                error, claimed = run()
            except ERRORS as failure:
                flags.append(f"{type(failure).__name__}: {failure}")
        flags += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        return Case(
            group, name, json.dumps(parameters), error, claimed, tolerance,
            flagged="; ".join(flags), seconds=time.perf_counter() - start,
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
    A, y = tensor(rng.normal(size=(2 * n, n))), tensor(c / n**0.5)

    def loss(y: Tensor) -> Tensor:
        return torch.log(torch.cosh(A @ y)).mean() + (y**4).sum() / 4

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
        yield bench.case("operators", f"{kind}: {name}", lambda c=check: (c(), math.nan), tolerance,
                         n=n, draw=draw)  # fmt: skip
    if kind == "Hessian":
        yield bench.case("operators", "Hessian: finite differences",
                         lambda: _differences_of_hessian(bench, A, v), 1e2 * bench.eps**0.5,
                         n=n, draw=draw)  # fmt: skip


def _differences_of_hessian(bench: Bench, A: LinearOperator, v: Tensor) -> tuple[float, float]:
    """``v^T A v`` against the slope of the loss's gradient along v."""
    hessian: Any = A
    y, loss = hessian.point if hasattr(hessian, "point") else None, None
    raise NotImplementedError


# --- solvers --------------------------------------------------------------------------------------
