"""`DiagonalFisher` against the diagonals of the matrices themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from operators.curvature.diagonal_fisher import DiagonalFisher
from operators.curvature.diagonal_fisher_stream import DiagonalFisherStream
from operators.curvature.empirical_fisher import EmpiricalFisher
from operators.curvature.fisher import Fisher, SampledFisher
from operators.curvature.likelihood import Gaussian
from operators.space import Space

FLOAT64 = torch.float64
CLASSES = 3


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def mlp(y, x: Tensor) -> Tensor:
    return torch.tanh(x @ y["w"]) @ y["v"]


def point(seed: int = 0):
    return {"w": sampled(2, 4, seed=seed), "v": sampled(4, CLASSES, seed=seed + 1)}


def images(y, x: Tensor) -> Tensor:
    """Logits ``(N, C, 2)``: two positions in a sample."""
    return torch.stack([mlp(y, x), mlp(y, x.flip(1)) ** 2], 2)


LIKELIHOODS = ["categorical", "bernoulli", Gaussian(variance=0.3), nn.MSELoss()]
CHUNKS = [1, 2, 3, 100]


class TestExact:
    @pytest.mark.parametrize("chunk_size", CHUNKS)
    @pytest.mark.parametrize("model", [mlp, images])
    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_is_the_diagonal_of_the_fisher_matrix(self, likelihood, model, chunk_size):
        y, x, weights = point(), sampled(5, 2, seed=7), sampled(5, seed=2).square()
        for w in (None, weights):
            A = DiagonalFisher.exact(model, likelihood, y, x, weights=w, chunk_size=chunk_size)
            close(A.values, Fisher(model, likelihood, y, x, weights=w).to_dense().diagonal())

    def test_of_a_module(self):
        net, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double(), sampled(5, 2)
        A = DiagonalFisher.exact(net, "categorical", None, x, damping=0.1)
        F = Fisher(net, "categorical", None, x, damping=0.1)
        close(A.values, F.to_dense().diagonal())
        assert A.domain == F.domain
        assert A.damping == 0.1
        assert A.positive_definite
        assert A.diagonal

    def test_is_differentiable_in_point_inputs_and_weights(self):
        y, x, weights = point(), sampled(3, 2, seed=7), sampled(3, seed=2).square()
        v = sampled(20, seed=3)

        def quadratic(w: Tensor, x: Tensor, weights: Tensor) -> Tensor:
            A = DiagonalFisher.exact(
                mlp, "categorical", {**y, "w": w}, x, weights=weights, chunk_size=2
            )
            return v @ (A @ v)

        at = (y["w"], x, weights)
        for i, gradient in enumerate(torch.func.grad(quadratic, (0, 1, 2))(*at)):
            direction = sampled(*at[i].shape, seed=20 + i)
            ends = [
                quadratic(*(a + sign * 1e-5 * direction if j == i else a for j, a in enumerate(at)))
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / 2e-5
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)

    def test_inside_vmap(self):
        ws, v, x = sampled(3, 2, 4), sampled(20), sampled(5, 2, seed=7)
        rest = point()

        def product(w: Tensor) -> Tensor:
            return DiagonalFisher.exact(mlp, "categorical", {**rest, "w": w}, x, damping=0.1) @ v

        close(torch.func.vmap(product)(ws)[2], product(ws[2]))


class TestSampled:
    @pytest.mark.parametrize("chunk_size", CHUNKS)
    @pytest.mark.parametrize("model", [mlp, images])
    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_is_the_diagonal_of_the_same_draws(self, likelihood, model, chunk_size):
        y, x, w = point(), sampled(5, 2, seed=7), sampled(5, seed=2).square()
        for options in ({}, {"weights": w}, {"weights": w, "root_weights": False}):
            arguments = {"samples": 4, **options}
            A = DiagonalFisher.sampled(
                model, likelihood, y, x, generator=seeded(), chunk_size=chunk_size, **arguments
            )
            F = SampledFisher(model, likelihood, y, x, generator=seeded(), **arguments)
            close(A.values, F.to_dense().diagonal())

    def test_tends_to_the_exact_one(self):
        y, x = point(), sampled(4, 2, seed=7)
        drawn = DiagonalFisher.sampled(
            mlp, "categorical", y, x, generator=seeded(), samples=20_000, chunk_size=80_000
        )
        exact = DiagonalFisher.exact(mlp, "categorical", y, x).values
        assert float((drawn.values - exact).norm() / exact.norm()) < 0.02


class TestEmpirical:
    @pytest.mark.parametrize("chunk_size", CHUNKS)
    @pytest.mark.parametrize("root_weights", [False, True])
    def test_is_the_diagonal_of_the_empirical_fisher_matrix(self, root_weights, chunk_size):
        y, x, t = point(), sampled(5, 2, seed=7), torch.tensor([0, 1, 2, 2, 0])
        for weights in (None, sampled(5, seed=2).square()):
            arguments = {"weights": weights, "root_weights": root_weights, "damping": 0.2}
            A = DiagonalFisher.empirical(
                mlp, "categorical", y, x, t, chunk_size=chunk_size, **arguments
            )
            F = EmpiricalFisher.from_model(mlp, "categorical", y, x, t, **arguments)
            close(A.values, F.to_dense().diagonal())

    def test_positions(self):
        y, x, t = (
            point(),
            sampled(5, 2, seed=7),
            torch.tensor([[0, 1], [2, 2], [0, 0], [1, 2], [1, 1]]),
        )
        A = DiagonalFisher.empirical(images, "categorical", y, x, t, chunk_size=2)
        F = EmpiricalFisher.from_model(images, "categorical", y, x, t)
        close(A.values, F.to_dense().diagonal())

    def test_labels_that_do_not_fit(self):
        y, x = point(), sampled(5, 2)
        with pytest.raises(ValueError, match=r"inputs and targets: leading axes of \[4, 5\]"):
            DiagonalFisher.empirical(mlp, "categorical", y, x, torch.zeros(4, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"targets is torch.float64; expected integer classes"):
            DiagonalFisher.empirical(mlp, "categorical", y, x, sampled(5))


def test_memory_is_that_of_a_few_gradients():
    """No tensor of more than chunk_size gradients is made, whatever the batch."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for part in torch.utils._pytree.tree_leaves(result):
                if isinstance(part, Tensor) and not part._is_view():
                    largest = max(largest, part.numel())
            return result

    y = {"w": sampled(30, 40), "v": sampled(40, CLASSES)}
    x, t, d = sampled(64, 30), torch.zeros(64, dtype=torch.int64), 30 * 40 + 40 * CLASSES
    makers = (
        lambda: DiagonalFisher.exact(mlp, "categorical", y, x, chunk_size=4),
        lambda: DiagonalFisher.empirical(mlp, "categorical", y, x, t, chunk_size=4),
        lambda: DiagonalFisher.sampled(
            mlp, "categorical", y, x, generator=seeded(), samples=9, chunk_size=4
        ),
    )
    for make in makers:
        largest = 0
        with Watch():
            make()
        assert 4 * d <= largest + d  # it does watch
        assert largest <= 4 * d


