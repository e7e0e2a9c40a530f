"""`AMG`: algebraic multigrid on the hierarchies of PyAMG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from operators import Cost, LinearOperator, Structure
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.preconditioners.entries import array_of, csr_of, nonzero_diagonal, on_arrays
from solvers.preconditioners.multigrid import Cycle, Kind, Level, coarsest_solver
from solvers.preconditioners.smoothers import Chebyshev, GaussSeidel, Jacobi, Smoother
from solvers.threads import one_blas_thread

KINDS = ("smoothed-aggregation", "ruge-stuben", "root-node")
SMOOTHERS = ("gauss-seidel", "jacobi", "chebyshev")
# Columns from which a block goes through the cycle whole.
NARROW = 4
# What PyAMG calls the threshold of a measure of strength.
THRESHOLDS = {"symmetric": "theta", "classical": "theta", "evolution": "epsilon"}


@dataclass(frozen=True, kw_only=True)
class AMG(Preconditioner):
    """One multigrid cycle, on coarser systems that are made from the entries of A alone.

    For elliptic problems the iterations of CG stay about the same from a thousand unknowns to
    millions: 8 to 10 by smoothed aggregation, 5 to 7 by Ruge and Stuben, to 1e-8 for Poisson
    problems in two and three dimensions.

    Parameters
    ----------
    kind
        ``"smoothed-aggregation"``: also for systems of equations, as elasticity, with their
        `near_nullspace`. ``"ruge-stuben"``: fewer iterations for one scalar equation whose matrix
        is close to an M-matrix. ``"root-node"``: smoothed aggregation with an energy-minimising
        interpolation, dearer to set up, for anisotropic and nonsymmetric problems.
    near_nullspace
        ``(n,)`` or ``(n, m)``: what A hardly sees, as the rigid motions of an elastic body; by
        default the constant. Not for ``"ruge-stuben"``.
    cycle
        ``"V"``; ``"W"``, which visits each coarser level twice as often; ``"F"``, which lies
        between them, but is not symmetric: for GMRES or BiCGSTAB.
    smoother
        ``"gauss-seidel"``, a sweep forward and one back; ``"jacobi"``, ``"chebyshev"``: products
        and nothing else.
    sweeps
        Smoothing steps before and after each correction.
    degree
        Of the polynomial of ``"chebyshev"``.
    strength
        What counts as a strong coupling: ``"symmetric"``, ``"classical"`` or ``"evolution"``; by
        default the first for aggregation and the second for Ruge and Stuben.
    threshold
        From which size on; by default 0, 0.25 and 4.
    max_coarse
        Unknowns below which a system is solved.
    max_levels
        Levels at most.
    seed
        Of the random vectors in spectral radii: two hierarchies of one A agree bit for bit.

    Notes
    -----
    Symmetric where A is, unless the cycle is F; positive definite where A is. For other A the
    restriction is made from ``A^T``, and the transpose is the true one, for the adjoint.

    The setup costs one to three solves. A cycle costs ``4 sweeps`` products with A by Gauss-Seidel,
    times the operator complexity, and takes blocks whole; all levels together hold about three
    copies of A, times that complexity. The work is done on the CPU, in float32 or float64. A
    hierarchy that was made for an earlier A is still good for one that differs little: 10 % in the
    coefficients hardly matter, a factor of 2 doubles the iterations (`PreparedSolver.update`).

    Vanek, Mandel and Brezina (1996, doi:10.1007/BF02238511); Ruge and Stuben (1987,
    doi:10.1137/1.9781611971057.ch4); Manteuffel, Olson, Schroder and Southworth (2017,
    doi:10.1137/16M1082706); Bell, Olson, Schroder and Southworth (2023, doi:10.21105/joss.05495).

    Examples
    --------
    >>> import torch, operators as ops, scipy.sparse as sp
    >>> T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(1000, 1000))
    >>> P = AMG(max_coarse=20).prepare(ops.Sparse(T, symmetric=True))
    >>> print(P.hierarchy)
    smoothed-aggregation, 5 levels, operator complexity 1.49
    level  unknowns  nonzeros
        0      1000      2998
        1       334      1000
        2       112       334
        3        38       112
        4        13        37
    """

    kind: Literal["smoothed-aggregation", "ruge-stuben", "root-node"] = "smoothed-aggregation"
    near_nullspace: Tensor | None = field(default=None, repr=False)
    cycle: Kind = "V"
    smoother: Literal["gauss-seidel", "jacobi", "chebyshev"] = "gauss-seidel"
    sweeps: int = 1
    degree: int = 3
    strength: Literal["symmetric", "classical", "evolution"] | None = None
    threshold: float | None = None
    max_coarse: int = 100
    max_levels: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "kind": KINDS,
            "cycle": ("V", "W", "F"),
            "smoother": SMOOTHERS,
            "strength": (*THRESHOLDS, None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"AMG: {name}={getattr(self, name)!r}; expected one of "
                    f"{', '.join(map(repr, allowed))}"
                )
        for name in ("sweeps", "degree", "max_coarse", "max_levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"AMG: {name}={getattr(self, name)}; expected at least 1")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ValueError(f"AMG: threshold={self.threshold}; expected a number >= 0")
        if self.kind == "ruge-stuben" and self.near_nullspace is not None:
            raise ValueError(
                "AMG: near_nullspace with kind='ruge-stuben', which interpolates constants; use "
                "kind='smoothed-aggregation'"
            )

    def __eq__(self, other: object) -> bool:
        """Equal settings; of tensors, the same one."""
        if not isinstance(other, AMG):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs)

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Build the hierarchy.

        Raises
        ------
        StructureError
            The entries of A are not known.
        SingularError
            There is a zero on the diagonal of A.
        ValueError
            `near_nullspace` has another size than A.
        """
        return Multigrid(self, A)


