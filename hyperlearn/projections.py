"""Projections onto convex sets, ``P(y) = argmin_{u in C} |u - y|``, and their derivatives.

A constrained minimiser of a loss is a fixed point, ``y = P(y - s grad loss(y))`` for any ``s > 0``.
To be differentiated implicitly, P needs a derivative: it is Lipschitz, hence differentiable almost
everywhere, and where it is, the derivatives here are those of the active set (the constraints that
hold with equality stay so). On the kinks, a set of measure zero, one element of the generalised
Jacobian is taken. There is no branch on values, so ``torch.func``'s ``grad``, ``jvp``, ``vmap``,
and their compositions go through.

Every projection is called as ``P(y)``, or ``P(y, x)`` where one of its parameters (a radius, a
bound) is a function of the outer variable x; y is a tensor or a nested structure of tensors. To
differentiate with respect to a parameter through a solution, make it a function of x: a tensor that
a projection merely holds is a constant for it. A parameter's values are checked when the projection
is made; those that a function of x returns are not read, and where they are unsuitable (a negative
radius, a lower bound above the upper) the result is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.parameters import FINITE, NUMBER, POSITIVE, Parameter, check, per_leaf, scalar
from operators import Dense, Space
from operators.tracing import readable, tracked
from solvers import QR

Tree = Any


@dataclass(frozen=True)
class Ball:
    """Projection onto ``|y| <= radius`` (2-norm over all leaves together): ``y / max(|y|/r, 1)``.

    Parameters
    ----------
    radius
        Positive: a number, a tensor ``()``, or a function of x that returns one.

    Raises
    ------
    TypeError, ValueError
        A radius that is none, or is not positive.

    Examples
    --------
    >>> import torch
    >>> Ball(1.0)(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    >>> ball = Ball(lambda x: x["radius"])
    >>> ball(torch.tensor([3.0, 4.0]), {"radius": torch.tensor(2.0)})
    tensor([1.2000, 1.6000])
    """

    radius: Parameter

    def __post_init__(self) -> None:
        check(self.radius, POSITIVE, "Ball: radius")

    def __call__(self, y: Tree, x: Tree = None) -> Tree:
        """Projection of a nested structure; differentiable. Inside, y comes back bit for bit."""
        space = Space.of(y, "y")
        flat = space.ravel(y)
        radius = scalar(self.radius, POSITIVE, space, x, "Ball: radius")
        # max(|y| / radius, 1) is differentiable wherever the constraint is strictly (in)active, and
        # inside it is exactly 1: whether the point came back unchanged tells an active constraint.
        return space.unravel(flat / (_norm(flat) / radius).clamp_min(1.0))


@dataclass(frozen=True)
class Box:
    """Projection onto ``lower <= y <= upper``, entry by entry.

    Parameters
    ----------
    lower, upper
        ``lower <= upper``, both allowed to be infinite: a number, a tensor that broadcasts to every
        leaf of y, a nested structure like y, or a function of x that returns one of these.

    Raises
    ------
    TypeError, ValueError
        Bounds that are no numbers, are NaN, or cross.

    Examples
    --------
    >>> import torch
    >>> Box(-1.0, 1.0)(torch.tensor([-3.0, 0.5, 2.0]))
    tensor([-1.0000,  0.5000,  1.0000])
    >>> Box(torch.tensor([0.0, -torch.inf, 0.0]), torch.inf)(torch.tensor([-3.0, -3.0, 2.0]))
    tensor([ 0., -3.,  2.])
    """

    lower: Parameter
    upper: Parameter

    def __post_init__(self) -> None:
        check(self.lower, NUMBER, "Box: lower")
        check(self.upper, NUMBER, "Box: upper")
        if callable(self.lower) or callable(self.upper):
            return
        lower, below = pytree.tree_flatten(self.lower)
        upper, above = pytree.tree_flatten(self.upper)
        if not (below.is_leaf() or above.is_leaf() or below == above):
            raise ValueError(f"Box: lower is nested as {below}, upper as {above}")
        for low, high in (
            zip(lower, upper, strict=True) if below == above else product(lower, upper)
        ):
            try:
                ordered = torch.as_tensor(low <= high)
            except RuntimeError as error:
                raise ValueError(f"Box: lower and upper cannot be compared: {error}") from None
            if readable(ordered) and not bool(ordered.all()):
                raise ValueError(f"Box: lower={low}, upper={high}; expected lower <= upper")

    def __call__(self, y: Tree, x: Tree = None) -> Tree:
        """Projection of a nested structure; differentiable."""
        space = Space.of(y, "y")
        lower = per_leaf(self.lower, NUMBER, space, x, "Box: lower")
        upper = per_leaf(self.upper, NUMBER, space, x, "Box: upper")
        leaves = map(_clip, pytree.tree_leaves(y), lower, upper)
        return pytree.tree_unflatten(list(leaves), space.treespec)


@dataclass(frozen=True)
class NonNegative:
    """Projection onto ``y >= 0``, entry by entry: ``max(y, 0)``.

    Examples
    --------
    >>> import torch
    >>> NonNegative()({"a": torch.tensor([-1.0, 2.0])})
    {'a': tensor([0., 2.])}
    """

    def __call__(self, y: Tree, x: Tree = None) -> Tree:
        """Projection of a nested structure; differentiable."""
        return pytree.tree_map(torch.relu, y)


@dataclass(frozen=True)
class Simplex:
    """Projection of the last axis of each leaf onto ``y >= 0, sum_i y_i = total``.

    A vector is one point of a simplex, a matrix ``(m, n)`` is m of them: its rows. The projection
    is ``max(y - tau, 0)`` with ``tau = max_k (u_1 + ... + u_k - total) / k``, u being y in
    descending order. Exact, no iteration; costs a sort of each row.

    Parameters
    ----------
    total
        Positive: a number, a tensor that broadcasts to the shape of each leaf without its last axis
        (one total a row), a nested structure of these like y, or a function of x that returns one.

    Raises
    ------
    TypeError, ValueError
        A total that is none or not positive; a leaf of y that has no last axis.

    Notes
    -----
    Held, Wolfe and Crowder (1974), Validation of subgradient optimization, section 3; Duchi,
    Shalev-Shwartz, Singer and Chandra (2008), Efficient projections onto the l1-ball, figure 1.
    They look for the largest k with ``u_k > tau_k``; ``tau_k`` rises up to there and falls beyond,
    so that it is the maximum, whose derivative is that of the support found.

    Examples
    --------
    >>> import torch
    >>> Simplex()(torch.tensor([[0.5, 0.9, -1.0], [0.2, 0.2, 0.2]])).round(decimals=4)
    tensor([[0.3000, 0.7000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """

    total: Parameter = 1.0

    def __post_init__(self) -> None:
        check(self.total, POSITIVE, "Simplex: total")

    def __call__(self, y: Tree, x: Tree = None) -> Tree:
        """Projection of a nested structure; differentiable."""
        space = Space.of(y, "y")
        for shape in space.shapes:
            if not shape or not shape[-1]:
                raise ValueError(
                    f"Simplex: a leaf has shape {tuple(shape)}; expected a last axis to project"
                )
        totals = per_leaf(
            self.total, POSITIVE, space, x, "Simplex: total", lambda shape: shape[:-1]
        )
        leaves = map(_onto_simplex, pytree.tree_leaves(y), totals)
        return pytree.tree_unflatten(list(leaves), space.treespec)


@dataclass(frozen=True)
class L1Ball:
    """Projection onto ``|y|_1 <= radius`` (sum of absolute values over all leaves together).

    Outside, ``sign(y) P(|y|)`` with P the projection onto the simplex of this total. Exact; costs a
    sort.

    Parameters
    ----------
    radius
        Positive: a number, a tensor ``()``, or a function of x that returns one.

    Raises
    ------
    TypeError, ValueError
        A radius that is none, or is not positive.

    Notes
    -----
    Duchi, Shalev-Shwartz, Singer and Chandra (2008), Efficient projections onto the l1-ball for
    learning in high dimensions, section 4.

    Examples
    --------
    >>> import torch
    >>> L1Ball(1.0)(torch.tensor([-1.0, 0.5, 0.1])).round(decimals=4)
    tensor([-0.7500,  0.2500,  0.0000])
    """

    radius: Parameter

    def __post_init__(self) -> None:
        check(self.radius, POSITIVE, "L1Ball: radius")

    def __call__(self, y: Tree, x: Tree = None) -> Tree:
        """Projection of a nested structure; differentiable. Inside, y comes back bit for bit."""
        space = Space.of(y, "y")
        flat = space.ravel(y)
        radius = scalar(self.radius, POSITIVE, space, x, "L1Ball: radius")
        outside = flat.sign() * _onto_simplex(flat.abs(), radius)
        return space.unravel(torch.where(flat.abs().sum() <= radius, flat, outside))


@dataclass(frozen=True, eq=False)
class AffineSet:
    """Projection onto ``A y = b``: ``y - A^+ (A y - b)``, ``A^+ = A^T (A A^T)^{-1}``.

    y stands for its coordinates: the leaves one after the other, each in row-major order.

    Parameters
    ----------
    A
        Dense, ``(m, n)`` with ``m <= n``, of full rank; a constant, of y's dtype and device.
    b
        A number, a tensor that broadcasts to ``(m,)``, or a function of x that returns one.

    Raises
    ------
    TypeError, ValueError
        A that is not a floating-point matrix, not finite, has more rows than columns, or is
        differentiated; b that does not fit.
    solvers.SingularError
        The rows of A are dependent: then ``A y = b`` either has no solution, or rows too many.

    Notes
    -----
    ``A^+`` is formed once, by QR: ``4 n m^2`` flops, ``n m`` numbers; then ``4 n m`` flops a
    projection. That is for dense A up to some 10^7 entries; a large sparse A wants a multiplier for
    each row instead (`kkt_residual`) and a sparse solver.

    Examples
    --------
    >>> import torch
    >>> AffineSet(torch.ones(1, 2), 1.0)(torch.tensor([2.0, 1.0])).round(decimals=4)
    tensor([1., 0.])
    """

    A: Tensor
    b: Parameter
    _pseudoinverse: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        A = self.A
        if not isinstance(A, Tensor) or A.ndim != 2 or not A.is_floating_point():
            given = f"{A.dtype} {tuple(A.shape)}" if isinstance(A, Tensor) else type(A).__name__
            raise TypeError(f"AffineSet: A is a {given}; expected a floating-point tensor (m, n)")
        if A.shape[0] > A.shape[1]:
            raise ValueError(
                f"AffineSet: A has shape {tuple(A.shape)}; expected no more rows than columns"
            )
        if tracked(A):
            # Factors that were made once know nothing of later derivatives in A.
            raise ValueError("AffineSet: A is differentiated or mapped over; expected a constant")
        check(self.b, FINITE, "AffineSet: b")
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        object.__setattr__(self, "_pseudoinverse", QR().prepare(Dense(A)).solve(identity).value)

    def __call__(self, y: Tree, x: Tree = None) -> Tree:
        """Projection of a nested structure; differentiable."""
        space = Space.of(y, "y")
        rows, columns = self.A.shape
        if columns != space.size:
            raise ValueError(f"AffineSet: A has {columns} columns, y {space.size} coordinates")
        if self.A.dtype != space.dtype or self.A.device != space.device:
            raise TypeError(
                f"AffineSet: A is {self.A.dtype} on {self.A.device}; "
                f"expected that of y, {space.dtype} on {space.device}"
            )
        # b belongs to the rows of A, not to the leaves of y.
        dual = Space.flat(rows, space.dtype, space.device)
        (b,) = per_leaf(self.b, FINITE, dual, x, "AffineSet: b")
        flat = space.ravel(y)
        return space.unravel(flat - self._pseudoinverse @ (self.A @ flat - b))


def _norm(vector: Tensor) -> Tensor:
    """``|v|``, whose derivatives of every order are 0 at 0, where torch's second one is NaN."""
    zero = (vector == 0).all()
    return torch.where(zero, 0.0, torch.linalg.vector_norm(torch.where(zero, 1.0, vector)))


def _clip(y: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    # Unlike clamp, this has the derivatives in the bounds also where the two are equal.
    clipped = torch.where(y < lower, lower, torch.where(y > upper, upper, y))
    return torch.where(lower <= upper, clipped, math.nan)


def _onto_simplex(y: Tensor, total: Tensor) -> Tensor:
    """``max(y - tau, 0)`` along the last axis, with the tau for which it sums to `total`."""
    # A constant added to y leaves the projection as it is; taken from the largest entry, tau is in
    # [-total, 0), so that rounding is relative to the total and not to the size of y.
    shifted = y - y.amax(-1, keepdim=True).detach()
    descending = shifted.sort(dim=-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    thresholds = (descending.cumsum(-1) - total.unsqueeze(-1)) / count
    return torch.relu(shifted - thresholds.max(dim=-1, keepdim=True).values)
