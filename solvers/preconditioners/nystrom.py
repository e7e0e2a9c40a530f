"""`Nystrom`: the inverse of a low-rank sketch, for kernel and Fisher matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators import (
    Diagonal,
    Identity,
    LinearOperator,
    LowRankPlusDiagonal,
    Scaled,
    Structure,
    Sum,
)
from operators import Nystrom as Sketched
from operators.randomized.sketch import Columns, columns_of
from solvers.preconditioner import Preconditioner
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class Nystrom(Preconditioner):
    """``P ~ (K + mu I)^-1`` for positive semidefinite K whose eigenvalues decay fast.

    With ``U^T Lambda U`` the Nystrom approximation of K of rank l, and ``lambda_l`` the last of its
    eigenvalues,

        P = U^T (Lambda + mu)^-1 U + (I - U^T U) / (lambda_l + mu) ,

    symmetric positive definite.

    Parameters
    ----------
    rank
        l; under a tolerance the first one that is tried.
    damping
        mu, the multiple of I that is inside A; by default what the sum ``A = K + mu I`` shows.
    sketch
        ``"gaussian"``: l products with K. ``"rpcholesky"``: l of its columns, randomly pivoted;
        cheaper where entries are known (see `operators.Nystrom`).
    tolerance
        Double l until the estimate of ``|K - K_l|`` is at most this. ``"auto"`` is 10 mu; None
        takes `rank` as it is.
    max_rank
        Where the doubling ends; by default a tenth of n, but at least 256.
    seed
        Of the sketch.

    Notes
    -----
    The condition number of ``P A`` is at most ``(lambda_l + mu + |K - K_l|) / mu``, and below 28 on
    average for ``l >= 2 ceil(1.5 d) + 1``, where ``d = tr(K (K + mu)^-1)`` is the effective
    dimension (Frangella, Tropp and Udell, 2021, arXiv:2110.02820, Proposition 5.3, Theorem 5.1;
    adaptive rank: section 5.4). P is theirs divided by ``lambda_l + mu``, so that it stands for
    ``A^-1`` in methods that mind the scale.

    Costs l products, ``O(n l^2)`` flops and l n numbers once; ``4 n l`` flops a product. Not for
    eigenvalues that decay slowly, as those of differential operators: there `AMG`.

    Warns
    -----
    RuntimeWarning
        The tolerance was not met at `max_rank`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> K = ops.Dense(torch.diag(torch.tensor([8.0, 3.0, 0.0, 0.0])), symmetric=True)
    >>> P = Nystrom(rank=2, tolerance=None).prepare(K + 1.0 * ops.Identity(4))
    >>> (P @ torch.tensor([9.0, 4.0, 4.0, 4.0])).round(decimals=3)
    tensor([1., 1., 1., 1.])
    """

    rank: int = 32
    damping: float | None = None
    sketch: Literal["gaussian", "rpcholesky"] = "gaussian"
    tolerance: float | Literal["auto"] | None = "auto"
    max_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Nystrom: rank={self.rank}; expected at least 1")
        if self.max_rank is not None and self.max_rank < self.rank:
            raise ValueError(
                f"Nystrom: max_rank={self.max_rank}; expected at least rank={self.rank}"
            )
        if self.sketch not in ("gaussian", "rpcholesky"):
            raise ValueError(f"Nystrom: sketch={self.sketch!r}; expected 'gaussian', 'rpcholesky'")
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise ValueError(f"Nystrom: damping={self.damping}; expected a number > 0, or None")
        if isinstance(self.tolerance, str) and self.tolerance != "auto":
            raise ValueError(f"Nystrom: tolerance={self.tolerance!r}; expected 'auto' or a number")
        if isinstance(self.tolerance, (int, float)) and not self.tolerance > 0:
            raise ValueError(f"Nystrom: tolerance={self.tolerance}; expected a number > 0")

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Sketch K.

        Raises
        ------
        StructureError
            A is not known to be symmetric, or shows no multiple of the identity.
        ValueError
            K is not positive semidefinite; or the sketch needs a diagonal that K does not know.
        """
        if not A.symmetric:
            raise StructureError(
                f"Nystrom needs a symmetric positive definite operator; {A!r} does not claim to be "
                "symmetric: claim it"
            )
        K, mu, columns = self._split(A)
        n = A.shape[0]
        rank = min(self.rank, n)
        limit = min(max(n // 10, 256, rank) if self.max_rank is None else self.max_rank, n)
        tolerance = 10 * mu if self.tolerance == "auto" else self.tolerance
        sketched = Sketched(
            K,
            rank,
            sketch=self.sketch,
            tolerance=tolerance,
            max_rank=None if tolerance is None else limit,
            power_iterations=0 if tolerance is None else 5,
            columns=columns,
            generator=torch.Generator(A.device).manual_seed(self.seed),
        )
        eigenvalues = sketched.eigenvalues
        outside = 1 / (eigenvalues[-1:].sum() + mu)
        weights = 1 / (eigenvalues + mu) - outside
        # The weights are negative, but 1 / (lambda + mu) is positive all the same.
        definite = Structure(symmetric=True, positive_definite=True)
        return sketched._derived(sketched.rows, outside, weights, A.domain, definite)

    def _split(self, A: LinearOperator) -> tuple[LinearOperator, float, Columns | None]:
        """``K``, ``mu`` and, where there is more to it than K knows, columns of K."""
        mu = self.damping
        if mu is None:
            K, mu = split_shift(A)
            if K is None or not mu > 0:
                raise StructureError(
                    f"Nystrom: {A!r} shows no multiple of the identity; make it a sum "
                    "K + mu * Identity, or say which multiple is inside it by damping="
                )
            return K, mu, None
        of_A = columns_of(A)
        eye = Identity(A.domain)

        def columns(index: Tensor) -> Tensor:
            block = of_A(index).clone()
            block[index, torch.arange(len(index), device=A.device)] -= mu
            return block

        return A - mu * eye, mu, columns


def split_shift(A: LinearOperator) -> tuple[LinearOperator | None, float]:
    """``A = K + mu I``, as far as sums, multiples and low rank plus diagonal show; K may be None.

    Examples
    --------
    >>> import torch, operators as ops
    >>> K = ops.Dense(torch.eye(2))
    >>> split_shift(K + 0.5 * ops.Identity(2) + 1.5 * ops.Identity(2))
    (Dense(2, 2), 2.0)
    """
    if isinstance(A, Diagonal) and A.values.ndim == 0:
        return None, float(A.values)
    if isinstance(A, LowRankPlusDiagonal) and A.diagonal_values.ndim == 0:
        return LowRankPlusDiagonal(A.rows, 0.0, A.weights, space=A.domain), float(A.diagonal_values)
    if isinstance(A, Scaled):
        K, mu = split_shift(A.operator)
        return None if K is None else A.factor * K, float(A.factor) * mu
    if isinstance(A, Sum):
        (left, mu), (right, nu) = split_shift(A.left), split_shift(A.right)
        kept = [K for K in (left, right) if K is not None]
        return (sum(kept[1:], kept[0]) if kept else None), mu + nu
    return A, 0.0
