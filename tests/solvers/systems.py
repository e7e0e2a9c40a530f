"""Systems as functions of their tensors, each beside its matrix as a function of the same.

The matrix is plain torch code, so that torch.func differentiates `torch.linalg.solve` of it: what
`test_derivatives.py` asks of a solver, values and derivatives alike, is asked of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.sparse
import torch
from torch import Tensor

import operators as ops
from operators import LinearOperator

Parameters = dict[str, Tensor]
N = 6


@dataclass(frozen=True)
class System:
    """`draw(numbers)` gives tensors; `build` and `matrix` the two forms of one linear map."""

    draw: Callable[[Numbers], Parameters]
    build: Callable[[Parameters], LinearOperator]
    matrix: Callable[[Parameters], Tensor]


class Numbers:
    """Reproducible samples of a dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def eye(like: Tensor, n: int = N) -> Tensor:
    return torch.eye(n, dtype=like.dtype)


def gram(M: Tensor) -> Tensor:
    """Eigenvalues at least 1, and few units."""
    return M @ M.mT / M.shape[-1] + torch.eye(M.shape[-2], dtype=M.dtype)


def near_identity(M: Tensor) -> Tensor:
    """Far from symmetric; eigenvalues within 0.9 of 2."""
    return 2 * torch.eye(M.shape[-1], dtype=M.dtype) + 0.3 * torch.tanh(M)


def positive(d: Tensor) -> Tensor:
    return 1 + torch.nn.functional.softplus(d)


def nested(v: Tensor) -> dict[str, Tensor]:
    return {"a": v[:4].reshape(2, 2), "b": v[4:]}


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree["a"].reshape(-1), tree["b"]])


def dominant(c: Tensor) -> Tensor:
    """First entry above the sum of the others."""
    return 0.2 * torch.tanh(c) + torch.nn.functional.one_hot(torch.tensor(0), N).to(c.dtype) * 3


def same_corner(d: Tensor, c: Tensor) -> Tensor:
    """A first row with the first entry of the column."""
    return torch.cat([dominant(c)[:1], 0.2 * torch.sin(d[1:])])


def toeplitz(column: Tensor, row: Tensor) -> Tensor:
    line = torch.cat([column.flip(0), row[1:]])  # c_{n-1}, ..., c_0 = r_0, ..., r_{n-1}
    i = torch.arange(N)
    return line[N - 1 - i[:, None] + i]


# A ring: node i to i + 1. Symmetric, and connected both ways.
RING = ops.Pattern.of(
    torch.tensor([*range(N), *range(N), *range(N)]),
    torch.tensor([*range(N), *((i + 1) % N for i in range(N)), *((i - 1) % N for i in range(N))]),
    (N, N),
)[0]


