"""Kernels given as a function of two points: derivatives by nested automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators.kernels.functionals import Functionals
from operators.kernels.kernel import Kernel, Lift

Pair = Callable[[Tensor, Tensor], Tensor]


class FunctionKernel(Kernel):
    """``k(x, y)`` as a function, differentiated pair by pair: for what no other class expresses.

    Up to four derivatives are nested, so a block costs tens to hundreds of times what a closed form
    does: write a `Radial`, `WarpedKernel` or product where it is one.

    Parameters
    ----------
    function
        ``f(x, y, **parameters)`` of two points ``(d,)``, a scalar; symmetric and positive definite,
        which is not tested, and with the derivatives that functionals ask of it at ``x = y`` too (a
        square root of the squared distance has none there).
    parameters
        Tensors that it takes by name: parameters of the kernel.

    Examples
    --------
    >>> import torch, operators as ops
    >>> k = ops.FunctionKernel(
    ...     lambda x, y, a: torch.exp(-a * (x - y) @ (x - y)), a=torch.tensor(2.0)
    ... )
    >>> L = ops.Functionals.laplacian_at(torch.zeros(1, 1))
    >>> ops.gram(k, L).to_dense()  # 12 a^2
    tensor([[48.]])
    """

    _parameters = ("shape",)

    def __init__(self, function: Callable[..., Tensor], **parameters: Tensor) -> None:
        if not callable(function):
            raise TypeError(f"function is a {type(function).__name__}; expected f(x, y)")
        self.function = function
        self.shape: dict[str, Any] = parameters

    def lift(self, L: Functionals) -> Lift:
        """The functionals with all second-order coefficients in one field."""
        return Functionals(L.points, L.value, L.gradient, None, L.second())

    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """``(..., n, m)``, by vmap over the pairs."""
        if left.points.ndim > 2:
            return torch.func.vmap(self.pairs)(left, right)

        def entry(L: Functionals, M: Functionals) -> Tensor:
            def of_second(x: Tensor) -> Tensor:
                return _applied(M, lambda y: self.function(x, y, **self.shape))

            return _applied(L, of_second)

        rows = torch.func.vmap(entry, in_dims=(None, 0))
        return torch.func.vmap(rows, in_dims=(0, None))(left, right)


def _applied(L: Functionals, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``L f`` for a functional at one point."""
    x, total = L.points, torch.zeros((), dtype=L.points.dtype, device=L.points.device)
    if L.value is not None:
        total = total + L.value * f(x)
    if L.gradient is not None:
        total = total + torch.func.grad(f)(x) @ L.gradient
    if L.hessian is not None:
        total = total + (torch.func.jacrev(torch.func.grad(f))(x) * L.hessian).sum()
    return total
