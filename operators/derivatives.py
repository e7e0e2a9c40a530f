"""Derivatives of functions as operators, by torch.func: `Jacobian`, `Hessian`, `CrossDerivative`.

Nothing is ever formed: a product is one forward- or reverse-mode sweep. The functions take and
return nested structures of tensors; the operators carry the flattening.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.linear_operator import LinearOperator
from operators.space import Space, Tree
from operators.structure import Structure


class Jacobian(LinearOperator):
    """``A = d f(y) / d y`` of a function of nested tensors.

    Parameters
    ----------
    function
        ``f(y)``, built of torch operations that torch.func can differentiate.
    y
        Point: a tensor or nested structure.

    Raises
    ------
    TypeError, ValueError
        `y` or ``f(y)`` is not a (nested) floating tensor.

    Notes
    -----
    ``A v`` is one forward-mode sweep (`torch.func.jvp`), ``A^T u`` one reverse-mode sweep
    (`torch.func.vjp`): each about two to three evaluations of f.

    Examples
    --------
    >>> import torch
    >>> A = Jacobian(lambda y: y**2, torch.tensor([1.0, 2.0]))
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([2., 4.])
    """

    def __init__(self, function: Callable[[Tree], Tree], y: Tree) -> None:
        domain = Space.of(y, "y")
        with torch.no_grad():
            codomain = Space.of(function(y), "f(y)")
        super().__init__(domain, codomain)
        self.function, self.y = function, y

    def _matvec(self, v: Tensor) -> Tensor:
        tangent = torch.func.jvp(self.function, (self.y,), (self.domain.unravel(v),))[1]
        return self.codomain.ravel(tangent)

    def _rmatvec(self, v: Tensor) -> Tensor:
        pullback = torch.func.vjp(self.function, self.y)[1]
        return self.domain.ravel(pullback(self.codomain.unravel(v))[0])


class Hessian(LinearOperator):
    """``A = d^2 f(y) / d y^2`` of a scalar function of nested tensors; symmetric.

    Parameters
    ----------
    loss
        ``f(y)``, a scalar.
    y
        Point: a tensor or nested structure.
    positive_definite
        Claim that it is so at y (as at a strict minimum of a strongly convex loss).
    mode
        ``"reverse"``: the graph of the gradient is built once, at the first product, and kept;
        since A is symmetric, ``A v = A^T v`` is one sweep back through it, about the cost of a
        gradient. It is built anew after y has changed in place, and for each product through which
        autograd could go on to y or to what the loss closes over (not under ``torch.no_grad``).
        ``"forward"``: forward over reverse, ``A v = d/de grad f(y + e v)`` at e = 0 (Pearlmutter,
        1994, eq. 11), keeps nothing and costs two to three gradients a product.

    Raises
    ------
    ValueError
        ``f(y)`` is not a scalar, or mode is not one of the two.

    Examples
    --------
    >>> import torch
    >>> A = Hessian(lambda y: (y["a"] ** 3).sum(), {"a": torch.tensor([1.0, 2.0])})
    >>> A @ {"a": torch.tensor([1.0, 1.0])}
    {'a': tensor([ 6., 12.])}
    """

    def __init__(
        self,
        loss: Callable[[Tree], Tensor],
        y: Tree,
        *,
        positive_definite: bool = False,
        mode: Literal["reverse", "forward"] = "reverse",
    ) -> None:
        if mode not in ("reverse", "forward"):
            raise ValueError(f"mode={mode!r}; expected 'reverse' or 'forward'")
        space = Space.of(y, "y")
        structure = Structure(symmetric=True, positive_definite=positive_definite)
        super().__init__(space, space, structure)
        self.loss, self.y, self.mode = _scalar(loss), y, mode
        self._pullback: Callable[[Tree], Any] | None = None
        self._recorded: tuple[bool | int, ...] = ()

    def _matvec(self, v: Tensor) -> Tensor:
        gradient, direction = torch.func.grad(self.loss), self.domain.unravel(v)
        if self.mode == "forward":
            return self.domain.ravel(torch.func.jvp(gradient, (self.y,), (direction,))[1])
        # The kept graph holds for the values that y had (an optimiser may have stepped in place
        # since) and for the grad mode that it was recorded in.
        leaves = pytree.tree_leaves(self.y)
        versions = (0 if leaf.is_inference() else leaf._version for leaf in leaves)
        recorded = (torch.is_grad_enabled(), *versions)
        pullback = self._pullback if recorded == self._recorded else None
        if pullback is None:
            value, pullback = torch.func.vjp(gradient, self.y)[:2]
            # A graph that goes on into a history of y or of what the loss closes over is freed by
            # the first backward() through a product, and one that belongs to a transform under way
            # (grad, jvp) ends with it: then each product has its own.
            if not any(
                leaf.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(leaf)
                for leaf in pytree.tree_leaves(value)
            ):
                self._pullback, self._recorded = pullback, recorded
        return self.domain.ravel(pullback(direction)[0])


class CrossDerivative(LinearOperator):
    """``C = d/dx (d f(y, x) / d y)``: maps the space of y to the space of x (rows: outer).

    Parameters
    ----------
    loss
        ``f(y, x)``, a scalar.
    y, x
        Point: tensors or nested structures.

    Raises
    ------
    ValueError
        ``f(y, x)`` is not a scalar.

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

    def __init__(self, loss: Callable[[Tree, Tree], Tensor], y: Tree, x: Tree) -> None:
        super().__init__(Space.of(y, "y"), Space.of(x, "x"))
        self.loss, self.y, self.x = _scalar(loss), y, x

    def _matvec(self, v: Tensor) -> Tensor:
        def gradient(x: Tree) -> Tree:
            return torch.func.grad(self.loss, argnums=0)(self.y, x)

        pullback = torch.func.vjp(gradient, self.x)[1]
        return self.codomain.ravel(pullback(self.domain.unravel(v))[0])

    def _rmatvec(self, v: Tensor) -> Tensor:
        def gradient(y: Tree) -> Tree:
            return torch.func.grad(self.loss, argnums=1)(y, self.x)

        pullback = torch.func.vjp(gradient, self.y)[1]
        return self.domain.ravel(pullback(self.codomain.unravel(v))[0])


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
