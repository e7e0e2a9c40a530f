"""Parameters of projections and penalties: numbers, tensors, nested tensors, or functions of x."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators import Space
from operators.tracing import readable

Tree = Any
# A number, a tensor, a nested structure of both, or a function that computes one of them from x.
Parameter = Any


@dataclass(frozen=True)
class Condition:
    """What a parameter has to fulfil: in words, and as a test of a number or of each entry."""

    words: str
    holds: Callable[[Any], Any]


POSITIVE = Condition("a positive number", lambda value: value > 0)
NONNEGATIVE = Condition("a number >= 0", lambda value: (value >= 0) & (value < math.inf))
FINITE = Condition("a finite number", lambda value: (value > -math.inf) & (value < math.inf))
NUMBER = Condition("a number, not NaN", lambda value: value == value)


def check(parameter: Parameter, condition: Condition, name: str) -> None:
    """Raise unless every value of `parameter` that can be read fulfils the condition.

    A function of x has no values yet, and those that ``torch.func.vmap`` maps over cannot be read:
    where such a value does not fulfil the condition, `scalar` and `per_leaf` make it NaN.

    Raises
    ------
    TypeError
        Neither a number, nor a floating-point tensor, nor nested ones, nor a function.
    ValueError
        A value does not fulfil the condition.
    """
    if callable(parameter):
        return
    leaves = pytree.tree_leaves(parameter)
    if not leaves:
        raise ValueError(f"{name} holds no number; expected {condition.words}")
    for leaf in leaves:
        _check_type(leaf, name)
        if not isinstance(leaf, Tensor):
            _check_number(leaf, condition, name)
        elif readable(leaf) and not bool(condition.holds(leaf).all()):
            count = int((~condition.holds(leaf)).sum())
            raise ValueError(
                f"{name} has {count} unsuitable entries of {leaf.numel()}; "
                f"expected of each {condition.words}"
            )


def scalar(parameter: Parameter, condition: Condition, space: Space, x: Tree, name: str) -> Tensor:
    """Value at x of a parameter that is one number: a tensor ``()`` of the space's dtype.

    NaN where it is a tensor that does not fulfil the condition, so that a wrong value shows in all
    that is computed from it without one that is read, which torch.func's transforms do not allow.

    Raises
    ------
    TypeError
        x is needed and is None, or the dtype or device is not that of the space.
    ValueError
        More than one number, or a number that does not fulfil the condition.
    """
    return _fitted(_at(parameter, x, name), condition, space, torch.Size(), name)


def per_leaf(
    parameter: Parameter,
    condition: Condition,
    space: Space,
    x: Tree,
    name: str,
    shape: Callable[[torch.Size], torch.Size] = lambda shape: shape,
) -> list[Tensor]:
    """Value at x of a parameter for each leaf of the space, which broadcasts to ``shape(leaf)``.

    A number or a tensor holds for every leaf; a nested structure has that of the space. NaN and
    errors are as for `scalar`.

    Raises
    ------
    ValueError
        Another structure than that of the space, or a tensor that does not broadcast.
    """
    parts, treespec = pytree.tree_flatten(_at(parameter, x, name))
    if treespec.is_leaf():
        parts = parts * len(space.shapes)
    elif treespec != space.treespec:
        raise ValueError(
            f"{name} is nested as {treespec}; expected one number or tensor for all of y, or the "
            f"structure of y, {space.treespec}"
        )
    return [
        _fitted(part, condition, space, shape(leaf), name)
        for part, leaf in zip(parts, space.shapes, strict=True)
    ]


def _at(parameter: Parameter, x: Tree, name: str) -> Tree:
    if not callable(parameter):
        return parameter
    if x is None:
        raise TypeError(f"{name} is a function of x, and x is not given; pass x as well as y")
    return parameter(x)


def _fitted(value: Any, condition: Condition, space: Space, shape: torch.Size, name: str) -> Tensor:
    _check_type(value, name)
    if not isinstance(value, Tensor):
        _check_number(value, condition, name)
        return torch.full((), float(value), dtype=space.dtype, device=space.device)
    if value.dtype != space.dtype or value.device != space.device:
        raise TypeError(
            f"{name} has dtype {value.dtype} on {value.device}; "
            f"expected that of y, {space.dtype} on {space.device}"
        )
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected one that broadcasts to {tuple(shape)}"
        )
    return torch.where(condition.holds(value), value, math.nan)


def _check_type(value: Any, name: str) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    elif not isinstance(value, Real):
        raise TypeError(
            f"{name} is or holds a {type(value).__name__}; expected numbers, tensors, nested ones "
            "of y's structure, or a function of x"
        )


def _check_number(value: Real, condition: Condition, name: str) -> None:
    if not condition.holds(value):
        raise ValueError(f"{name}={value}; expected {condition.words}")