class TestItself:
    def test_acts_as_the_diagonal_and_is_a_pytree(self):
        A = DiagonalFisher(torch.tensor([1.0, 0.0], dtype=FLOAT64), damping=0.5)
        close(A.to_dense(), torch.diag(torch.tensor([1.5, 0.5], dtype=FLOAT64)))
        gradient = torch.func.grad(lambda A: (A @ torch.ones(2, dtype=FLOAT64)).sum())(A)
        close(gradient.values, torch.ones(2, dtype=FLOAT64))

    def test_damping_may_be_differentiated(self):
        f = torch.tensor([1.0, 0.0], dtype=FLOAT64)

        def total(c: Tensor) -> Tensor:
            return (DiagonalFisher(f, c) @ torch.ones(2, dtype=FLOAT64)).sum()

        close(torch.func.grad(total)(torch.tensor(0.5, dtype=FLOAT64)), torch.tensor(2.0).double())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.ones(2, 2),), r"diagonal has shape \(2, 2\); expected \(d,\)"),
            ((torch.tensor([1.0, -1.0]),), r"diagonal has negative or NaN entries"),
            ((torch.tensor([1.0, math.nan]),), r"diagonal has negative or NaN entries"),
            ((torch.ones(2), -1.0), r"damping=-1.0; expected one number >= 0"),
            ((torch.ones(2), math.nan), r"damping=nan"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DiagonalFisher(*arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"chunk_size": 0}, r"chunk_size=0; expected at least 1"),
            (
                {"weights": torch.ones(3, dtype=FLOAT64)},
                r"weights has shape \(3,\); expected \(5,\)",
            ),
            ({"inputs": torch.zeros(0, 2, dtype=FLOAT64)}, r"inputs: leading axes of \[0\]"),
            ({"damping": -1.0}, r"damping=-1.0"),
        ],
    )
    def test_errors_of_the_constructors(self, change, message):
        arguments = {"inputs": sampled(5, 2), **change}
        with pytest.raises(ValueError, match=message):
            DiagonalFisher.exact(mlp, "categorical", point(), **arguments)
        with pytest.raises(ValueError, match=message):
            DiagonalFisher.sampled(mlp, "categorical", point(), generator=seeded(), **arguments)

    def test_float32_is_kept(self):
        y = {name: value.float() for name, value in point().items()}
        A = DiagonalFisher.exact(mlp, "categorical", y, sampled(5, 2).float(), damping=0.1)
        assert A.values.dtype == torch.float32


