"""`LinearOperator`: a matrix known by what it does, and the algebra of such matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from operators.space import Space
from operators.structure import Structure

Scalar = float | int | Tensor


class LinearOperator(ABC):
    """A linear map ``A: R^n -> R^m`` between (nested) tensor spaces; immutable.

    ``A @ v`` takes a vector ``(n,)``, a block of k columns ``(n, k)``, or a nested structure of
    `domain`, and returns the like: ``(m,)``, ``(m, k)``, or a nested structure of `codomain`.
    Operators combine by ``A + B``, ``A - B``, ``c * A``, ``A @ B``, ``A.T``; facts about structure
    (`structure`) follow the rules of `operators.structure`.

    A subclass implements `_matvec`, and unless it is symmetric `_rmatvec` or `_transpose`; it may
    override `_matmat` where a block is cheaper than its columns.

    Parameters
    ----------
    domain, codomain
        Spaces of the argument and of the result.
    structure
        What is known of the operator.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])) + 1.0 * ops.Identity(2)
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([4., 5.])
    """

    # numpy must not try to broadcast over an operator in `array @ operator`.
    __array_priority__ = 1000

    def __init__(self, domain: Space, codomain: Space, structure: Structure | None = None) -> None:
        if domain.dtype != codomain.dtype or domain.device != codomain.device:
            raise TypeError(
                f"domain is {domain.dtype} on {domain.device} but codomain is {codomain.dtype} on "
                f"{codomain.device}; an operator keeps dtype and device"
            )
        if not domain.dtype.is_floating_point:
            raise TypeError(
                f"{type(self).__name__} of dtype {domain.dtype}; expected a floating dtype"
            )
        structure = structure or Structure()
        if structure.symmetric and domain.size != codomain.size:
            raise ValueError(
                f"structure claims symmetric, but the shape is ({codomain.size}, {domain.size})"
            )
        self.domain = domain
        self.codomain = codomain
        self.structure = structure

    # --- what it is ---------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``: rows, columns."""
        return (self.codomain.size, self.domain.size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of arguments and results."""
        return self.domain.dtype

    @property
    def device(self) -> torch.device:
        """Device of arguments and results."""
        return self.domain.device

    @property
    def symmetric(self) -> bool:
        """Whether ``A = A^T`` is known."""
        return self.structure.symmetric

    @property
    def positive_semidefinite(self) -> bool:
        """Whether ``<v, A v> >= 0`` is known."""
        return self.structure.positive_semidefinite

    @property
    def positive_definite(self) -> bool:
        """Whether ``<v, A v> > 0`` for v != 0 is known."""
        return self.structure.positive_definite

    @property
    def diagonal(self) -> bool:
        """Whether ``A`` is known to be diagonal."""
        return self.structure.diagonal

    @property
    def low_rank_plus_diagonal(self) -> bool:
        """Whether ``A`` is held as a diagonal plus few outer products."""
        return False

    # --- what it does -------------------------------------------------------------------------

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """``A v`` for a checked vector ``(n,)``."""

    def _matmat(self, block: Tensor) -> Tensor:
        """``A V`` for a checked block ``(n, k)``; by default one vmapped `_matvec`."""
        if block.shape[1] == 0:
            return block.new_zeros(self.shape[0], 0)
        # out_dims=1 would not do: torch expands a result that no column enters along axis 0 only.
        return torch.func.vmap(self._matvec, in_dims=1)(block).T

    def _rmatvec(self, v: Tensor) -> Tensor:
        """``A^T v`` for a checked vector ``(m,)``."""
        raise TypeError(f"{self} does not define its transposed product")

    def _transpose(self) -> LinearOperator:
        """``A^T`` of an operator that is not symmetric."""
        return Transpose(self)

    def to_dense(self) -> Tensor:
        """Matrix ``(m, n)``. Costs n products and m n numbers."""
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self._matmat(eye)

    def _check_tensor(self, v: Tensor) -> None:
        if v.dtype != self.dtype or v.device != self.device:
            raise TypeError(
                f"{self} applied to {v.dtype} on {v.device}; expected {self.dtype} on {self.device}"
            )
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"{self} applied to a tensor of shape {tuple(v.shape)}; expected "
                f"({self.shape[1]},), ({self.shape[1]}, k), or the nested structure {self.domain}"
            )

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            return Product(self, other)
        if isinstance(other, Tensor) and (self.domain.is_flat or not self.domain.holds(other)):
            self._check_tensor(other)
            return self._matvec(other) if other.ndim == 1 else self._matmat(other)
        return self.codomain.unravel(self._matvec(self.domain.ravel(other, "the argument")))

    # --- algebra ------------------------------------------------------------------------------

    @property
    def T(self) -> LinearOperator:
        """Transpose ``A^T``."""
        return self if self.symmetric else self._transpose()

    def _like(self, other: LinearOperator) -> LinearOperator:
        """The operator on the space of `other`, where it has none of its own."""
        return self

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        """``A + B`` where a class knows better than `Sum`; None otherwise."""
        return None

    def _scale(self, factor: Scalar) -> LinearOperator:
        """``c A`` where a class knows better than `Scaled`."""
        return Scaled(self, factor)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        left, right = self._like(other), other._like(self)
        _check_same(left, right, "add")
        structured = left._add(right)
        if structured is None:
            structured = right._add(left)
        return Sum(left, right) if structured is None else structured

    def __mul__(self, factor: Scalar) -> LinearOperator:
        if isinstance(factor, Tensor) and factor.ndim != 0:
            raise ValueError(f"factor has shape {tuple(factor.shape)}; expected a scalar")
        if not isinstance(factor, (float, int, Tensor)):
            return NotImplemented
        return self._scale(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> LinearOperator:
        return self * (1 / divisor)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"


def sign_of(factor: Scalar) -> float | None:
    """Value of a factor where it is known before tracing; None for tensors (see `Structure`)."""
    return None if isinstance(factor, Tensor) else float(factor)


def _check_same(a: LinearOperator, b: LinearOperator, verb: str) -> None:
    if a.shape != b.shape:
        raise ValueError(f"cannot {verb} {a} and {b}: shapes differ")
    if a.dtype != b.dtype or a.device != b.device:
        raise TypeError(
            f"cannot {verb} {a} ({a.dtype} on {a.device}) and {b} ({b.dtype} on {b.device})"
        )
    # Sizes may agree where the coordinates mean different things.
    for ours, theirs in ((a.domain, b.domain), (a.codomain, b.codomain)):
        if not (ours.is_flat or theirs.is_flat or ours == theirs):
            raise ValueError(f"cannot {verb} {a} on {ours} and {b} on {theirs}: structures differ")


class Sum(LinearOperator):
    """``A + B``."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        # A nested space says more than a flat one, so the sum keeps it.
        nested = right if left.domain.is_flat else left
        super().__init__(nested.domain, nested.codomain, left.structure.plus(right.structure))
        self.left, self.right = left, right

    def _matvec(self, v: Tensor) -> Tensor:
        return self.left._matvec(v) + self.right._matvec(v)

    def _matmat(self, block: Tensor) -> Tensor:
        return self.left._matmat(block) + self.right._matmat(block)

    def _transpose(self) -> LinearOperator:
        return Sum(self.left.T, self.right.T)

    def __repr__(self) -> str:
        return f"({self.left} + {self.right})"


class Scaled(LinearOperator):
    """``c A``."""

    def __init__(self, operator: LinearOperator, factor: Scalar) -> None:
        structure = operator.structure.times(sign_of(factor))
        super().__init__(operator.domain, operator.codomain, structure)
        self.operator, self.factor = operator, factor

    def _matvec(self, v: Tensor) -> Tensor:
        return self.factor * self.operator._matvec(v)

    def _matmat(self, block: Tensor) -> Tensor:
        return self.factor * self.operator._matmat(block)

    def _transpose(self) -> LinearOperator:
        return Scaled(self.operator.T, self.factor)

    def _scale(self, factor: Scalar) -> LinearOperator:
        return Scaled(self.operator, factor * self.factor)

    def __repr__(self) -> str:
        return f"{self.factor} * {self.operator}"


class Product(LinearOperator):
    """``A B``: first B, then A."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"cannot compose {left} with {right}: inner sizes differ")
        structure = left.structure.compose(right.structure)
        super().__init__(right.domain, left.codomain, structure)
        self.left, self.right = left, right

    def _matvec(self, v: Tensor) -> Tensor:
        return self.left._matvec(self.right._matvec(v))

    def _matmat(self, block: Tensor) -> Tensor:
        return self.left._matmat(self.right._matmat(block))

    def _transpose(self) -> LinearOperator:
        return Product(self.right.T, self.left.T)

    def __repr__(self) -> str:
        return f"({self.left} @ {self.right})"


class Transpose(LinearOperator):
    """``A^T`` of an operator that knows its transposed product; ``Transpose(A).T`` is ``A``."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.codomain, operator.domain, operator.structure.transpose())
        self.operator = operator

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operator._rmatvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.operator._matvec(v)

    def _transpose(self) -> LinearOperator:
        return self.operator

    def __repr__(self) -> str:
        return f"{self.operator}.T"