def ring(diagonal: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Values of the ring's nonzeros, in the order of the pattern, from those of its edges."""
    rows, columns = RING.rows, RING.columns
    i, j = torch.arange(N), (torch.arange(N) + 1) % N
    dense = torch.zeros(N, N, dtype=diagonal.dtype)
    dense = dense.index_put((i, i), diagonal).index_put((i, j), upper).index_put((j, i), lower)
    return dense[rows, columns]


def ring_matrix(diagonal: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    shift = torch.roll(eye(diagonal), 1, 1)
    return torch.diag(diagonal) + torch.diag(upper) @ shift + (torch.diag(lower) @ shift).T


def quadratic(y: dict[str, Tensor], M: Tensor, c: Tensor) -> Tensor:
    """Its Hessian depends on where it is taken."""
    v = flat(y)
    return v @ gram(M) @ v / 2 + (torch.cosh(0.3 * v) * c.square()).sum()


def quadratic_matrix(p: Parameters) -> Tensor:
    return gram(p["M"]) + torch.diag(0.09 * torch.cosh(0.3 * p["y"]) * p["c"].square())


SYSTEMS: dict[str, System] = {
    "dense spd": System(
        lambda r: {"M": r(N, N)},
        lambda p: ops.Dense(gram(p["M"]), positive_definite=True),
        lambda p: gram(p["M"]),
    ),
    "dense symmetric": System(
        lambda r: {"M": r(N, N)},
        lambda p: ops.Dense(
            torch.diag(torch.tensor([2.0, -2, 3, -3, 4, 2], dtype=p["M"].dtype))
            + 0.1 * (p["M"] + p["M"].mT),
            symmetric=True,
        ),
        lambda p: (
            torch.diag(torch.tensor([2.0, -2, 3, -3, 4, 2], dtype=p["M"].dtype))
            + 0.1 * (p["M"] + p["M"].mT)
        ),
    ),
    "dense": System(
        lambda r: {"M": r(N, N)},
        lambda p: ops.Dense(near_identity(p["M"])),
        lambda p: near_identity(p["M"]),
    ),
    "dense triangular": System(
        lambda r: {"M": r(N, N)},
        lambda p: ops.Dense(near_identity(p["M"]).tril(), lower_triangular=True),
        lambda p: near_identity(p["M"]).tril(),
    ),
    "diagonal": System(
        lambda r: {"d": r(N)},
        lambda p: ops.Diagonal(positive(p["d"])),
        lambda p: torch.diag(positive(p["d"])),
    ),
    "hessian": System(
        lambda r: {"y": r(N), "M": r(N, N), "c": r(N)},
        lambda p: ops.Hessian(quadratic, nested(p["y"]), p["M"], p["c"]),
        quadratic_matrix,
    ),
    "shifted hessian": System(
        lambda r: {"y": r(N), "M": r(N, N), "c": r(N), "l": r()},
        lambda p: (
            ops.Hessian(quadratic, nested(p["y"]), p["M"], p["c"])
            + positive(p["l"]) * ops.Identity(N)
        ),
        lambda p: quadratic_matrix(p) + positive(p["l"]) * eye(p["M"]),
    ),
    "low rank plus diagonal": System(
        lambda r: {"U": r(2, N), "d": r(N), "w": r(2)},
        lambda p: ops.LowRankPlusDiagonal(p["U"], positive(p["d"]), positive(p["w"])),
        lambda p: torch.diag(positive(p["d"])) + p["U"].T @ torch.diag(positive(p["w"])) @ p["U"],
    ),
    "sparse spd": System(
        lambda r: {"d": r(N), "e": r(N)},
        lambda p: ops.Sparse(
            ring(2 + positive(p["d"]), -torch.sigmoid(p["e"]), -torch.sigmoid(p["e"])),
            RING,
            symmetric=True,
        ),
        lambda p: ring_matrix(2 + positive(p["d"]), -torch.sigmoid(p["e"]), -torch.sigmoid(p["e"])),
    ),
    "sparse": System(
        lambda r: {"d": r(N), "u": r(N), "l": r(N)},
        lambda p: ops.Sparse(ring(2 + positive(p["d"]), torch.tanh(p["u"]), p["l"].sin()), RING),
        lambda p: ring_matrix(2 + positive(p["d"]), torch.tanh(p["u"]), p["l"].sin()),
    ),
    "kronecker": System(
        lambda r: {"A": r(2, 2), "B": r(3, 3)},
        lambda p: ops.Kronecker(
            ops.Dense(gram(p["A"]), positive_definite=True),
            ops.Dense(gram(p["B"]), positive_definite=True),
        ),
        lambda p: torch.kron(gram(p["A"]), gram(p["B"])),
    ),
    "kronecker sum": System(
        lambda r: {"A": r(2, 2), "B": r(3, 3)},
        lambda p: ops.KroneckerSum(
            ops.Dense(gram(p["A"]), positive_definite=True),
            ops.Dense(gram(p["B"]), positive_definite=True),
        ),
        lambda p: (
            torch.kron(gram(p["A"]), eye(p["A"], 3)) + torch.kron(eye(p["A"], 2), gram(p["B"]))
        ),
    ),
    "block diagonal": System(
        lambda r: {"A": r(2, 2), "B": r(4, 4)},
        lambda p: ops.BlockDiagonal(
            ops.Dense(gram(p["A"]), positive_definite=True), ops.Dense(near_identity(p["B"]))
        ),
        lambda p: torch.block_diag(gram(p["A"]), near_identity(p["B"])),
    ),
    "saddle": System(
        lambda r: {"M": r(4, 4), "G": r(2, 4)},
        lambda p: ops.Saddle(
            ops.Dense(gram(p["M"]), positive_definite=True),
            ops.Dense(p["G"] + 2 * torch.eye(2, 4, dtype=p["G"].dtype)),
        ),
        lambda p: torch.cat(
            [
                torch.cat([gram(p["M"]), (p["G"] + 2 * torch.eye(2, 4, dtype=p["G"].dtype)).T], 1),
                torch.cat(
                    [
                        p["G"] + 2 * torch.eye(2, 4, dtype=p["G"].dtype),
                        torch.zeros(2, 2, dtype=p["G"].dtype),
                    ],
                    1,
                ),
            ]
        ),
    ),
    "jacobian": System(
        lambda r: {"y": r(N), "M": r(N, N)},
        lambda p: ops.Jacobian(lambda y, M: 3 * y + torch.tanh(M @ y) / 2, p["y"], p["M"]),
        lambda p: torch.func.jacfwd(lambda y: 3 * y + torch.tanh(p["M"] @ y) / 2)(p["y"]),
    ),
    "block triangular": System(
        lambda r: {"A": r(2, 2), "B": r(4, 4), "C": r(2, 4)},
        lambda p: ops.Block(
            [
                [ops.Dense(near_identity(p["A"])), ops.Dense(p["C"])],
                [None, ops.Dense(near_identity(p["B"]))],
            ]
        ),
        lambda p: torch.cat(
            [
                torch.cat([near_identity(p["A"]), p["C"]], 1),
                torch.cat([torch.zeros(4, 2, dtype=p["A"].dtype), near_identity(p["B"])], 1),
            ]
        ),
    ),
    "circulant": System(
        lambda r: {"c": r(N)},
        lambda p: ops.Circulant(dominant(p["c"])),
        lambda p: torch.stack([torch.roll(dominant(p["c"]), k) for k in range(N)], 1),
    ),
    "toeplitz": System(
        lambda r: {"c": r(N), "d": r(N)},
        lambda p: ops.Toeplitz(dominant(p["c"]), same_corner(p["d"], p["c"])),
        lambda p: toeplitz(dominant(p["c"]), same_corner(p["d"], p["c"])),
    ),
    "tall": System(
        lambda r: {"M": r(N + 3, N)},
        lambda p: ops.Dense(p["M"] + 2 * torch.eye(N + 3, N, dtype=p["M"].dtype)),
        lambda p: p["M"] + 2 * torch.eye(N + 3, N, dtype=p["M"].dtype),
    ),
    "wide": System(
        lambda r: {"M": r(N - 2, N)},
        lambda p: ops.Dense(p["M"] + 2 * torch.eye(N - 2, N, dtype=p["M"].dtype)),
        lambda p: p["M"] + 2 * torch.eye(N - 2, N, dtype=p["M"].dtype),
    ),
}
SQUARE = [name for name in SYSTEMS if name not in ("tall", "wide")]
SPD = [
    "dense spd", "diagonal", "hessian", "shifted hessian", "low rank plus diagonal", "sparse spd",
    "kronecker", "kronecker sum",
]  # fmt: skip
SYMMETRIC = [*SPD, "dense symmetric", "saddle"]


def poisson(*sizes: int) -> scipy.sparse.csr_matrix:
    """The Laplacian with ``-1, 2, -1`` along each axis of a grid."""
    total = scipy.sparse.csr_matrix((1, 1))
    for size in sizes:
        line = scipy.sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(size, size))
        total = scipy.sparse.kronsum(line, total) if total.shape != (1, 1) else line
    return scipy.sparse.csr_matrix(total)


def known_by_products(values: Tensor, **claims: bool) -> LinearOperator:
    """``diag(values)``, which shows its products alone."""
    own = {} if claims else {"rmatvec": lambda v, d: d * v}
    return ops.FunctionOperator(
        lambda v, d: d * v, torch.zeros_like(values), values, **own, **claims
    )
