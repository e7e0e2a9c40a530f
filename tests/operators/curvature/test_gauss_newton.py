"""`GaussNewton` against dense Jacobians and Hessians of the loss, and against curvlinops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from operators.claims import FalseClaimError
from operators.curvature.gauss_newton import GaussNewton
from operators.derivatives import Hessian
from operators.space import Space

FLOAT64 = torch.float64
CLASSES = 3


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def labels(*shape: int, seed: int = 0, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def network(seed: int = 0) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(sampled(*parameter.shape, seed=seed + i))
    return net


def mlp(y, x: Tensor) -> Tensor:
    return torch.tanh(x @ y["w"] + y["b"]) @ y["v"]


def point(seed: int = 0, classes: int = CLASSES):
    return {
        "w": sampled(4, 5, seed=seed),
        "b": sampled(5, seed=seed + 1),
        "v": sampled(5, classes, seed=seed + 2),
    }


def dense(model, loss, y, inputs, targets) -> Tensor:
    """``J^T H J`` with every factor formed."""
    space = Space.of(y)
    flat = space.ravel(y)

    def outputs(v: Tensor) -> Tensor:
        return model(space.unravel(v), inputs)

    z = outputs(flat)
    jacobian = torch.func.jacrev(lambda v: outputs(v).reshape(-1))(flat)
    hessian = torch.func.hessian(lambda z_: loss(z_.reshape(z.shape), targets))(z.reshape(-1))
    return jacobian.T @ hessian @ jacobian


def images(y, x: Tensor) -> Tensor:
    """Logits ``(N, C, 2)``: two positions in a sample."""
    return torch.stack([mlp(y, x), mlp(y, x.flip(1)) ** 2], 2)


WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=FLOAT64)
CLASSIFICATION = {
    "plain": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "both": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
    "both, sum": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2, reduction="sum"),
    "ignore": nn.CrossEntropyLoss(ignore_index=1),
    "all": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.3, ignore_index=1),
}
BINARY = {
    "plain": nn.BCEWithLogitsLoss(),
    "sum": nn.BCEWithLogitsLoss(reduction="sum"),
    "weight": nn.BCEWithLogitsLoss(weight=torch.tensor([0.5, 1.0, 3.0], dtype=FLOAT64)),
    "pos_weight": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1.0, 3.0], dtype=FLOAT64)),
}


class TestAgainstDense:
    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("name", CLASSIFICATION)
    def test_cross_entropy(self, name, chunk_size):
        loss, y, x, t = CLASSIFICATION[name], point(), sampled(5, 4, seed=7), labels(5)
        A = GaussNewton(mlp, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(mlp, loss, y, x, t))
        assert A._claims == ()
        assert A.positive_semidefinite

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("name", CLASSIFICATION)
    def test_cross_entropy_with_positions(self, name, chunk_size):
        loss, y, x, t = CLASSIFICATION[name], point(), sampled(5, 4, seed=7), labels(5, 2)
        A = GaussNewton(images, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(images, loss, y, x, t))

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("name", ["plain", "sum", "weights", "smoothing", "both", "both, sum"])
    @pytest.mark.parametrize("model", [mlp, images])
    def test_cross_entropy_with_probabilities(self, name, model, chunk_size):
        loss, y, x = CLASSIFICATION[name], point(), sampled(5, 4, seed=7)
        t = torch.softmax(model(point(seed=20), x), 1)
        A = GaussNewton(model, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(model, loss, y, x, t))

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("model", [mlp, images])
    def test_squared(self, model, reduction, chunk_size):
        loss, y, x = nn.MSELoss(reduction=reduction), point(), sampled(5, 4, seed=7)
        t = sampled(*model(y, x).shape, seed=8)
        A = GaussNewton(model, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(model, loss, y, x, t))
        assert A.positive_semidefinite

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("name", BINARY)
    def test_logistic(self, name, chunk_size):
        loss, y, x = BINARY[name], point(), sampled(5, 4, seed=7)
        t = torch.sigmoid(sampled(5, CLASSES, seed=8))
        A = GaussNewton(mlp, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(mlp, loss, y, x, t))
        assert A.positive_semidefinite

    @pytest.mark.parametrize(
        ("name", "loss", "targets"),
        [
            ("cross-entropy", nn.functional.cross_entropy, labels(5)),
            ("mse", nn.functional.mse_loss, sampled(5, CLASSES)),
            (
                "binary-cross-entropy",
                nn.functional.binary_cross_entropy_with_logits,
                labels(5, CLASSES, classes=2).double(),
            ),
        ],
    )
    def test_names_are_the_losses_of_torch(self, name, loss, targets):
        y, x = point(), sampled(5, 4, seed=7)
        named, general = (GaussNewton(mlp, one, y, x, targets) for one in (name, loss))
        close(named.to_dense(), general.to_dense())
        assert named._claims == ()
        assert general._claims == ("positive_semidefinite",)
        assert general.positive_semidefinite
        assert not general.positive_definite
        assert GaussNewton(mlp, loss, y, x, targets, damping=0.1).positive_definite

    @pytest.mark.parametrize("chunk_size", [None, 2, 5, 100])
    def test_a_loss_of_ones_own(self, chunk_size):
        def loss(z: Tensor, t: Tensor) -> Tensor:
            return (z - t).cosh().log().sum(1).mean() + 0.1 * (z**4).mean()

        y, x, t = point(), sampled(5, 4, seed=7), sampled(5, CLASSES, seed=8)
        A = GaussNewton(mlp, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(mlp, loss, y, x, t))

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_loss_of_torch_without_closed_form(self, reduction, chunk_size):
        loss = nn.PoissonNLLLoss(reduction=reduction)
        y, x, t = point(), sampled(5, 4, seed=7), labels(5, CLASSES).double()
        A = GaussNewton(mlp, loss, y, x, t, chunk_size=chunk_size)
        close(A.to_dense(), dense(mlp, loss, y, x, t))

    def test_a_subclass_of_a_known_loss_is_not_taken_for_it(self):
        class Tempered(nn.CrossEntropyLoss):
            def forward(self, input: Tensor, target: Tensor) -> Tensor:
                return super().forward(0.5 * input, target)

        y, x, t = point(), sampled(5, 4, seed=7), labels(5)
        close(GaussNewton(mlp, Tempered(), y, x, t).to_dense(), dense(mlp, Tempered(), y, x, t))

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_nested_outputs_inputs_and_targets(self, chunk_size):
        def model(y, x):
            return {"a": mlp(y, x["one"]), "b": (mlp(y, x["two"]) ** 2).sum(1)}

        def loss(z, t):
            couple = (z["a"].sum(1) + z["b"]) ** 2
            return (couple + (z["a"] - t[0]).square().sum(1) + (z["b"] - t[1]) ** 2).mean()

        y = point()
        x = {"one": sampled(5, 4, seed=7), "two": sampled(5, 4, seed=8)}
        t = (sampled(5, CLASSES, seed=9), sampled(5, seed=10))
        A = GaussNewton(model, loss, y, x, t, chunk_size=chunk_size)

        def joined(y, x):
            z = model(y, x)
            return torch.cat([z["a"], z["b"][:, None]], 1)

        def of_joined(z, t):
            return loss({"a": z[:, :CLASSES], "b": z[:, CLASSES]}, t)

        close(A.to_dense(), dense(joined, of_joined, y, x, t))

    def test_damping_is_inside_and_reported(self):
        y, x, t = point(), sampled(5, 4, seed=7), labels(5)
        plain = GaussNewton(mlp, "cross-entropy", y, x, t)
        for damping in (0.3, torch.tensor(0.3, dtype=FLOAT64)):
            for chunk_size in (None, 2):
                A = GaussNewton(
                    mlp, "cross-entropy", y, x, t, damping=damping, chunk_size=chunk_size
                )
                eye = torch.eye(len(A.to_dense()), dtype=FLOAT64)
                close(A.to_dense(), plain.to_dense() + 0.3 * eye)
                v = sampled(A.shape[1], seed=2)
                close(A @ v, plain @ v + 0.3 * v)
                assert float(A.damping) == 0.3
                assert A.positive_definite
        assert float(plain.damping) == 0.0
        assert not plain.positive_definite

    def test_is_the_hessian_of_a_model_that_is_linear(self):
        def linear(w, x):
            return x @ w

        w, x, t = sampled(4, CLASSES), sampled(6, 4, seed=1), labels(6)
        A = GaussNewton(linear, "cross-entropy", w, x, t)
        H = Hessian(lambda w: nn.functional.cross_entropy(linear(w, x), t), w)
        close(A.to_dense(), H.to_dense())

    @settings(deadline=None, max_examples=20, derandomize=True)
    @given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
    def test_chunks_change_nothing(self, count, chunk_size, seed):
        y, x, t = point(seed), sampled(count, 4, seed=seed), labels(count, seed=seed)
        loss = nn.CrossEntropyLoss(weight=WEIGHTS)
        whole = GaussNewton(mlp, loss, y, x, t)
        cut = GaussNewton(mlp, loss, y, x, t, chunk_size=chunk_size)
        v = sampled(whole.shape[1], 2, seed=seed + 5)
        close(cut @ v, whole @ v)
        close(cut @ v[:, 0], whole @ v[:, 0])


class TestModules:
    def test_parameters_of_a_module(self):
        net, x, t = network(), sampled(6, 4, seed=9), labels(6)
        A = GaussNewton(net, "cross-entropy", None, x, t)
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        assert A.domain == Space.of(parameters)
        image = A @ parameters
        assert {name: value.shape for name, value in image.items()} == {
            name: value.shape for name, value in parameters.items()
        }
        expected = dense(
            lambda y, x: torch.func.functional_call(net, y, (x,)),
            nn.functional.cross_entropy,
            parameters,
            x,
            t,
        )
        close(A.to_dense(), expected)

    @pytest.mark.parametrize(
        ("loss", "targets"),
        [
            (nn.CrossEntropyLoss(), labels(6)),
            (nn.MSELoss(), sampled(6, CLASSES, seed=3)),
            (nn.CrossEntropyLoss(reduction="sum"), labels(6)),
            (nn.BCEWithLogitsLoss(), labels(6, CLASSES, classes=2).double()),
        ],
    )
    def test_against_curvlinops(self, loss, targets):
        curvlinops = pytest.importorskip("curvlinops", reason="the oracle is not installed")
        net, x = network(), sampled(6, 4, seed=9)
        theirs = curvlinops.GGNLinearOperator(
            net, loss, list(net.parameters()), [(x, targets)], check_deterministic=False
        )
        ours = GaussNewton(net, loss, None, x, targets)
        eye = torch.eye(ours.shape[0], dtype=FLOAT64)
        close(ours.to_dense(), (theirs @ eye).detach())

    def test_a_tuple_is_the_positional_arguments_of_a_module(self):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = network()

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return self.inner(a * b)

        a, b, t = sampled(5, 4), sampled(5, 4, seed=1), labels(5)
        for chunk_size in (None, 2):
            both = GaussNewton(Two(), "cross-entropy", None, (a, b), t, chunk_size=chunk_size)
            one = GaussNewton(network(), "cross-entropy", None, a * b, t)
            close(both.to_dense(), one.to_dense())

    def test_part_of_the_parameters(self):
        net, x, t = network(), sampled(6, 4, seed=9), labels(6)
        whole = GaussNewton(net, "cross-entropy", None, x, t)
        bias = net[2].bias.detach()
        part = GaussNewton(net, "cross-entropy", {"2.bias": bias}, x, t)
        close(part.to_dense(), whole.to_dense()[-CLASSES:, -CLASSES:])
        net[0].requires_grad_(False)
        assert GaussNewton(net, "cross-entropy", None, x, t).shape == (18, 18)

    def test_training_mode_that_couples_or_draws_is_refused(self):
        x, t = sampled(6, 4), labels(6)
        for layer in (nn.BatchNorm1d(CLASSES), nn.Dropout(0.5)):
            net = nn.Sequential(network(), layer).double()
            with pytest.raises(ValueError, match=rf"1 is a {type(layer).__name__}.*eval"):
                GaussNewton(net, "cross-entropy", None, x, t)
            A = GaussNewton(net.eval(), "cross-entropy", None, x, t)
            assert (A @ sampled(A.shape[1])).shape == (A.shape[0],)

    def test_float32_is_kept(self):
        net, x, t = network().float(), sampled(6, 4, seed=9).float(), labels(6)
        for chunk_size in (None, 4):
            A = GaussNewton(net, "cross-entropy", None, x, t, chunk_size=chunk_size, damping=0.1)
            assert A.to_dense().dtype == torch.float32
            assert (A @ sampled(A.shape[1]).float()).dtype == torch.float32


class TestFromResidual:
    def residual(self, u, c):
        return {"r": u["a"] ** 2 * c, "s": torch.sin(u["b"].sum()) * u["a"]}

    def test_is_the_gram_matrix_of_the_jacobian(self):
        u, c = {"a": sampled(3), "b": sampled(2, seed=1)}, sampled(3, seed=2)
        A = GaussNewton.from_residual(self.residual, u, c, damping=0.2)
        space = Space.of(u)

        def stacked(v: Tensor) -> Tensor:
            return torch.cat(
                [part.reshape(-1) for part in self.residual(space.unravel(v), c).values()]
            )

        J = torch.func.jacrev(stacked)(space.ravel(u))
        close(A.to_dense(), J.T @ J + 0.2 * torch.eye(5, dtype=FLOAT64))
        assert isinstance(A, GaussNewton)
        assert A.positive_definite
        assert A.damping == 0.2
        assert GaussNewton.from_residual(self.residual, u, c).positive_semidefinite

    def test_is_differentiable_in_arguments(self):
        u, c = {"a": sampled(3), "b": sampled(2, seed=1)}, sampled(3, seed=2)
        v = sampled(5, seed=3)

        def quadratic(c: Tensor) -> Tensor:
            return v @ (GaussNewton.from_residual(self.residual, u, c) @ v)

        gradient = torch.func.grad(quadratic)(c)
        close(gradient, central(quadratic, c), 1e-7)


def central(f, x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function."""
    gradient = torch.zeros(x.numel(), dtype=x.dtype)
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=x.dtype)
        e[i] = step
        e = e.reshape(x.shape)
        gradient[i] = (f(x + e) - f(x - e)) / (2 * step)
    return gradient.reshape(x.shape)