class Multigrid(ApproximateInverse):
    """A cycle of `AMG`, as an operator.

    Attributes
    ----------
    unknowns, nonzeros
        Of each level, from the finest on.
    operator_complexity
        Nonzeros on all levels over those of A.
    """

    backend = "pyamg"
    settings: AMG

    def __init__(self, settings: AMG, A: LinearOperator) -> None:
        symmetric = A.symmetric and settings.cycle != "F"
        definite = symmetric and A.positive_definite
        super().__init__(settings, A, Structure(symmetric=symmetric, positive_definite=definite))
        matrix = csr_of(A, "AMG").copy()  # pyamg writes into its argument
        nonzero_diagonal(A, torch.from_numpy(matrix.diagonal()), "AMG")
        # BLAS has only small work here, and its threads would stay in the way of others.
        with _numpy_seeded(settings.seed), one_blas_thread():
            self.matrices, self.transfers = _hierarchy(settings, matrix, A)
            needed = settings.smoother != "gauss-seidel"
            self.radii = [_radius(level) if needed else 1.0 for level in self.matrices[:-1]]
        self.unknowns = [level.shape[0] for level in self.matrices]
        self.nonzeros = [level.nnz for level in self.matrices]
        self.operator_complexity = sum(self.nonzeros) / max(self.nonzeros[0], 1)
        self.forward = self._cycle(self.matrices, self.transfers, backwards=False)

    @cached_property
    def transposed(self) -> Cycle:
        """The transposed cycle: that of ``A^T``, with restriction and interpolation exchanged."""
        matrices = [level.T.tocsr() for level in self.matrices]
        transfers = [(P.T.tocsr(), R.T.tocsr()) for R, P in self.transfers]
        return self._cycle(matrices, transfers, backwards=True)

    def _cycle(
        self, matrices: list[Any], transfers: list[tuple[Any, Any]], *, backwards: bool
    ) -> Cycle:
        *finer, last = matrices
        levels = [
            Level(level, R, P, self._smoother(level, radius))
            for level, (R, P), radius in zip(finer, transfers, self.radii, strict=True)
        ]
        coarsest = coarsest_solver(last, symmetric=self.A.symmetric)
        settings = self.settings
        return Cycle(levels, coarsest, settings.cycle, settings.sweeps, backwards=backwards)

    def _smoother(self, A: Any, radius: float) -> Smoother:
        if self.settings.smoother == "jacobi":
            return Jacobi(A, radius)
        if self.settings.smoother == "chebyshev":
            return Chebyshev(A, radius, self.settings.degree)
        return GaussSeidel(A)

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        cycle = self.transposed if transpose and not self.symmetric else self.forward
        if not 1 < block.shape[1] < NARROW:
            return on_arrays(cycle, block)
        # Scipy's products take two columns apart faster than together.
        return torch.cat([on_arrays(cycle, column) for column in block.split(1, 1)], 1)

    def _cost(self) -> Cost:
        # Products with A of a sweep and its residual; sweeps come before and after.
        products = {"gauss-seidel": 2, "jacobi": 1, "chebyshev": self.settings.degree}
        a_visit = 2 * self.settings.sweeps * products[self.settings.smoother]
        flops = 0
        for depth, nnz in enumerate(self.nonzeros):
            visits = {"V": 1, "W": 2**depth, "F": depth + 1}[self.settings.cycle]
            flops += visits * a_visit * 2 * nnz
        return Cost(flops=flops)

    @property
    def hierarchy(self) -> str:
        """A table of the levels."""
        lines = [
            f"{self.settings.kind}, {len(self.matrices)} levels, operator complexity "
            f"{self.operator_complexity:.2f}",
            "level  unknowns  nonzeros",
        ]
        for depth, (n, nnz) in enumerate(zip(self.unknowns, self.nonzeros, strict=True)):
            lines.append(f"{depth:5d} {n:9d} {nnz:9d}")
        return "\n".join(lines)

    def _describe(self) -> str:
        return (
            f"{self.settings.kind}, {self.settings.cycle}-cycle over {len(self.matrices)} levels, "
            f"operator complexity {self.operator_complexity:.2f}"
        )


