"""`BilevelProblem`: the two losses, their variables and their data; knows nothing of algorithms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.certificate import Smoothness
from hyperlearn.oracles import Loss, Oracles, batch_length
from hyperlearn.regularizer import L2
from operators import Space

Tree = Any
Projection = Callable[[Tree], Tree]


@dataclass(frozen=True, kw_only=True)
class WeightedLikelihood:
    """The inner loss taken apart as ``mean_i weight_i(x) * nll_i(y)``, for the Fisher corrections.

    Parameters
    ----------
    sample_loss
        ``l(y, batch) -> (B,)``: negative log-likelihood of each sample, unweighted.
    sample_weight
        ``s(x, batch) -> (B,)``: its weight, nonnegative.
    """

    sample_loss: Callable[[Tree, Tree], Tensor]
    sample_weight: Callable[[Tree, Tree], Tensor]


@dataclass(frozen=True)
class BilevelProblem:
    """``min_x g(y*(x), x)`` with ``y*(x) = argmin_{y in Y} G(y, x)``.

    Parameters
    ----------
    inner_loss, outer_loss
        ``f(y, x)``, or ``f(y, x, batch)`` where there is data; scalar tensors, means over the
        batch.
    x0, y0
        Where to start: tensors or nested structures, of one floating dtype and device.
    inner_data, outer_data
        Nested tensors with a common leading axis, from which batches are drawn; None for none.
    regularizer
        ``L2(weight)``: then ``G = inner_loss + weight |y|^2``. Leave it out of `inner_loss`.
    project_inner, project_outer
        Projection onto Y, and onto the set of x (see `Ball`, `Box`).
    likelihood
        The inner loss taken apart, for methods that correct for sample weights.
    smoothness
        Constants of the two losses; certificates then hold an error bound wherever a method uses
        all of the data at each step.
    metrics
        ``name -> f(y, x) -> float``, evaluated whenever the run is recorded, outside the clock.
    units
        ``metric -> unit``, of the metrics and ``outer_loss`` that have one.
    name
        What to call it in records.

    Raises
    ------
    TypeError, ValueError
        An argument that does not fit, or data that are empty, of unequal lengths, or not finite.

    Examples
    --------
    >>> import torch
    >>> problem = BilevelProblem(
    ...     inner_loss=lambda y, x: ((y - x) ** 2).sum(),
    ...     outer_loss=lambda y, x: ((y - 1) ** 2).sum(),
    ...     x0=torch.zeros(2),
    ...     y0=torch.zeros(2),
    ... )
    >>> problem.y_space.size
    2
    """

    inner_loss: Loss
    outer_loss: Loss
    x0: Tree = field(kw_only=True)
    y0: Tree = field(kw_only=True)
    inner_data: Tree = field(default=None, kw_only=True)
    outer_data: Tree = field(default=None, kw_only=True)
    regularizer: L2 | None = field(default=None, kw_only=True)
    project_inner: Projection | None = field(default=None, kw_only=True)
    project_outer: Projection | None = field(default=None, kw_only=True)
    likelihood: WeightedLikelihood | None = field(default=None, kw_only=True)
    smoothness: Smoothness | None = field(default=None, kw_only=True)
    metrics: Mapping[str, Callable[[Tree, Tree], float]] = field(default_factory=dict, kw_only=True)
    units: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    name: str = field(default="bilevel problem", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} is a {type(getattr(self, name)).__name__}; expected f(y, x)"
                )
        x_space, y_space = Space.of(self.x0, "x0"), Space.of(self.y0, "y0")
        if x_space.dtype != y_space.dtype or x_space.device != y_space.device:
            raise TypeError(
                f"x0 is {x_space.dtype} on {x_space.device}, y0 is {y_space.dtype} on "
                f"{y_space.device}; expected one dtype and device"
            )
        for name in ("x0", "y0"):
            _check_finite(getattr(self, name), name)
        for name in ("inner_data", "outer_data"):
            check_data(getattr(self, name), name)
        for name, data in (("inner", self.inner_data), ("outer", self.outer_data)):
            _check_signature(getattr(self, f"{name}_loss"), name, data is not None)

    @property
    def y_space(self) -> Space:
        """Layout of y."""
        return Space.of(self.y0, "y0")

    @property
    def x_space(self) -> Space:
        """Layout of x."""
        return Space.of(self.x0, "x0")

    def conclude(self, y: Tree, x: Tree) -> Mapping[str, Any]:
        """What a run's result holds beside x and y; nothing, for a problem of losses alone."""
        return {}

    def oracles(self) -> Oracles:
        """Derivatives of this problem, with a counter at zero."""
        return Oracles(
            self.inner_loss, self.outer_loss, self.y_space, self.x_space, self.regularizer
        )


def _check_signature(loss: Loss, name: str, with_batch: bool) -> None:
    """A loss of the wrong number of arguments is told here, not from inside a transform."""
    arguments = "y, x, batch" if with_batch else "y, x"
    try:
        inspect.signature(loss).bind(*arguments.split(", "))
    except TypeError as error:
        given = f"{name}_data is given" if with_batch else f"there is no {name}_data"
        raise TypeError(
            f"{name}_loss is not callable as {name}_loss({arguments}), and {given}: {error}"
        ) from None
    except ValueError:
        pass  # a builtin without a signature: the call itself will tell


def _check_finite(tree: Tree, name: str) -> None:
    for leaf in pytree.tree_leaves(tree):
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            count = int((~torch.isfinite(leaf)).sum())
            raise ValueError(
                f"{name} holds {count} NaN or infinite entries; expected finite numbers"
            )


def check_data(data: Tree, name: str) -> None:
    """Raise unless `data` is None, or nested tensors ``(n, ...)`` of one length n > 0, finite."""
    if data is None:
        return
    leaves = pytree.tree_leaves(data)
    if not leaves:
        raise ValueError(f"{name} holds no tensor; expected tensors (n, ...), or None")
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise TypeError(f"{name} has a leaf without samples; expected tensors (n, ...)")
    lengths = sorted({leaf.shape[0] for leaf in leaves})
    if len(lengths) != 1:
        raise ValueError(f"{name} has tensors of lengths {lengths}; expected one leading length")
    if batch_length(data) == 0:
        raise ValueError(f"{name} is empty; expected at least one sample")
    _check_finite(data, name)
