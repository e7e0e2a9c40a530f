"""`EmpiricalFisher` and `FisherStream` against explicit sums and the exact Fisher matrix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from operators.curvature.empirical_fisher import EmpiricalFisher, FisherStream
from operators.curvature.likelihood import Gaussian
from operators.derivatives import Hessian
from operators.elementary import Identity
from operators.space import Space
from solvers import InverseRecursion, Woodbury

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def stream_of(gradients: Tensor, **settings: float | None) -> FisherStream:
    stream = FisherStream(Space.flat(gradients.shape[1], gradients.dtype), **settings)
    for gradient in gradients:
        stream.push(gradient)
    return stream


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestStream:
    @PROPERTY
    @given(
        count=st.integers(0, 12),
        d=st.integers(1, 5),
        damping=st.floats(0.0, 2.0),
        initial=st.floats(0.1, 2.0),
        seed=st.integers(0, 99),
    )
    def test_mean_recursion_with_a_pseudo_sample(self, count, d, damping, initial, seed):
        gradients = sampled(count, d, seed=seed)
        explicit = initial * torch.eye(d, dtype=FLOAT64)  # H_0
        for t, g in enumerate(gradients, start=1):
            explicit = (t * explicit + torch.outer(g, g)) / (t + 1)
        stream = stream_of(gradients, damping=damping, initial=initial)
        assert len(stream) == count
        close(stream.operator().to_dense(), explicit + damping * torch.eye(d, dtype=FLOAT64))

    @PROPERTY
    @given(st.integers(1, 12), st.integers(1, 5), st.floats(0.01, 2.0), st.integers(0, 99))
    def test_plain_mean(self, count, d, damping, seed):
        gradients = sampled(count, d, seed=seed)
        explicit = sum(torch.outer(g, g) for g in gradients) / count
        operator = stream_of(gradients, damping=damping).operator()
        close(operator.to_dense(), explicit + damping * torch.eye(d, dtype=FLOAT64))
        close(operator.damping, torch.tensor(damping, dtype=FLOAT64))

    @PROPERTY
    @given(
        count=st.integers(0, 12),
        rho=st.floats(0.01, 0.99),
        damping=st.floats(0.0, 2.0),
        initial=st.floats(0.1, 2.0),
        seed=st.integers(0, 99),
    )
    def test_smoothing_recursion(self, count, rho, damping, initial, seed):
        gradients = sampled(count, 4, seed=seed)
        explicit = initial * torch.eye(4, dtype=FLOAT64)
        for g in gradients:
            explicit = (1 - rho) * explicit + rho * torch.outer(g, g)
        operator = stream_of(gradients, damping=damping, initial=initial, rho=rho).operator()
        close(operator.to_dense(), explicit + damping * torch.eye(4, dtype=FLOAT64))

    def test_window_of_the_mean_is_the_mean_over_the_window(self):
        gradients = sampled(9, 3)
        stream = stream_of(gradients, damping=0.5, window=4)
        assert len(stream) == 4
        newest = stream_of(gradients[-4:], damping=0.5)
        assert torch.equal(stream.operator().to_dense(), newest.operator().to_dense())

    @pytest.mark.parametrize("window", [1, 5, 20])
    def test_window_of_smoothing_loses_less_than_it_says(self, window):
        rho, gradients = 0.2, torch.nn.functional.normalize(sampled(20, 3), dim=1)
        full = stream_of(gradients, damping=0.1, initial=1.0, rho=rho).operator()
        short = stream_of(gradients, damping=0.1, initial=1.0, rho=rho, window=window).operator()
        # Unit gradients: the trace of what was dropped is its mass. H_0 decays by all 20 pushes.
        lost = float(torch.trace(full.to_dense() - short.to_dense()))
        mass = (1 - rho) ** window - (1 - rho) ** 20
        assert lost == pytest.approx(mass, abs=1e-12)
        assert torch.equal(full.damping, short.damping)

    def test_reset_starts_again_from_the_initial_matrix(self):
        gradients = sampled(5, 3)
        for rho in (None, 0.3):
            stream = stream_of(sampled(7, 3, seed=1), damping=0.1, initial=2.0, rho=rho)
            stream.reset()
            assert len(stream) == 0
            close(stream.operator().to_dense(), 2.1 * torch.eye(3, dtype=FLOAT64))
            for gradient in gradients:
                stream.push(gradient)
            fresh = stream_of(gradients, damping=0.1, initial=2.0, rho=rho)
            assert torch.equal(stream.operator().to_dense(), fresh.operator().to_dense())

    def test_an_operator_is_a_snapshot(self):
        stream = stream_of(sampled(2, 3), damping=1.0)
        operator = stream.operator()
        before = operator.to_dense().clone()
        stream.push(sampled(3, seed=5))
        stream.reset()
        assert torch.equal(operator.to_dense(), before)

    def test_a_gradient_buffer_may_be_reused(self):
        """As optimisers do: the same tensor is overwritten for each step."""
        gradients, buffer = sampled(3, 2), torch.empty(2, dtype=FLOAT64)
        stream = FisherStream(Space.flat(2, FLOAT64), damping=1.0)
        for gradient in gradients:
            buffer.copy_(gradient)
            stream.push(buffer)
        buffer.zero_()
        expected = stream_of(gradients, damping=1.0)
        assert torch.equal(stream.operator().to_dense(), expected.operator().to_dense())

    def test_no_history_is_held(self):
        stream = FisherStream(Space.flat(2, FLOAT64), damping=1.0)
        stream.push(torch.ones(2, dtype=FLOAT64, requires_grad=True) * 2)
        assert not stream.operator().rows.requires_grad

    def test_acts_on_the_nested_space(self):
        tree = {"w": sampled(2, 2), "b": sampled(1)}
        space = Space.of(tree)
        stream = FisherStream(space, damping=0.5)
        stream.push(tree)
        flat = FisherStream(space, damping=0.5)
        flat.push(space.ravel(tree))
        assert torch.equal(flat.operator().rows, stream.operator().rows)
        result = stream.operator() @ tree
        squared = space.ravel(tree) @ space.ravel(tree)
        close(result["w"], (0.5 + squared) * tree["w"])

    @pytest.mark.parametrize("rho", [None, 0.1])
    def test_nothing_to_average(self, rho):
        stream = FisherStream(Space.flat(2, FLOAT64), damping=1.0, rho=rho)
        with pytest.raises(RuntimeError, match=r"no gradient was pushed and initial is 0"):
            stream.operator()

    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    def test_dtype_is_kept(self, dtype):
        for rho in (None, 0.1):
            stream = stream_of(sampled(3, 2).to(dtype), damping=0.1, initial=0.2, rho=rho)
            assert stream.operator().to_dense().dtype == dtype

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"damping": 0.0}, r"damping=0.0 and initial=0.0; expected both >= 0 and one > 0"),
            ({"damping": -1.0, "initial": 2.0}, r"damping=-1.0"),
            ({"damping": 1.0, "initial": -0.5}, r"initial=-0.5"),
            ({"damping": float("nan")}, r"damping=nan"),
            ({"damping": 1.0, "initial": float("nan")}, r"initial=nan"),
            ({"damping": 1.0, "rho": 0.0}, r"rho=0.0; expected 0 < rho < 1, or None"),
            ({"damping": 1.0, "rho": 1.0}, r"rho=1.0"),
            ({"damping": 1.0, "rho": float("nan")}, r"rho=nan"),
            ({"damping": 1.0, "window": 0}, r"window=0; expected at least 1, or None"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            FisherStream(Space.flat(2, FLOAT64), **settings)

    def test_gradients_that_do_not_fit(self):
        stream = FisherStream(Space.flat(2, FLOAT64), damping=1.0)
        with pytest.raises(ValueError, match=r"gradient has structure \(3,\); expected \(2,\)"):
            stream.push(sampled(3))
        with pytest.raises(ValueError, match=r"gradient has structure \(2, 1\); expected \(2,\)"):
            stream.push(sampled(2, 1))
        with pytest.raises(TypeError, match=r"torch.float32 on cpu; expected torch.float64"):
            stream.push(torch.ones(2))
        assert len(stream) == 0


class TestWindUp:
    """Directions that no gradient excites: the dense recursion grows there, the stream does not."""

    rho, damping, initial, d = 0.1, 1e-2, 1.0, 12

    def gradients(self, count: int) -> Tensor:
        """Rows that excite the first three directions only."""
        return torch.nn.functional.pad(sampled(count, 3), (0, self.d - 3))

    def test_the_stream_stays_below_one_over_damping(self):
        stream = stream_of(
            self.gradients(2000), damping=self.damping, initial=self.initial, rho=self.rho
        )
        factor = Woodbury().prepare(stream.operator())
        inverse = factor.solve(torch.eye(self.d, dtype=FLOAT64)).value
        largest = float(torch.linalg.matrix_norm(inverse, 2))
        assert largest == pytest.approx(1 / self.damping, rel=1e-10)  # attained off the span
        excited = float(torch.linalg.matrix_norm(inverse[:3, :3], 2))
        assert excited < 10  # the gradients are of unit variance: F is of order 1 there

    def test_the_dense_recursion_grows_geometrically(self):
        recursion = InverseRecursion(self.d, initial=self.initial, rho=self.rho, dtype=FLOAT64)
        for g in self.gradients(120):
            recursion.update(g)
        growth = (1 - self.rho) ** -120 / self.initial  # 3.1e5
        unexcited = recursion.inverse.diag()[3:]
        torch.testing.assert_close(
            unexcited, torch.full_like(unexcited, growth), rtol=1e-10, atol=0
        )
        assert growth > 1000 / self.damping
        assert float(recursion.inverse.diag()[:3].max()) < 10


def softmax_loss(y: Tensor, sample: tuple[Tensor, Tensor]) -> Tensor:
    """Negative log-likelihood of a linear softmax model with weights ``(classes, features)``."""
    features, label = sample
    logits = y @ features
    return torch.logsumexp(logits, 0) - (logits * label).sum()


class TestFisherIsTheHessian:
    classes = 3

    def model(self, features: int, seed: int = 3) -> Tensor:
        return sampled(self.classes, features, seed=seed)

    def exact(self, y: Tensor, inputs: Tensor) -> Tensor:
        """Hessian of the mean loss; the labels do not enter it."""
        labels = torch.zeros(len(inputs), self.classes, dtype=FLOAT64)

        def loss(y: Tensor) -> Tensor:
            return torch.func.vmap(lambda s: softmax_loss(y, s))((inputs, labels)).mean()

        # With all-zero labels only the log-partition function is left, whose Hessian it is.
        return Hessian(loss, y).to_dense()

    def test_exactly_when_every_label_enters_with_its_probability(self):
        inputs = sampled(5, 4)
        y = self.model(4)
        probabilities = torch.softmax(inputs @ y.T, dim=1)
        samples = (
            inputs.repeat_interleave(self.classes, dim=0),
            torch.eye(self.classes, dtype=FLOAT64).repeat(len(inputs), 1),
        )
        scores = EmpiricalFisher.from_samples(softmax_loss, y, samples).rows
        fisher = EmpiricalFisher(scores, weights=probabilities.reshape(-1) / len(inputs))
        close(fisher.to_dense(), self.exact(y, inputs))

    def test_in_the_limit_of_many_labels_drawn_from_the_model(self):
        n, y = 200_000, self.model(4)
        inputs = sampled(n, 4, seed=1)
        labels = self.draw(y, inputs, seed=2)
        fisher = EmpiricalFisher.from_samples(softmax_loss, y, (inputs, labels)).to_dense()
        hessian = self.exact(y, inputs)
        assert torch.linalg.matrix_norm(fisher - hessian) < 0.02 * torch.linalg.matrix_norm(hessian)

    def test_not_with_labels_of_another_model(self):
        """Far from the minimum the empirical Fisher is a surrogate: the identity must fail."""
        n, y = 20_000, self.model(4)
        inputs = sampled(n, 4, seed=1)
        labels = self.draw(-y, inputs, seed=2)
        fisher = EmpiricalFisher.from_samples(softmax_loss, y, (inputs, labels)).to_dense()
        hessian = self.exact(y, inputs)
        assert torch.linalg.matrix_norm(fisher - hessian) > 0.5 * torch.linalg.matrix_norm(hessian)

    def draw(self, y: Tensor, inputs: Tensor, seed: int) -> Tensor:
        """One-hot labels from the model's own distribution."""
        probabilities = torch.softmax(inputs @ y.T, dim=1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return torch.eye(self.classes, dtype=FLOAT64)[drawn]

    def test_batch_scale_exactly(self):
        """``E[gbar gbar^T] = F / B`` over all labellings of a batch, each with its probability."""
        batch, y = 3, self.model(2)
        inputs = sampled(batch, 2)
        probabilities = torch.softmax(inputs @ y.T, dim=1)
        eye = torch.eye(self.classes, dtype=FLOAT64)

        rows, weights = [], []
        for labelling in itertools.product(range(self.classes), repeat=batch):
            samples = (inputs, eye[list(labelling)])
            rows.append(EmpiricalFisher.from_samples(softmax_loss, y, samples).rows.mean(0))
            weights.append(math.prod(float(probabilities[i, k]) for i, k in enumerate(labelling)))
        rows, weights = torch.stack(rows), torch.tensor(weights, dtype=FLOAT64)

        fisher = self.exact(y, inputs)
        close(EmpiricalFisher(rows, weights=weights).to_dense(), fisher / batch)
        close(EmpiricalFisher(batch**0.5 * rows, weights=weights).to_dense(), fisher)

    def test_batch_scale_of_a_stream_of_batch_gradients(self):
        batch, steps, y = 16, 4000, self.model(2)
        inputs = sampled(batch * steps, 2, seed=1)
        labels = self.draw(y, inputs, seed=2)
        scores = EmpiricalFisher.from_samples(softmax_loss, y, (inputs, labels)).rows
        means = scores.reshape(steps, batch, -1).mean(1)
        hessian = self.exact(y, inputs)

        plain = stream_of(means, damping=1e-12).operator().to_dense()
        scaled = stream_of(batch**0.5 * means, damping=1e-12).operator().to_dense()
        ratio = float(torch.trace(plain) / torch.trace(hessian))
        assert ratio == pytest.approx(1 / batch, rel=0.05)
        assert torch.linalg.matrix_norm(scaled - hessian) < 0.05 * torch.linalg.matrix_norm(hessian)
        assert torch.linalg.matrix_norm(plain - hessian) > 0.9 * torch.linalg.matrix_norm(hessian)


class TestEmpiricalFisher:
    def test_mean_over_a_batch_by_default(self):
        gradients = sampled(7, 3)
        fisher = EmpiricalFisher(gradients, damping=0.3)
        close(fisher.to_dense(), gradients.T @ gradients / 7 + 0.3 * torch.eye(3, dtype=FLOAT64))
        assert fisher.positive_definite
        close(fisher.damping, torch.tensor(0.3, dtype=FLOAT64))

    def test_from_samples_is_the_sum_over_single_gradients(self):
        y = {"w": sampled(2, 3), "b": sampled(2, seed=1)}
        samples = {"x": sampled(5, 3, seed=2), "t": sampled(5, 2, seed=3)}

        def loss(y, sample):
            return ((y["w"] @ sample["x"] + y["b"] - sample["t"]) ** 2).sum()

        fisher = EmpiricalFisher.from_samples(loss, y, samples, damping=0.1)
        explicit = 0.1 * torch.eye(8, dtype=FLOAT64)
        for i in range(5):
            residual = 2 * (y["w"] @ samples["x"][i] + y["b"] - samples["t"][i])
            g = torch.cat([torch.outer(residual, samples["x"][i]).reshape(-1), residual])
            explicit = explicit + torch.outer(g, g) / 5
        close(fisher.to_dense(), explicit)
        assert fisher.domain == Space.of(y)

    def test_damping_adds_up_and_stays_structured(self):
        fisher = EmpiricalFisher(sampled(2, 3), damping=0.3) + 0.2 * Identity(3, FLOAT64)
        assert fisher.low_rank_plus_diagonal
        close(fisher.diagonal_values, torch.tensor(0.5, dtype=FLOAT64))

    def test_without_gradients_it_is_the_damping(self):
        fisher = EmpiricalFisher(torch.zeros(0, 3, dtype=FLOAT64), damping=0.3)
        close(fisher.to_dense(), 0.3 * torch.eye(3, dtype=FLOAT64))
        assert fisher.effective_rank() == 0.0

    @pytest.mark.parametrize(
        ("gradients", "damping", "expected"),
        [
            # s_i = 4, 1 with weights 1/2 on rows of squared length 8, 2
            ([[8**0.5, 0.0, 0.0], [0.0, 2**0.5, 0.0]], 1.0, 4 / 5 + 1 / 2),
            ([[8**0.5, 0.0, 0.0], [0.0, 2**0.5, 0.0]], 0.0, 2.0),
            # parallel gradients are one direction, however many they are
            ([[2.0, 1.0, 0.3]] * 6, 0.0, 1.0),
            ([[1.0, 0.0, 0.0]] * 6, 0.5, 1 / 1.5),
            ([[0.0, 0.0, 0.0]], 0.0, 0.0),
        ],
    )
    def test_effective_rank(self, gradients, damping, expected):
        fisher = EmpiricalFisher(torch.tensor(gradients, dtype=FLOAT64), damping)
        assert fisher.effective_rank() == pytest.approx(expected, rel=1e-12)

    def test_effective_rank_without_damping_is_the_rank(self):
        low = sampled(40, 3) @ sampled(3, 20, seed=1)
        assert EmpiricalFisher(low).effective_rank() == 3.0

    def test_effective_rank_falls_with_damping(self):
        gradients = sampled(10, 6)
        ranks = [EmpiricalFisher(gradients, c).effective_rank() for c in (0.0, 1e-3, 1.0, 1e3)]
        assert ranks[0] == 6.0
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[-1] < 0.1


@pytest.mark.parametrize("damping", [-0.1, math.nan, torch.ones(2)])
def test_damping_is_one_number_from_zero_on(damping):
    with pytest.raises(ValueError, match=r"damping=.*expected one number >= 0"):
        EmpiricalFisher(torch.ones(3, 2), damping)


class TestFromModel:
    def network(self, x: Tensor, seed: int = 1) -> nn.Module:
        net = nn.Sequential(nn.Linear(x.shape[1], 4), nn.Tanh(), nn.Linear(4, 3)).double()
        with torch.no_grad():
            for i, parameter in enumerate(net.parameters()):
                parameter.copy_(sampled(*parameter.shape, seed=seed + i))
        return net

    def gradients(self, net: nn.Module, loss, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of each sample's loss, one backward pass at a time."""
        rows = []
        for i in range(len(x)):
            value = loss(net(x[i : i + 1]), t[i : i + 1])
            parts = torch.autograd.grad(value, tuple(net.parameters()))
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows)

    cases = (
        (
            "categorical",
            nn.CrossEntropyLoss(reduction="sum"),
            torch.tensor([0, 2, 1, 1, 0]),
        ),
        (
            "bernoulli",
            nn.BCEWithLogitsLoss(reduction="sum"),
            (sampled(5, 3, seed=3) > 0).double(),
        ),
        (
            Gaussian(variance=0.25),
            lambda z, t: (z - t).square().sum() / (2 * 0.25),
            sampled(5, 3, seed=3),
        ),
    )

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize(("likelihood", "loss", "t"), cases)
    def test_is_the_mean_of_outer_products(self, likelihood, loss, t, chunk_size):
        x = sampled(5, 2)
        net = self.network(x)
        g = self.gradients(net, loss, x, t)
        fisher = EmpiricalFisher.from_model(
            net, likelihood, None, x, t, damping=0.1, chunk_size=chunk_size
        )
        close(fisher.rows, g)
        eye = torch.eye(g.shape[1], dtype=FLOAT64)
        close(fisher.to_dense(), g.T @ g / 5 + 0.1 * eye)
        assert fisher.domain == Space.of({n: p.detach() for n, p in net.named_parameters()})
        close(fisher.damping, torch.tensor(0.1, dtype=FLOAT64))

    def test_weights_enter_squared_unless_their_root_is_asked_for(self):
        x, t, w = sampled(5, 2), torch.tensor([0, 2, 1, 1, 0]), sampled(5, seed=4).square()
        net = self.network(x)
        g = self.gradients(net, nn.CrossEntropyLoss(), x, t)
        for root, power in ((False, 2), (True, 1)):
            fisher = EmpiricalFisher.from_model(
                net, "categorical", None, x, t, weights=w, root_weights=root
            )
            close(fisher.to_dense(), (g.T * w**power) @ g / 5)

    def test_the_root_of_the_weights_gives_the_hessian_of_the_weighted_loss(self):
        """Every label once, with its probability: F is then exact, and so is the comparison."""
        x, w = sampled(4, 2), torch.tensor([0.1, 2.0, 0.0, 1.0], dtype=FLOAT64)
        y = sampled(2, 3, seed=5)

        def model(y: Tensor, x: Tensor) -> Tensor:
            return x @ y

        p = torch.softmax(model(y, x), 1)
        labels = torch.arange(3).repeat(4)
        repeated, weights = x.repeat_interleave(3, 0), w.repeat_interleave(3)
        # The probability of a label is a weight that belongs to the mean, not to the loss.
        share = 3 * p.reshape(-1)

        def loss(y: Tensor) -> Tensor:
            each = nn.functional.cross_entropy(model(y, repeated), labels, reduction="none")
            return (each * weights * share).mean()

        hessian = Hessian(loss, y).to_dense()
        root = EmpiricalFisher.from_model(
            model, "categorical", y, repeated, labels, weights=weights, root_weights=True
        )
        matched = EmpiricalFisher(root.rows, weights=root.weights * share)
        close(matched.to_dense(), hessian)
        plain = EmpiricalFisher.from_model(
            model, "categorical", y, repeated, labels, weights=weights
        )
        wrong = EmpiricalFisher(plain.rows, weights=plain.weights * share).to_dense()
        assert torch.linalg.matrix_norm(wrong - hessian) > 0.3 * torch.linalg.matrix_norm(hessian)

    def test_positions_of_a_sample_are_one_row(self):
        x, t = sampled(4, 2), torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])
        y = sampled(2, 3, seed=5)

        def model(y: Tensor, x: Tensor) -> Tensor:
            return torch.stack([x @ y, (x @ y) ** 2], 2)

        def loss(y: Tensor, sample: tuple[Tensor, Tensor]) -> Tensor:
            z = model(y, sample[0][None])
            return nn.functional.cross_entropy(z, sample[1][None], reduction="sum")

        rows = EmpiricalFisher.from_samples(loss, y, (x, t)).rows
        fisher = EmpiricalFisher.from_model(model, "categorical", y, x, t)
        close(fisher.rows, rows)
        close(fisher.to_dense(), rows.T @ rows / 8)

    def test_chunks_of_from_samples(self):
        y = sampled(3, 4)
        samples = (sampled(7, 4, seed=1), sampled(7, 3, seed=2))
        whole = EmpiricalFisher.from_samples(softmax_loss, y, samples)
        cut = EmpiricalFisher.from_samples(softmax_loss, y, samples, chunk_size=3)
        close(cut.rows, whole.rows)
        with pytest.raises(ValueError, match=r"chunk_size=0"):
            EmpiricalFisher.from_samples(softmax_loss, y, samples, chunk_size=0)
        with pytest.raises(ValueError, match=r"samples: leading axes of \[0\]"):
            EmpiricalFisher.from_samples(softmax_loss, y, (samples[0][:0], samples[1][:0]))

    def test_is_differentiable_in_point_inputs_targets_and_weights(self):
        x, t, w = sampled(4, 2), sampled(4, 3, seed=3), sampled(4, seed=4).square()
        y, v = sampled(2, 3, seed=5), sampled(6, seed=6)

        def quadratic(y: Tensor, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
            def model(y: Tensor, x: Tensor) -> Tensor:
                return torch.tanh(x @ y)

            fisher = EmpiricalFisher.from_model(
                model, "gaussian", y, x, t, weights=w, root_weights=True
            )
            return v @ (fisher @ v)

        at = (y, x, t, w)
        gradients = torch.func.grad(quadratic, (0, 1, 2, 3))(*at)
        for i, gradient in enumerate(gradients):
            direction = sampled(*at[i].shape, seed=20 + i)
            ends = [
                quadratic(*(a + sign * 1e-5 * direction if j == i else a for j, a in enumerate(at)))
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / 2e-5
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)

    def test_inside_vmap(self):
        x, t, ys, v = sampled(4, 2), sampled(4, 3, seed=3), sampled(2, 2, 3), sampled(6)

        def product(y: Tensor) -> Tensor:
            fisher = EmpiricalFisher.from_model(
                lambda y, x: torch.tanh(x @ y), "gaussian", y, x, t, damping=0.1
            )
            return fisher @ v

        together = torch.func.vmap(product)(ys)
        close(together[1], product(ys[1]))

    def test_errors(self):
        x, t = sampled(5, 2), torch.tensor([0, 2, 1, 1, 0])
        net = self.network(x)

        def made(**change):
            arguments = {"likelihood": "categorical", "inputs": x, "targets": t, **change}
            return EmpiricalFisher.from_model(net, y=None, **arguments)

        for change, error, message in (
            ({"targets": t[:4]}, ValueError, r"targets has shape \(4,\); expected \(5,\)"),
            ({"likelihood": "poisson"}, ValueError, r"likelihood='poisson'; expected one of"),
            ({"weights": torch.ones(4)}, ValueError, r"weights has shape \(4,\); expected \(5,\)"),
            ({"weights": torch.ones(5)}, TypeError, r"weights is torch.float32 on cpu"),
            ({"weights": -torch.ones(5, dtype=FLOAT64)}, ValueError, r"weights has negative"),
            ({"weights": t * math.nan}, TypeError, r"weights is torch.float32"),
            ({"weights": t.double() * math.nan}, ValueError, r"negative or NaN"),
            ({"damping": -1.0}, ValueError, r"damping=-1.0; expected one number >= 0"),
            ({"chunk_size": 0}, ValueError, r"chunk_size=0"),
            ({"inputs": x[:0]}, ValueError, r"inputs: leading axes of \[0\]"),
        ):
            with pytest.raises(error, match=message):
                made(**change)
