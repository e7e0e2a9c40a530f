"""Derivatives of functions as operators: `Jacobian`, `Linearization`, `Hessian`, `CrossDerivative`.

Nothing is ever formed: a product is one forward- or reverse-mode sweep. The functions take and
return nested structures of tensors; the operators carry the flattening.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.cost import Cost
from operators.kept import Kept
from operators.layout import called_by_columns
from operators.linear_operator import ArgumentOf, LinearOperator
from operators.space import Space, Tree
from operators.structure import Structure


class Sweeps(LinearOperator):
    """An operator whose products are sweeps through a function of nested tensors.

    A nested argument goes through as it is; it is not copied into a flat vector and back.
    """

    @abstractmethod
    def _push(self, v: Tree) -> Tree:
        """``A v``, from `domain` to `codomain`."""

    def _pull(self, u: Tree) -> Tree:
        """``A^T u``, from `codomain` to `domain`."""
        raise TypeError(f"{self!r} does not define its transposed product")

    def _map(self, v: Tree) -> Tree:
        self.domain.check(v, ArgumentOf(self))
        return self._push(v)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.codomain.ravel(self._push(self.domain.unravel(v)))

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.domain.ravel(self._pull(self.codomain.unravel(v)))


class Jacobian(Sweeps):
    """``A = d f(y, *args) / d y`` of a function of nested tensors.

    Parameters
    ----------
    function
        ``f(y, *args)``, built of torch operations that torch.func can differentiate.
    y
        Point: a tensor or nested structure.
    *args
        What else f depends on. Tensors handed over here are parameters of the operator: torch.func
        sees them. So does plain autograd, which also sees tensors that f closes over.

    Raises
    ------
    TypeError, ValueError
        `y` or ``f(y, *args)`` is not a (nested) floating tensor.

    Notes
    -----
    ``A v`` is one forward-mode sweep (`torch.func.jvp`), ``A^T u`` one reverse-mode sweep
    (`torch.func.vjp`): each about two to three evaluations of f. Nothing is kept between products;
    `Linearization` keeps the sweep.

    Examples
    --------
    >>> import torch
    >>> A = Jacobian(lambda y: y**2, torch.tensor([1.0, 2.0]))
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([2., 4.])
    """

    _parameters = ("y", "args")

    def __init__(self, function: Callable[..., Tree], y: Tree, *args: Any) -> None:
        domain = Space.of(y, "y")
        with torch.no_grad():
            codomain = Space.of(function(y, *args), "f(y)")
        super().__init__(domain, codomain)
        self.function, self.y, self.args = function, y, args

    def _at_args(self, y: Tree) -> Tree:
        return self.function(y, *self.args)

    def _push(self, v: Tree) -> Tree:
        return torch.func.jvp(self._at_args, (self.y,), (v,))[1]

    def _pull(self, u: Tree) -> Tree:
        return torch.func.vjp(self._at_args, self.y)[1](u)[0]

    def _cost(self) -> Cost:
        return Cost(evaluations=3)


class Linearization(Jacobian):
    """``A = d F(u, *args) / d u``, with the sweeps through F done once and kept.

    Parameters
    ----------
    residual
        ``F(u, *args)``.
    u
        Point: a tensor or nested structure.
    *args
        What else F depends on, as for `Jacobian`.

    Attributes
    ----------
    value
        ``F(u, *args)``: the right-hand side of a Newton step.

    Notes
    -----
    The graph of F is recorded once, at the first product: ``A^T w`` is one sweep back through it,
    and ``A v`` one sweep back through that sweep, since ``w -> A^T w`` is linear with transpose A.
    Each costs about as much as F itself; memory is that of the graph. The graph is recorded anew
    where `Hessian` does so.

    Examples
    --------
    >>> import torch
    >>> A = Linearization(lambda u, c: u**2 - c, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]))
    >>> A.value
    tensor([-2.,  1.])
    >>> A @ torch.tensor([1.0, 1.0]), A.T @ torch.tensor([1.0, 1.0])
    (tensor([2., 4.]), tensor([2., 4.]))
    """

    _transient = ("_backward", "_forward")
    _backward: Kept | None = None
    _forward: Kept | None = None

    def __init__(self, residual: Callable[..., Tree], u: Tree, *args: Any) -> None:
        super().__init__(residual, u, *args)

    @property
    def value(self) -> Tree:
        """``F(u, *args)``."""
        return self._at_args(self.y)

    def _pull(self, u: Tree) -> Tree:
        return self._pullback()(u)[0]

    def _push(self, v: Tree) -> Tree:
        def record() -> tuple[Tree, Any]:
            backward = self._pullback()
            zeros = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            zero = self.codomain.unravel(zeros)
            return torch.func.vjp(lambda w: backward(w)[0], zero)[:2]

        self._forward = self._forward or Kept()
        leaves = pytree.tree_leaves((self.y, self.args))
        return self._forward.get(leaves, record, self.function)(v)[0]

    def _pullback(self) -> Any:
        self._backward = self._backward or Kept()
        return self._backward.get(
            pytree.tree_leaves((self.y, self.args)),
            lambda: torch.func.vjp(self._at_args, self.y)[:2],
            self.function,
        )

    def _cost(self) -> Cost:
        return Cost(evaluations=2)


class Hessian(Sweeps):
    """``A = d^2 f(y, *args) / d y^2`` of a scalar function of nested tensors; symmetric.

    Parameters
    ----------
    loss
        ``f(y, *args)``, a scalar.
    y
        Point: a tensor or nested structure.
    *args
        What else f depends on (outer variables, a batch), as for `Jacobian`.
    positive_definite
        Claim that it is so at y (as at a strict minimum of a strongly convex loss); probed at the
        first use.
    mode
        ``"reverse"``: the graph of the gradient is built once, at the first product, and kept;
        since A is symmetric, ``A v = A^T v`` is one sweep back through it, about the cost of a
        gradient. It is built anew after y, a tensor in args or one that the loss reaches has
        changed in place, after a name that the loss reads (in its closure, an object, its globals)
        was bound to something else, and for each product through which autograd could go on to
        them (not under ``torch.no_grad``). See `operators.closures.Closure` for what is found.
        ``"forward"``: forward over reverse, ``A v = d/de grad f(y + e v)`` at e = 0 (Pearlmutter,
        1994, eq. 11), keeps nothing and costs two to three gradients a product.

    Raises
    ------
    ValueError
        ``f(y, *args)`` is not a scalar, or mode is not one of the two.

    Notes
    -----
    Torch's fused attention has no second derivatives: evaluate it inside f under
    ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``. Modules that are called
    by `functional` do so by themselves.

    Examples
    --------
    >>> import torch
    >>> A = Hessian(lambda y: (y["a"] ** 3).sum(), {"a": torch.tensor([1.0, 2.0])})
    >>> A @ {"a": torch.tensor([1.0, 1.0])}
    {'a': tensor([ 6., 12.])}
    """

    _parameters = ("y", "args")
    _transient = ("_kept",)
    _kept: Kept | None = None

    def __init__(
        self,
        loss: Callable[..., Tensor],
        y: Tree,
        *args: Any,
        positive_definite: bool = False,
        mode: Literal["reverse", "forward"] = "reverse",
    ) -> None:
        if mode not in ("reverse", "forward"):
            raise ValueError(f"mode={mode!r}; expected 'reverse' or 'forward'")
        space = Space.of(y, "y")
        structure = Structure(symmetric=True, positive_definite=positive_definite)
        super().__init__(space, space, structure)
        self._claims = ("positive_definite",) if positive_definite else ()
        self.loss, self.y, self.args, self.mode = loss, y, args, mode

    def _gradient(self, y: Tree) -> Tree:
        return torch.func.grad(_scalar(self.loss))(y, *self.args)

    def _push(self, v: Tree) -> Tree:
        if self.mode == "forward":
            return torch.func.jvp(self._gradient, (self.y,), (v,))[1]
        self._kept = self._kept or Kept()
        pullback = self._kept.get(
            pytree.tree_leaves((self.y, self.args)),
            lambda: called_by_columns(lambda y: torch.func.vjp(self._gradient, y)[:2], self.y),
            self.loss,
        )
        return pullback(v)[0]

    def _cost(self) -> Cost:
        return Cost(evaluations=4 if self.mode == "reverse" else 8)


class CrossDerivative(Sweeps):
    """``C = d/dx (d f(y, x, *args) / d y)``: maps the space of y to that of x (rows: outer).

    Parameters
    ----------
    loss
        ``f(y, x, *args)``, a scalar.
    y, x
        Point: tensors or nested structures.
    *args
        What else f depends on, as for `Jacobian`.

    Raises
    ------
    ValueError
        ``f(y, x, *args)`` is not a scalar.

    Notes
    -----
    ``C q = grad_x <grad_y f, q>`` and ``C^T p = grad_y <grad_x f, p>``, each one sweep back through
    a gradient. Neither follows the history of y: y is a point here, not a function of x.

    Examples
    --------
    >>> import torch
    >>> C = CrossDerivative(lambda y, x: (x * y**2).sum(), torch.tensor([3.0]), torch.tensor([1.0]))
    >>> C @ torch.tensor([1.0])
    tensor([6.])
    """

    _parameters = ("y", "x", "args")

    def __init__(self, loss: Callable[..., Tensor], y: Tree, x: Tree, *args: Any) -> None:
        super().__init__(Space.of(y, "y"), Space.of(x, "x"))
        self.loss, self.y, self.x, self.args = loss, y, x, args

    def _push(self, v: Tree) -> Tree:
        def gradient(x: Tree) -> Tree:
            return torch.func.grad(_scalar(self.loss), argnums=0)(self.y, x, *self.args)

        return torch.func.vjp(gradient, self.x)[1](v)[0]

    def _pull(self, u: Tree) -> Tree:
        def gradient(y: Tree) -> Tree:
            return torch.func.grad(_scalar(self.loss), argnums=1)(y, self.x, *self.args)

        return torch.func.vjp(gradient, self.y)[1](u)[0]

    def _cost(self) -> Cost:
        return Cost(evaluations=6)


def _scalar(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(*args: Tree) -> Tensor:
        value = loss(*args)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss returned {got}; expected a scalar tensor (a mean over the batch)"
            )
        return value

    return checked
