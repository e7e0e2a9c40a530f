"""`IncompleteCholesky`: a Cholesky factor on the pattern of the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import Cost, LinearOperator, Pattern, Sparse, Structure
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.preconditioners.entries import Array, csr_of, on_arrays
from solvers.solution import NotPositiveDefiniteError, StructureError
from solvers.sparse.substitution import Substitution


@dataclass(frozen=True, kw_only=True)
class IncompleteCholesky(Preconditioner):
    """``P = (L L^T)^-1`` with L lower triangular on the pattern of A, and ``L L^T = A`` there.

    Symmetric positive definite.

    Parameters
    ----------
    shift
        Factorise ``A + shift diag(A)`` instead: for an A on which the factorisation breaks down.
        It never does on an M-matrix.
    modified
        Part of what falls outside the pattern that is taken off the diagonal: 0 is IC(0); 1 is
        MIC(0), with the row sums of A; 0.95 is a common choice.
    rtol
        Relative change of the factor at which its sweeps end.

    Notes
    -----
    The equations ``(L L^T)_ij = A_ij`` for all places (i, j) of the pattern are a fixed-point map
    of L that is strictly triangular in a suitable order. All entries are swept at once, on whatever
    device A is; the sweeps end at the factor that elimination computes, to `rtol` after about 10 of
    them for a diffusion problem, many more with ``modified`` near 1, and after as many as the
    longest chain of dependent rows at the latest. A sweep costs two flops for each pair of nonzeros
    in a column of L, whose indices are held meanwhile.

    Products run on the CPU (see `Substitution`), at ``2 nnz(A)`` flops a column.

    Meijerink and van der Vorst (1977, doi:10.1090/S0025-5718-1977-0438681-4); Gustafsson (1978,
    doi:10.1007/BF01931691); shift: Manteuffel (1980); sweeps: Chow and Patel (2015,
    doi:10.1137/140968896).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Sparse(torch.tensor([[4.0, 2.0], [2.0, 5.0]]), symmetric=True)
    >>> (IncompleteCholesky().prepare(A) @ torch.tensor([6.0, 7.0])).round(decimals=5)
    tensor([1., 1.])
    """

    shift: float = 0.0
    modified: float = 0.0
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        for name, most in (("shift", float("inf")), ("modified", 1.0), ("rtol", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most or value == float("inf"):
                raise ValueError(
                    f"IncompleteCholesky: {name}={value}; expected a number from 0 to {most:g}"
                )

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric, or its entries are not known.
        NotPositiveDefiniteError
            A pivot is not positive; the row is named.
        """
        return _Factor(self, A)


class _Factor(ApproximateInverse):
    backend = "scipy"

    def __init__(self, settings: IncompleteCholesky, A: LinearOperator) -> None:
        if not A.symmetric:
            raise StructureError(
                f"IncompleteCholesky needs a symmetric operator; {A!r} does not claim to be: claim "
                "it, or use IncompleteLU"
            )
        definite = Structure(symmetric=True, positive_definite=True)
        super().__init__(settings, A, definite)
        held = A if isinstance(A, Sparse) else Sparse(csr_of(A, "IncompleteCholesky"))
        L = incomplete_factor(held, settings)
        self.nonzeros = self.factor_nonzeros = L.nnz
        self.forward = Substitution(csr_of(L, "IncompleteCholesky"), lower=True)
        self.backward = Substitution(csr_of(L.T, "IncompleteCholesky"), lower=False)

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        return on_arrays(self._solve, block)

    def _solve(self, b: Array) -> Array:
        return self.backward(self.forward(b))

    def _cost(self) -> Cost:
        return Cost(flops=4 * self.nonzeros)

    def _describe(self) -> str:
        return f"{self.nonzeros} nonzeros"


def incomplete_factor(A: Sparse, settings: IncompleteCholesky) -> Sparse:
    """``L`` of a symmetric matrix, as settings of `IncompleteCholesky` say; in float32 at least.

    Raises
    ------
    NotPositiveDefiniteError
        A pivot is not positive.
    """
    n, values = A.shape[0], A.values.detach()
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    diagonal = A._exact_diagonal()
    assert diagonal is not None
    diagonal = diagonal.detach().to(values.dtype) * (1 + settings.shift)
    _check_pivots(diagonal, A, settings)
    root = diagonal.sqrt()

    # Of the matrix scaled to a unit diagonal, what is below it.
    kept = A.pattern.rows > A.pattern.columns
    rows, columns = A.pattern.rows[kept], A.pattern.columns[kept]
    a = values[kept] / (root[rows] * root[columns])
    below = Pattern.of(rows, columns, (n, n))[0]

    # Nonzeros (i, k) and (j, k) of one column, i >= j, meet at (i, j).
    product = below.product(below.transpose()[0])
    mirror = below.transpose()[1][product.right]  # nonzero (j, k)
    i, j = product.pattern.rows[product.where], product.pattern.columns[product.where]
    once = i >= j
    i, j, left, right = i[once], j[once], product.left[once], mirror[once]
    places = torch.searchsorted(rows * n + columns, i * n + j).clamp_max(max(len(rows) - 1, 0))
    stays = (i > j) & (rows[places] == i) & (columns[places] == j) if len(rows) else i < 0
    falls = (i > j) & ~stays
    squares = i == j
    ratio = (root[j] / root[i])[falls]  # the row sums are those of A, not of the scaled matrix

    entries, pivot = a, torch.ones_like(diagonal)
    for _ in range(n + 1):
        pairs = entries[left] * entries[right]
        taken = torch.zeros_like(pivot).index_add(0, i[squares], pairs[squares])
        if settings.modified:
            lost = settings.modified * pairs[falls]
            taken = taken.index_add(0, i[falls], lost * ratio).index_add(0, j[falls], lost / ratio)
        fill = torch.zeros_like(entries).index_add(0, places[stays], pairs[stays])
        previous, pivot = (entries, pivot), 1 - taken
        # A pivot that is not positive yet may become so; at the end it is an error.
        size = pivot.clamp_min(torch.finfo(pivot.dtype).eps).sqrt()
        entries = (a - fill) / size[columns]
        moved = (entries - previous[0]).abs().sum() + (pivot - previous[1]).abs().sum()
        if not bool(moved > settings.rtol * n):
            break
    _check_pivots(pivot, A, settings)

    values = torch.cat([entries * root[rows], pivot.sqrt() * root])
    index = torch.arange(n, device=A.device)
    return Sparse.from_coo(torch.cat([rows, index]), torch.cat([columns, index]), values, (n, n))


def _check_pivots(pivots: Tensor, A: LinearOperator, settings: IncompleteCholesky) -> None:
    wrong = (~(pivots > 0)).nonzero()
    if len(wrong):
        raise NotPositiveDefiniteError(
            f"IncompleteCholesky of {A!r}: the pivot of row {int(wrong[0])} is not positive "
            f"({len(wrong)} in all); raise shift={settings.shift:g}, lower "
            f"modified={settings.modified:g}, or use AMG or Jacobi"
        )
