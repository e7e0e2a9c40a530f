"""`LowRankUpdate`: a multiple of the identity plus few outer products, not symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.cost import Cost
from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar
from operators.precision import in_single
from operators.space import Space, check_tensor
from operators.tracing import readable


class LowRankUpdate(LinearOperator):
    """``A = a I + sum_t u_t v_t^T``, that is ``a I + U^T V`` with rows ``u_t`` and ``v_t``.

    Parameters
    ----------
    left
        U, of shape ``(T, n)``; T may be 0.
    right
        V, of shape ``(T, n)``.
    scale
        ``a``, one number.
    space
        Space that it acts on; by default plain vectors ``(n,)``.

    Raises
    ------
    ValueError
        A shape does not fit.
    TypeError
        `right` or the space has another dtype than `left`.

    Notes
    -----
    A product costs ``4 T n`` flops. Sums of two, and with a multiple of I, are of the form again.
    `LowRankPlusDiagonal` is the symmetric kind.

    Examples
    --------
    >>> import torch
    >>> A = LowRankUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 2.0)
    >>> A.to_dense()
    tensor([[2., 3.],
            [0., 2.]])
    """

    _parameters = ("left", "right", "scale")

    def __init__(
        self, left: Tensor, right: Tensor, scale: Scalar, *, space: Space | None = None
    ) -> None:
        check_tensor(left, "left", "(T, n)")
        check_tensor(right, "right", "(T, n)")
        if left.ndim != 2 or right.shape != left.shape:
            raise ValueError(
                f"left has shape {tuple(left.shape)} and right {tuple(right.shape)}; "
                "expected (T, n) twice"
            )
        space = space or Space.flat(left.shape[1], left.dtype, left.device)
        if space.size != left.shape[1]:
            raise ValueError(f"left has length {left.shape[1]}, but the space size {space.size}")
        for what, dtype in (("right", right.dtype), ("the space", space.dtype)):
            if dtype != left.dtype:
                raise TypeError(f"{what} has dtype {dtype}, but left has {left.dtype}")
        value = torch.as_tensor(scale, dtype=left.dtype, device=left.device)
        if value.ndim != 0:
            raise ValueError(f"scale has shape {tuple(value.shape)}; expected one number")
        super().__init__(space, space)
        self.left, self.right, self.scale = left, right, value

    @property
    def rank(self) -> int:
        """Number of outer products T (the rank of that part is at most T)."""
        return self.left.shape[0]

    def _matvec(self, v: Tensor) -> Tensor:
        return self.scale * v + self.left.T @ (self.right @ v)

    def _matmat(self, block: Tensor) -> Tensor:
        return self.scale * block + self.left.T @ (self.right @ block)

    def _transpose(self) -> LinearOperator:
        return LowRankUpdate(self.right, self.left, self.scale, space=self.domain)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        space = other.domain if self.domain.is_flat else self.domain
        if isinstance(other, Diagonal) and other.values.ndim == 0:
            return LowRankUpdate(self.left, self.right, self.scale + other.values, space=space)
        if isinstance(other, LowRankUpdate):
            left, right = torch.cat([self.left, other.left]), torch.cat([self.right, other.right])
            return LowRankUpdate(left, right, self.scale + other.scale, space=space)
        return None

    def _scale(self, factor: Scalar) -> LinearOperator:
        scale, left = factor * self.scale, (factor * self.left).to(self.dtype)
        return LowRankUpdate(left, self.right, scale, space=self.domain)

    def _cost(self) -> Cost:
        return Cost(flops=4 * self.rank * self.shape[0])

    def _describe(self) -> str:
        return f"rank {self.rank} + multiple of I"

    def _exact_diagonal(self) -> Tensor:
        return self.scale + (self.left * self.right).sum(0)

    def _exact_logdet(self) -> Tensor:
        """``n log |a| + log |det(I + V U^T / a)|``."""
        size = self.shape[0]
        small: Tensor = in_single(torch.linalg.slogdet, self._small()).logabsdet
        return (size - self.rank) * self.scale.abs().log() + small

    def inverse(self) -> LowRankUpdate:
        """``A^-1 = (I - U^T (a I + V U^T)^-1 V) / a``, of the same form.

        Raises
        ------
        ValueError
            The scale is zero or the T x T system is singular.
        """
        small, failed = in_single(torch.linalg.inv_ex, self._small())
        if readable(failed, self.scale) and (int(failed) or not bool(self.scale != 0)):
            raise ValueError(f"{self!r} is singular; it has no inverse")
        left = -(small.T @ self.left) / self.scale
        return LowRankUpdate(left, self.right, 1 / self.scale, space=self.domain)

    def _small(self) -> Tensor:
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        return self.scale * eye + self.right @ self.left.T
