"""`Jacobian`, `Hessian`, `CrossDerivative` against torch.autograd and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from operators import CrossDerivative, Hessian, Jacobian, Space

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 1, 0, 1, 0])

Params = dict[str, dict[str, Tensor]]


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> Params:
    """Parameters of a network 3 -> 2 -> 2: 14 numbers in a nested dict."""
    return {
        "hidden": {"weight": sampled(2, 3, seed=seed), "bias": sampled(2, seed=seed + 1)},
        "out": {"weight": sampled(2, 2, seed=seed + 2), "bias": sampled(2, seed=seed + 3)},
    }


def outer(seed: int = 0) -> dict[str, Tensor]:
    """Outer variables: a weight for each sample and a penalty."""
    return {"weights": sampled(6, seed=seed + 10), "penalty": sampled(seed=seed + 11)}


def logits(y: Params) -> Tensor:
    hidden = torch.tanh(INPUTS @ y["hidden"]["weight"].T + y["hidden"]["bias"])
    return hidden @ y["out"]["weight"].T + y["out"]["bias"]


def inner_loss(y: Params, x: dict[str, Tensor]) -> Tensor:
    losses = torch.nn.functional.cross_entropy(logits(y), TARGETS, reduction="none")
    penalty = sum((leaf**2).sum() for layer in y.values() for leaf in layer.values())
    return (torch.sigmoid(x["weights"]) * losses).mean() + torch.exp(x["penalty"]) * penalty


def flattened(function: Callable, space: Space) -> Callable[[Tensor], Tensor]:
    return lambda vector: function(space.unravel(vector))


def central(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """Fourth-order central difference of a function along a direction; error about 1e-11."""
    h = 1e-3
    near = function(point + h * direction) - function(point - h * direction)
    far = function(point + 2 * h * direction) - function(point - 2 * h * direction)
    return (8 * near - far) / (12 * h)


seeds = st.integers(0, 999)


@PROPERTY
@given(seeds, st.sampled_from(["reverse", "forward"]))
def test_hessian_is_that_of_autograd(seed, mode):
    y, x = network(seed), outer(seed)
    space = Space.of(y)
    loss = flattened(lambda y: inner_loss(y, x), space)
    A = Hessian(lambda y: inner_loss(y, x), y, mode=mode)
    expected = torch.autograd.functional.hessian(loss, space.ravel(y), vectorize=True)
    torch.testing.assert_close(A.to_dense(), expected, rtol=1e-10, atol=1e-10)


@PROPERTY
@given(seeds, st.sampled_from(["reverse", "forward"]))
def test_hessian_is_the_difference_of_gradients_and_self_adjoint(seed, mode):
    y, x = network(seed), outer(seed)
    space = Space.of(y)
    gradient = torch.func.grad(flattened(lambda y: inner_loss(y, x), space))
    A = Hessian(lambda y: inner_loss(y, x), y, mode=mode)
    u, v = sampled(space.size, seed=seed + 20), sampled(space.size, seed=seed + 21)
    torch.testing.assert_close(A @ v, central(gradient, space.ravel(y), v), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(u @ (A @ v), v @ (A @ u), rtol=1e-11, atol=1e-11)


@PROPERTY
@given(seeds)
def test_jacobian_and_its_transpose_are_those_of_autograd(seed):
    y = network(seed)
    space = Space.of(y)
    A = Jacobian(logits, y)
    expected = torch.autograd.functional.jacobian(
        flattened(lambda y: logits(y).reshape(-1), space), space.ravel(y)
    )
    assert A.shape == (12, 14)
    torch.testing.assert_close(A.to_dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.T.to_dense(), expected.T, rtol=1e-12, atol=1e-12)
    v = sampled(space.size, seed=seed + 20)
    difference = central(flattened(logits, space), space.ravel(y), v)
    torch.testing.assert_close(A @ v, difference.reshape(-1), rtol=1e-7, atol=1e-8)


@PROPERTY
@given(seeds)
def test_cross_derivative_is_the_block_of_the_full_hessian(seed):
    y, x = network(seed), outer(seed)
    inner_space, outer_space = Space.of(y), Space.of(x)
    d, p = inner_space.size, outer_space.size

    def joint(z: Tensor) -> Tensor:
        return inner_loss(inner_space.unravel(z[:d]), outer_space.unravel(z[d:]))

    point = torch.cat([inner_space.ravel(y), outer_space.ravel(x)])
    expected = torch.autograd.functional.hessian(joint, point, vectorize=True)
    expected = expected[d:, :d]  # rows: outer
    C = CrossDerivative(inner_loss, y, x)
    assert C.shape == (p, d)
    torch.testing.assert_close(C.to_dense(), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(C.T.to_dense(), expected.T, rtol=1e-10, atol=1e-11)


@PROPERTY
@given(seeds)
def test_cross_derivative_by_its_definition_and_its_adjoint(seed):
    y, x = network(seed), outer(seed)
    inner_space, outer_space = Space.of(y), Space.of(x)
    C = CrossDerivative(inner_loss, y, x)
    q, p = sampled(inner_space.size, seed=seed + 20), sampled(outer_space.size, seed=seed + 21)

    # C q = grad_x <grad_y G, q>, by two reverse sweeps of torch.autograd
    y_leaf = inner_space.ravel(y).requires_grad_()
    x_leaf = outer_space.ravel(x).requires_grad_()
    loss = inner_loss(inner_space.unravel(y_leaf), outer_space.unravel(x_leaf))
    (gradient,) = torch.autograd.grad(loss, y_leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient @ q, x_leaf)
    torch.testing.assert_close(C @ q, expected, rtol=1e-11, atol=1e-12)

    torch.testing.assert_close(p @ (C @ q), q @ (C.T @ p), rtol=1e-11, atol=1e-12)

    def slope(x: Tensor) -> Tensor:
        loss = flattened(lambda y: inner_loss(y, outer_space.unravel(x)), inner_space)
        return torch.func.grad(loss)(inner_space.ravel(y))

    difference = central(slope, outer_space.ravel(x), p)
    torch.testing.assert_close(C.T @ p, difference, rtol=1e-7, atol=1e-8)


class TestUnusedParameters:
    """What a function does not touch has derivative zero, not None and not an error."""

    def test_hessian(self):
        y = {"used": sampled(2), "unused": sampled(3), "linear": sampled(1)}
        A = Hessian(lambda y: (y["used"] ** 3).sum() + y["linear"].sum(), y)
        expected = torch.diag(torch.cat([6 * y["used"], torch.zeros(4).double()]))
        torch.testing.assert_close(A.to_dense(), expected)

    def test_hessian_of_a_constant(self):
        assert torch.equal(
            Hessian(lambda y: torch.tensor(1.0), torch.ones(2)).to_dense(), torch.zeros(2, 2)
        )

    def test_jacobian(self):
        y = {"used": sampled(2), "unused": sampled(3)}
        A = Jacobian(lambda y: [2 * y["used"], torch.ones(2).double()], y)
        expected = torch.zeros(4, 5).double()
        expected[:2, :2] = 2 * torch.eye(2)
        assert torch.equal(A.to_dense(), expected)
        assert torch.equal(A.T.to_dense(), expected.T)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda y, x: (y["used"] ** 2).sum(),
            lambda y, x: (x["used"] ** 2).sum(),
            lambda y, x: (y["used"] ** 2).sum() + (x["used"] ** 2).sum(),
            lambda y, x: torch.tensor(1.0),
        ],
        ids=["of x", "of y", "additive", "constant"],
    )
    def test_cross_derivative_where_nothing_crosses(self, loss):
        C = CrossDerivative(
            loss,
            {"used": torch.ones(2), "unused": torch.ones(1)},
            {"used": torch.ones(3), "unused": torch.ones(())},
        )
        assert torch.equal(C.to_dense(), torch.zeros(4, 3))
        assert torch.equal(C.T.to_dense(), torch.zeros(3, 4))

    def test_cross_derivative_with_some_that_cross(self):
        y = {"used": sampled(2), "unused": sampled(3)}
        x = {"unused": sampled(1), "used": sampled(2, seed=1)}
        C = CrossDerivative(lambda y, x: (x["used"] * y["used"] ** 2).sum(), y, x)
        expected = torch.zeros(3, 5).double()
        expected[1:, :2] = torch.diag(2 * y["used"])
        torch.testing.assert_close(C.to_dense(), expected)
        torch.testing.assert_close(C.T.to_dense(), expected.T)


class TestUnderTransforms:
    """The operators are functions of their point: torch.func goes through them."""

    def test_vmap_over_the_point(self):
        points, v = sampled(4, 3), sampled(3, seed=1)
        products = torch.func.vmap(lambda y: Hessian(lambda y: (y**3).sum(), y) @ v)(points)
        torch.testing.assert_close(products, 6 * points * v)
        products = torch.func.vmap(lambda y: Jacobian(torch.sin, y).T @ v)(points)
        torch.testing.assert_close(products, torch.cos(points) * v)
        products = torch.func.vmap(
            lambda y: CrossDerivative(lambda y, x: (x * y**2).sum(), y, v) @ v
        )(points)
        torch.testing.assert_close(products, 2 * points * v)

    def test_grad_through_a_hessian_product_is_the_third_derivative(self):
        y, v = sampled(3), sampled(3, seed=1)

        def curvature(y):
            return v @ (Hessian(lambda y: (y**4).sum(), y) @ v)

        torch.testing.assert_close(torch.func.grad(curvature)(y), 24 * y * v**2)

    def test_jacrev_and_jacfwd_over_a_parameter_of_the_loss(self):
        y, v, x = sampled(3), sampled(3, seed=1), sampled(3, seed=2)

        def product(x):
            return Hessian(lambda y: (x * y**3).sum(), y) @ v

        expected = torch.diag(6 * y * v)
        torch.testing.assert_close(torch.func.jacrev(product)(x), expected)
        torch.testing.assert_close(torch.func.jacfwd(product)(x), expected)

    def test_jacrev_of_a_cross_product(self):
        y, x, q = sampled(3), sampled(3, seed=1), sampled(3, seed=2)

        def product(y):
            return CrossDerivative(lambda y, x: (x**2 * y**3).sum(), y, x) @ q

        expected = torch.diag(12 * x * y * q)
        torch.testing.assert_close(torch.func.jacrev(product)(y), expected)

    def test_backward_through_a_product(self):
        y = sampled(3).requires_grad_()
        v = sampled(3, seed=1)
        (v @ (Hessian(lambda y: (y**4).sum(), y) @ v)).backward()
        torch.testing.assert_close(y.grad, 24 * y.detach() * v**2)

    def test_under_no_grad(self):
        y, v = sampled(3), sampled(3, seed=1)
        with torch.no_grad():
            product = Hessian(lambda y: (y**3).sum(), y) @ v
        torch.testing.assert_close(product, 6 * y * v)


class TestKeptGraph:
    """In reverse mode the gradient's graph outlives a product; no later product may notice."""

    matrix = sampled(4, 4, seed=5)
    v, block = sampled(4, seed=6), sampled(4, 3, seed=7)

    def loss(self, y: Tensor) -> Tensor:
        return (torch.sin(self.matrix @ y) ** 2).sum() + (y**4).sum()

    def dense(self, y: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, y.detach())

    def slope(self, y: Tensor) -> Tensor:
        """Gradient in y of ``<v, A v>``."""
        return torch.autograd.functional.jacobian(
            lambda y: (
                self.v @ torch.autograd.functional.hvp(self.loss, y, self.v, create_graph=True)[1]
            ),
            y.detach(),
        )

    @pytest.mark.parametrize(
        "first", ["vector", "block", "empty", "vmap", "grad", "jvp", "no_grad"]
    )
    def test_products_after_a_first_one_of_another_kind(self, first):
        y = sampled(4)
        A = Hessian(self.loss, y)
        if first == "vector":
            A @ self.v
        elif first == "block":
            A @ self.block
        elif first == "empty":
            A @ self.block[:, :0]
        elif first == "vmap":
            torch.func.vmap(lambda block: A @ block)(self.block[None])
        elif first == "grad":
            torch.func.grad(lambda v: v @ (A @ v))(self.v)
        elif first == "jvp":
            torch.func.jvp(lambda v: A @ v, (self.v,), (self.v,))
        else:
            with torch.no_grad():
                A @ self.v
        expected = self.dense(y)
        torch.testing.assert_close(A @ self.v, expected @ self.v)
        torch.testing.assert_close(A @ self.block, expected @ self.block)
        slope = torch.func.grad(lambda v: v @ (A @ v))(self.v)
        torch.testing.assert_close(slope, 2 * expected @ self.v)
        tangent = torch.func.jvp(lambda v: A @ v, (self.v,), (self.v,))[1]
        torch.testing.assert_close(tangent, expected @ self.v)

    def test_it_is_kept(self):
        calls = []

        def loss(y):
            calls.append(1)
            return (y**4).sum()

        A = Hessian(loss, sampled(4))
        for _ in range(5):
            A @ self.v
            A @ self.block
        assert len(calls) == 1

    def test_y_stepped_in_place(self):
        """As torch.optim does. Half of a stale graph would be no Hessian of anything."""
        y = sampled(4)
        A = Hessian(self.loss, y)
        A @ self.v
        y.add_(1.0)
        torch.testing.assert_close(A @ self.v, self.dense(y) @ self.v)

    def test_a_product_without_grad_does_not_cut_later_ones_off_from_y(self):
        y = sampled(4).requires_grad_()
        A = Hessian(self.loss, y)
        with torch.no_grad():
            A @ self.v
        (slope,) = torch.autograd.grad(self.v @ (A @ self.v), y)
        torch.testing.assert_close(slope, self.slope(y))

    def test_products_can_each_be_differentiated(self):
        y = sampled(4).requires_grad_()
        A = Hessian(self.loss, y)
        for _ in range(2):
            (slope,) = torch.autograd.grad(self.v @ (A @ self.v), y)
            torch.testing.assert_close(slope, self.slope(y))

    def test_products_can_each_be_differentiated_by_what_the_loss_closes_over(self):
        y, scale = sampled(4), torch.tensor(2.0).double().requires_grad_()
        A = Hessian(lambda y: scale * self.loss(y), y)
        for _ in range(2):
            (slope,) = torch.autograd.grad(self.v @ (A @ self.v), scale)
            torch.testing.assert_close(slope, self.v @ self.dense(y) @ self.v)

    def test_mode_that_does_not_exist(self):
        with pytest.raises(ValueError, match=r"mode='both'; expected 'reverse' or 'forward'"):
            Hessian(self.loss, sampled(4), mode="both")