DIRECTION = sampled(40, seed=30)


def quadratic(loss, y, x, t, *, damping=0.0, chunk_size=None) -> Tensor:
    A = GaussNewton(mlp, loss, y, x, t, damping=damping, chunk_size=chunk_size, convex=False)
    return DIRECTION @ (A @ DIRECTION)


class TestDifferentiation:
    losses = (
        ("cross-entropy", torch.softmax(sampled(3, CLASSES, seed=11), 1)),
        ("mse", sampled(3, CLASSES, seed=11)),
        (lambda z, t: ((z - t) ** 4).mean(), sampled(3, CLASSES, seed=11)),
    )

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize(("loss", "t"), losses)
    def test_in_the_point_the_inputs_and_the_damping(self, loss, t, chunk_size):
        y, x = point(), sampled(3, 4, seed=7)
        space = Space.of(y)
        damping = torch.tensor(0.3, dtype=FLOAT64)
        cases = (
            (
                lambda v: quadratic(loss, space.unravel(v), x, t, chunk_size=chunk_size),
                space.ravel(y),
            ),
            (lambda x: quadratic(loss, y, x, t, chunk_size=chunk_size), x),
            (lambda c: quadratic(loss, y, x, t, damping=c, chunk_size=chunk_size), damping),
        )
        for f, at in cases:
            expected = central(f, at)
            assert expected.norm() > 1e-3
            close(torch.func.grad(f)(at), expected, 1e-6)
            leaf = at.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(f(leaf), leaf)
            close(gradient, expected, 1e-6)
            direction = sampled(*at.shape, seed=40)
            slope = torch.func.jvp(f, (at,), (direction,))[1]
            close(slope, (expected * direction).sum(), 1e-6)

    def test_in_the_targets_of_a_loss_of_ones_own(self):
        y, x, t = point(), sampled(3, 4, seed=7), sampled(3, CLASSES, seed=8)

        def f(t: Tensor) -> Tensor:
            return quadratic(lambda z, t: ((z - t) ** 4).mean(), y, x, t)

        close(torch.func.grad(f)(t), central(f, t), 1e-6)

    def test_twice(self):
        y, x, t = point(), sampled(3, 4, seed=7), labels(3)

        def f(b: Tensor) -> Tensor:
            return quadratic("cross-entropy", {**y, "b": b}, x, t)

        hessian = torch.func.hessian(f)(y["b"])
        gradient = torch.func.grad(f)
        for i in range(3):
            e = torch.zeros(5, dtype=FLOAT64)
            e[i] = 1e-5
            difference = (gradient(y["b"] + e) - gradient(y["b"] - e)) / 2e-5
            close(hessian[i], difference, 1e-6)

    def test_as_a_pytree(self):
        """The gradient with respect to the operator is that with respect to its tensors."""
        y, x, t = point(), sampled(3, 4, seed=7), labels(3)
        A = GaussNewton(mlp, "cross-entropy", y, x, t)
        v = sampled(A.shape[1], seed=30)
        gradient = torch.func.grad(lambda A: v @ (A @ v))(A)
        by_y, by_x = torch.func.grad(lambda y, x: quadratic("cross-entropy", y, x, t), (0, 1))(y, x)
        close(gradient.inputs, by_x)
        pytree.tree_map(close, gradient.y, by_y)

    def test_in_v(self):
        y, x, t = point(), sampled(3, 4, seed=7), labels(3)
        for chunk_size in (None, 2):
            A = GaussNewton(mlp, "cross-entropy", y, x, t, chunk_size=chunk_size)
            v = sampled(A.shape[1], seed=30)
            close(torch.func.grad(lambda v: v @ (A @ v) / 2)(v), A @ v)  # noqa: B023
            leaf = v.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(leaf @ (A @ leaf) / 2, leaf)
            close(gradient, A @ v)
            close(torch.func.jacrev(A.__matmul__)(v), A.to_dense())
            close(torch.func.jacfwd(A.__matmul__)(v), A.to_dense())


