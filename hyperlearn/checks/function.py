"""The checks of a function: every way in which torch differentiates it."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.checks.point import (
    Function,
    Point,
    Settings,
    Tree,
    cast,
    in_double,
    ratio,
    refused,
    validated,
)
from hyperlearn.checks.report import CheckRow, Verdict
from operators import Space

# Points in a batch, and how far they are from x, relative to each entry.
BATCH, NEARBY = 3, 1e-3


def check_function(
    function: Function, x: Tree, settings: Settings
) -> tuple[list[CheckRow], list[str]]:
    """Rows and notes for ``function(x) -> scalar tensor`` at x."""
    own = validated(x)
    point, refusal = in_double(function, own, settings)
    rows = [] if refusal is None else [refusal]

    gradients: dict[str, Tensor] = {}
    for name, derivative in (("reverse mode", _reverse), ("backward()", backward)):
        try:
            gradient = derivative(function, point.x)
            gradients[name] = point.space.ravel(gradient, f"{name}: gradient").detach()
        except Exception as error:
            rows.append(refused(name, error))
        else:
            point.learn_gradient(gradients[name])
    for name, gradient in gradients.items():
        rows += point.compare(name, point.slopes(gradient))

    try:
        forward = [_forward(function, point.x, point.space.unravel(v)) for v in point.directions]
    except Exception as error:
        rows.append(refused("forward mode", error))
    else:
        rows += point.compare("forward mode", forward)
        if "reverse mode" in gradients:
            reverse = point.slopes(gradients["reverse mode"])
            rows += point.identity("forward = reverse", forward, reverse)

    if "reverse mode" in gradients:
        rows.append(_batch_row(function, point))
        if refusal is None:
            rows.append(_dtype_row(function, own, point))
    return rows, list(point.notes())


def _batch_row(function: Function, point: Point) -> CheckRow:
    """``vmap(grad f)`` of neighbours of x against the gradient of each."""
    name, gradient = "batch = one by one", partial(_reverse, function)
    block = torch.stack([point.flat + NEARBY * point.random_direction() for _ in range(BATCH)])
    try:
        together = torch.func.vmap(gradient)(torch.func.vmap(point.space.unravel)(block))
        rows = torch.func.vmap(point.space.ravel)(together)
    except Exception as refusal:
        return refused(name, refusal)
    single = torch.stack([point.space.ravel(gradient(point.space.unravel(row))) for row in block])
    sizes = (point.scale * single).norm(dim=1).clamp_min(point.size)
    errors = (point.scale * (rows - single)).norm(dim=1)
    error = max(ratio(*pair) for pair in zip(errors.tolist(), sizes.tolist(), strict=True))
    tolerance = point.rtol + point.resolution
    verdict: Verdict = "passed" if error <= tolerance else "failed"
    return CheckRow(name, None, error, tolerance, verdict, f"{BATCH} points under vmap")


def _dtype_row(function: Function, x: Tree, point: Point) -> CheckRow:
    """The gradient in x's own dtype, or in float32, against float64 at the same numbers."""
    own = Space.of(x).dtype
    dtype = torch.float32 if own == torch.float64 else own
    name = f"{str(dtype).removeprefix('torch.')} = float64"
    lower = cast(x, dtype)
    try:
        found = _reverse(function, lower)
        Space.of(lower).check(found, "the gradient")
        exact = point.space.ravel(_reverse(function, cast(lower, torch.float64)))
    except Exception as refusal:
        return refused(name, refusal)
    difference = point.space.ravel(cast(found, torch.float64)) - exact
    size = max(float((point.scale * exact).norm()), point.size)
    error = ratio(float((point.scale * difference).norm()), size)
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    row = CheckRow(name, None, error, tolerance, "passed", "half of the dtype's digits are right")
    if error <= tolerance:
        return row
    text = (
        f"the gradient in {dtype} is off by {error:.1e}: the problem is too badly conditioned for "
        "it, or an inner solver does not reach its tolerance in it"
    )
    # In a dtype that is not the caller's, rounding is not the caller's problem.
    verdict: Verdict = "refused" if own == torch.float64 else "noisy" if error < 0.1 else "failed"
    return dataclasses.replace(row, verdict=verdict, detail=f"{text}; use float64")


def _reverse(function: Function, x: Tree) -> Tree:
    gradient = torch.func.grad(function)(x)
    # It has a graph of its own where the function closes over tensors that require grad.
    return pytree.tree_map(torch.detach, gradient)


def _forward(function: Function, x: Tree, v: Tree) -> float:
    return float(torch.func.jvp(function, (x,), (v,))[1].detach())


def backward(function: Function, x: Tree) -> Tree:
    """Gradient by ``backward()``, like x; zero where the value has no graph."""
    with torch.enable_grad():
        x = pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), x)
        value = function(x)
        if value.requires_grad:
            # Into x alone: what f closes over keeps its .grad.
            value.backward(inputs=pytree.tree_leaves(x))
    return pytree.tree_map(
        lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, x
    )