def test_the_history_of_y_is_not_followed():
    """y is a point here: that it was computed from x must not enter C (it would be unrolling)."""
    x = sampled(3).requires_grad_()
    y = 3 * x.square()  # carries a graph back to x
    q = sampled(3, seed=1)
    C = CrossDerivative(lambda y, x: (x * y**2).sum(), y, x)
    expected = 2 * y.detach() * q
    torch.testing.assert_close((C @ q).detach(), expected)
    torch.testing.assert_close((C.T @ q).detach(), expected)
    torch.testing.assert_close(
        (Hessian(lambda y: (y**3).sum(), y) @ q).detach(), 6 * y.detach() * q
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda y: y**2, r"loss returned \(3,\); expected a scalar tensor"),
        (lambda y: (y**2).sum(0, keepdim=True), r"loss returned \(1,\); expected a scalar tensor"),
        (lambda y: 1.0, r"loss returned float; expected a scalar tensor"),
        (lambda y: [y.sum()], r"loss returned list; expected a scalar tensor"),
    ],
)
def test_losses_that_are_not_scalars(value, message):
    y, v = torch.ones(3), torch.ones(3)
    hessian = Hessian(value, y)
    cross = CrossDerivative(lambda y, x: value(y), y, v)
    for product in (
        lambda: hessian @ v,
        lambda: hessian @ torch.ones(3, 2),
        lambda: cross @ v,
        lambda: cross.T @ v,
    ):
        with pytest.raises(ValueError, match=message):
            product()