class TestMapping:
    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("loss", ["cross-entropy", nn.functional.cross_entropy])
    def test_over_points_batches_and_vectors(self, loss, chunk_size):
        ys = [point(seed) for seed in (0, 10, 20)]
        stacked = {name: torch.stack([y[name] for y in ys]) for name in ys[0]}
        xs, ts, vs = sampled(3, 5, 4), labels(3, 5), sampled(3, 40, seed=4)

        def product(y, x, t, v):
            return GaussNewton(mlp, loss, y, x, t, chunk_size=chunk_size, damping=0.1) @ v

        together = torch.func.vmap(product)(stacked, xs, ts, vs)
        for i in range(3):
            close(together[i], product(ys[i], xs[i], ts[i], vs[i]))
        over_points = torch.func.vmap(lambda y: product(y, xs[0], ts[0], vs[0]))(stacked)
        close(over_points[2], product(ys[2], xs[0], ts[0], vs[0]))

    @pytest.mark.parametrize("chunk_size", [None, 3])
    @pytest.mark.parametrize("columns", [0, 1, 5, 130])
    def test_blocks(self, columns, chunk_size):
        A = GaussNewton(
            mlp,
            "cross-entropy",
            point(),
            sampled(5, 4),
            labels(5),
            chunk_size=chunk_size,
            damping=0.1,
        )
        block = sampled(A.shape[1], columns, seed=3)
        image = A @ block
        assert image.shape == block.shape
        for i in range(0, columns, 40):
            close(image[:, i], A @ block[:, i])

    def test_gradient_of_a_mapped_quadratic(self):
        y, x, t = point(), sampled(3, 4, seed=7), labels(3)
        A = GaussNewton(mlp, "cross-entropy", y, x, t)
        block = sampled(4, A.shape[1], seed=3)
        gradients = torch.func.vmap(torch.func.grad(lambda v: v @ (A @ v) / 2))(block)
        close(gradients, block @ A.to_dense())


