"""Gauss quadrature of ``z^T f(A) z`` from the Lanczos process, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators.linear_operator import LinearOperator
from operators.randomized.krylov import Tridiagonals, lanczos
from operators.randomized.monte_carlo import check_finite
from operators.tracing import readable

Function = Callable[[Tensor], Tensor]

# Small matrices are diagonalised in float64 whatever the dtype: nodes far below the largest would
# lose all digits otherwise.
WIDE = torch.float64
# The error of a rule is extrapolated from its last differences at most this slowly convergent.
SLOWEST = 0.99


def gauss_rules(
    A: LinearOperator, f: Function, check_nodes: Callable[[Tensor], None], z: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gauss rules for ``z^T f(A) z`` of k and of fewer steps, and ``<f'(A) z, A z>``."""
    image = A._matmat(z)
    check_finite(A, image)
    T = lanczos(A, z, steps, image=image.detach())
    scale = T.norms.to(WIDE).square()
    k = T.diagonal.shape[1]
    nodes, weights, vectors = _nodes(T, k)
    check_nodes(nodes)
    values = scale * (weights * applied(f, nodes)).sum(1)
    # An invariant space leaves no error of quadrature, nor one to extrapolate.
    invariant = T.remainder == 0
    coarse = []
    # Single differences go up and down with the step; those of two steps do less.
    stride = 2 if k > 4 else 1
    for fewer in (k - stride, k - 2 * stride):
        if fewer < 1:  # k = n, invariant
            coarse.append(values.detach())
            continue
        nodes_, weights_, _ = _nodes(T, fewer)
        rule = scale * (weights_ * applied(f, nodes_).detach()).sum(1)
        coarse.append(torch.where(invariant, values.detach(), rule))

    def total(nodes: Tensor) -> Tensor:
        return f(nodes).sum()

    # f'(A) z ~ V f'(T) e_1 |z|.
    slope = vectors @ (vectors[:, 0, :] * torch.func.grad(total)(nodes))[..., None]
    adjoint = (T.basis.mT @ slope.to(A.dtype))[..., 0].T * T.norms
    slopes: Tensor = _Weighted.apply(image, adjoint)
    return values, coarse[0], coarse[1], slopes


def _nodes(T: Tridiagonals, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights of the Gauss rules, and the eigenvectors they come from."""
    nodes, vectors = torch.linalg.eigh(T.to_dense(steps).to(WIDE))
    return nodes, vectors[:, 0, :].square(), vectors


def applied(f: Function, nodes: Tensor) -> Tensor:
    """``f(nodes)``; raises ValueError where it is not finite, or of another shape."""
    values = f(nodes)
    if not isinstance(values, Tensor) or values.shape != nodes.shape:
        what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"f of shape {tuple(nodes.shape)} gives {what}; expected the same shape")
    if readable(values) and not bool(torch.isfinite(values).all()):
        bad = nodes[~torch.isfinite(values)].flatten()[0]
        raise ValueError(f"f is not finite at {float(bad):.6g}, a Ritz value or eigenvalue of A")
    return values


def extrapolated_error(values: Tensor, coarser: Tensor, coarsest: Tensor) -> Tensor:
    """Twice the error left in a sequence whose differences shrink by r: ``2 d r / (1 - r)``.

    Twice, for where the convergence slows down: of an error ``1 / k`` this is all, once half of it.
    """
    last = (values.detach().mean() - coarser.mean()).abs()
    before = (coarser.mean() - coarsest.mean()).abs()
    ratio = (last / torch.where(before > 0, before, torch.inf)).clamp_max(SLOWEST)
    return last * 2 * ratio / (1 - ratio)


class _Weighted(torch.autograd.Function):
    """``(A z, w) -> <w, A z>`` of each column; w counts as a constant at the first derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, weight: Tensor) -> Tensor:
        return (image * weight).sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor, None]:
        image, weight = ctx.saved_tensors
        return outputs[0] * _Constant.apply(weight, image), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        image, weight = ctx.saved_tensors
        if tangents[0] is None:
            return torch.zeros_like(image[0])
        directional: Tensor = (tangents[0] * _Constant.apply(weight, image)).sum(0)
        return directional


class _Constant(torch.autograd.Function):
    """w, which depends on A as A z does: it must not be differentiated as if it did not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, image: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        raise NotImplementedError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_SECOND)


_SECOND = (
    "second derivatives of a trace or log-determinant estimated by Lanczos quadrature would lack "
    "terms; take method='exact', or an operator whose structure gives it"
)
