"""`Permutation`: an operator that only puts coordinates in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.cost import Cost
from operators.linear_operator import LinearOperator
from operators.space import Space
from operators.structure import Structure
from operators.tracing import plain_values, readable


class Permutation(LinearOperator):
    """``(P x)_i = x_order[i]``, that is ``P x = x[order]``; ``P_ij = 1`` where ``j = order[i]``.

    Parameters
    ----------
    order
        Integer tensor ``(n,)`` that holds each of ``0, ..., n - 1`` once.
    space
        Space whose coordinates, in the order of the flat vector, are permuted; by default plain
        vectors ``(n,)``.
    dtype, device
        Of the vectors, where no space is given; by default torch's default dtype on the device of
        `order`. In a sum or a product, a Permutation of which neither space, dtype nor device was
        said takes those of the other operand.

    Raises
    ------
    TypeError
        `order` is not a tensor of integers, or both a space and a dtype or device are given.
    ValueError
        `order` is not a permutation, or does not have the size of the space.

    Notes
    -----
    P is orthogonal: ``P^-1 = P^T = Permutation(argsort(order))``. A product moves n numbers;
    products of permutations are permutations, and ``|det P| = 1``. It is symmetric where it is an
    involution.

    Examples
    --------
    >>> import torch
    >>> P = Permutation(torch.tensor([2, 0, 1]))
    >>> P @ torch.tensor([10.0, 20.0, 30.0])
    tensor([30., 10., 20.])
    >>> (P.T @ P).order
    tensor([0, 1, 2])
    """

    def __init__(
        self,
        order: Tensor,
        space: Space | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(order, Tensor) or order.dtype in (torch.bool, torch.uint8):
            kind = order.dtype if isinstance(order, Tensor) else type(order).__name__
            raise TypeError(f"order is {kind}; expected a tensor of signed integers")
        if order.is_floating_point() or order.is_complex():
            raise TypeError(f"order has dtype {order.dtype}; expected integers, as torch.argsort")
        if order.ndim != 1:
            raise ValueError(f"order has shape {tuple(order.shape)}; expected (n,)")
        if space is not None and (dtype is not None or device is not None):
            raise TypeError("space and dtype or device are given; a space has both already")
        size = order.shape[0]
        untyped = space is None and dtype is None and device is None
        if space is None:
            space = Space.flat(size, dtype or torch.get_default_dtype(), device or order.device)
        if space.size != size:
            raise ValueError(f"order has length {size}, but the space has size {space.size}")
        order = order.to(device=space.device, dtype=torch.int64)
        structure = Structure()
        if readable(order):
            _check_permutation(order)
            structure = _look_up(order)
        super().__init__(space, space, structure)
        self.order = _kept(order)
        self._untyped = untyped

    def _on(self, space: Space) -> LinearOperator:
        if not self._untyped or space.size != self.shape[0] or space == self.domain:
            return self
        return self._derived(self.order.to(space.device), space, self.structure)

    def _derived(self, order: Tensor, space: Space, structure: Structure) -> Permutation:
        """Permutation that follows from others and need not be checked."""
        derived = object.__new__(Permutation)
        LinearOperator.__init__(derived, space, space, structure)
        derived.order, derived._untyped = _kept(order), False
        return derived

    def _matvec(self, v: Tensor) -> Tensor:
        return v.index_select(0, self.order)

    def _matmat(self, block: Tensor) -> Tensor:
        return block.index_select(0, self.order)

    def _transpose(self) -> LinearOperator:
        inverse = torch.argsort(self.order)
        transposed = self._derived(inverse, self.domain, self.structure.transpose())
        transposed._untyped = self._untyped
        return transposed

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Permutation):
            return None
        space = other.domain if self.domain.is_flat else self.domain
        # (P (Q x))_i = (Q x)_p[i] = x_q[p[i]].
        order = other.order[self.order]
        structure = _look_up(order) if readable(order) else Structure()
        composed = self._derived(order, space, structure)
        composed._untyped = self._untyped and other._untyped
        return composed

    def _cost(self) -> Cost:
        return Cost()

    def _exact_diagonal(self) -> Tensor:
        return _fixed(self.order).to(self.dtype)

    def _exact_logdet(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)


def _fixed(order: Tensor) -> Tensor:
    """Which coordinates stay where they are."""
    return order == torch.arange(order.shape[0], device=order.device)


def _look_up(order: Tensor) -> Structure:
    """``P^T = P`` for an involution; the only definite permutation is the identity."""
    identity = bool(_fixed(order).all())
    involution = identity or bool(_fixed(order[order]).all())
    return Structure(symmetric=involution, diagonal=identity, positive_definite=identity)


def _kept(order: Tensor) -> Tensor:
    """The plain numbers: order is no tensor of A, and no transform under way must hold it."""
    return plain_values(order, "order cannot be read") if readable(order) else order


def _check_permutation(order: Tensor) -> None:
    n = order.shape[0]
    outside = order[(order < 0) | (order >= n)]
    if outside.numel():
        raise ValueError(f"order holds {int(outside[0])}; expected each of 0, ..., {n - 1} once")
    counts = torch.bincount(order, minlength=n)
    if bool((counts != 1).any()):
        twice, never = int(counts.argmax()), int(counts.argmin())
        raise ValueError(
            f"order holds {twice} {int(counts[twice])} times and {never} not at all; "
            f"expected each of 0, ..., {n - 1} once"
        )
