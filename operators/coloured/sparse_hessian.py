"""The Hessian of a function as a sparse operator: all its nonzeros from a few products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from operators.coloured.colouring import Colouring
from operators.coloured.derivative_plan import (
    MAPPED,
    Plan,
    check_chunk,
    direction,
    grid_of,
    sparsity_of,
    to_try,
    verify,
)
from operators.coloured.recovery import symmetric_recovery
from operators.coloured.sparsity import Sparsity
from operators.coloured.symmetric_colouring import symmetric_colouring
from operators.coloured.vertex_order import Order
from operators.space import Space, Tree
from operators.sparse.matrix import Sparse
from operators.sparse.pattern import Pattern
from operators.tracing import outside, plain_values


class SparseHessian(Sparse):
    """``A = d^2 loss(u, *args) / d u^2`` with all its nonzeros; symmetric.

    Parameters
    ----------
    loss
        ``l(u, *args)``, a scalar.
    u
        Point: a tensor or nested structure.
    *args
        Further arguments of the loss.
    sparsity
        As for `SparseJacobian`, of the gradient; a given pattern must be symmetric. An entry is
        kept if its mirror is in the pattern too (detected), or if either is (probed).
    colouring
        ``"star"``: nonzeros are read off; ``"acyclic"``: fewer products, nonzeros by substitution
        (`operators.coloured.recovery`); or a `Colouring`.
    order
        Of the greedy colouring.
    positive_definite
        Claim that it is so at u.
    chunk_size, plan
        As for `SparseJacobian`.

    Raises
    ------
    ValueError, TypeError
        As `SparseJacobian` does; the loss is not a scalar.

    Notes
    -----
    One product is forward over reverse (Pearlmutter, 1994), two to three gradients. The tensors of
    the operator are its nonzeros, mirror ones equal; move it to another point by `at`.

    Gebremedhin, Tarafdar, Manne and Pothen (2007, doi:10.1137/050639879).

    Examples
    --------
    >>> import torch
    >>> A = SparseHessian(lambda u: (u[1:] * u[:-1] ** 2).sum(), torch.tensor([1.0, 2.0, 3.0]))
    >>> A.to_dense()
    tensor([[4., 2., 0.],
            [2., 6., 4.],
            [0., 4., 0.]])
    """

    # The values carry the derivatives already.
    _unread = (*Sparse._unread, "loss", "plan")

    def __init__(
        self,
        loss: Callable[..., Tensor],
        u: Tree,
        *args: Any,
        sparsity: Any = "detect",
        colouring: Colouring | Literal["star", "acyclic"] = "star",
        order: Order = "largest_first",
        positive_definite: bool = False,
        chunk_size: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        space = Space.of(u, "u")
        made = plan is None
        if plan is None:
            check_chunk(chunk_size)
            with outside():
                plain: tuple[Tree, tuple[Any, ...]] = plain_values((u, args), MAPPED)
                plan = _hessian_plan(loss, *plain, sparsity, colouring, order, chunk_size)
        elif plan.domain != space or plan.colouring.kind not in ("star", "acyclic"):
            raise ValueError(
                f"plan was made for u in {plan.domain} ({plan.colouring!r}); u has {space}; "
                "leave the plan out to make a new one"
            )
        self._fill(loss, u, args, plan, positive_definite, verified=made)

    def _fill(
        self,
        loss: Callable[..., Tensor],
        u: Tree,
        args: tuple[Any, ...],
        plan: Plan,
        positive_definite: bool,
        *,
        verified: bool,
    ) -> None:
        gradient = _gradient(loss, plan.domain, args)
        point = plan.domain.ravel(u, "u")

        def push(v: Tensor) -> Tensor:
            tangent: Tensor = torch.func.jvp(gradient, (point,), (v,))[1]
            return tangent

        further = direction(plan) if verified else None
        values, image = plan.recovery.values(push, plan.domain.dtype, plan.chunk_size, further)
        Sparse.__init__(
            self,
            values,
            plan.sparsity.pattern,
            domain=plan.domain,
            codomain=plan.domain,
            symmetric=True,
            positive_definite=positive_definite,
        )
        self.loss, self.plan = loss, plan
        if image is not None:
            verify(self, plan, image, "loss")

    def at(
        self, u: Tree, *args: Any, positive_definite: bool = False, verify: bool | None = None
    ) -> Self:
        """The Hessian at another point and other arguments; pattern and colouring are kept.

        Parameters
        ----------
        u, *args, positive_definite
            As for the class.
        verify
            As for `SparseJacobian.at`.

        Raises
        ------
        ValueError, TypeError
            u is not in the space that the plan was made for; or the pattern misses entries here.
        """
        self.plan.domain.check(u, "u")
        moved = object.__new__(type(self))
        verified = to_try(self.plan, args) if verify is None else verify
        moved._fill(self.loss, u, args, self.plan, positive_definite, verified=verified)
        return moved

    @property
    def colouring(self) -> Colouring:
        """Colours, their number (`Colouring.count`), and how they were found."""
        return self.plan.colouring

    @property
    def colours(self) -> int:
        """Number of colours: of products for all nonzeros."""
        return self.plan.colouring.count

    def _describe(self) -> str:
        return f"{super()._describe()}, {self.colours} colours ({self.plan.colouring.kind})"


def _hessian_plan(
    loss: Callable[..., Tensor],
    u: Tree,
    args: tuple[Any, ...],
    sparsity: Any,
    colouring: Colouring | Literal["star", "acyclic"],
    order: Order,
    chunk_size: int | None,
) -> Plan:
    space = Space.of(u, "u")
    gradient = _gradient(loss, space, args)
    known = sparsity_of(sparsity, gradient, space.ravel(u), (space.size, space.size))
    if known.source != "given":
        known = _mirrored(known)
    if not isinstance(colouring, Colouring):
        colouring = symmetric_colouring(known.pattern, colouring, order=order, grid=grid_of(space))
    recovery = symmetric_recovery(known.pattern, colouring)
    return Plan(space, space, known, colouring, recovery, chunk_size)


def _mirrored(known: Sparsity) -> Sparsity:
    """The symmetric pattern that a pattern of a symmetric matrix implies."""
    pattern = known.pattern
    if pattern.symmetric:
        return known
    union, ours, theirs = pattern.union(pattern.transpose()[0])
    if known.source == "detected":
        # The pattern and its mirror each hold every nonzero: so does what they share.
        shared = torch.zeros(union.nnz, dtype=torch.bool, device=union.device)
        shared[ours] = True
        mirrored = torch.zeros_like(shared)
        mirrored[theirs] = True
        shared &= mirrored
        union = Pattern.of(union.rows[shared], union.columns[shared], union.shape)[0]
    return replace(known, pattern=union)


def _gradient(
    loss: Callable[..., Tensor], space: Space, args: tuple[Any, ...]
) -> Callable[[Tensor], Tensor]:
    def flat(v: Tensor) -> Tensor:
        value = loss(space.unravel(v), *args)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss returned {got}; expected a scalar tensor")
        return value

    gradient: Callable[[Tensor], Tensor] = torch.func.grad(flat)
    return gradient
