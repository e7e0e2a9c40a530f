"""`choose_backend`, `explain_backend`: which backend, by what it would cost; and why."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hyperlearn.gp.backend import Backend, Blocks, Dense
from hyperlearn.gp.elementary import terms
from hyperlearn.gp.low_rank import HELD, LowRank
from hyperlearn.gp.pde import PDE
from hyperlearn.gp.sparse import Sparse
from operators import Kernel

# Rows up to which the exact answer is cheap enough to be preferred to any other.
EXACT = 6_000

# Seconds on one core, measured; only ratios matter. A pair of functionals in a large tile, of RBF
# and of Matern kernels, and in the small Gram matrices of a KL factor; a flop of a Cholesky
# factorisation; an entry of a matrix in memory in a product; a nonzero of a triangular system.
PAIR = {True: 4e-8, False: 1.4e-7}
SMALL_PAIR, FLOP, STREAMED, NONZERO = 1.5e-7, 3.5e-11, 6e-10, 3e-9
# Rank of smooth kernels at a nugget of 1e-10, of 300 to 400; iterations with it.
RANK, LOW_RANK_ITERATIONS = 400, 8
# Pairs and nonzeros of each functional at rho = 4 (of rows: 3), in one, two and three dimensions;
# iterations with them.
PAIRS = {1: 500, 2: 2_000, 3: 20_000}
NONZEROS = {1: 30, 2: 80, 3: 500}
SPARSE_ITERATIONS = 40


@dataclass(frozen=True)
class Candidate:
    """A backend, and what it is thought to cost for one linear solve.

    Parameters
    ----------
    backend
        Settings.
    seconds, bytes
        Predicted.
    refused
        Why not, if it is not to be taken.
    """

    backend: Backend
    seconds: float
    bytes: float
    refused: str = ""


def candidates(
    kernels: Mapping[str, Kernel], blocks: Blocks, memory: float | None = None
) -> list[Candidate]:
    """All backends: the one to take first, then the others by their predicted seconds."""
    points = [next(iter(block.values())).points for block in blocks]
    n, size, d = sum(map(len, points)), points[0].element_size(), points[0].shape[-1]
    limit = available(points[0].device) if memory is None else memory
    smooth = all(kernel.smoothness == math.inf for kernel in kernels.values())
    rough = all(kernel.smoothness < math.inf for kernel in kernels.values())
    pair = PAIR[smooth]
    found = [
        _dense(n, size, pair),
        _low_rank(n, size, pair, smooth),
        _sparse(blocks, n, d, size, rough),
    ]
    judged = []
    for one in found:
        refused = one.refused
        if not refused and one.bytes > limit:
            refused = f"needs {_gib(one.bytes)} of the {_gib(limit)} that it may take"
        judged.append(Candidate(one.backend, one.seconds, one.bytes, refused))

    def order(one: Candidate) -> tuple[bool, bool, float]:
        preferred = n <= EXACT and isinstance(one.backend, Dense)
        return bool(one.refused), not preferred, one.seconds

    return sorted(judged, key=order)


def choose_backend(
    kernels: Mapping[str, Kernel], blocks: Blocks, *, memory: float | None = None
) -> Backend:
    """`Dense` for a few thousand rows; beyond, what is predicted to be fastest and fits.

    `LowRank` is for kernels that are infinitely smooth, `Sparse` for those of finite smoothness (of
    a sum the roughest term counts) in up to three dimensions. Where fields have kernels of both
    sorts there is `Dense` alone.

    Parameters
    ----------
    kernels
        By field.
    blocks
        Functionals, as `hyperlearn.gp.PDE.linearised` gives them.
    memory
        Bytes; by default half of the device's.

    Raises
    ------
    MemoryError
        None is for these kernels and fits.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.rand(20_000, 2, dtype=torch.float64)
    >>> rows = [{"u": ops.Functionals.laplacian_at(x)}]
    >>> choose_backend({"u": ops.RBF(0.2)}, rows).__class__.__name__
    'LowRank'
    >>> choose_backend({"u": ops.Matern(0.2, nu=3.5)}, rows).__class__.__name__
    'Sparse'
    """
    first = candidates(kernels, blocks, memory)[0]
    if first.refused:
        raise MemoryError(f"no backend will do: {_listed(candidates(kernels, blocks, memory))}")
    return first.backend


def explain_backend(
    kernel: Kernel | Mapping[str, Kernel], pde: PDE, *, memory: float | None = None
) -> str:
    """What `choose_backend` takes for a PDE, what each would cost, and why not the others.

    Examples
    --------
    >>> import torch, hyperlearn as hl, operators as ops
    >>> x = torch.rand(100, 2, dtype=torch.float64)
    >>> pde = hl.PDE([hl.Equation(lambda u, lap_u: u - lap_u - 1.0, x)])
    >>> print(explain_backend(ops.RBF(0.2), pde).splitlines()[0])
    Dense(): 100 rows, exact and cheap
    """
    kernels = dict.fromkeys(pde.fields, kernel) if isinstance(kernel, Kernel) else dict(kernel)
    blocks = pde.linearised(pde.zeros()).blocks
    found = candidates(kernels, blocks, memory)
    n = sum(len(next(iter(block.values()))) for block in blocks)
    why = "exact and cheap" if n <= EXACT else "the fastest that fits, by prediction"
    head = f"{found[0].backend!r}: {n:,} rows, {why}"
    if found[0].refused:
        head = f"no backend will do for {n:,} rows"
    return f"{head}\n{_listed(found)}"


def available(device: torch.device) -> float:
    """Half of the memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def _dense(n: int, size: int, pair: float) -> Candidate:
    seconds = pair * n**2 / 2 + FLOP * n**3 / 3
    # The matrix and its factor.
    return Candidate(Dense(), seconds, 2.0 * size * n**2)


def _low_rank(n: int, size: int, pair: float, smooth: bool) -> Candidate:
    r = min(n, RANK)
    held = size * n**2 <= HELD
    product = STREAMED * n**2 if held else pair * n**2 / 2
    once = pair * n**2 / 2 if held else 0.0
    seconds = once + pair * n * r + 7 * FLOP * n * r**2 + LOW_RANK_ITERATIONS * product
    refused = "" if smooth else "a kernel of finite smoothness has no low rank"
    return Candidate(LowRank(), seconds, 24.0 * n * r + (size * n**2 if held else 0), refused)


def _sparse(blocks: Blocks, n: int, d: int, size: int, rough: bool) -> Candidate:
    # Values and derivatives, of which rows are combinations; their points may coincide, so at most.
    functionals = sum(
        len(term.coefficient)
        for block in blocks
        for L in block.values()
        for term in terms(L, split=L.hessian is not None)
    )
    refused = "" if rough else "an infinitely smooth kernel has no sparse inverse factor"
    if d not in PAIRS:
        refused = refused or f"balls of points are large in {d} dimensions"
    near, nonzeros = PAIRS.get(d, 10**6), NONZEROS.get(d, 10**4)
    total = functionals + n
    seconds = total * (SMALL_PAIR * near + SPARSE_ITERATIONS * NONZERO * 2 * nonzeros)
    # Values, places, and the sorted copies for both triangular systems.
    return Candidate(Sparse(), seconds, total * nonzeros * (4.0 * size + 32), refused)


def _listed(found: list[Candidate]) -> str:
    lines = []
    for one in found:
        name = type(one.backend).__name__
        line = f"  {name:<8} {one.seconds:9.2g} s a solve, {_gib(one.bytes)}"
        lines.append(line + (f"; no: {one.refused}" if one.refused else ""))
    return "\n".join(lines)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2g} GiB"
