"""`LowRankPlusDiagonal`: a diagonal plus a few weighted outer products."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.cost import Cost
from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.precision import in_single
from operators.space import Space, check_tensor
from operators.structure import Structure
from operators.tracing import readable


class LowRankPlusDiagonal(LinearOperator):
    """``A = diag(d) + sum_t w_t u_t u_t^T``, that is ``D + U^T W U`` with rows ``u_t`` of U.

    The class is closed under sums with its like and with diagonals, and under scaling. A product
    costs ``4 T n`` flops; the matrix is never formed.

    Parameters
    ----------
    rows
        U, of shape ``(T, n)``; T may be 0.
    diagonal
        ``d``: a float or scalar tensor for a multiple of I, or a tensor ``(n,)``.
    weights
        ``w``, of shape ``(T,)``; by default ones.
    space
        Space that it acts on; by default plain vectors ``(n,)``.
    positive_definite
        Claim; by default looked up: all ``d > 0`` and all ``w >= 0`` are sufficient.
    positive_semidefinite
        Claim; looked up where `positive_definite` is.

    Raises
    ------
    ValueError
        A shape does not fit.
    TypeError
        `weights` or the space has another dtype than `rows`.

    Examples
    --------
    >>> import torch
    >>> A = LowRankPlusDiagonal(torch.tensor([[1.0, 1.0]]), 2.0)
    >>> A.to_dense()
    tensor([[3., 1.],
            [1., 3.]])
    >>> (A + A).low_rank_plus_diagonal
    True
    """

    _parameters = ("rows", "diagonal_values", "weights")

    def __init__(
        self,
        rows: Tensor,
        diagonal: Scalar,
        weights: Tensor | None = None,
        *,
        space: Space | None = None,
        positive_definite: bool | None = None,
        positive_semidefinite: bool = False,
    ) -> None:
        check_tensor(rows, "rows", "(T, n)")
        if rows.ndim != 2:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; expected (T, n)")
        count, size = rows.shape
        space = space or Space.flat(size, rows.dtype, rows.device)
        if space.size != size:
            raise ValueError(f"rows has length {size}, but the space has size {space.size}")
        d = torch.as_tensor(diagonal, dtype=rows.dtype, device=rows.device)
        if d.shape not in (torch.Size([]), torch.Size([size])):
            raise ValueError(f"diagonal has shape {tuple(d.shape)}; expected () or ({size},)")
        weights = rows.new_ones(count) if weights is None else weights
        check_tensor(weights, "weights", "(T,)")
        if weights.shape != (count,):
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({count},)")
        for what, dtype in (("weights", weights.dtype), ("the space", space.dtype)):
            if dtype != rows.dtype:
                raise TypeError(f"{what} has dtype {dtype}, but rows has {rows.dtype}")
        claims = {
            "positive_definite": bool(positive_definite),
            "positive_semidefinite": positive_semidefinite,
        }
        structure = Structure(symmetric=True, **claims)
        if positive_definite is None and not positive_semidefinite and readable(weights, d):
            structure = _look_up(weights, d)
        super().__init__(space, space, structure)
        self._claims = tuple(claim for claim, made in claims.items() if made)
        self.rows, self.diagonal_values, self.weights = rows, d, weights

    @property
    def low_rank_plus_diagonal(self) -> bool:
        """True."""
        return True

    @property
    def rank(self) -> int:
        """Number of outer products T (the rank of that part is at most T)."""
        return self.rows.shape[0]

    def _matvec(self, v: Tensor) -> Tensor:
        return self.diagonal_values * v + self.rows.T @ (self.weights * (self.rows @ v))

    def _matmat(self, block: Tensor) -> Tensor:
        d = self.diagonal_values
        d = d if d.ndim == 0 else d[:, None]
        return d * block + self.rows.T @ (self.weights[:, None] * (self.rows @ block))

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        structure = self.structure.plus(other.structure)
        space = other.domain if self.domain.is_flat else self.domain
        rows, weights = self.rows, self.weights
        if isinstance(other, Diagonal):
            d = self.diagonal_values + other.values
        elif isinstance(other, LowRankPlusDiagonal):
            d = self.diagonal_values + other.diagonal_values
            rows, weights = torch.cat([rows, other.rows]), torch.cat([weights, other.weights])
        else:
            return None
        # The sum may have gained definiteness that neither term has.
        if readable(weights, d):
            structure = structure.join(_look_up(weights, d))
        return self._derived(rows, d, weights, space, structure, other)

    def _scale(self, factor: Scalar) -> LinearOperator:
        structure = self.structure.times(sign_of(factor, self.dtype))
        d, weights = factor * self.diagonal_values, factor * self.weights
        return self._derived(self.rows, d, weights, self.domain, structure)

    def _derived(
        self,
        rows: Tensor,
        d: Tensor,
        weights: Tensor,
        space: Space,
        structure: Structure,
        *others: LinearOperator,
    ) -> LowRankPlusDiagonal:
        """One whose facts follow from those of this one and others."""
        derived = object.__new__(LowRankPlusDiagonal)
        LinearOperator.__init__(derived, space, space, structure)
        # A factor of a wider dtype would widen what is held as a scalar tensor.
        derived.rows, derived.weights = rows, weights.to(rows.dtype)
        derived.diagonal_values = d.to(rows.dtype)
        derived._inherit_claims(self, *others)
        return derived

    def _cost(self) -> Cost:
        return Cost(flops=4 * self.rank * self.shape[0])

    def _describe(self) -> str:
        return f"rank {self.rank} + diagonal"

    def _exact_diagonal(self) -> Tensor:
        return self.diagonal_values + self.weights @ self.rows**2

    def _exact_logdet(self) -> Tensor | None:
        """``log |det D| + log |det(I + W U D^-1 U^T)|``: the matrix determinant lemma."""
        d = self.diagonal_values.expand(self.shape[0])
        if not readable(d) or bool((d == 0).any()):
            return None
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        small = eye + self.weights[:, None] * self.rows @ (self.rows / d).T
        return d.abs().log().sum() + in_single(torch.linalg.slogdet, small).logabsdet


def _look_up(weights: Tensor, d: Tensor) -> Structure:
    """Facts that the signs tell: nonnegative weights and a positive diagonal are sufficient."""
    nonnegative = bool((weights >= 0).all())
    return Structure(
        symmetric=True,
        positive_definite=nonnegative and bool((d > 0).all()),
        positive_semidefinite=nonnegative and bool((d >= 0).all()),
    )
