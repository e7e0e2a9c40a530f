"""Every kernel against nested automatic differentiation; algebra and parameters of kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import operators as ops
from operators import Functionals
from operators.kernels.kernel import log_of
from tests.operators.kernels.families import (
    blocks,
    by_nested_autodiff,
    close,
    float64,
    generator,
    kernels,
    net,
    random,
)

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
NAMES = list(kernels(2))


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_is_nested_autodiff_of_its_formula(name, d):
    kernel, pair = kernels(d)[name]
    x, y = random(18, d, seed=1), random(18, d, seed=2)
    left, right = blocks(x, 3), blocks(y, 4)
    close(ops.gram(kernel, left, right).to_dense(), by_nested_autodiff(pair, left, right))


@pytest.mark.parametrize("name", NAMES)
def test_coincident_points(name):
    kernel, pair = kernels(2)[name]
    x = random(18, 2, seed=1)
    left, right = blocks(x, 3), blocks(x.clone(), 4)
    expected = by_nested_autodiff(pair, left, right)
    close(ops.gram(kernel, left, right).to_dense(), expected)
    expected = by_nested_autodiff(pair, left, left)
    close(ops.gram(kernel, left).to_dense(), expected)
    close(ops.Representers(kernel, left).variances(), expected.diagonal())


@pytest.mark.parametrize("name", NAMES)
def test_values(name):
    kernel, pair = kernels(2)[name]
    x, y = random(4, 2, seed=1), random(3, 2, seed=2)
    expected = torch.stack([torch.stack([pair(a, b) for b in y]) for a in x])
    close(kernel(x, y), expected, 1e-14)
    close(kernel(x), kernel(x, x.clone()), 1e-15)


@PROPERTY
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(0, 99))
def test_grams_are_symmetric_and_positive_semidefinite(name, d, seed):
    kernel, _ = kernels(d)[name]
    if name == "radial":
        return  # a function of one's own need not be positive definite, and this one is not
    K = ops.gram(kernel, blocks(random(18, d, seed=seed), seed + 1)).to_dense()
    close(K.mT, K, 1e-14)
    values = torch.linalg.eigvalsh(K)
    assert float(values[0]) >= -1e-12 * float(values[-1])


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_stays(name):
    kernel, _ = kernels(2)[name]
    single = pytree.tree_map(lambda leaf: leaf.float(), kernel)
    x = random(18, 2, seed=1)
    left, right = blocks(x, 3), blocks(random(18, 2, seed=2), 4)
    exact = ops.gram(kernel, left, right).to_dense()
    lowered = [pytree.tree_map(lambda leaf: leaf.float(), side) for side in (left, right)]
    K = ops.gram(single, *lowered)
    assert K.dtype == torch.float32
    close(K.to_dense(), exact.float(), 2e-5)
    v = torch.ones(18)
    assert (K @ v).dtype == torch.float32


def test_numbers_do_not_decide_the_precision():
    x = torch.rand(3, 2, generator=generator())
    for kernel in (
        2.0 * ops.RBF(0.3) + ops.Matern(0.3, 3.5),
        ops.RationalQuadratic(0.3, 0.5) * ops.Polynomial(2),
        ops.PeriodicKernel(ops.InverseQuadratic(0.3), {1: 1.0}, 0.5),
        ops.Linear(2.0) + ops.White(0.1),
        ops.CoordinatesKernel(ops.InverseMultiquadric(0.5), [1]),
        ops.Gibbs(lambda z: 0.1 + z[:, :1] ** 2),
    ):
        assert kernel(x).dtype == torch.float32


# --- algebra -----------------------------------------------------------------------------------


def grams(kernel, d=2):
    x, y = random(18, d, seed=1), random(18, d, seed=2)
    return ops.gram(kernel, blocks(x, 3), blocks(y, 4)).to_dense()


def test_sums_and_multiples_are_those_of_matrices():
    a, b = ops.RBF(0.5), ops.Matern(0.4, 3.5)
    close(grams(a + b), grams(a) + grams(b), 1e-15)
    close(grams(3 * a), 3 * grams(a), 1e-14)
    close(grams(a * 0.25), 0.25 * grams(a), 1e-14)
    close(grams(torch.tensor(3.0, dtype=float64) * a), 3 * grams(a), 1e-14)
    assert (a + ops.Matern(0.4, 1.5)).smoothness == 1.5
    assert (a * ops.Matern(0.4, 1.5)).smoothness == 1.5
    assert (2.0 * ops.Matern(0.4, 1.5)).smoothness == 1.5


def test_products_commute_and_associate():
    a, b, c = ops.RBF(0.5), ops.Matern(0.4, 3.5), ops.Polynomial(2)
    close(grams(a * b), grams(b * a), 1e-13)
    few = blocks(random(18, 2))[-2:]
    left = ops.gram((a * b) * c, few).to_dense()
    close(left, ops.gram(a * (b * c), few).to_dense(), 1e-13)
    close(grams(a * (b + c)), grams(a * b + a * c), 1e-13)


def test_product_of_values_is_that_of_numbers():
    x = random(5, 2)
    a, b = ops.RBF(0.5), ops.White(2.0)
    close((a * b)(x), a(x) * b(x), 1e-14)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_ard_is_a_product_over_coordinates(d):
    lengths = torch.linspace(0.3, 0.9, d, dtype=float64)
    product = ops.CoordinatesKernel(ops.RBF(lengths[0]), [0])
    for a in range(1, d):
        product = product * ops.CoordinatesKernel(ops.RBF(lengths[a]), [a])
    close(grams(product, d), grams(ops.RBF(lengths), d), 1e-13)


# --- parameters --------------------------------------------------------------------------------


def test_names():
    module = net(2, 3, 1, last=torch.nn.Softplus())
    kernel = 2.0 * ops.Gibbs(module) + ops.WarpedKernel(
        ops.RationalQuadratic(0.3, 0.5), net(2, 3, 2)
    ) * ops.Radial(lambda s, a: torch.exp(-a * s), 0.5, a=torch.tensor(0.3, dtype=float64))
    assert list(kernel.parameters) == [
        "left.log_variance",
        "left.kernel.lengthscale.0.weight",
        "left.kernel.lengthscale.0.bias",
        "left.kernel.lengthscale.2.weight",
        "left.kernel.lengthscale.2.bias",
        "right.left.kernel.log_lengthscale",
        "right.left.kernel.log_alpha",
        "right.left.warp.0.weight",
        "right.left.warp.0.bias",
        "right.left.warp.2.weight",
        "right.left.warp.2.bias",
        "right.right.log_lengthscale",
        "right.right.shape.a",
    ]
    leaves = pytree.tree_leaves(kernel)
    assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in kernel.parameters.values()]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_round_trip(name):
    kernel, _ = kernels(2)[name]
    again = kernel.with_parameters(kernel.parameters)
    assert type(again) is type(kernel)
    assert repr(again) == repr(kernel)
    assert list(again.parameters) == list(kernel.parameters)
    x = random(4, 2)
    assert bool((again(x) == kernel(x)).all())


def test_with_parameters_changes_the_named_and_keeps_the_rest():
    kernel = 2.0 * ops.RBF(0.5) + ops.Linear()
    longer = kernel.with_parameters({"left.kernel.log_lengthscale": torch.tensor(1.0).double()})
    assert float(longer.left.kernel.lengthscale) == pytest.approx(torch.e)
    assert float(kernel.left.kernel.lengthscale) == pytest.approx(0.5)
    assert longer.parameters["left.log_variance"] is kernel.parameters["left.log_variance"]


def test_with_parameters_refuses():
    kernel = ops.RBF(0.5)
    with pytest.raises(ValueError, match=r"'lengthscale' is no parameter .* it has log_length"):
        kernel.with_parameters({"lengthscale": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"log_lengthscale has shape \(2,\); expected \(\)"):
        kernel.with_parameters({"log_lengthscale": torch.ones(2)})


def test_given_tensors_keep_their_graph():
    length = torch.tensor(0.5, dtype=float64, requires_grad=True)
    variance = torch.tensor(2.0, dtype=float64, requires_grad=True)
    kernel = variance * ops.RBF(length)
    x = random(3, 2)
    value = kernel(x).sum()
    by_length, by_variance = torch.autograd.grad(value, (length, variance))
    s = ((x[:, None] - x) ** 2).sum(-1)
    E = torch.exp(-s / 0.5)
    close(by_variance, E.sum(), 1e-14)
    close(by_length, (2 * E * s / 0.5**3).sum(), 1e-14)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])])
def test_parameters_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match=r"lengthscale=.*; expected positive finite numbers"):
        log_of(value, "lengthscale")


@pytest.mark.parametrize("value", ["a", None, True, [1.0], torch.tensor(1)])
def test_parameters_must_be_numbers(value):
    with pytest.raises(TypeError, match=r"expected a (positive number|floating dtype)"):
        log_of(value, "lengthscale")


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t * ops.RBF(0.3),
        lambda t: ops.Linear(t),
        lambda t: ops.White(t),
        lambda t: ops.Polynomial(2, t),
        lambda t: ops.Polynomial(2, 1.0, t),
        lambda t: ops.RationalQuadratic(0.3, t),
    ],
)
def test_one_number_where_one_is_meant(make):
    """A field of variances would else be taken for coefficients of as many functionals."""
    with pytest.raises(ValueError, match=r"has shape \(2,\); expected a number"):
        make(torch.tensor([1.0, 2.0], dtype=float64))


def test_algebra_with_something_else():
    for wrong in (
        lambda: ops.RBF() + 1,
        lambda: ops.RBF() * "a",
        lambda: ops.RBF() + torch.ones(()),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_smoothness_is_checked():
    x = random(3, 2)
    lap, grad = Functionals.laplacian_at(x), Functionals.gradient_at(x, 0)
    for kernel, L in (
        (ops.Matern(0.3, 0.5), grad),
        (ops.Matern(0.3, 1.5), lap),
        (ops.Matern(0.3, 1.5) + ops.RBF(0.3), lap),
        (ops.RBF(0.3) * ops.Matern(0.3, 0.5), grad),
        (ops.White(), grad),
        (ops.RBF(0.3) + ops.White(), lap),
        (ops.WarpedKernel(ops.Matern(0.3, 1.5), lambda z: 2 * z), lap),
        (ops.PeriodicKernel(ops.Matern(0.3, 1.5), {0: 1.0}), lap),
        (ops.CoordinatesKernel(ops.Matern(0.3, 1.5), [0]), lap),
    ):
        assert L.order >= kernel.smoothness
        with pytest.raises(ValueError, match=f"no derivatives of order {L.order}"):
            ops.gram(kernel, L)


def test_reprs():
    assert (
        repr(2.0 * ops.RBF(0.5) + ops.Linear()) == "2 * RBF(lengthscale=0.5) + Linear(variance=1)"
    )
    assert repr(ops.RBF(0.5) * ops.Matern(1.0, 3.5)) == (
        "RBF(lengthscale=0.5) * Matern(lengthscale=1, nu=3.5)"
    )
    assert repr(ops.RBF(torch.ones(8))) == "RBF(lengthscale=tensor(8,))"
    assert repr(ops.RBF(torch.tensor([1.0, 2.0]))) == "RBF(lengthscale=[1, 2])"
    assert repr(ops.Gibbs(net(2, 3, 1))) == "Gibbs(Sequential of 13 parameters)"
    assert repr(ops.CoordinatesKernel(ops.RBF(1.0), [1])) == "RBF(lengthscale=1) of [1]"
    shown = []
    torch.func.grad(lambda t: (shown.append(repr(ops.RBF(t))), t)[1])(torch.tensor(1.0))
    assert shown == ["RBF(lengthscale=...)"]


def test_products_are_shown_with_the_sums_in_them():
    a, b = ops.RBF(1.0), ops.Linear()
    assert repr((a + b) * a) == "(RBF(lengthscale=1) + Linear(variance=1)) * RBF(lengthscale=1)"
    assert repr(2.0 * (a + b)) == "2 * (RBF(lengthscale=1) + Linear(variance=1))"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_function_is_nothing(name):
    """Functionals without any coefficient: rows of zeros."""
    kernel, _ = kernels(2)[name]
    x = random(3, 2)
    K = ops.gram(kernel, [Functionals(x), Functionals.value_at(x)])
    expected = torch.zeros(6, 6, dtype=float64)
    expected[3:, 3:] = kernel(x)
    assert bool((K.to_dense() == expected).all())
    close(K @ torch.ones(6, dtype=float64), expected.sum(1), 1e-13)
    assert bool((K.left.variances()[:3] == 0).all())
