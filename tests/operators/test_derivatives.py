"""`Jacobian`, `Linearization`, `Hessian`, `CrossDerivative` against autograd and differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from operators import CrossDerivative, Hessian, Jacobian, Linearization, Space

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


def shifted(y: dict[str, Tensor], x: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """From {p: (2,), q: (2, 1)} to {r: (4,), s: ()}; depends on two more arguments."""
    v = torch.cat([y["p"], y["q"][:, 0]])
    return {"r": scale * torch.sin(x * v) + v.roll(1) ** 2, "s": (x * v**3).sum()}


def shifted_loss(y: dict[str, Tensor], x: Tensor, scale: Tensor) -> Tensor:
    image = shifted(y, x, scale)
    return (image["r"] ** 2).sum() + image["s"] * scale


def point(seed: int = 0) -> dict[str, Tensor]:
    return {"p": sampled(2, seed=seed), "q": sampled(2, 1, seed=seed + 1)}


ARGS = (sampled(4, seed=40), sampled(seed=41))


class TestLinearization:
    """The same operator as `Jacobian`, with its sweeps kept."""

    v, u = sampled(4, seed=20), sampled(5, seed=21)

    def counted(self, y, *args) -> tuple[Linearization, list[int]]:
        calls: list[int] = []

        def residual(*at):
            calls.append(1)
            return shifted(*at)

        A = Linearization(residual, y, *args)
        calls.clear()
        return A, calls

    def both(self, seed: int = 0) -> tuple[Linearization, Jacobian]:
        y = point(seed)
        return Linearization(shifted, y, *ARGS), Jacobian(shifted, y, *ARGS)

    @PROPERTY
    @given(seeds)
    def test_is_the_jacobian(self, seed):
        A, J = self.both(seed)
        torch.testing.assert_close(A.to_dense(), J.to_dense())
        torch.testing.assert_close(A.T.to_dense(), J.to_dense().T)
        v, u = sampled(4, seed=seed + 2), sampled(5, seed=seed + 3)
        torch.testing.assert_close(A @ v, J @ v)
        torch.testing.assert_close(A.T @ u, J.T @ u)
        tangent = A @ A.domain.unravel(v)
        assert A.codomain.holds(tangent)
        torch.testing.assert_close(A.codomain.ravel(tangent), J @ v)

    def test_value(self):
        A, _ = self.both()
        assert A.codomain.holds(A.value)
        for key, leaf in shifted(point(), *ARGS).items():
            assert torch.equal(A.value[key], leaf)

    def test_newton(self):
        c = torch.tensor([4.0, 9.0], dtype=torch.float64)
        u = torch.ones(2, dtype=torch.float64)
        for _ in range(8):
            A = Linearization(lambda u, c: u**2 - c, u, c)
            u = u - torch.linalg.solve(A.to_dense(), A.value)
        torch.testing.assert_close(u, c.sqrt())

    def test_one_evaluation_serves_every_product(self):
        A, calls = self.counted(point(), *ARGS)
        block, co_block = sampled(4, 3, seed=22), sampled(5, 3, seed=23)
        for _ in range(3):
            A @ self.v, A.T @ self.u, A @ block, A.T @ co_block
        A.to_dense()
        (A.T @ A) @ self.v
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "first",
        ["vector", "transpose", "block", "empty", "vmap", "grad", "jvp", "no_grad", "inference"],
    )
    def test_products_after_a_first_one_of_another_kind(self, first):
        A, J = self.both()
        uses: dict[str, Callable[[], object]] = {
            "vector": lambda: A @ self.v,
            "transpose": lambda: A.T @ self.u,
            "block": lambda: A @ sampled(4, 3),
            "empty": lambda: (A @ sampled(4, 0), A.T @ sampled(5, 0)),
            "vmap": lambda: torch.func.vmap(lambda v: A.T @ (A @ v))(sampled(3, 4)),
            "grad": lambda: torch.func.grad(lambda v: (A @ v).square().sum())(self.v),
            "jvp": lambda: torch.func.jvp(lambda v: A.T @ (A @ v), (self.v,), (self.v,)),
            "no_grad": lambda: torch.no_grad()(lambda: (A @ self.v, A.T @ self.u))(),
            "inference": lambda: torch.inference_mode()(lambda: (A @ self.v, A.T @ self.u))(),
        }
        uses[first]()
        matrix = J.to_dense()
        torch.testing.assert_close(A @ self.v, matrix @ self.v)
        torch.testing.assert_close(A.T @ self.u, matrix.T @ self.u)
        torch.testing.assert_close(A @ sampled(4, 2), matrix @ sampled(4, 2))
        torch.testing.assert_close(A.T @ sampled(5, 2), matrix.T @ sampled(5, 2))
        slope = torch.func.grad(lambda v: (A @ v).square().sum())(self.v)
        torch.testing.assert_close(slope, 2 * matrix.T @ matrix @ self.v)
        slope = torch.func.grad(lambda u: (A.T @ u).square().sum())(self.u)
        torch.testing.assert_close(slope, 2 * matrix @ matrix.T @ self.u)
        tangent = torch.func.jvp(lambda v: A @ v, (self.v,), (self.v,))[1]
        torch.testing.assert_close(tangent, matrix @ self.v)
        products = torch.func.vmap(lambda v: A @ v)(sampled(3, 4))
        torch.testing.assert_close(products, sampled(3, 4) @ matrix.T)

    def test_u_or_args_changed_in_place(self):
        y, x, scale = point(), ARGS[0].clone(), ARGS[1].clone()
        A = Linearization(shifted, y, x, scale)
        for changed in (y["p"], y["q"], x, scale):
            A @ self.v, A.T @ self.u
            changed.add_(0.5)
            matrix = Jacobian(shifted, y, x, scale).to_dense()
            torch.testing.assert_close(A @ self.v, matrix @ self.v)
            torch.testing.assert_close(A.T @ self.u, matrix.T @ self.u)
            torch.testing.assert_close(A.value, shifted(y, x, scale))

    @pytest.mark.parametrize("which", ["u", "args", "closure"])
    def test_products_can_each_be_differentiated(self, which):
        y, x, scale = point(), ARGS[0].clone(), ARGS[1].clone()
        if which == "closure":
            A = Linearization(lambda y: shifted(y, x, scale), y)
        else:
            A = Linearization(shifted, y, x, scale)
        leaf = (y["p"] if which == "u" else x).requires_grad_()

        def energy(moved):
            at = {**y, "p": moved} if which == "u" else y
            J = Jacobian(shifted, at, x if which == "u" else moved, scale)
            return self.u @ (J @ self.v)

        expected = torch.func.grad(energy)(leaf.detach())
        with torch.no_grad():
            A @ self.v
        for _ in range(2):
            (slope,) = torch.autograd.grad(self.u @ (A @ self.v), leaf)
            torch.testing.assert_close(slope, expected)
            (slope,) = torch.autograd.grad((A.T @ self.u) @ self.v, leaf)
            torch.testing.assert_close(slope, expected)

    def test_products_can_each_be_differentiated_by_the_direction(self):
        A, J = self.both()
        v, u = self.v.clone().requires_grad_(), self.u.clone().requires_grad_()
        matrix = J.to_dense()
        for _ in range(2):
            (slope,) = torch.autograd.grad(self.u @ (A @ v), v)
            torch.testing.assert_close(slope, matrix.T @ self.u)
            (slope,) = torch.autograd.grad((A.T @ u) @ self.v, u)
            torch.testing.assert_close(slope, matrix @ self.v)

    def test_second_derivatives_are_those_of_the_jacobian(self):
        def energies(kind):
            def energy(y, x):
                A = kind(shifted, y, x, ARGS[1])
                return self.u @ (A @ self.v) + (A.T @ self.u).square().sum()

            return energy

        for derivative in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
            ours = derivative(energies(Linearization), argnums=(0, 1))(point(), ARGS[0])
            theirs = derivative(energies(Jacobian), argnums=(0, 1))(point(), ARGS[0])
            torch.testing.assert_close(ours, theirs)

    def test_where_nothing_depends_on_u(self):
        A = Linearization(lambda u: torch.ones(3, dtype=torch.float64), sampled(2))
        assert torch.equal(A.to_dense(), torch.zeros(3, 2, dtype=torch.float64))
        assert torch.equal(A.T.to_dense(), torch.zeros(2, 3, dtype=torch.float64))
        B = Linearization(lambda u: 2 * u["b"], {"a": sampled(2), "b": sampled(1)})
        assert torch.equal(B.to_dense(), torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64))
        assert torch.equal(B.T.to_dense(), B.to_dense().T)

    @pytest.mark.parametrize(("m", "n"), [(0, 2), (2, 0), (0, 0)])
    def test_empty(self, m, n):
        A = Linearization(lambda u: torch.ones(m, n) @ u, torch.zeros(n))
        assert A.to_dense().shape == (m, n)
        assert A.T.to_dense().shape == (n, m)
        assert torch.equal(A @ torch.zeros(n), torch.zeros(m))

    def test_float32_and_points_that_are_not_contiguous(self):
        u = sampled(3, 4).float().T
        assert not u.is_contiguous()
        A = Linearization(lambda u: (u**2).T, u)
        assert A.dtype == torch.float32
        torch.testing.assert_close(A @ torch.ones(4, 3), 2 * u.T)
        torch.testing.assert_close(A.T @ torch.ones(3, 4), 2 * u)


OPERATORS_OF_ARGS = {
    "Jacobian": lambda y, *args: Jacobian(shifted, y, *args),
    "Linearization": lambda y, *args: Linearization(shifted, y, *args),
    "Hessian": lambda y, *args: Hessian(shifted_loss, y, *args),
    "Hessian forward": lambda y, *args: Hessian(shifted_loss, y, *args, mode="forward"),
    "CrossDerivative": lambda y, *args: CrossDerivative(shifted_loss, y, *args),
}


@pytest.mark.parametrize("transpose", [False, True], ids=["A", "A.T"])
@pytest.mark.parametrize("name", OPERATORS_OF_ARGS)
class TestArgs:
    """What the function depends on besides its point is part of the operator."""

    def product(self, name: str, transpose: bool) -> Callable[..., Tensor]:
        def product(y, x, scale, v):
            A = OPERATORS_OF_ARGS[name](y, x, scale)
            return (A.T if transpose else A) @ v

        return product

    def direction(self, name: str, transpose: bool) -> Tensor:
        A = OPERATORS_OF_ARGS[name](point(), *ARGS)
        return sampled(A.shape[0 if transpose else 1], seed=50)

    def test_derivatives_by_finite_differences(self, name, transpose):
        product, v = self.product(name, transpose), self.direction(name, transpose)
        dx, ds = sampled(4, seed=51), sampled(seed=52)
        tangent = torch.func.jvp(lambda x, s: product(point(), x, s, v), ARGS, (dx, ds))[1]
        difference = central(
            lambda t: product(point(), ARGS[0] + t[0] * dx, ARGS[1] + t[0] * ds, v),
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
        )
        torch.testing.assert_close(tangent, difference, rtol=1e-7, atol=1e-7)
        u = sampled(*tangent.shape, seed=53)
        pulled = torch.func.vjp(lambda x, s: product(point(), x, s, v), *ARGS)[1](u)
        torch.testing.assert_close(pulled[0] @ dx + pulled[1] * ds, u @ tangent)

    def test_second_derivatives_by_finite_differences(self, name, transpose):
        product, v = self.product(name, transpose), self.direction(name, transpose)
        dx = sampled(4, seed=51)

        def slope(x):
            return torch.func.grad(lambda x: product(point(), x, ARGS[1], v).sin().sum())(x)

        tangent = torch.func.jvp(slope, (ARGS[0],), (dx,))[1]
        difference = central(slope, ARGS[0], dx)
        torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)

    def test_plain_autograd(self, name, transpose):
        v = self.direction(name, transpose)
        x, scale = (leaf.clone().requires_grad_() for leaf in ARGS)
        A = OPERATORS_OF_ARGS[name](point(), x, scale)
        product = self.product(name, transpose)
        expected = torch.func.grad(
            lambda x, s: product(point(), x, s, v).square().sum(), argnums=(0, 1)
        )(*ARGS)
        for _ in range(2):
            total = ((A.T if transpose else A) @ v).square().sum()
            torch.testing.assert_close(torch.autograd.grad(total, (x, scale)), expected)

    def test_changed_in_place(self, name, transpose):
        v = self.direction(name, transpose)
        x, scale = (leaf.clone() for leaf in ARGS)
        A = OPERATORS_OF_ARGS[name](point(), x, scale)
        for changed in (x, scale):
            (A.T if transpose else A) @ v
            changed.add_(1.0)
            expected = self.product(name, transpose)(point(), x.clone(), scale.clone(), v)
            torch.testing.assert_close((A.T if transpose else A) @ v, expected)

    def test_changed_in_place_in_inference_mode(self, name, transpose):
        """Such tensors count no versions, so nothing can be kept for them."""
        v = self.direction(name, transpose)
        with torch.inference_mode():
            x, scale = (leaf.clone() for leaf in ARGS)
            A = OPERATORS_OF_ARGS[name](point(), x, scale)
            (A.T if transpose else A) @ v
            x.add_(1.0)
            result = (A.T if transpose else A) @ v
        expected = self.product(name, transpose)(point(), ARGS[0] + 1.0, ARGS[1], v)
        torch.testing.assert_close(result.clone(), expected)

    def test_that_begin_to_require_grad(self, name, transpose):
        """After a first product: a graph kept from before does not lead to them."""
        v = self.direction(name, transpose)
        y, x, scale = point(), ARGS[0].clone(), ARGS[1].clone()
        A = OPERATORS_OF_ARGS[name](y, x, scale)
        (A.T if transpose else A) @ v
        leaves = (y["p"].requires_grad_(), x.requires_grad_())
        total = ((A.T if transpose else A) @ v).square().sum()
        slopes = torch.autograd.grad(total, leaves)
        product = self.product(name, transpose)
        expected = torch.func.grad(
            lambda p, x: product({**y, "p": p}, x, scale, v).square().sum(), argnums=(0, 1)
        )(*(leaf.detach() for leaf in leaves))
        torch.testing.assert_close(slopes, expected)

    def test_mapped(self, name, transpose):
        y, v, X = point(), self.direction(name, transpose), sampled(3, 4, seed=54)
        product = self.product(name, transpose)

        def of(x, v=v):
            return product(y, x, ARGS[1], v)

        torch.testing.assert_close(torch.func.vmap(of)(X), torch.stack([of(x) for x in X]))
        V = sampled(3, *v.shape, seed=55)
        expected = torch.stack([of(x, v) for x, v in zip(X, V, strict=True)])
        torch.testing.assert_close(torch.func.vmap(of)(X, V), expected)
        slope = torch.func.grad(lambda x: of(x).square().sum())
        expected = torch.stack([slope(x) for x in X])
        torch.testing.assert_close(torch.func.vmap(slope)(X), expected)

    def test_a_kept_graph_then_other_transforms(self, name, transpose):
        v = self.direction(name, transpose)
        A = OPERATORS_OF_ARGS[name](point(), *ARGS)
        A = A.T if transpose else A
        expected = A @ v
        torch.testing.assert_close(torch.func.vmap(lambda v: A @ v)(v[None])[0], expected)
        pulled = torch.func.vjp(lambda A: A @ v, A)[1](torch.ones_like(expected))[0]
        again = torch.func.vjp(lambda A: A @ v, A)[1](torch.ones_like(expected))[0]
        torch.testing.assert_close(pulled.tensors, again.tensors)
        torch.testing.assert_close(A @ v, expected)


def test_args_that_are_no_tensors_are_fixed():
    def f(y: Tensor, power: int, weights: dict[str, object]) -> Tensor:
        return (weights["w"] * y**power).sum()

    y, w = sampled(3), sampled(3, seed=1)
    A = Hessian(f, y, 3, {"w": w, "note": "unused"})
    assert len(A.tensors) == 2
    torch.testing.assert_close(A @ y, 6 * w * y * y)
    gradient = torch.func.grad(lambda A: (A @ y).sum())(A)
    torch.testing.assert_close(gradient.args[1]["w"], 6 * y * y)
    assert gradient.args[0] == 3


@pytest.mark.parametrize(
    "build", [Hessian, lambda loss, y: Linearization(torch.func.grad(loss), y)]
)
def test_a_closed_over_tensor_changed_in_place(build):
    """autograd does not notice (under torch.func the tensor saved is a wrapper)."""
    y, v, c = sampled(3), sampled(3, seed=1), sampled(3, seed=2)
    A = build(lambda y: (c * y**4).sum() + (c * y).sum() ** 2, y)
    A @ v
    c.mul_(2)
    expected = 12 * c * y**2 * v + 2 * c * (c @ v)
    torch.testing.assert_close(A @ v, expected)


class Weighted:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def loss(self, y: Tensor) -> Tensor:
        return (self.x * y**2).sum() / 2


class TestAttributesBoundAnew:
    def test_is_seen(self):
        weighted, v = Weighted(torch.ones(3)), torch.full((3,), 12.0)
        H = Hessian(weighted.loss, torch.ones(3))
        assert torch.equal(H @ v, v)
        weighted.x = torch.full((3,), 5.0)
        assert torch.equal(H @ v, 5 * v)

    def test_inside_a_transform(self):
        weighted, v = Weighted(torch.ones(3)), torch.full((3,), 12.0)
        H = Hessian(weighted.loss, torch.ones(3))
        H @ v

        def total(x):
            weighted.x = x
            return (H @ v).sum()

        assert torch.equal(torch.func.grad(total)(torch.ones(3)), v)


def test_globals_are_watched():
    scope = {"__name__": "__main__", "x": torch.ones(3)}
    exec("def loss(y): return (x * y**2).sum() / 2", scope)
    H, v = Hessian(scope["loss"], torch.ones(3)), torch.ones(3)
    assert torch.equal(H @ v, v)
    scope["x"].mul_(2)
    assert torch.equal(H @ v, 2 * v)
    scope["x"] = torch.full((3,), 3.0)
    assert torch.equal(H @ v, 3 * v)


def test_numbers_that_a_loss_closes_over_are_watched():
    settings, y = {"lam": 1.0}, torch.ones(3)
    A = Hessian(lambda y: settings["lam"] * (y**2).sum(), y)
    assert torch.equal(A @ y, 2 * y)
    settings["lam"] = 10.0
    assert torch.equal(A @ y, 20 * y)