def test_modules_passed_by_mistake():
    module = torch.nn.Linear(2, 1)
    for build in (
        lambda: Hessian(lambda m: m(torch.ones(2)).sum(), module),
        lambda: Jacobian(lambda m: m(torch.ones(2)), module),
        lambda: CrossDerivative(lambda m, x: m(x).sum(), module, torch.ones(2)),
        lambda: CrossDerivative(lambda x, m: m(x).sum(), torch.ones(2), module),
    ):
        with pytest.raises(TypeError, match=r"(y|x) is a Linear module.*functional_call"):
            build()


def test_a_module_by_functional_call():
    module = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    data = sampled(5, 2)

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (data,)).square().mean()

    A = Hessian(loss, dict(module.named_parameters()))
    torch.testing.assert_close(A.to_dense().detach(), 2 * data.T @ data / 5)


def test_points_and_values_that_are_no_floating_tensors():
    with pytest.raises(TypeError, match=r"y has a leaf of dtype torch.int64"):
        Hessian(lambda y: y.sum(), torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"f\(y\) has a leaf of dtype torch.int64"):
        Jacobian(lambda y: y.argmax(), torch.ones(2))
    with pytest.raises(TypeError, match=r"domain is torch.float32.*codomain is torch.float64"):
        Jacobian(lambda y: y.double(), torch.ones(2))


def test_claims():
    y = torch.ones(2)
    assert Hessian(lambda y: (y**2).sum(), y).symmetric
    assert not Hessian(lambda y: (y**2).sum(), y).positive_semidefinite
    assert Hessian(lambda y: (y**2).sum(), y, positive_definite=True).positive_definite
    assert not Jacobian(torch.sin, y).symmetric
