"""Nonsmooth penalties and their proximal maps, ``prox(y) = argmin_u s h(u) + |u - y|^2 / 2``.

A minimiser of ``loss(y) + h(y)`` is a fixed point, ``y = prox(y - s grad loss(y))`` for any
``s > 0``. The maps are differentiable almost everywhere, with the derivative of the active set:
what is zero stays zero. On the kinks one element of the generalised Jacobian is taken. There is no
branch on values, so ``torch.func``'s ``grad``, ``jvp``, ``vmap``, and their compositions go
through.

Weights are numbers, tensors, nested tensors or functions of the outer variable x, to the same rules
as the parameters of `hyperlearn.projections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.parameters import NONNEGATIVE, POSITIVE, Parameter, check, per_leaf, scalar
from operators import Space

Tree = Any


class Penalty(Protocol):
    """A convex function ``h(y, x)`` whose proximal map is known."""

    def penalty(self, y: Tree, x: Tree = None) -> Tensor:
        """``h(y, x)``, a tensor ``()``; x only where a weight is a function of it."""
        ...

    def prox(self, y: Tree, step: float | Tensor, x: Tree = None) -> Tree:
        """``argmin_u step h(u, x) + |u - y|^2 / 2``."""
        ...


@dataclass(frozen=True)
class L1:
    """``h(y) = sum_i weight_i |y_i|``, the lasso's penalty.

    Its proximal map is soft thresholding, ``sign(y) max(|y| - step weight, 0)``.

    Parameters
    ----------
    weight
        ``>= 0``: a number, a tensor that broadcasts to every leaf of y, a nested structure like y,
        or a function of x that returns one of these.

    Raises
    ------
    TypeError, ValueError
        A weight that is none, or is negative or not finite.

    Notes
    -----
    Tibshirani (1996), Regression shrinkage and selection via the lasso.

    Examples
    --------
    >>> import torch
    >>> L1(1.0).prox(torch.tensor([-2.0, 0.3]), step=0.5)
    tensor([-1.5000,  0.0000])
    >>> sparse = L1(lambda x: x.exp())
    >>> y, x = torch.tensor([-2.0, 0.3]), torch.tensor(0.0)
    >>> torch.func.jacrev(lambda x: sparse.prox(y, 0.5, x))(x)  # what is zero stays zero
    tensor([0.5000, 0.0000])
    """

    weight: Parameter

    def __post_init__(self) -> None:
        check(self.weight, NONNEGATIVE, "L1: weight")

    def penalty(self, y: Tree, x: Tree = None) -> Tensor:
        """``sum_i weight_i |y_i|``, a tensor ``()``; at 0 the subgradient 0."""
        space = Space.of(y, "y")
        weights = per_leaf(self.weight, NONNEGATIVE, space, x, "L1: weight")
        return _total(lambda leaf, weight: weight * leaf.abs(), y, weights)

    def prox(self, y: Tree, step: float | Tensor, x: Tree = None) -> Tree:
        """``sign(y) max(|y| - step weight, 0)``; step positive, a number or a tensor ``()``."""
        space = Space.of(y, "y")
        step = scalar(step, POSITIVE, space, None, "step")
        weights = per_leaf(self.weight, NONNEGATIVE, space, x, "L1: weight")
        return _mapped(lambda leaf, weight: _soft(leaf, step * weight), y, space, weights)


@dataclass(frozen=True)
class ElasticNet:
    """``h(y) = sum_i l1_i |y_i| + l2_i y_i^2`` (no factor 1/2, as in `L2`).

    Its proximal map is ``sign(y) max(|y| - step l1, 0) / (1 + 2 step l2)``.

    Parameters
    ----------
    l1, l2
        ``>= 0``; each as the weight of `L1`. With ``l1 = 0`` it is ridge regression's penalty.

    Raises
    ------
    TypeError, ValueError
        A weight that is none, or is negative or not finite.

    Notes
    -----
    Zou and Hastie (2005), Regularization and variable selection via the elastic net, equation 3
    (the naive one).

    Examples
    --------
    >>> import torch
    >>> ElasticNet(1.0, 0.5).prox(torch.tensor([-3.0, 0.3]), step=1.0)
    tensor([-1.,  0.])
    """

    l1: Parameter
    l2: Parameter

    def __post_init__(self) -> None:
        check(self.l1, NONNEGATIVE, "ElasticNet: l1")
        check(self.l2, NONNEGATIVE, "ElasticNet: l2")

    def penalty(self, y: Tree, x: Tree = None) -> Tensor:
        """``sum_i l1_i |y_i| + l2_i y_i^2``, a tensor ``()``; at 0 the subgradient 0."""
        l1, l2 = self._weights(Space.of(y, "y"), x)
        return _total(lambda leaf, a, b: a * leaf.abs() + b * leaf * leaf, y, l1, l2)

    def prox(self, y: Tree, step: float | Tensor, x: Tree = None) -> Tree:
        """``sign(y) max(|y| - step l1, 0) / (1 + 2 step l2)``; step as in `L1.prox`."""
        space = Space.of(y, "y")
        step = scalar(step, POSITIVE, space, None, "step")
        l1, l2 = self._weights(space, x)
        return _mapped(
            lambda leaf, a, b: _soft(leaf, step * a) / (1 + 2 * step * b), y, space, l1, l2
        )

    def _weights(self, space: Space, x: Tree) -> tuple[list[Tensor], list[Tensor]]:
        return (
            per_leaf(self.l1, NONNEGATIVE, space, x, "ElasticNet: l1"),
            per_leaf(self.l2, NONNEGATIVE, space, x, "ElasticNet: l2"),
        )


@dataclass(frozen=True)
class GroupLasso:
    """``h(y) = sum_g weight_g |y_g|``: 2-norms of disjoint groups of entries.

    Its proximal map is ``max(1 - step weight_g / |y_g|, 0) y_g``.

    Parameters
    ----------
    weight
        ``>= 0``: a number, a tensor with one weight a group, or a function of x that returns one.
        Without `groups`, a tensor broadcasts to the shape of each leaf without its last axis, and a
        nested structure like y is allowed; with `groups`, it broadcasts to ``(len(groups),)``.
        There is no hidden factor: the usual ``sqrt(size of g)`` is yours to put into the weight.
    groups
        None: the last axis of each leaf is a group (a vector is one, a matrix ``(m, n)`` is m: its
        rows). Else the indices of each group among the coordinates of y (its leaves one after the
        other, each in row-major order); what is in no group is not penalised.

    Raises
    ------
    TypeError, ValueError
        A weight that is none, or is negative or not finite; groups that are empty, overlap, or
        hold what is no coordinate of y; a leaf of y that has no last axis.

    Notes
    -----
    Yuan and Lin (2006), Model selection and estimation in regression with grouped variables.

    Examples
    --------
    >>> import torch
    >>> GroupLasso(5.0).prox(torch.tensor([[6.0, 8.0], [3.0, 0.0]]), step=1.0)
    tensor([[3., 4.],
            [0., 0.]])
    >>> GroupLasso(5.0, groups=[[0, 3], [1]]).prox(torch.tensor([6.0, 4.0, 1.0, 8.0]), step=1.0)
    tensor([3., 0., 1., 4.])
    """

    weight: Parameter
    groups: Sequence[Sequence[int]] | None = None
    # For each entry that is in a group: which entry, and which group.
    _entry: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _group: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self.weight, NONNEGATIVE, "GroupLasso: weight")
        groups = [list(group) for group in self.groups or ()]
        if self.groups is not None and not (groups and all(groups)):
            raise ValueError("GroupLasso: groups are empty, or one is; expected lists of indices")
        entries = [index for group in groups for index in group]
        if any(not isinstance(index, int) or index < 0 for index in entries):
            raise ValueError("GroupLasso: groups hold something else than indices >= 0")
        if len(set(entries)) < len(entries):
            raise ValueError("GroupLasso: groups overlap; expected each index in at most one")
        labels = [label for label, group in enumerate(groups) for _ in group]
        # Numbers and no tensors: one that is made inside a transform is of no use after it.
        object.__setattr__(self, "_entry", tuple(entries))
        object.__setattr__(self, "_group", tuple(labels))

    def penalty(self, y: Tree, x: Tree = None) -> Tensor:
        """``sum_g weight_g |y_g|``, a tensor ``()``; at ``y_g = 0`` the subgradient 0."""
        space = Space.of(y, "y")
        weights = self._weights(space, x)
        squares = self._squares(y, space)
        return _total(lambda square, weight: weight * _safe_sqrt(square), squares, weights)

    def prox(self, y: Tree, step: float | Tensor, x: Tree = None) -> Tree:
        """``max(1 - step weight_g / |y_g|, 0) y_g``; step as in `L1.prox`."""
        space = Space.of(y, "y")
        step = scalar(step, POSITIVE, space, None, "step")
        weights = self._weights(space, x)
        factors = [
            _shrinkage(square, step * weight)
            for square, weight in zip(self._squares(y, space), weights, strict=True)
        ]
        if self.groups is None:
            return _mapped(lambda leaf, factor: leaf * factor.unsqueeze(-1), y, space, factors)
        # A last group, of what is not penalised, with the factor 1.
        factor = torch.cat([factors[0], factors[0].new_ones(1)])
        label = torch.full((space.size,), len(self.groups), device=space.device)
        label = label.index_copy(0, *self._layout(space))
        return space.unravel(space.ravel(y) * factor[label])

    def _weights(self, space: Space, x: Tree) -> list[Tensor]:
        if self.groups is None:
            for shape in space.shapes:
                if not shape:
                    raise ValueError("GroupLasso: a leaf has shape (); expected a last axis")
            return per_leaf(
                self.weight, NONNEGATIVE, space, x, "GroupLasso: weight", lambda shape: shape[:-1]
            )
        dual = Space.flat(len(self.groups), space.dtype, space.device)
        return per_leaf(self.weight, NONNEGATIVE, dual, x, "GroupLasso: weight")

    def _squares(self, y: Tree, space: Space) -> list[Tensor]:
        """``|y_g|^2``: for each leaf that of its rows, or one tensor for the explicit groups."""
        if self.groups is None:
            return [(leaf * leaf).sum(-1) for leaf in pytree.tree_leaves(y)]
        entry, group = self._layout(space)
        picked = space.ravel(y)[entry]
        zeros = torch.zeros(len(self.groups), dtype=space.dtype, device=space.device)
        return [zeros.index_add(0, group, picked * picked)]

    def _layout(self, space: Space) -> tuple[Tensor, Tensor]:
        assert self.groups is not None
        largest = max(max(group) for group in self.groups)
        if largest >= space.size:
            raise ValueError(
                f"GroupLasso: groups hold the index {largest}; y has {space.size} coordinates"
            )
        entry, group = (
            torch.tensor(numbers, device=space.device) for numbers in (self._entry, self._group)
        )
        return entry, group


@dataclass(frozen=True)
class Indicator:
    """``h(y) = 0`` where ``y = P(y)``, else infinite: a constraint as a penalty.

    Its proximal map is the projection P, whatever the step.

    Parameters
    ----------
    projection
        ``P(y, x)``, such as `hyperlearn.Box`.
    rtol
        y counts as feasible up to ``|y - P(y)| <= rtol |y|``, as projections round; None means the
        square root of its dtype's eps.

    Raises
    ------
    TypeError, ValueError
        A projection that is not callable, a negative tolerance.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> positive = Indicator(hl.NonNegative())
    >>> positive.prox(torch.tensor([-1.0, 2.0]), step=0.1)
    tensor([0., 2.])
    >>> positive.penalty(torch.tensor([-1.0, 2.0]))
    tensor(inf)
    """

    projection: Callable[..., Tree]
    rtol: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.projection):
            raise TypeError(
                f"Indicator: projection is a {type(self.projection).__name__}; expected P(y, x)"
            )
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"Indicator: rtol={self.rtol}; expected a number >= 0, or None")

    def penalty(self, y: Tree, x: Tree = None) -> Tensor:
        """0 where y is feasible up to rounding, else infinite; a tensor ``()``, derivative 0."""
        space = Space.of(y, "y")
        flat = space.ravel(y).detach()
        distance = flat - space.ravel(self.projection(y, x), "P(y)").detach()
        rtol = torch.finfo(space.dtype).eps ** 0.5 if self.rtol is None else self.rtol
        feasible = torch.linalg.vector_norm(distance) <= rtol * torch.linalg.vector_norm(flat)
        return torch.where(feasible, 0.0, math.inf).to(space.dtype)

    def prox(self, y: Tree, step: float | Tensor, x: Tree = None) -> Tree:
        """``P(y, x)``."""
        return self.projection(y, x)


def _total(terms: Callable[..., Tensor], y: Tree, *weights: list[Tensor]) -> Tensor:
    """Sum of the entries of all terms, leaf by leaf."""
    sums = [term.sum() for term in map(terms, pytree.tree_leaves(y), *weights)]
    return torch.stack(sums).sum()


def _mapped(change: Callable[..., Tensor], y: Tree, space: Space, *weights: list[Tensor]) -> Tree:
    leaves = map(change, pytree.tree_leaves(y), *weights)
    return pytree.tree_unflatten(list(leaves), space.treespec)


def _soft(y: Tensor, threshold: Tensor) -> Tensor:
    # Strictly below, so that without a threshold the derivative at 0 is that of the identity.
    return torch.where(y.abs() < threshold, 0.0, y - threshold * y.sign())


def _shrinkage(square: Tensor, threshold: Tensor) -> Tensor:
    """``max(1 - threshold / sqrt(square), 0)``; without a threshold 1, at 0 too."""
    norm = _safe_sqrt(square)
    positive = torch.where(norm > 0, norm, 1.0)
    return torch.where(norm < threshold, 0.0, 1 - threshold / positive)


def _safe_sqrt(square: Tensor) -> Tensor:
    """Square root with derivative 0 at 0.

    What `where` does not choose is differentiated too, and infinity times zero is NaN: so the root
    must not be asked for at 0.
    """
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
