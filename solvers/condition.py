"""`condition_estimate`: the condition number of what a solver is prepared for, by a few solves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from operators import Dense, LinearOperator, Sparse
from solvers.linear_solver import PreparedSolver
from solvers.members import Members

# Columns that the iteration goes on with at once, and its steps.
COLUMNS = 4
STEPS = 5


@torch.no_grad()
def condition_estimate(prepared: PreparedSolver) -> float:
    """Estimate of ``|A|_1 |A^-1|_1`` from below; ``|A|_1 |A^+|_1`` for least squares.

    Parameters
    ----------
    prepared
        A solver bound to A. Its transposed solves are needed too.

    Returns
    -------
    float
        That of the worst member of a batch; infinite where a solution is not finite.

    Notes
    -----
    Both norms are estimated as the largest value that ``|B x|_1`` takes on the octahedron
    ``|x|_1 <= 1``, by steps from vertex to vertex along subgradients: a block of four columns, at
    most five products with B and as many with its transpose (Hager, 1984, doi:10.1137/0905023;
    Higham, 1988, doi:10.1145/50063.214386; Higham and Tisseur, 2000, algorithm 2.4,
    doi:10.1137/S0895479899356080). The norm of A itself is exact where its entries are there to
    add up. The estimate is a lower bound, up to the accuracy of the solves; it is rarely below a
    third of the truth, though matrices can be made for which it is.

    A relative change of A or b by ``d`` changes x by up to ``d`` times the condition number: about
    ``-log10(eps * condition)`` digits of x can be trusted, whatever the residual.

    Examples
    --------
    >>> import torch, operators as ops, solvers
    >>> A = ops.Dense(torch.tensor([[1.0, 0.0], [0.0, 1e-3]]), symmetric=True)
    >>> round(solvers.DenseLU().prepare(A).condition(), 3)
    1000.0
    """
    A = prepared.A
    m, n = A.shape
    if not (m and n):
        return 0.0
    count = len(A) if isinstance(A, Members) else 1

    def inverse(block: Tensor, transpose: bool) -> Tensor:
        size = torch.linalg.vector_norm(block, dim=0)
        targets = block.new_full((block.shape[1],), prepared.solver.tolerance(block.dtype))
        return prepared._answer(block / size, targets, transpose=transpose)[0] * size

    norms = _norm_of(A)
    if norms is None:
        norms = _one_norm(lambda x, t: (A.T if t else A)._matmat(x), A, (m, n, count))
    condition = float((norms * _one_norm(inverse, A, (n, m, count))).max())
    return float("inf") if math.isnan(condition) else condition


def _norm_of(A: LinearOperator) -> Tensor | None:
    """``|A|_1`` of the members of a batch where the entries are there to add up."""
    held = A.stack.batched if isinstance(A, Members) else A
    if isinstance(held, Dense):
        return held.matrix.detach().abs().sum(-2).amax(-1)
    if isinstance(held, Sparse):
        sizes = held.values.detach().abs()
        sums = sizes.new_zeros(*sizes.shape[:-1], A.shape[1])
        return sums.index_add(-1, held.pattern.columns, sizes).amax(-1)
    return None


def _one_norm(
    apply: Callable[[Tensor, bool], Tensor], like: LinearOperator, size: tuple[int, int, int]
) -> Tensor:
    """Lower estimates ``(count,)`` of ``|B|_1`` for `count` operators of one shape.

    `apply` multiplies a block, with as many columns for each operator, by B or by its transpose.
    """
    rows, columns, count = size
    t = min(COLUMNS, columns)
    x = _first_columns(columns).to(like.dtype).to(like.device)[:, None, :t].expand(-1, count, -1)
    visited = torch.zeros(columns, count, dtype=torch.bool, device=like.device)
    best = x.new_zeros(count)
    for _ in range(STEPS):
        image = apply(x.reshape(columns, -1), False).reshape(rows, count, t)
        found = image.abs().sum(0).amax(-1)
        if bool((found <= best).all()):
            break
        best = torch.maximum(best, found)
        # |B x|_1 >= <sign, B x> for every x: where it may be larger, vertex by vertex.
        signs = torch.where(image < 0, -1.0, 1.0).to(x.dtype)
        slopes = apply(signs.reshape(rows, -1), True).reshape(columns, count, t).abs().amax(-1)
        if bool((slopes.amax(0) <= best).all()):
            break
        vertices = torch.where(visited, -1.0, slopes).topk(t, dim=0).indices
        visited.scatter_(0, vertices, True)
        x = x.new_zeros(columns, count, t).scatter_(0, vertices.T[None], 1.0)
    return best


def _first_columns(n: int) -> Tensor:
    """``(n, 4)``: the average, Higham's alternating vector, and random signs."""
    alternating = torch.linspace(1, 2, n, dtype=torch.float64)
    alternating[1::2] *= -1
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(2, (n, COLUMNS - 2), generator=generator).double() - 1
    block = torch.cat([torch.ones(n, 1).double(), alternating[:, None], signs], 1)
    return block / block.abs().sum(0)
