"""`LowRankPlusDiagonal`: a diagonal plus a few weighted outer products."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.space import Space
from operators.structure import Structure


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
        if weights.shape != (count,):
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({count},)")
        for what, dtype in (("weights", weights.dtype), ("the space", space.dtype)):
            if dtype != rows.dtype:
                raise TypeError(f"{what} has dtype {dtype}, but rows has {rows.dtype}")
        if positive_definite is None:
            nonnegative = bool((weights >= 0).all())
            positive_definite = nonnegative and bool((d > 0).all())
            positive_semidefinite = nonnegative and bool((d >= 0).all())
        structure = Structure(
            symmetric=True,
            positive_definite=positive_definite,
            positive_semidefinite=positive_semidefinite,
        )
        super().__init__(space, space, structure)
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
        # None: look it up, the sum may have gained it.
        definite = structure.positive_definite or None
        return LowRankPlusDiagonal(rows, d, weights, space=space, positive_definite=definite)

    def _scale(self, factor: Scalar) -> LinearOperator:
        structure = self.structure.times(sign_of(factor))
        return LowRankPlusDiagonal(
            self.rows,
            factor * self.diagonal_values,
            factor * self.weights,
            space=self.domain,
            positive_definite=structure.positive_definite,
            positive_semidefinite=structure.positive_semidefinite,
        )