class Counted:
    """The model, counting its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, y, x):
        self.runs += 1
        return mlp(y, x)


class TestKept:
    """The sweeps through the model are kept, and only as long as they hold."""

    def made(self, **options):
        model = Counted()
        y, x, t = point(), sampled(5, 4, seed=7), labels(5)
        A = GaussNewton(model, "cross-entropy", y, x, t, **options)
        model.runs = 0
        return A, model, y, x

    def test_the_model_runs_once(self):
        A, model, _, _ = self.made()
        v = sampled(A.shape[1])
        for _ in range(3):
            A @ v
            A @ torch.stack([v, v], 1)
        assert model.runs == 1

    def test_with_chunks_nothing_is_kept(self):
        A, model, _, _ = self.made(chunk_size=2)
        A @ sampled(A.shape[1])
        assert model.runs == 6
        assert A._kept is None

    @pytest.mark.parametrize("what", ["y", "inputs"])
    def test_in_place_changes_are_seen(self, what):
        A, model, y, x = self.made()
        v = sampled(A.shape[1])
        A @ v
        if what == "y":
            y["w"].mul_(2)
        else:
            x.add_(1)
        fresh = GaussNewton(mlp, "cross-entropy", y, x, A.targets)
        close(A @ v, fresh @ v)
        assert model.runs == 2

    def test_a_step_of_an_optimiser_and_moved_buffers_are_seen(self):
        net = nn.Sequential(network(), nn.BatchNorm1d(CLASSES)).double().eval()
        x, t = sampled(6, 4), labels(6)
        A = GaussNewton(net, "cross-entropy", None, x, t)
        v = sampled(A.shape[1], seed=3)
        before = A @ v
        optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
        nn.functional.cross_entropy(net(x), t).backward()
        optimiser.step()
        stepped = A @ v
        close(stepped, GaussNewton(net, "cross-entropy", None, x, t) @ v)
        assert (stepped - before).norm() > 1e-3
        net[1].running_var.fill_(4.0)
        moved = A @ v
        close(moved, GaussNewton(net, "cross-entropy", None, x, t) @ v)
        assert (moved - stepped).norm() > 1e-3

    @pytest.mark.parametrize("first", ["vmap", "grad", "jvp", "jacrev", "no_grad", "inference"])
    def test_first_product_inside_a_transform(self, first):
        A, _, y, x = self.made()
        v = sampled(A.shape[1])
        expected = GaussNewton(mlp, "cross-entropy", y, x, A.targets) @ v
        runs = {
            "vmap": lambda: torch.func.vmap(A.__matmul__)(torch.stack([v, v])),
            "grad": lambda: torch.func.grad(lambda v: (A @ v).sum())(v),
            "jvp": lambda: torch.func.jvp(A.__matmul__, (v,), (v,)),
            "jacrev": lambda: torch.func.jacrev(A.__matmul__)(v),
        }
        if first == "no_grad":
            with torch.no_grad():
                close(A @ v, expected)
        elif first == "inference":
            with torch.inference_mode():
                A @ v
        else:
            runs[first]()
        close(A @ v, expected)
        close(torch.func.grad(lambda v: v @ (A @ v) / 2)(v), expected)

    def test_backward_twice_through_leaves(self):
        y = {name: value.requires_grad_() for name, value in point().items()}
        A = GaussNewton(mlp, "cross-entropy", y, sampled(5, 4, seed=7), labels(5))
        v = sampled(A.shape[1])
        for _ in range(2):
            for value in y.values():
                value.grad = None
            (v @ (A @ v)).backward()
        f = Space.of(y)
        detached = {name: value.detach() for name, value in y.items()}

        def at(u: Tensor) -> Tensor:
            A = GaussNewton(mlp, "cross-entropy", f.unravel(u), sampled(5, 4, seed=7), labels(5))
            return v @ (A @ v)

        expected = torch.func.grad(at)(f.ravel(detached))
        close(f.ravel({name: value.grad for name, value in y.items()}), expected)

    def test_a_model_that_closes_over_what_is_differentiated(self):
        y, x, t, v = point(), sampled(3, 4, seed=7), labels(3), sampled(40, seed=9)

        def f(c: Tensor) -> Tensor:
            return v @ (GaussNewton(lambda y, x: c * mlp(y, x), "cross-entropy", y, x, t) @ v)

        c = torch.tensor(1.5, dtype=FLOAT64)
        close(torch.func.grad(f)(c), central(f, c), 1e-6)


class TestFacts:
    def test_a_loss_that_is_not_convex_is_found_out(self):
        y, x, t = point(), sampled(5, 4), sampled(5, CLASSES, seed=1)

        def concave(z, t):
            return -((z - t) ** 2).mean()

        A = GaussNewton(mlp, concave, y, x, t)
        with pytest.raises(FalseClaimError, match=r"GaussNewton.*positive semidefinite"):
            A @ sampled(A.shape[1])

    def test_it_may_be_said(self):
        y, x, t = point(), sampled(5, 4), sampled(5, CLASSES, seed=1)

        def concave(z, t):
            return -((z - t) ** 2).mean()

        A = GaussNewton(mlp, concave, y, x, t, convex=False)
        close(A.to_dense(), dense(mlp, concave, y, x, t))
        assert A.symmetric
        assert not A.positive_semidefinite

    def test_negative_weights_of_a_known_loss_are_a_claim(self):
        loss = nn.BCEWithLogitsLoss(weight=torch.tensor(-1.0, dtype=FLOAT64))
        A = GaussNewton(mlp, loss, point(), sampled(5, 4), torch.ones(5, CLASSES, dtype=FLOAT64))
        with pytest.raises(FalseClaimError):
            A @ sampled(A.shape[1])
        with pytest.raises(FalseClaimError):
            GaussNewton(
                mlp,
                nn.CrossEntropyLoss(weight=-WEIGHTS, reduction="sum"),
                point(),
                sampled(5, 4),
                labels(5),
            ).to_dense()

    def test_symmetric_to_rounding_and_semidefinite(self):
        A = GaussNewton(mlp, "cross-entropy", point(), sampled(3, 4), labels(3)).to_dense()
        close(A, A.T, 1e-14)
        assert float(torch.linalg.eigvalsh(A)[0]) > -1e-13

    def test_printed(self):
        A = GaussNewton(
            mlp, "cross-entropy", point(), sampled(3, 4), labels(3), chunk_size=2, damping=0.1
        )
        assert str(A) == (
            "GaussNewton(40, 40) float64; positive definite; damping 0.1, chunks of 2 samples; "
            "6 evaluations"
        )


class TestErrors:
    y, x, t = point(), sampled(5, 4), labels(5)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"loss": "hinge"}, ValueError, r"loss='hinge'; expected one of \['cross-entropy'"),
            ({"loss": 3}, TypeError, r"loss is a int; expected one of"),
            (
                {"loss": nn.CrossEntropyLoss(reduction="none")},
                ValueError,
                r"CrossEntropyLoss with reduction='none'; expected 'mean' or 'sum'",
            ),
            (
                {"loss": lambda z, t: z.sum(1)},
                ValueError,
                r"loss returned \(5,\); expected a scalar",
            ),
            ({"loss": lambda z, t: 1.0}, ValueError, r"loss returned float; expected a scalar"),
            ({"chunk_size": 0}, ValueError, r"chunk_size=0; expected at least 1, or None"),
            ({"damping": -0.1}, ValueError, r"damping=-0.1; expected one number >= 0"),
            ({"damping": math.nan}, ValueError, r"damping=nan; expected one number >= 0"),
            ({"damping": torch.ones(2)}, ValueError, r"damping=.*expected one number >= 0"),
            ({"targets": labels(4)}, ValueError, r"inputs and targets: leading axes of \[4, 5\]"),
            (
                {"inputs": x[:0], "targets": t[:0]},
                ValueError,
                r"leading axes of \[0\]; expected one",
            ),
            (
                {"inputs": ()},
                ValueError,
                r"inputs: expected tensors \(N, ...\) with samples on axis 0",
            ),
            ({"inputs": x.sum()}, ValueError, r"inputs: expected tensors \(N, ...\)"),
            ({"targets": t.int()}, TypeError, r"targets is torch.int32; expected torch.int64"),
            ({"targets": t + 3}, ValueError, r"targets holds \d; expected classes 0 to 2, or -100"),
            (
                {"targets": labels(5, 2)},
                ValueError,
                r"targets has shape \(5, 2\); expected \(5,\) for outputs of shape \(5, 3\)",
            ),
            (
                {"targets": sampled(5, 1), "loss": "mse"},
                ValueError,
                r"targets has shape \(5, 1\), the outputs \(5, 3\); expected the same",
            ),
            ({"loss": "mse"}, TypeError, r"targets is torch.int64; expected torch.float64"),
            (
                {"model": lambda y, x: mlp(y, x).sum(1)},
                ValueError,
                r"output has shape \(5,\); expected \(N, C\)",
            ),
            (
                {"model": lambda y, x: mlp(y, x).T, "loss": "mse"},
                ValueError,
                r"the model's outputs and the targets: leading axes of \[3, 5\]",
            ),
            (
                {"model": lambda y, x: {"z": mlp(y, x)}},
                TypeError,
                r"the model's output is a dict; expected a tensor for CrossEntropyLoss",
            ),
            ({"model": "net"}, TypeError, r"model is a str; expected a torch.nn.Module or"),
            ({"y": None}, TypeError, r"y is None; it stands for a module's parameters"),
            ({"y": {}}, ValueError, r"y holds no tensor; expected at least one"),
        ],
    )
    def test_are_told_at_construction(self, change, error, message):
        arguments = {
            "model": mlp,
            "loss": "cross-entropy",
            "y": self.y,
            "inputs": self.x,
            "targets": self.t,
            **change,
        }
        with pytest.raises(error, match=message):
            GaussNewton(**arguments)