class TestStream:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(1, 12), st.floats(0.0, 2.0), st.integers(0, 99))
    def test_plain_mean(self, count, damping, seed):
        pushed = sampled(count, 4, seed=seed).square()
        stream = DiagonalFisherStream(Space.flat(4, FLOAT64), damping=damping)
        for f in pushed:
            stream.push(f)
        assert len(stream) == count
        A = stream.operator()
        close(A.values, pushed.mean(0) + damping)
        assert A.damping == damping

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(1, 12), st.floats(0.01, 0.99), st.integers(0, 99))
    def test_smoothing_with_weights_that_sum_to_one(self, count, rho, seed):
        pushed = sampled(count, 4, seed=seed).square()
        stream = DiagonalFisherStream(Space.flat(4, FLOAT64), damping=0.5, rho=rho)
        moving = torch.zeros(4, dtype=FLOAT64)
        for f in pushed:
            stream.push(f)
            moving = (1 - rho) * moving + rho * f
        close(stream.operator().values, moving / (1 - (1 - rho) ** count) + 0.5)

    def test_reset_and_snapshots(self):
        stream = DiagonalFisherStream(Space.flat(2, FLOAT64))
        buffer = torch.ones(2, dtype=FLOAT64)
        stream.push(buffer)
        buffer.zero_()
        A = stream.operator()
        close(A.values, torch.ones(2, dtype=FLOAT64))
        stream.push(3 * torch.ones(2, dtype=FLOAT64))
        close(A.values, torch.ones(2, dtype=FLOAT64))
        close(stream.operator().values, 2 * torch.ones(2, dtype=FLOAT64))
        stream.reset()
        assert len(stream) == 0
        with pytest.raises(RuntimeError, match=r"no diagonal was pushed"):
            stream.operator()

    def test_of_batches(self):
        y, x = point(), sampled(8, 2)
        space = Space.of(y)
        stream = DiagonalFisherStream(space, damping=0.1)
        for batch in x.split(4):
            stream.push(DiagonalFisher.exact(mlp, "categorical", y, batch).values)
        whole = DiagonalFisher.exact(mlp, "categorical", y, x, damping=0.1)
        close(stream.operator().values, whole.values)
        assert stream.operator().domain == space

    def test_trees_are_taken_as_their_coordinates_are(self):
        tree = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
        space = Space.of(tree)
        nested, flat = DiagonalFisherStream(space), DiagonalFisherStream(space)
        nested.push(tree)
        flat.push(space.ravel(tree))
        assert torch.equal(nested.operator().values, flat.operator().values)

    def test_errors(self):
        space = Space.flat(2, FLOAT64)
        for settings_, message in (
            ({"rho": 0.0}, r"rho=0.0; expected 0 < rho < 1, or None"),
            ({"rho": math.nan}, r"rho=nan"),
            ({"damping": -1.0}, r"damping=-1.0"),
        ):
            with pytest.raises(ValueError, match=message):
                DiagonalFisherStream(space, **settings_)
        stream = DiagonalFisherStream(space)
        with pytest.raises(ValueError, match=r"diagonal has structure \(3,\); expected \(2,\)"):
            stream.push(torch.ones(3, dtype=FLOAT64))
        with pytest.raises(TypeError, match=r"diagonal has dtype torch.float32 on cpu"):
            stream.push(torch.ones(2))
        assert len(stream) == 0