def _hierarchy(
    settings: AMG, matrix: Any, A: LinearOperator
) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """``A`` of each level and ``(R, P)`` between each and the next, by PyAMG, as CSR."""
    import pyamg  # half a second

    common: dict[str, Any] = {
        "max_coarse": settings.max_coarse,
        "max_levels": settings.max_levels,
        "presmoother": None,
        "postsmoother": None,
    }
    measure = settings.strength or ("classical" if settings.kind == "ruge-stuben" else "symmetric")
    threshold = settings.threshold
    if threshold is None and settings.kind == "ruge-stuben" and measure == "classical":
        threshold = 0.25
    options = {} if threshold is None else {THRESHOLDS[measure]: threshold}
    common["strength"] = (measure, options)
    dtype = matrix.dtype
    if settings.kind == "ruge-stuben":
        made = pyamg.ruge_stuben_solver(matrix, **common)
    else:
        common["symmetry"] = "symmetric" if A.symmetric else "nonsymmetric"
        common["B"] = _near_nullspace(settings, A)
        if settings.kind == "root-node":
            # Its interpolation is there in double precision alone.
            common["B"] = common["B"].astype(np.float64)
            made = pyamg.rootnode_solver(matrix.astype(np.float64), **common)
        else:
            made = pyamg.smoothed_aggregation_solver(matrix, **common)

    def csr(M: Any) -> Any:
        return M.tocsr().astype(dtype, copy=False)

    transfers = [(csr(level.R), csr(level.P)) for level in made.levels[:-1]]
    return [csr(level.A) for level in made.levels], transfers


def _near_nullspace(settings: AMG, A: LinearOperator) -> Any:
    candidates = settings.near_nullspace
    if candidates is None:
        candidates = torch.ones(A.shape[0])
    if candidates.ndim not in (1, 2) or candidates.shape[0] != A.shape[0]:
        raise ValueError(
            f"AMG: near_nullspace has shape {tuple(candidates.shape)}; expected ({A.shape[0]},) or "
            f"({A.shape[0]}, m)"
        )
    return array_of(candidates.to(A.dtype))


def _radius(A: Any) -> float:
    """Spectral radius of ``D^-1 A``, to a few percent."""
    from pyamg.relaxation.smoothing import rho_D_inv_A

    return float(rho_D_inv_A(A))


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Numpy's global generator, which PyAMG draws from, seeded; afterwards as it was."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
