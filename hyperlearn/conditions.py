"""Optimality conditions ``F(y, x) = 0``: what defines y as a function of x, whoever solves it.

Along a solution ``d_y F dy + d_x F dx = 0``, so the linearisation ``A = d_y F`` is all that the
implicit function theorem asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperlearn.lifting import Lifting, Watch
from operators import Hessian, Jacobian, LinearOperator, Space

Tree = Any
# The user's own operator for A: ``(y, x) -> LinearOperator``.
OperatorOf = Callable[[Tree, Tree], LinearOperator]


class Conditions(ABC):
    """``F(y, x) = 0`` for y in R^n, flat, and any nested x.

    Parameters
    ----------
    function
        The user's, of nested y and x.
    space
        Layout of y.
    operator
        ``(y, x) -> A``, in place of the one that is derived from the function: one that knows its
        structure, as `operators.SparseJacobian`, or a surrogate, which makes the derivative one.
    """

    # Whether A is symmetric: a second derivative.
    symmetric: ClassVar[bool] = False
    # What the user wrote, for messages.
    noun: ClassVar[str]

    def __init__(
        self, function: Callable[..., Any], space: Space, operator: OperatorOf | None = None
    ) -> None:
        self.function, self.space, self._operator = function, space, operator
        # What the functions reach, where derivatives may be asked for.
        self.watch: Watch | None = None

    @abstractmethod
    def residual(self, y: Tensor, x: Tree) -> Tensor:
        """``F(y, x)``, ``(n,)``."""

    def value(self, y: Tensor, x: Tree) -> Tensor:
        """What a descent method may watch: the loss where F is its gradient, else ``|F|^2 / 2``."""
        return self.residual(y, x).square().sum() / 2

    def operator(self, y: Tensor, x: Tree) -> LinearOperator:
        """``A = d_y F(y, x)``."""
        if self._operator is None:
            return self._linearized(y, x)
        operator = self._operator(self.space.unravel(y), x)
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"operator(y, x) returned {type(operator).__name__}; expected a LinearOperator"
            )
        n = self.space.size
        if operator.shape != (n, n):
            raise ValueError(
                f"operator(y, x) has shape {operator.shape}; y has {n} entries, so expected "
                f"({n}, {n})"
            )
        return operator

    def _linearized(self, y: Tensor, x: Tree) -> LinearOperator:
        return Jacobian(self.residual, y, x)

    def freeze(self, lifting: Lifting) -> None:
        """Take the functions as they were when they were lifted."""
        self.function, self._operator = lifting.functions[:2]

    def rebind(self, lifting: Lifting) -> None:
        """Take functions of ``(x, lifted tensors)`` in place of the user's, which are of x."""
        self.function = lifting.called(0)
        if self._operator is not None:
            self._operator = lifting.called(1)

    @property
    def given(self) -> bool:
        """Whether the user gave an operator."""
        return self._operator is not None

    def dense(self, y: Tensor, x: Tree) -> Tensor:
        """``A`` in full, ``(n, n)``: n sweeps back at once."""
        return torch.func.jacrev(lambda y: self.residual(y, x))(y)

    def _checked(self, name: str, value: Any) -> Tensor:
        """A flat tree like y; the user hears of another structure in his own terms."""
        if not self.space.holds(value):
            try:
                came = str(Space.of(value))
            except (TypeError, ValueError):
                came = type(value).__name__
            order = "" if self.space.treespec.is_leaf() else " (the order of keys counts)"
            raise ValueError(
                f"{name}(y, x) returned {came}; expected the structure of y0, {self.space}{order}"
            )
        return self.space.ravel(value, name)


class Root(Conditions):
    """``F(y, x)`` as given."""

    noun = "residual"

    def residual(self, y: Tensor, x: Tree) -> Tensor:
        """``F(y, x)``."""
        return self._checked("residual", self.function(self.space.unravel(y), x))


class FixedPoint(Conditions):
    """``F = y - T(y, x)``."""

    noun = "map"

    def residual(self, y: Tensor, x: Tree) -> Tensor:
        """``y - T(y, x)``."""
        return y - self._checked("map", self.function(self.space.unravel(y), x))


