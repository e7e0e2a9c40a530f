"""Every operator, as a function of its tensors, beside its matrix as a function of the same.

The matrix is written out by hand, in torch, so that torch.func differentiates it too: what
`test_contract.py` asks of an operator, values and derivatives alike, is asked of the matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator, Space

Parameters = dict[str, Tensor]


class Numbers:
    """Reproducible float64 samples, converted to a dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def spd(self, n: int) -> Tensor:
        root = torch.randn((n, n), generator=self.generator, dtype=torch.float64)
        return (root @ root.T / n + torch.eye(n, dtype=torch.float64)).to(self.dtype)


@dataclass(frozen=True)
class Case:
    """`draw(n, numbers)` gives tensors; `build` and `matrix` the two forms of one linear map."""

    draw: Callable[[int, Numbers], Parameters]
    build: Callable[[Parameters], LinearOperator]
    matrix: Callable[[Parameters], Tensor]
    # Derivatives that exist by the operator's definition, and are asked for: 0, 1 or 2.
    order: int = 2
    # Whether it can be built inside vmap over its tensors.
    batched: bool = True


CASES: dict[str, Case] = {}


def wide(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64


def eye(like: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def tree(v: Tensor) -> dict[str, Tensor]:
    """Nested structure of a vector: all but the last entry under a, as a row; the last under b."""
    return {"a": v[None, :-1], "b": v[-1]}


def flat(nested: dict[str, Tensor]) -> Tensor:
    return torch.cat([nested["a"][0], nested["b"][None]])


def nested_space(like: Tensor, n: int) -> Space:
    return Space.of(tree(torch.zeros(n, dtype=like.dtype, device=like.device)))


# --- held entry by entry --------------------------------------------------------------------------

CASES["Dense"] = Case(lambda n, r: {"M": r(n, n)}, lambda p: ops.Dense(p["M"]), lambda p: p["M"])
CASES["Dense wide"] = Case(
    lambda n, r: {"M": r(n, n + 2)}, lambda p: ops.Dense(p["M"]), lambda p: p["M"]
)
CASES["Dense symmetric"] = Case(
    lambda n, r: {"M": r(n, n)},
    lambda p: ops.Dense(p["M"] + p["M"].T, symmetric=True),
    lambda p: p["M"] + p["M"].T,
)
CASES["Dense triangular, transposed"] = Case(
    lambda n, r: {"M": r(n, n)},
    lambda p: ops.Dense(p["M"].tril(), lower_triangular=True).T,
    lambda p: p["M"].tril().T,
)
CASES["Diagonal"] = Case(
    lambda n, r: {"d": r(n)}, lambda p: ops.Diagonal(p["d"]), lambda p: torch.diag(p["d"])
)
CASES["Diagonal, nested"] = Case(
    lambda n, r: {"d": r(n)},
    lambda p: ops.Diagonal(p["d"], nested_space(p["d"], p["d"].shape[0])),
    lambda p: torch.diag(p["d"]),
)
CASES["multiple of Identity"] = Case(
    lambda n, r: {"c": r()},
    lambda p: p["c"] * ops.Identity(4, p["c"].dtype),
    lambda p: p["c"] * eye(p["c"], 4),
)
CASES["LowRankPlusDiagonal"] = Case(
    lambda n, r: {"U": r(2, n), "d": r(n), "w": r(2)},
    lambda p: ops.LowRankPlusDiagonal(p["U"], p["d"], p["w"]),
    lambda p: torch.diag(p["d"]) + p["U"].T @ torch.diag(p["w"]) @ p["U"],
)
CASES["EmpiricalFisher, nested"] = Case(
    lambda n, r: {"g": r(3, n)},
    lambda p: ops.EmpiricalFisher(p["g"], 0.5, space=nested_space(p["g"], p["g"].shape[1])),
    lambda p: p["g"].T @ p["g"] / 3 + 0.5 * eye(p["g"], p["g"].shape[1]),
)

# --- algebra --------------------------------------------------------------------------------------

CASES["Sum"] = Case(
    lambda n, r: {"A": r(n, n), "B": r(n, n), "d": r(n)},
    lambda p: ops.Dense(p["A"]) - ops.Dense(p["B"]) + ops.Diagonal(p["d"]),
    lambda p: p["A"] - p["B"] + torch.diag(p["d"]),
)
CASES["Scaled"] = Case(
    lambda n, r: {"A": r(n, n + 1), "c": r()},
    lambda p: p["c"] * ops.Dense(p["A"]) / 2,
    lambda p: p["c"] * p["A"] / 2,
)
CASES["shift"] = Case(
    lambda n, r: {"A": r(n, n), "c": r()},
    lambda p: ops.Dense(p["A"]) + p["c"] * ops.Identity(p["A"].shape[0]),
    lambda p: p["A"] + p["c"] * eye(p["A"], p["A"].shape[0]),
)
CASES["Product"] = Case(
    lambda n, r: {"A": r(n + 1, n), "B": r(n, n + 2), "d": r(n)},
    lambda p: ops.Dense(p["A"]) @ ops.Diagonal(p["d"]) @ ops.Dense(p["B"]),
    lambda p: p["A"] @ torch.diag(p["d"]) @ p["B"],
)
CASES["Gram"] = Case(
    lambda n, r: {"J": r(n + 1, n)},
    lambda p: ops.Gram(ops.Dense(p["J"])),
    lambda p: p["J"].T @ p["J"],
)
CASES["Gram by itself"] = Case(
    lambda n, r: {"J": r(n, n)},
    lambda p: (lambda A: 3.0 * A.T @ A)(ops.Dense(p["J"]) + ops.Identity(p["J"].shape[0])),
    lambda p: (lambda A: 3.0 * A.T @ A)(p["J"] + eye(p["J"], p["J"].shape[0])),
)
CASES["Gram with a weight"] = Case(
    lambda n, r: {"J": r(n + 1, n), "W": r(n + 1, n + 1)},
    lambda p: ops.Gram(ops.Dense(p["J"]), ops.Dense(p["W"])),
    lambda p: p["J"].T @ p["W"] @ p["J"],
)
CASES["Inverse"] = Case(
    lambda n, r: {"A": r(n, n) / n + 2 * torch.eye(n, dtype=r.dtype)},
    lambda p: ops.Inverse(ops.Dense(p["A"]), solvers.DenseLU()),
    lambda p: torch.linalg.inv(p["A"]),
)
CASES["Inverse of a sum, transposed"] = Case(
    lambda n, r: {"A": r(n, n) / n, "d": r(n) ** 2},
    lambda p: ops.Inverse(ops.Dense(p["A"]) + ops.Diagonal(2 + p["d"]), solvers.DenseLU()).T,
    lambda p: torch.linalg.inv(p["A"] + torch.diag(2 + p["d"])).T,
)
CASES["Stacked"] = Case(
    lambda n, r: {"A": r(3, n, n), "d": r(3, n)},
    lambda p: ops.Stacked(
        [ops.Dense(A) + ops.Diagonal(d) for A, d in zip(p["A"], p["d"], strict=True)]
    ),
    lambda p: torch.block_diag(*[A + torch.diag(d) for A, d in zip(p["A"], p["d"], strict=True)]),
)

# --- from functions -------------------------------------------------------------------------------


def residual(y: Tensor, x: Tensor) -> Tensor:
    """``(x_i sin y_i + y_{i+1}^3, sum y)``"""
    return torch.cat([x * torch.sin(y) + y.roll(-1) ** 3, y.sum()[None]])


def residual_matrix(p: Parameters) -> Tensor:
    n = p["y"].shape[0]
    ahead = eye(p["y"], n).roll(1, 1)  # (ahead y)_i = y_{i+1}
    square = torch.diag(p["x"] * torch.cos(p["y"])) + ahead @ torch.diag(3 * p["y"] ** 2)
    return torch.cat([square, torch.ones(1, n, dtype=square.dtype)])


def loss(y: dict[str, Tensor], x: Tensor) -> Tensor:
    """``sum_i (x_i y_i^4 / 12) + (sum_i x_i y_i)^2 / 2`` over a nested y."""
    v = flat(y)
    return (x * v**4).sum() / 12 + (x * v).sum() ** 2 / 2


def loss_hessian(p: Parameters) -> Tensor:
    return torch.diag(p["x"] * p["y"] ** 2) + torch.outer(p["x"], p["x"])


def loss_cross(p: Parameters) -> Tensor:
    """``d^2 f / dx_i dy_j``."""
    x, y = p["x"], p["y"]
    return torch.diag(y**3 / 3 + (x * y).sum()) + torch.outer(y, x)


def points(n: int, r: Numbers) -> Parameters:
    return {"y": r(n), "x": r(n)}


CASES["Jacobian"] = Case(points, lambda p: ops.Jacobian(residual, p["y"], p["x"]), residual_matrix)
CASES["Jacobian, transposed"] = Case(
    points, lambda p: ops.Jacobian(residual, p["y"], p["x"]).T, lambda p: residual_matrix(p).T
)
CASES["Linearization"] = Case(
    points, lambda p: ops.Linearization(residual, p["y"], p["x"]), residual_matrix
)
CASES["Gauss-Newton by hand"] = Case(
    points,
    lambda p: (lambda J: J.T @ J)(ops.Linearization(residual, p["y"], p["x"])),
    lambda p: (lambda J: J.T @ J)(residual_matrix(p)),
)
CASES["Hessian, nested"] = Case(
    points, lambda p: ops.Hessian(loss, tree(p["y"]), p["x"]), loss_hessian
)
CASES["Hessian forward, nested"] = Case(
    points, lambda p: ops.Hessian(loss, tree(p["y"]), p["x"], mode="forward"), loss_hessian
)
CASES["CrossDerivative, nested"] = Case(
    points, lambda p: ops.CrossDerivative(loss, tree(p["y"]), p["x"]), loss_cross
)
CASES["FunctionOperator"] = Case(
    lambda n, r: {"a": r(n)},
    lambda p: ops.FunctionOperator(
        lambda v, a: {"product": a * v.roll(1), "sum": v.sum()}, torch.zeros_like(p["a"]), p["a"]
    ),
    lambda p: torch.cat(
        [
            torch.diag(p["a"]) @ eye(p["a"], p["a"].shape[0]).roll(1, 0),
            torch.ones(1, p["a"].shape[0], dtype=p["a"].dtype),
        ]
    ),
)
CASES["BatchMean"] = Case(
    lambda n, r: {"X": r(5, n), "y": r(n)},
    lambda p: ops.BatchMean(
        lambda chunk, y: ops.Hessian(lambda y, X: ((X @ y) ** 4).mean() / 12, y, chunk),
        p["X"],
        p["y"],
        chunk_size=2,
    ),
    lambda p: p["X"].T @ torch.diag((p["X"] @ p["y"]) ** 2) @ p["X"] / 5,
)

# --- Kronecker, blocks, permutations --------------------------------------------------------------

CASES["Kronecker"] = Case(
    lambda n, r: {"A": r(n, 2), "B": r(2, 3), "d": r(2)},
    lambda p: ops.Kronecker(ops.Dense(p["A"]), ops.Dense(p["B"]), ops.Diagonal(p["d"])),
    lambda p: torch.kron(torch.kron(p["A"], p["B"]), torch.diag(p["d"])),
)
CASES["Kronecker, square, scaled"] = Case(
    lambda n, r: {"A": r(n, n), "B": r(2, 2), "c": r()},
    lambda p: p["c"] * ops.Kronecker(ops.Dense(p["A"]), ops.Dense(p["B"])),
    lambda p: p["c"] * torch.kron(p["A"], p["B"]),
)
CASES["KroneckerSum"] = Case(
    lambda n, r: {"A": r(n, n), "B": r(2, 2)},
    lambda p: ops.KroneckerSum(ops.Dense(p["A"]), ops.Dense(p["B"])),
    lambda p: torch.kron(p["A"], eye(p["B"], 2)) + torch.kron(eye(p["A"], p["A"].shape[0]), p["B"]),
)
CASES["BlockDiagonal"] = Case(
    lambda n, r: {"A": r(n, 2), "d": r(n)},
    lambda p: ops.BlockDiagonal(ops.Dense(p["A"]), ops.Diagonal(p["d"])),
    lambda p: torch.block_diag(p["A"], torch.diag(p["d"])),
)
CASES["Block"] = Case(
    lambda n, r: {"A": r(n, 2), "B": r(n, n), "C": r(1, n)},
    lambda p: ops.Block([[ops.Dense(p["A"]), ops.Dense(p["B"])], [None, ops.Dense(p["C"])]]),
    lambda p: torch.cat(
        [torch.cat([p["A"], p["B"]], 1), torch.cat([torch.zeros_like(p["C"][:, :2]), p["C"]], 1)]
    ),
)
CASES["Saddle"] = Case(
    lambda n, r: {"B": r(n, n), "G": r(2, n)},
    lambda p: ops.Saddle(ops.Dense(p["B"] + p["B"].T, symmetric=True), ops.Dense(p["G"])),
    lambda p: torch.cat(
        [
            torch.cat([p["B"] + p["B"].T, p["G"].T], 1),
            torch.cat([p["G"], torch.zeros_like(p["G"][:, :2])], 1),
        ]
    ),
)
CASES["Permutation"] = Case(
    lambda n, r: {"A": r(n, n)},
    lambda p: ops.Permutation(torch.arange(p["A"].shape[0]).roll(1)) @ ops.Dense(p["A"]),
    lambda p: p["A"].roll(1, 0),
)

# --- convolutions ---------------------------------------------------------------------------------


def differences(m: int, n: int) -> Tensor:
    """``i - j`` at ``(i, j)``."""
    return torch.arange(m)[:, None] - torch.arange(n)


def toeplitz(column: Tensor, row: Tensor) -> Tensor:
    m, n = column.shape[0], row.shape[0]
    return torch.cat([row[1:].flip(0), column])[differences(m, n) + n - 1]


def circulant(column: Tensor) -> Tensor:
    n = column.shape[0]
    return column[differences(n, n) % n]


CASES["Circulant, symmetric, plus I, transposed"] = Case(
    lambda n, r: {"c": r(n), "a": r()},
    lambda p: (
        (
            ops.Circulant(p["c"] + p["c"].flip(0).roll(1), symmetric=True)
            + 2.0 * ops.Circulant(p["c"])
            + p["a"] * ops.Identity(p["c"].shape[0])
        ).T
    ),
    lambda p: circulant(p["c"]) + 3 * circulant(p["c"]).T + p["a"] * eye(p["c"], p["c"].shape[0]),
)
CASES["inverse of Circulant"] = Case(
    lambda n, r: {"c": r(n) / (2 * n) + torch.eye(n, dtype=r.dtype)[0]},
    lambda p: ops.Circulant(p["c"]).inverse(),
    lambda p: torch.linalg.inv(circulant(p["c"])),
)
CASES["Toeplitz"] = Case(
    lambda n, r: {"c": r(n), "r": r(n + 2)},
    lambda p: ops.Toeplitz(p["c"], p["r"]),
    lambda p: toeplitz(p["c"], p["r"]),
)
CASES["Toeplitz, symmetric"] = Case(
    lambda n, r: {"c": r(n)}, lambda p: ops.Toeplitz(p["c"]), lambda p: toeplitz(p["c"], p["c"])
)
CASES["Toeplitz, sum, transposed"] = Case(
    lambda n, r: {"c": r(n), "r": r(n), "s": r(n), "a": r()},
    lambda p: (
        (
            p["a"] * ops.Toeplitz(p["c"], p["r"])
            + ops.Toeplitz(p["s"])
            - p["a"] * ops.Identity(p["c"].shape[0])
        ).T
    ),
    lambda p: (
        (
            p["a"] * (toeplitz(p["c"], p["r"]) - eye(p["c"], p["c"].shape[0]))
            + toeplitz(p["s"], p["s"])
        ).T
    ),
)

# --- sparse ---------------------------------------------------------------------------------------


def cycle(n: int) -> ops.Pattern:
    """The diagonal and the next entry to the right, cyclically."""
    i = torch.arange(n)
    return ops.Pattern.of(torch.cat([i, i]), torch.cat([i, (i + 1) % n]), (n, n))[0]


def cyclic(values: Tensor) -> Tensor:
    pattern = cycle(values.shape[0] // 2)
    zero = torch.zeros(pattern.shape, dtype=values.dtype)
    return zero.index_put((pattern.rows, pattern.columns), values)


CASES["Sparse"] = Case(
    lambda n, r: {"a": r(2 * n)},
    lambda p: ops.Sparse(p["a"], cycle(p["a"].shape[0] // 2)),
    lambda p: cyclic(p["a"]),
)
CASES["Sparse, A.T @ A + d"] = Case(
    lambda n, r: {"a": r(2 * n), "d": r(n)},
    lambda p: (
        (lambda A: A.T @ A)(ops.Sparse(p["a"], cycle(p["a"].shape[0] // 2))) + ops.Diagonal(p["d"])
    ),
    lambda p: (lambda A: A.T @ A)(cyclic(p["a"])) + torch.diag(p["d"]),
)
CASES["Sparse, product and sum"] = Case(
    lambda n, r: {"a": r(2 * n), "b": r(2 * n), "d": r(n), "c": r()},
    lambda p: (lambda A, B: p["c"] * (A @ ops.Diagonal(p["d"]) @ B.T - B))(
        *(ops.Sparse(p[name], cycle(p[name].shape[0] // 2)) for name in ("a", "b"))
    ),
    lambda p: (lambda A, B: p["c"] * (A @ torch.diag(p["d"]) @ B.T - B))(
        cyclic(p["a"]), cyclic(p["b"])
    ),
)
CASES["Jacobian @ Sparse"] = Case(
    lambda n, r: {"y": r(n), "x": r(n), "a": r(2 * n)},
    lambda p: ops.Jacobian(residual, p["y"], p["x"]) @ ops.Sparse(p["a"], cycle(p["y"].shape[0])),
    lambda p: residual_matrix(p) @ cyclic(p["a"]),
)

# --- curvature of models --------------------------------------------------------------------------


def classifier(y: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Logits of three classes, from a nested y."""
    return torch.tanh(inputs @ flat(y)[:, None]) * torch.tensor([1.0, -1.0, 0.5]).to(inputs)


def logits_jacobian(y: Tensor, inputs: Tensor) -> Tensor:
    """``(N, 3, d)``."""
    slope = 1 - torch.tanh(inputs @ y) ** 2
    weight = torch.tensor([1.0, -1.0, 0.5]).to(inputs)
    return slope[:, None, None] * weight[None, :, None] * inputs[:, None, :]


def categorical(p: Parameters) -> Tensor:
    """``(1/N) sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n``"""
    J = logits_jacobian(p["y"], p["X"])
    chances = torch.softmax(classifier(tree(p["y"]), p["X"]), 1)
    inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    return torch.einsum("nci,ncd,ndj->ij", J, inner, J) / p["X"].shape[0]


def data(n: int, r: Numbers) -> Parameters:
    return {"y": r(n), "X": r(5, n)}


CASES["GaussNewton"] = Case(
    data,
    lambda p: ops.GaussNewton(
        classifier, "cross-entropy", tree(p["y"]), p["X"], torch.tensor([0, 1, 2, 0, 1])
    ),
    categorical,
)
CASES["GaussNewton of a general loss, in chunks, damped"] = Case(
    data,
    lambda p: ops.GaussNewton(
        classifier,
        lambda outputs, targets: ((outputs - targets) ** 4).mean(0).sum(),
        tree(p["y"]),
        p["X"],
        torch.zeros(5, 3, dtype=p["X"].dtype),
        chunk_size=2,
        damping=0.5,
    ),
    lambda p: (
        torch.einsum(
            "nci,nc,ncj->ij",
            logits_jacobian(p["y"], p["X"]),
            12 * classifier(tree(p["y"]), p["X"]) ** 2 / 5,
            logits_jacobian(p["y"], p["X"]),
        )
        + 0.5 * eye(p["y"], p["y"].shape[0])
    ),
)
CASES["Fisher"] = Case(
    data,
    lambda p: ops.Fisher(classifier, "categorical", tree(p["y"]), p["X"], damping=0.25),
    lambda p: categorical(p) + 0.25 * eye(p["y"], p["y"].shape[0]),
)
CASES["DiagonalFisher"] = Case(
    lambda n, r: {"v": r(n) ** 2},
    lambda p: ops.DiagonalFisher(p["v"], damping=0.5),
    lambda p: torch.diag(p["v"] + 0.5),
)

# --- quasi-Newton and windows ---------------------------------------------------------------------

CASES["LowRankUpdate"] = Case(
    lambda n, r: {"U": r(2, n), "V": r(2, n), "a": r()},
    lambda p: ops.LowRankUpdate(p["U"], p["V"], p["a"]),
    lambda p: p["a"] * eye(p["U"], p["U"].shape[1]) + p["U"].T @ p["V"],
)
CASES["MFACInverse"] = Case(
    lambda n, r: {"g": r(3, n)},
    lambda p: ops.MFACInverse(p["g"], 0.5),
    lambda p: torch.linalg.inv(p["g"].T @ p["g"] / 3 + 0.5 * eye(p["g"], p["g"].shape[1])),
)


def bfgs(p: Parameters) -> Tensor:
    """``H <- (I - s y^T / s^T y) H (I - y s^T / s^T y) + s s^T / s^T y``, pair by pair."""
    identity = eye(p["s"], p["s"].shape[1])
    H = p["c"] ** 2 * identity
    for s, y in zip(p["s"], partners(p), strict=True):
        left = identity - torch.outer(s, y) / (s @ y)
        H = left @ H @ left.T + torch.outer(s, s) / (s @ y)
    return H


def partners(p: Parameters) -> Tensor:
    """Differences of positive curvature: ``y = s + t (t^T s) / 9``."""
    return p["s"] + p["t"] * (p["t"] * p["s"]).sum(1, keepdim=True) / 9


CASES["LBFGSInverse"] = Case(
    lambda n, r: {"s": r(2, n), "t": r(2, n), "c": r()},
    lambda p: ops.LBFGSInverse(p["s"], partners(p), p["c"] ** 2),
    bfgs,
)


def layer(n: int, like: Tensor) -> Space:
    return Space.of({"out.weight": torch.zeros(2, n, dtype=like.dtype)})


def factors(p: Parameters) -> dict[str, tuple[Tensor, Tensor]]:
    return {"out": (p["s"] @ p["s"].T / 3, p["a"] @ p["a"].T / 3)}


def factored(p: Parameters) -> Tensor:
    """``(S + (l^(1/2) / pi) I) (x) (A + pi l^(1/2) I)`` with l = 0.25."""
    S, A = factors(p)["out"]
    pi = ((A.trace() / A.shape[0]) / (S.trace() / S.shape[0])).sqrt()
    return torch.kron(S + 0.5 / pi * eye(S, len(S)), A + 0.5 * pi * eye(A, len(A)))


CASES["KFAC"] = Case(
    lambda n, r: {"s": r(2, 3), "a": r(n, 3)},
    lambda p: ops.KFAC(
        factors(p), layer(p["a"].shape[0], p["a"]), damping=0.5, damping_style="tikhonov"
    ),
    lambda p: torch.kron(*factors(p)["out"]) + 0.5 * eye(p["a"], 2 * p["a"].shape[0]),
)
CASES["KFAC, factored damping"] = Case(
    lambda n, r: {"s": r(2, 3), "a": r(n, 3)},
    lambda p: ops.KFAC(factors(p), layer(p["a"].shape[0], p["a"]), damping=0.25),
    factored,
)

# --- sparse derivatives ---------------------------------------------------------------------------


@functools.cache
def jacobian_plan(n: int) -> Any:
    """Pattern and colouring, found once: inside torch.func's vmap they could not be."""
    y = torch.ones(n, dtype=torch.float64)
    return ops.SparseJacobian(residual, y, y).plan


@functools.cache
def hessian_plan(n: int) -> Any:
    y = torch.ones(n, dtype=torch.float64)
    return ops.SparseHessian(chain, y, y).plan


def chain(y: Tensor, x: Tensor) -> Tensor:
    """``sum_i x_i y_i^2 y_{i+1} / 2``, not cyclic."""
    return (x[:-1] * y[:-1] ** 2 * y[1:]).sum() / 2


def chain_hessian(p: Parameters) -> Tensor:
    x, y = p["x"], p["y"]
    main = torch.cat([x[:-1] * y[1:], torch.zeros_like(x[:1])])
    beside = torch.diag(x[:-1] * y[:-1], 1)
    return torch.diag(main) + beside + beside.T


CASES["SparseJacobian"] = Case(
    points,
    lambda p: ops.SparseJacobian(
        residual, p["y"], p["x"], plan=jacobian_plan(len(p["y"])) if wide(p["y"]) else None
    ),
    residual_matrix,
)
CASES["SparseHessian"] = Case(
    points,
    lambda p: ops.SparseHessian(
        chain, p["y"], p["x"], plan=hessian_plan(len(p["y"])) if wide(p["y"]) else None
    ),
    chain_hessian,
)
