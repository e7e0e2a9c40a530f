"""Gaussian kernels coordinate by coordinate: against embeddings, automatic derivatives, mpmath."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import Functionals
from operators.kernels import radial
from operators.kernels.gaussian import gaussian_pairs
from tests.operators.kernels.families import blocks, close, float64, normal, random

CIRCLES = ([False], [True], [False, True], [True, True], [True, False, False])


def pairs(left: list[Functionals], right: list[Functionals], rates: Tensor, circles: list[bool]):
    rows = [torch.cat([gaussian_pairs(L, M, rates, circles) for M in right], -1) for L in left]
    return torch.cat(rows, -2)


@pytest.mark.parametrize("circles", CIRCLES, ids=repr)
def test_is_the_kernel_on_embedded_circles(circles: list[bool]) -> None:
    """``1 - cos p`` is half the square of the chord: an RBF kernel of ``(cos, sin)``."""
    d, rates = len(circles), torch.linspace(0.4, 2.0, len(circles), dtype=float64)
    left, right = blocks(2 * random(18, d, seed=1), 3), blocks(2 * random(18, d, seed=2), 4)

    def embedded(z: Tensor) -> Tensor:
        parts = []
        for a, circle in enumerate(circles):
            images = [z[:, a].cos(), z[:, a].sin()] if circle else [z[:, a]]
            parts += [image * rates[a].sqrt() for image in images]
        return torch.stack(parts, -1)

    # Inverse powers have no such product: the general path, and nothing of this one.
    general = ops.Radial(lambda s: torch.exp(-s))
    expected = ops.gram(ops.WarpedKernel(general, embedded), left, right).to_dense()
    close(pairs(left, right, rates, circles), expected, 1e-11)


def test_rbf_takes_it_in_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = radial.gaussian_pairs
    monkeypatch.setattr(radial, "gaussian_pairs", lambda *a: (used.append(1), original(*a))[1])
    x = random(4, 2)
    ops.gram(ops.RBF(0.3), Functionals(random(4, 3), hessian=normal(4, 3, 3))).to_dense()
    ops.gram(ops.RBF(0.3), Functionals.laplacian_at(x)).to_dense()
    assert not used
    L = Functionals.gradient_at(x, 0) + Functionals.second_at(x, 1, 1)
    ops.gram(ops.RBF(0.3), L).to_dense()
    assert used


@settings(deadline=None, max_examples=40)
@given(
    circles=st.sampled_from(CIRCLES),
    seed=st.integers(0, 1000),
    first=st.integers(0, 8),
    second=st.integers(0, 8),
    coincident=st.booleans(),
)
def test_gradients_are_those_of_automatic_differentiation(
    circles: list[bool], seed: int, first: int, second: int, coincident: bool
) -> None:
    d = len(circles)
    x, y = random(18, d, seed=seed), random(18, d, seed=seed + 1)
    if coincident:
        y = x
    L, M = blocks(x, seed)[first], blocks(y, seed + 1)[second]
    rates = 0.5 + random(d, seed=seed)
    names = ("points", "value", "gradient", "laplacian", "hessian")
    held = [[n for n in names if getattr(one, n) is not None] for one in (L, M)]
    tensors = [getattr(one, n) for one, known in zip((L, M), held, strict=True) for n in known]
    W = normal(len(L), len(M), seed=seed)

    def loss(rates: Tensor, *tensors: Tensor) -> Tensor:
        each = iter(tensors)
        moved = [
            Functionals(**{n: next(each) for n in known}, entries=one.entries, axes=one.axes)
            for one, known in zip((L, M), held, strict=True)
        ]
        return (W * gaussian_pairs(*moved, rates, circles)).sum()

    leaves = [leaf.clone().requires_grad_() for leaf in (rates, *tensors)]
    found = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    # Inside a transform each elementwise step is differentiated by itself.
    expected = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(rates, *tensors)
    for a, b in zip(found, expected, strict=True):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max() + 1))


def test_second_derivatives() -> None:
    x, y = random(3, 2, seed=1), random(2, 2, seed=2)

    def block(rates: Tensor, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        L = c * (Functionals.gradient_at(x, 0) + Functionals.second_at(x, 1, 1))
        return gaussian_pairs(L, Functionals.second_at(y, 0, 1), rates, [False, True])

    leaves = [
        leaf.requires_grad_() for leaf in (torch.tensor([0.7, 1.3], dtype=float64), x, y, normal(3))
    ]
    assert torch.autograd.gradcheck(block, leaves)
    assert torch.autograd.gradgradcheck(lambda *t: block(*t).sin(), leaves)


@pytest.mark.parametrize("p", [0.0, 1e-9, 1e-4, 1.0, 3.1])
def test_fourth_derivative_on_a_circle_to_all_digits(p: float) -> None:
    rate = 46.0
    with mpmath.workdps(50):
        at, step = mpmath.mpf(p), mpmath.mpf("1e-9")
        exact = mpmath.diff(lambda t: mpmath.exp(rate * (mpmath.cos(t) - 1)), at, 4, h=step)
    x, y = (torch.tensor([[value]], dtype=float64) for value in (p, 0.0))
    L, M = Functionals.second_at(x, 0, 0), Functionals.second_at(y, 0, 0)
    found = float(gaussian_pairs(L, M, torch.tensor([rate], dtype=float64), [True]))
    assert abs(found - float(exact)) <= 1e-12 * max(abs(float(exact)), 3 * rate**2 * 1e-3)


def test_float32_and_batches() -> None:
    x = random(2, 3, 2).float()
    L = Functionals.gradient_at(x, 0) + Functionals.value_at(x)
    rates = torch.tensor([0.5, 2.0])
    found = gaussian_pairs(L, L, rates, [True, False])
    assert found.dtype == torch.float32
    for k in range(2):
        expected = gaussian_pairs(L[k], L[k], rates, [True, False])
        torch.testing.assert_close(found[k], expected)