class Stationary(Conditions):
    """``F = d_y f(y, x)`` of a loss f: A is its Hessian."""

    noun = "loss"
    symmetric = True

    def value(self, y: Tensor, x: Tree) -> Tensor:
        """``f(y, x)``."""
        value = self.function(self.space.unravel(y), x)
        if not isinstance(value, Tensor) or value.ndim != 0:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss(y, x) returned {came}; expected a scalar tensor")
        return value

    def residual(self, y: Tensor, x: Tree) -> Tensor:
        """``d_y f(y, x)``."""
        return torch.func.grad(self.value)(y, x)

    def _linearized(self, y: Tensor, x: Tree) -> LinearOperator:
        return Hessian(self.value, y, x)


class LeastSquares(Stationary):
    """``F = J^T r``, the gradient of ``|r(y, x)|^2 / 2``; A is the whole Hessian of that.

    The residuals r are any nested structure, more or fewer than the entries of y.
    """

    noun = "residuals"

    def residuals(self, y: Tensor, x: Tree) -> Tensor:
        """``r(y, x)``, flat."""
        value = self.function(self.space.unravel(y), x)
        return Space.of(value, "residuals(y, x)").ravel(value)

    def value(self, y: Tensor, x: Tree) -> Tensor:
        """``|r|^2 / 2``."""
        return self.residuals(y, x).square().sum() / 2


class ProximalGradient(Conditions):
    """``F = y - prox_{s h}(y - s d_y f(y, x))``: zero where ``f + h`` is least.

    The solutions do not depend on the step s > 0, and neither do derivatives through them: where an
    entry sits at a bound or at zero its row of A is one of the identity, so that the others carry
    the derivative, with the Hessian of f among them. Where the active set is about to change (an
    entry at a bound with multiplier zero) there is no derivative; what comes out belongs to one of
    the sides.

    Parameters
    ----------
    loss
        ``f(y, x)``, smooth, a scalar.
    prox
        ``(y, s, x) -> argmin_u s h(u, x) + |u - y|^2 / 2`` on nested y; for a constraint the
        projection.
    penalty
        ``h(y, x)``; None for one that is zero where prox leads to.

    Notes
    -----
    s is 1 until `take_step` makes it a part of x, where each member of a batch has its own.
    """

    noun = "loss"

    def __init__(
        self,
        loss: Callable[..., Any],
        space: Space,
        prox: Callable[[Tree, Any, Tree], Tree],
        penalty: Callable[[Tree, Tree], Tensor] | None = None,
    ) -> None:
        super().__init__(loss, space)
        self.smooth = Stationary(loss, space)
        self.prox, self.penalty = prox, penalty
        self.step: Callable[[Tree], Any] = lambda x: 1.0

    def freeze(self, lifting: Lifting) -> None:
        """The loss alone is frozen."""
        super().freeze(lifting)
        self.smooth.freeze(lifting)

    def rebind(self, lifting: Lifting) -> None:
        """The loss alone is rebound."""
        super().rebind(lifting)
        self.smooth.rebind(lifting)
        self._of_first()

    def take_step(self) -> None:
        """Take functions of ``(x, s)`` in place of those of x."""
        loss = self.function
        self.function = self.smooth.function = lambda y, x: loss(y, x[0])
        self._of_first()
        self.step = lambda x: x[1]

    def _of_first(self) -> None:
        prox, penalty = self.prox, self.penalty
        self.prox = lambda y, step, x: prox(y, step, x[0])
        self.penalty = None if penalty is None else lambda y, x: penalty(y, x[0])

    def proximal(self, y: Tensor, step: Any, x: Tree) -> Tensor:
        """``prox_{step h}(y)``, flat."""
        name = "constraint" if self.penalty is None else "penalty.prox"
        return self._checked(name, self.prox(self.space.unravel(y), step, x))

    def residual(self, y: Tensor, x: Tree) -> Tensor:
        """``y - prox_{s h}(y - s d_y f)``."""
        step = self.step(x)
        return y - self.proximal(y - step * self.smooth.residual(y, x), step, x)

    def value(self, y: Tensor, x: Tree) -> Tensor:
        """``f + h``."""
        value = self.smooth.value(y, x)
        return value if self.penalty is None else value + self.penalty(self.space.unravel(y), x)
