"""The implicit function theorem: every transform of a solution is that of its closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.hyperlearn.problems import FLOAT64, KNOWN, POINT, POINTS, sampled

Function = Callable[[Tensor], Tensor]
W = torch.tensor([0.3, -1.2, 0.7], dtype=FLOAT64)
V = torch.tensor([1.1, 0.4, -0.8], dtype=FLOAT64)
GRID = torch.stack([POINTS, 1.02 * POINTS])


def scalar(f: Function) -> Function:
    """Not linear in y, and with a direct part."""
    return lambda x: (W * torch.sin(f(x))).sum() + (f(x) ** 2).sum() * x[1] + (x**3).sum()


def by_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    scalar(f)(x).backward()
    assert x.grad is not None
    return x.grad


def by_double_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(scalar(f)(x), x, create_graph=True)
    return torch.autograd.grad(g @ V, x)[0]


def by_dual_numbers(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, V))).tangent
    assert tangent is not None
    return tangent


functional = torch.autograd.functional

TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "backward": lambda f: by_backward(f, POINT),
    "double backward": lambda f: by_double_backward(f, POINT),
    "dual numbers": lambda f: by_dual_numbers(f, POINT),
    "grad": lambda f: grad(scalar(f))(POINT),
    "vjp": lambda f: vjp(f, POINT)[1](W)[0],
    "jvp": lambda f: jvp(f, (POINT,), (V,))[1],
    "jacrev": lambda f: jacrev(f)(POINT),
    "jacfwd": lambda f: jacfwd(f)(POINT),
    "hessian": lambda f: hessian(scalar(f))(POINT),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f))(POINT),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f))(POINT),
    "jvp of grad": lambda f: jvp(grad(scalar(f)), (POINT,), (V,))[1],
    "grad of jvp": lambda f: grad(lambda x: W @ jvp(f, (x,), (V,))[1])(POINT),
    "grad of grad": lambda f: grad(lambda x: V @ grad(scalar(f))(x))(POINT),
    "third order": lambda f: grad(lambda x: V @ jvp(grad(scalar(f)), (x,), (W,))[1])(POINT),
    "vmap": lambda f: vmap(f)(POINTS),
    "vmap along columns": lambda f: vmap(f, in_dims=1, out_dims=1)(POINTS.T),
    "vmap of grad": lambda f: vmap(grad(scalar(f)))(POINTS),
    "grad of vmap": lambda f: grad(lambda X: (vmap(f)(X) ** 2 * W).sum())(POINTS),
    "vmap of vmap": lambda f: vmap(vmap(f))(GRID),
    "vmap of vmap across": lambda f: vmap(vmap(f), in_dims=1)(GRID),
    "vmap of jacrev": lambda f: vmap(jacrev(f))(POINTS),
    "vmap of jacfwd": lambda f: vmap(jacfwd(f))(POINTS),
    "vmap of hessian": lambda f: vmap(hessian(scalar(f)))(POINTS),
    "jacfwd of vmap": lambda f: jacfwd(vmap(f))(POINTS[:2]),
    "hessian of vmap": lambda f: hessian(lambda X: (vmap(f)(X) ** 2 * W).sum())(POINTS[:2]),
    "vmap of grad of vmap": lambda f: vmap(grad(lambda X: (vmap(f)(X) ** 2 * W).sum()))(GRID),
    "functional jacobian": lambda f: functional.jacobian(f, POINT),
    "functional hessian": lambda f: functional.hessian(scalar(f), POINT),
    "functional hvp": lambda f: functional.hvp(scalar(f), POINT, V)[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", KNOWN)
def test_every_transform_is_that_of_the_closed_form(name: str, transform: str) -> None:
    known, applied = KNOWN[name], TRANSFORMS[transform]
    torch.testing.assert_close(applied(known.solve), applied(known.closed), rtol=1e-7, atol=1e-8)
