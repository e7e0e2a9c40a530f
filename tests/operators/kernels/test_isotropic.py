"""The written-out derivative of blocks of values and Laplacians, against automatic ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import operators as ops
from operators.kernels import pullback

KERNELS = [
    ops.RBF(0.4),
    ops.RBF(torch.tensor([0.4, 0.7])),
    ops.Matern(0.5, nu=2.5),
    ops.Matern(0.5, nu=3.5),
    ops.Matern(0.5, nu=4.5),
    ops.InverseQuadratic(0.6),
    ops.InverseMultiquadric(0.6),
]


def functionals(points: Tensor, value: Tensor | None, laplacian: Tensor | None) -> ops.Functionals:
    """``v + c Lap`` at points."""
    parts = []
    if value is not None:
        parts.append(ops.Functionals.value_at(points) * value)
    if laplacian is not None:
        parts.append(ops.Functionals.laplacian_at(points) * laplacian)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def inputs(seed: int, n: int, m: int, coincident: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(size, 2, generator=g, dtype=torch.float64) for size in (n, m))
    if coincident:
        y = torch.cat([x[:1], y])
    coefficients = [
        torch.randn(size, generator=g, dtype=torch.float64)
        for size in (n, n, len(y), len(y))
    ]  # fmt: skip
    return [x, y, *coefficients]


def block(kernel: ops.Kernel, length: Tensor, *tensors: Tensor) -> Tensor:
    x, y, v, c, w, e = tensors
    moved = kernel.with_parameters({"log_lengthscale": length})
    L, M = functionals(x, v, c), functionals(y, w, e)
    return moved.pairs(moved.lift(L), moved.lift(M))


@settings(deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 1000),
    n=st.integers(1, 5),
    m=st.integers(1, 5),
    coincident=st.booleans(),
)
def test_gradients_are_those_of_automatic_differentiation(
    kernel: ops.Kernel, seed: int, n: int, m: int, coincident: bool
) -> None:
    tensors = [kernel.parameters["log_lengthscale"].double(), *inputs(seed, n, m, coincident)]
    W = torch.randn(n, m + coincident, dtype=torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        return (W * block(kernel, *tensors)).sum()

    moved = [tensor.clone().requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(loss(*moved), moved)
    # Inside a transform each elementwise step is differentiated by itself.
    expected = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max() + 1))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_second_derivatives(kernel: ops.Kernel) -> None:
    tensors = [kernel.parameters["log_lengthscale"].double(), *inputs(3, 3, 2, False)]
    moved = [tensor.clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *t: block(kernel, *t), moved, atol=1e-4, rtol=1e-5)
    assert torch.autograd.gradgradcheck(
        lambda *t: block(kernel, *t).sin(), moved, atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("which", [(True, False, False, True), (False, True, True, False)])
def test_values_against_laplacians(which: tuple[bool, bool, bool, bool]) -> None:
    x, y, *coefficients = inputs(5, 4, 3, True)
    v, c, w, e = (t if on else None for t, on in zip(coefficients, which, strict=True))
    kernel = ops.Matern(0.4, nu=3.5)

    def loss(length: Tensor, x: Tensor, y: Tensor) -> Tensor:
        moved = kernel.with_parameters({"log_lengthscale": length})
        L, M = functionals(x, v, c), functionals(y, w, e)
        return moved.pairs(moved.lift(L), moved.lift(M)).sin().sum()

    tensors = [kernel.parameters["log_lengthscale"].double(), x, y]
    moved = [tensor.clone().requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(loss(*moved), moved)
    for a, b in zip(found, torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_forward_mode_outside_of_transforms() -> None:
    kernel, tensors = ops.RBF(0.4), inputs(1, 3, 2, False)
    length = kernel.parameters["log_lengthscale"].double()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(length, torch.ones_like(length))
        tangent = forward_ad.unpack_dual(block(kernel, dual, *tensors)).tangent
    h = 1e-6
    difference = block(kernel, length + h, *tensors) - block(kernel, length - h, *tensors)
    torch.testing.assert_close(tangent, difference / (2 * h), rtol=1e-6, atol=1e-5)


def test_the_written_derivative_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    apply = pullback._Block.apply
    monkeypatch.setattr(pullback._Block, "apply", lambda *a: (used.append(1), apply(*a))[1])
    x = torch.rand(4, 2, dtype=torch.float64)
    ops.gram(ops.RBF(0.3), ops.Functionals.laplacian_at(x)).to_dense()
    assert used
    used.clear()
    # A profile with parameters of its own is differentiated as it is written.
    ops.gram(ops.RationalQuadratic(0.3), ops.Functionals.laplacian_at(x)).to_dense()
    assert not used
