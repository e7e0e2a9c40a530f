"""Gibbs kernels: constant lengths, wild ones, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import operators as ops
from operators import Functionals
from tests.operators.kernels.families import (
    blocks,
    by_nested_autodiff,
    close,
    float64,
    gibbs,
    net,
    normal,
    random,
)

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_of_a_constant_length_is_rbf(d):
    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    lengths = torch.linspace(0.3, 0.6, d, dtype=float64)
    for function, length in (
        (lambda x: 0.4 + 0 * x[:, :1], 0.4),
        (lambda x: torch.full(x.shape[:-1], 0.4, dtype=float64), 0.4),
        (lambda x: lengths + 0 * x, lengths),
        (lambda x: lengths.expand(x.shape[0], d), lengths),
    ):
        found = ops.gram(ops.Gibbs(function), left, right).to_dense()
        close(found, ops.gram(ops.RBF(length), left, right).to_dense(), 1e-12)


@PROPERTY
@given(st.integers(1, 3), st.booleans(), st.floats(0.5, 3.0), st.integers(0, 99))
def test_is_positive_semidefinite_for_a_wild_length(d, each, wildness, seed):
    waves = 3 * wildness * normal(d, d if each else 1, seed=seed)

    def length(x):
        return 0.05 * torch.exp(wildness * torch.sin(x @ waves))

    rows = blocks(random(18, d, seed=seed), seed)
    K = ops.gram(ops.Gibbs(length), rows)
    K = ops.KernelGram(K.left.scaled(K.left.variances().rsqrt())).to_dense()
    close(K.diagonal(), torch.ones(18, dtype=float64), 1e-12)
    assert float(torch.linalg.eigvalsh(K)[0]) > -1e-12


@pytest.mark.parametrize("d", [1, 2, 3])
def test_wild_lengths(d):
    for each in (False, True):
        waves = 4 * normal(d, d if each else 1, seed=d)

        def length(x, waves=waves):
            return 0.2 * torch.exp(torch.sin(x @ waves))

        x = random(18, d, seed=1)
        left, right = blocks(x, 3), blocks(torch.cat([x[:9], random(9, d, seed=2)]), 4)
        found = ops.gram(ops.Gibbs(length), left, right).to_dense()
        close(found, by_nested_autodiff(gibbs(length), left, right), 1e-11)


def test_lengths_without_an_axis_and_without_a_rule():
    def length(x):
        return 0.3 + torch.erf(x[:, 0]) ** 2

    left, right = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    found = ops.gram(ops.Gibbs(length), left, right).to_dense()
    expected = by_nested_autodiff(gibbs(lambda x: length(x)[:, None]), left, right)
    close(found, expected, 1e-11)


def test_the_network_is_evaluated_once_a_point():
    """Its length, slope and bend in one sweep over n points, never over n^2 pairs."""
    seen = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = net(2, 5, 1, last=nn.Softplus())

        def forward(self, x):
            seen.append(tuple(x.shape))
            return self.inside(x)

    K = ops.gram(ops.Gibbs(Counted()), Functionals.laplacian_at(random(30, 2)))
    K.to_dense()
    K @ torch.ones(30, dtype=float64)
    assert seen == [(30, 2)]


@pytest.mark.parametrize("each", [False, True])
def test_parameters_of_the_network_are_differentiated(each):
    kernel = ops.Gibbs(net(2, 4, 2 if each else 1, last=nn.Softplus()))
    x = random(18, 2, seed=1)
    left, right = blocks(x, 3), blocks(torch.cat([x[:9], random(9, 2, seed=2)]), 4)
    u, v = normal(18, seed=1), normal(18, seed=2)

    def f(parameters):
        return u @ (ops.gram(kernel.with_parameters(parameters), left, right) @ v)

    gradient = torch.func.grad(f)(kernel.parameters)
    for name, tensor in kernel.parameters.items():
        direction = normal(*tensor.shape)
        moved = [
            f({**kernel.parameters, name: tensor + h * direction}).item() for h in (1e-5, -1e-5)
        ]
        slope = float((gradient[name] * direction).sum())
        assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)


def test_refuses():
    x = random(3, 3)
    for length in (lambda z: -z[:, :1], lambda z: 0 * z[:, :1], lambda z: z[:, :1] / 0 * 0):
        with pytest.raises(
            ValueError, match=r"the length-scale is .* at a point; expected positive"
        ):
            ops.Gibbs(length)(x)
    with pytest.raises(ValueError, match=r"has 2 components; expected 1, or 3: one for each"):
        ops.Gibbs(lambda z: z[:, :2] + 1)(x)
    with pytest.raises(ValueError, match=r"a function of points \(3, 3\) returned"):
        ops.Gibbs(lambda z: z[:2])(x)
    with pytest.raises(TypeError, match=r"lengthscale is a float; expected a function"):
        ops.Gibbs(0.3)
