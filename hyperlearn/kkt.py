"""Optimality conditions of Karush, Kuhn and Tucker as an equation ``F((y, nu, lam), x) = 0``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
Constraint = Callable[[Tree, Tree], Tree]


class KKTPoint(NamedTuple):
    """A point and its multipliers; also the three parts of the residual there.

    A nested structure like any other: `root` and ``torch.func`` take it as it is.

    Attributes
    ----------
    y
        Nested tensors.
    equality, inequality
        A multiplier for each constraint, nested and shaped like the value of ``h(y, x)`` and of
        ``g(y, x)``; the empty tuple where there is no such constraint (None would count as a leaf).
    """

    y: Tree
    equality: Tree = ()
    inequality: Tree = ()


def kkt_residual(
    loss: Callable[[Tree, Tree], Tensor],
    equality: Constraint | None = None,
    inequality: Constraint | None = None,
    *,
    smoothing: float = 0.0,
) -> Callable[[KKTPoint, Tree], KKTPoint]:
    r"""Optimality of ``min_y f(y, x)`` subject to ``h(y, x) = 0``, ``g(y, x) <= 0``, as a residual.

    F has as many equations as unknowns ``(y, nu, lam)``, and hence can be solved by Newton's method
    and differentiated implicitly:

        d_y f + (d_y h)^T nu + (d_y g)^T lam,    h,    phi(lam, -g),

    with ``phi(a, b) = sqrt(a^2 + b^2 + 2 eps) - a - b``, which is 0 exactly where ``a >= 0``,
    ``b >= 0`` and ``a b = eps``.

    Parameters
    ----------
    loss
        ``f(y, x)``, a tensor ``()``.
    equality, inequality
        ``h(y, x)`` and ``g(y, x)``: tensors or nested structures of tensors; None for none.
    smoothing
        ``eps >= 0``. At 0 it is the function of Fischer and Burmeister and the solutions of F are
        exactly the points of Karush, Kuhn and Tucker. Above 0, F is smooth and its solution is the
        point of the logarithmic barrier ``f - eps sum log(-g)``, ``O(eps)`` off.

    Returns
    -------
    F
        ``F(point, x) -> KKTPoint``, of the structure and shapes of `point`.

    Raises
    ------
    TypeError, ValueError
        What is not callable, a negative smoothing; from F, multipliers that do not have the
        structure and shapes of the constraints' values, and a loss that is not a scalar.

    Notes
    -----
    With ``eps = 0``, phi lacks a derivative at (0, 0) only. So under strict complementarity (one of
    each pair ``lam_i, -g_i`` is positive) F is differentiable at its solution, with the derivative
    of the active set: its row is ``d g_i = 0`` where ``lam_i > 0``, and ``d lam_i = 0`` where
    ``g_i < 0``. If besides the gradients of the active constraints are independent and the Hessian
    of the Lagrangian is positive definite on their null space, ``d F`` is nonsingular and
    ``dy*/dx`` is exact. At (0, 0) the derivative is taken to be (-1, -1), the centre of Clarke's
    generalised gradient; ``y*(x)`` then has directional derivatives only.

    phi is evaluated as ``2 (eps - a b) / (sqrt(a^2 + b^2 + 2 eps) + a + b)`` where ``a + b > 0``:
    no digits cancel if a multiplier is large.

    Fischer (1992), A special Newton-type optimization method, Optimization 24; the smoothing is of
    Kanzow (1996), Some noninterior continuation methods for linear complementarity problems.
    One evaluation costs one gradient of the Lagrangian.

    Examples
    --------
    The point of ``y >= x`` that is closest to 0:

    >>> import torch
    >>> F = kkt_residual(lambda y, x: (y**2).sum() / 2, inequality=lambda y, x: x - y)
    >>> x = torch.tensor([2.0, -1.0])
    >>> F(KKTPoint(y=torch.tensor([2.0, 0.0]), inequality=torch.tensor([2.0, 0.0])), x)
    KKTPoint(y=tensor([0., 0.]), equality=(), inequality=tensor([0., 0.]))
    """
    if not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}; expected f(y, x)")
    for name, constraint in (("equality", equality), ("inequality", inequality)):
        if constraint is not None and not callable(constraint):
            raise TypeError(f"{name} is a {type(constraint).__name__}; expected a function of y, x")
    if not 0 <= smoothing < math.inf:
        raise ValueError(f"smoothing={smoothing}; expected a finite number >= 0")

    def residual(point: KKTPoint, x: Tree) -> KKTPoint:
        y0, nu, lam = point

        def lagrangian(y: Tree) -> tuple[Tensor, tuple[Tree, Tree]]:
            value = loss(y, x)
            if not isinstance(value, Tensor) or value.ndim:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss(y, x) is {shape}; expected a tensor ()")
            h, g = _values(equality, y, x), _values(inequality, y, x)
            for name, multiplier, constraint in (
                ("equality", nu, h),
                ("inequality", lam, g),
            ):
                value = value + _pairing(name, multiplier, constraint)
            return value, (h, g)

        stationarity, (h, g) = torch.func.grad(lagrangian, has_aux=True)(y0)
        complementarity = pytree.tree_map(
            lambda multiplier, value: _fischer_burmeister(multiplier, -value, smoothing),
            lam,
            g,
        )
        return KKTPoint(stationarity, h, complementarity)

    return residual


def kkt_start(
    y0: Tree,
    x: Tree,
    equality: Constraint | None = None,
    inequality: Constraint | None = None,
) -> KKTPoint:
    """``(y0, 0, 1)``: a point for Newton's method on `kkt_residual` to start from.

    The multipliers of inequalities are ones: zeros, with an active constraint, would be the one
    place where phi has no derivative.

    Parameters
    ----------
    y0
        Where y starts.
    x
        The outer variable; with y0 it tells the shapes of the constraints' values.
    equality, inequality
        As for `kkt_residual`; each is evaluated once.

    Examples
    --------
    >>> import torch
    >>> kkt_start(torch.zeros(3), torch.ones(2), inequality=lambda y, x: y[:2] - x)
    KKTPoint(y=tensor([0., 0., 0.]), equality=(), inequality=tensor([1., 1.]))
    """
    h, g = _values(equality, y0, x), _values(inequality, y0, x)
    return KKTPoint(y0, pytree.tree_map(torch.zeros_like, h), pytree.tree_map(torch.ones_like, g))


def _values(constraint: Constraint | None, y: Tree, x: Tree) -> Tree:
    return () if constraint is None else constraint(y, x)


def _pairing(name: str, multiplier: Tree, value: Tree) -> Tensor | float:
    """``<multiplier, value>``, summed over the leaves of two trees that must look alike."""
    ours, structure = pytree.tree_flatten(multiplier)
    theirs, expected = pytree.tree_flatten(value)
    shapes = [
        [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        for leaves in (ours, theirs)
    ]
    if structure != expected or shapes[0] != shapes[1]:
        raise ValueError(
            f"the multipliers point.{name} are {structure} of {shapes[0]}; expected what {name}"
            f"(y, x) is, {expected} of {shapes[1]}, and () where there is no such constraint"
        )
    return sum((a * b).sum() for a, b in zip(ours, theirs, strict=True))


def _fischer_burmeister(a: Tensor, b: Tensor, smoothing: float) -> Tensor:
    """``sqrt(a^2 + b^2 + 2 smoothing) - a - b``; unsmoothed, its derivative at 0 is (-1, -1)."""
    square, total = a * a + b * b + 2 * smoothing, a + b
    # What `where` does not choose is differentiated too: neither the root nor the quotient may be
    # asked for at 0.
    nonzero, positive = square > 0, total > 0
    root = torch.where(nonzero, torch.where(nonzero, square, 1.0).sqrt(), 0.0)
    quotient = 2 * (smoothing - a * b) / torch.where(positive, root + total, 1.0)
    return torch.where(positive, quotient, root - total)
