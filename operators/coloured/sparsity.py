"""Where the nonzeros of a derivative are: given, of a stencil, found from the graph, or probed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log, prod
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from operators.coloured.colouring import column_colouring
from operators.coloured.dependence import reach_of, warn_unknown
from operators.sparse.formats import from_scipy, from_torch
from operators.sparse.pattern import Pattern

# Steps from a point of the grid to those that its equation takes in.
FIVE_POINT = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
NINE_POINT = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))
SEVEN_POINT = tuple(
    (i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1) if i**2 + j**2 + k**2 < 2
)

# Values that a probing vector takes: a random entry cancels all others with this chance at most.
LEVELS = 2**20


@dataclass(frozen=True, eq=False)
class Sparsity:
    """A pattern, and how it is known.

    Parameters
    ----------
    pattern
        Where nonzeros can be.
    source
        ``"given"``; ``"detected"``: from the graph of the function, for every value of its
        argument; ``"probed"``: by random products near one point.
    unknown
        Operations whose dependences were not known, or vary, so that the pattern is larger than
        need be.
    failure_probability
        Bound on the probability that one entry is missing; 0 of what is not probed.
    """

    pattern: Pattern
    source: Literal["given", "detected", "probed"]
    unknown: tuple[str, ...] = ()
    failure_probability: float = 0.0


def stencil(
    shape: Sequence[int],
    offsets: Sequence[Sequence[int]],
    *,
    fields: int | None = None,
    coupling: Tensor | None = None,
    layout: Literal["first", "last"] = "first",
    periodic: bool = False,
) -> Pattern:
    """Pattern of a difference operator on a grid.

    Parameters
    ----------
    shape
        Points along each axis.
    offsets
        Steps to the points that enter the equation of a point, as `FIVE_POINT`, `NINE_POINT`,
        `SEVEN_POINT`.
    fields
        Number of unknowns at each point; None for one, without an axis of its own.
    coupling
        Bool matrix ``(fields, fields)``: whether the equation of the one has the other in it. By
        default all are coupled.
    layout
        Whether the axis of the fields comes before those of the grid or after.
    periodic
        Whether the grid closes on itself.

    Raises
    ------
    ValueError
        An offset has another number of axes; the coupling is of another shape; sizes below 1.

    Examples
    --------
    >>> stencil((1000, 1000), FIVE_POINT)
    Pattern((1000000, 1000000), nnz=4996000)
    """
    shape = tuple(int(size) for size in shape)
    if not shape or min(shape) < 1 or (fields is not None and fields < 1):
        raise ValueError(f"shape={shape}, fields={fields}; expected sizes >= 1")
    if layout not in ("first", "last"):
        raise ValueError(f"layout={layout!r}; expected 'first' or 'last'")
    steps = torch.as_tensor([list(offset) for offset in offsets], dtype=torch.int64)
    if steps.ndim != 2 or steps.shape[1] != len(shape):
        raise ValueError(
            f"offsets has shape {tuple(steps.shape)}; expected (k, {len(shape)}) for shape {shape}"
        )
    kinds = fields or 1
    coupled = torch.ones(kinds, kinds, dtype=torch.bool) if coupling is None else coupling.bool()
    if coupled.shape != (kinds, kinds):
        raise ValueError(
            f"coupling has shape {tuple(coupled.shape)}; expected ({kinds}, {kinds}) for fields"
        )
    points = prod(shape)
    strides = torch.tensor([prod(shape[i + 1 :]) for i in range(len(shape))])
    here = torch.arange(points)
    axes = torch.stack(torch.unravel_index(here, shape), dim=1)
    # In the order of their numbers the neighbours of each point come sorted, unless they wrap.
    steps = steps[torch.argsort((steps * strides).sum(dim=1))]
    inside = torch.ones(points, len(steps), dtype=torch.bool)
    neighbour = torch.zeros(points, len(steps), dtype=torch.int64)
    for axis, (count, stride) in enumerate(zip(shape, strides.tolist(), strict=True)):
        there = axes[:, axis, None] + steps[:, axis]
        if periodic:
            there = there % count
        else:
            inside &= (there >= 0) & (there < count)
        neighbour += there * stride
    row, column = here.repeat_interleave(inside.sum(dim=1)), neighbour[inside]

    def numbered(point: Tensor, kind: Tensor) -> Tensor:
        if layout == "first":
            return (kind[:, None] * points + point).reshape(-1)
        return (point * kinds + kind[:, None]).reshape(-1)

    equation, unknown = coupled.nonzero(as_tuple=True)
    total = kinds * points
    return Pattern.of(numbered(row, equation), numbered(column, unknown), (total, total))[0]


def pattern_of(given: Any, shape: tuple[int, int], device: torch.device) -> Pattern:
    """Pattern of what a caller gives: a Pattern, or a matrix whose nonzeros count.

    Parameters
    ----------
    given
        `Pattern`, `Sparsity`, a torch tensor (dense, COO, CSR, CSC; bool too), a numpy array or a
        scipy sparse matrix. Of a sparse one every stored entry counts.
    shape
        ``(m, n)`` that it must have.
    device
        Where to put it.

    Raises
    ------
    ValueError
        Another shape.
    TypeError
        None of these.
    """
    if isinstance(given, Sparsity):
        given = given.pattern
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        given = from_torch(given.to(torch.float64))[1]
    elif scipy.sparse.issparse(given):
        matrix: Any = given
        given = from_scipy(matrix.astype(np.float64))[1]
    if not isinstance(given, Pattern):
        raise TypeError(
            f"sparsity is a {type(given).__name__}; expected 'detect', 'probe', a Pattern, or a "
            "torch, numpy or scipy matrix"
        )
    if given.shape != shape:
        raise ValueError(f"sparsity has shape {given.shape}; expected {shape} for this residual")
    return given.to(device)


def detect(function: Callable[[Tensor], Tensor], u: Tensor) -> Sparsity:
    """Pattern of the Jacobian from the graph of the function: safe for every value of u.

    An operation whose dependences are not known, or which indices that are computed from u steer
    (a sort, a departure point), is taken to join all that it could, and a warning names it.

    Parameters
    ----------
    function
        From a vector ``(n,)`` to a vector ``(m,)``.
    u
        Example of its argument.

    Raises
    ------
    ValueError
        The function cannot be traced; see `operators.coloured.dependence.reach_of`.

    Examples
    --------
    >>> import torch
    >>> found = detect(lambda u: u[1:] ** 2 - u[:-1], torch.zeros(4))
    >>> found.pattern.rows, found.pattern.columns
    (tensor([0, 0, 1, 1, 2, 2]), tensor([0, 1, 1, 2, 2, 3]))
    """
    reach, unknown = reach_of(function, u)
    warn_unknown(unknown)
    reach.sum_duplicates()
    columns = torch.from_numpy(reach.indices.astype(np.int64))
    pointers = torch.from_numpy(reach.indptr.astype(np.int64))
    m, n = reach.shape
    return Sparsity(Pattern(columns, pointers, (m, n)).to(u.device), "detected", unknown)


def probe(
    function: Callable[[Tensor], Tensor],
    u: Tensor,
    *,
    failure_probability: float = 1e-9,
    spread: float = 1e-2,
    seed: int = 0,
    most_products: int = 10_000,
    back: bool = False,
) -> Sparsity:
    """Pattern of the Jacobian near u by random sweeps, halving blocks of columns.

    Parameters
    ----------
    function
        From a vector ``(n,)`` to a vector ``(m,)``, built of operations that torch.func can
        differentiate.
    u
        Point.
    failure_probability
        Bound on the probability that any one entry is missing.
    spread
        Points are ``u + spread max(1, |u|) xi`` with xi uniform in (-1, 1), entry by entry.
    seed
        Of the random numbers.
    most_products
        Largest number of sweeps.
    back
        Sweep back (vjp) instead of forward (jvp), and halve blocks of rows.

    Raises
    ------
    ValueError
        More sweeps would be needed; a probability outside (0, 1); results that are not finite.

    Notes
    -----
    Level l knows which of ``2^l`` blocks of columns enter each row. The halves of these blocks are
    coloured so that no row meets two of one colour, and one product of each colour, with a random
    vector v on its blocks, tells which halves enter each row: row i sees ``sum_j J_ij v_j`` over
    one half.

    The bound. The entries of v are independent and uniform on ``K = 2^20`` values. If some
    ``J_ij != 0`` in the block, then for any values of the others at most one value of ``v_j`` makes
    the sum zero: probability at most 1/K (Schwartz and Zippel). With r independent repetitions, at
    r points, an entry is missing with probability at most ``(1 + ceil(log2 n)) K^-r``, and r is
    taken so that this is at most `failure_probability`. The bound is for exact arithmetic, and for
    entries that are not zero at the points drawn: of an analytic function every entry that is not
    identically zero almost surely, but a branch (a ReLU, a limiter) that is not taken near u is not
    seen. Zeros are told exactly: rounding noise adds entries, it never loses them.

    Costs r times about ``2 s log2 n`` sweeps with s nonzeros in the longest row.
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability={failure_probability}; expected a number in (0, 1)")
    with torch.no_grad():
        m, n = function(u).numel(), u.numel()
    # Sweeps back are products with the transpose, whose pattern is found in the same way.
    m, n = (n, m) if back else (m, n)
    levels = max(1, ceil(log(max(n, 2), 2)))
    repetitions = max(1, ceil(log((1 + levels) / failure_probability) / log(LEVELS)))
    generator = torch.Generator(u.device).manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(u.numel(), generator=generator, dtype=u.dtype, device=u.device)

    def sweep(point: Tensor, v: Tensor) -> Tensor:
        if back:
            cotangent: Tensor = torch.func.vjp(function, point)[1](v)[0]
            return cotangent
        tangent: Tensor = torch.func.jvp(function, (point,), (v,))[1]
        return tangent

    u = u.detach()
    points = [u + spread * u.abs().clamp(min=1) * (2 * uniform() - 1) for _ in range(repetitions)]
    column = torch.arange(n, device=u.device)
    # Every row may have something in the only block.
    rows = torch.arange(m, device=u.device)
    pattern = Pattern.of(rows, torch.zeros_like(rows), (m, 1))[0]
    width, products = 2**levels, 0
    while True:
        colouring = column_colouring(pattern, method="greedy")
        products += repetitions * colouring.count
        if products > most_products:
            raise ValueError(
                f"probing needs more than most_products={most_products} products: a row of the "
                "Jacobian is long; detect the pattern, or give it"
            )
        block = column // width
        colour = colouring.colours[block]
        hit = torch.zeros(pattern.nnz, dtype=torch.bool, device=u.device)
        entry_colour = colouring.colours[pattern.columns]
        for c in range(colouring.count):
            mine = (entry_colour == c).nonzero()[:, 0]
            for point in points:
                drawn = torch.randint(1, LEVELS + 1, (n,), generator=generator, device=u.device).to(
                    u.dtype
                )
                v = torch.where(colour == c, drawn / LEVELS, 0)
                y = sweep(point, v)
                if not bool(y.isfinite().all()):
                    raise ValueError(
                        "residual has derivatives that are not finite near u; give a smaller "
                        "spread, or a pattern"
                    )
                hit[mine] |= y[pattern.rows[mine]] != 0
        rows, blocks = pattern.rows[hit], pattern.columns[hit]
        if width == 1:
            found = Pattern.of(rows, blocks, (m, n))[0]
            found = found.transpose()[0] if back else found
            return Sparsity(found, "probed", (), failure_probability)
        width //= 2
        count = ceil(n / width) if n else 0
        halves = torch.stack([2 * blocks, 2 * blocks + 1], dim=1).reshape(-1)
        rows = torch.repeat_interleave(rows, 2)
        inside = halves < count
        pattern = Pattern.of(rows[inside], halves[inside], (m, count))[0]
