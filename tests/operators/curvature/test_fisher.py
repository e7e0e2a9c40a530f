"""`Fisher` and `SampledFisher` against expectations over labels that are summed in full."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from operators.curvature.empirical_fisher import EmpiricalFisher
from operators.curvature.fisher import Fisher, SampledFisher
from operators.curvature.gauss_newton import GaussNewton
from operators.curvature.likelihood import Bernoulli, Categorical, Gaussian
from operators.derivatives import Hessian
from operators.space import Space
from solvers import Woodbury

FLOAT64 = torch.float64
CLASSES = 3


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def linear(w: Tensor, x: Tensor) -> Tensor:
    return x @ w


def mlp(y, x: Tensor) -> Tensor:
    return torch.tanh(x @ y["w"]) @ y["v"]


def point(seed: int = 0):
    return {"w": sampled(2, 4, seed=seed), "v": sampled(4, CLASSES, seed=seed + 1)}


def images(y, x: Tensor) -> Tensor:
    """Logits ``(N, C, 2)``: two positions in a sample."""
    return torch.stack([mlp(y, x), mlp(y, x.flip(1)) ** 2], 2)


def jacobians(model, y, x: Tensor) -> Tensor:
    """``J_n``, of shape ``(N, C, d)``."""
    space = Space.of(y)
    return torch.func.jacrev(lambda v: model(space.unravel(v), x))(space.ravel(y))


def expectation(model, likelihood, y, x: Tensor) -> Tensor:
    """``(1/N) sum_n E_t[g g^T]``: all labels of discrete likelihoods, moments of the Gaussian."""
    J, z = jacobians(model, y, x), model(y, x)
    total = torch.zeros(J.shape[2], J.shape[2], dtype=FLOAT64)
    for n in range(len(x)):
        if likelihood == "categorical":
            p = torch.softmax(z[n], 0)
            for t in range(z.shape[1]):
                g = J[n].T @ (p - torch.eye(z.shape[1], dtype=FLOAT64)[t])
                total += p[t] * torch.outer(g, g)
        elif likelihood == "bernoulli":
            p = torch.sigmoid(z[n])
            for t in itertools.product((0.0, 1.0), repeat=z.shape[1]):
                label = torch.tensor(t, dtype=FLOAT64)
                probability = (p**label * (1 - p) ** (1 - label)).prod()
                g = J[n].T @ (p - label)
                total += probability * torch.outer(g, g)
        else:
            # s = (z - t) / variance has the covariance I / variance.
            total += J[n].T @ J[n] / likelihood.variance
    return total / len(x)


LIKELIHOODS = ["categorical", "bernoulli", Gaussian(variance=0.3)]


class TestExact:
    @pytest.mark.parametrize("chunk_size", [None, 2, 5])
    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_is_the_expectation_over_labels(self, likelihood, chunk_size):
        y, x = point(), sampled(5, 2, seed=7)
        F = Fisher(mlp, likelihood, y, x, chunk_size=chunk_size)
        close(F.to_dense(), expectation(mlp, likelihood, y, x))
        assert F.positive_semidefinite
        assert F._claims == ()

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_positions_are_terms_of_the_mean(self, chunk_size):
        y, x = point(), sampled(5, 2, seed=7)
        parts = [
            expectation(lambda y, x, k=k: images(y, x)[:, :, k], "categorical", y, x)
            for k in (0, 1)
        ]
        F = Fisher(images, "categorical", y, x, chunk_size=chunk_size)
        close(F.to_dense(), (parts[0] + parts[1]) / 2)
        parts = [
            expectation(lambda y, x, k=k: images(y, x)[..., k], "bernoulli", y, x) for k in (0, 1)
        ]
        F = Fisher(images, "bernoulli", y, x, chunk_size=chunk_size)  # (N, 3, 2): two outputs each
        close(F.to_dense(), (parts[0] + parts[1]) / 3)

    @pytest.mark.parametrize(
        ("loss", "likelihood"),
        [
            ("cross-entropy", "categorical"),
            ("cross-entropy", nn.CrossEntropyLoss()),
            ("mse", nn.MSELoss()),
            ("binary-cross-entropy", nn.BCEWithLogitsLoss()),
        ],
    )
    def test_is_the_gauss_newton_matrix_of_the_negative_log_likelihood(self, loss, likelihood):
        y, x = point(), sampled(5, 2, seed=7)
        targets = torch.tensor([0, 1, 2, 0, 0])
        if loss != "cross-entropy":
            targets = nn.functional.one_hot(targets, CLASSES).double()
        A = GaussNewton(mlp, loss, y, x, targets)
        close(Fisher(mlp, likelihood, y, x).to_dense(), A.to_dense())

    def test_scale_of_the_gaussian_against_the_mean_squared_error(self):
        """MSE is a mean over entries too, and has no half: ``2 / C`` of unit variance."""
        y, x = point(), sampled(5, 2, seed=7)
        A = GaussNewton(mlp, "mse", y, x, torch.zeros(5, CLASSES, dtype=FLOAT64))
        close(2 / CLASSES * Fisher(mlp, "gaussian", y, x).to_dense(), A.to_dense())

    def test_outputs_without_an_axis_of_their_own(self):
        w, x = sampled(2), sampled(5, 2, seed=7)
        flat = Fisher(linear, "bernoulli", w, x)
        close(flat.to_dense(), Fisher(linear, "bernoulli", w[:, None], x).to_dense())

    def test_is_the_hessian_of_a_linear_softmax_model_whatever_the_labels(self):
        w, x = sampled(2, CLASSES), sampled(6, 2, seed=1)
        F = Fisher(linear, "categorical", w, x)
        for t in (torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 2, 0, 1, 2])):
            H = Hessian(lambda w, t=t: nn.functional.cross_entropy(linear(w, x), t), w)
            close(F.to_dense(), H.to_dense())

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_weights_are_those_of_the_loss(self, chunk_size):
        """Trap: the Hessian of a weighted likelihood has w, not w^2."""
        w, x = sampled(2, CLASSES), sampled(6, 2, seed=1)
        weights = sampled(6, seed=2).square()
        F = Fisher(linear, "categorical", w, x, weights=weights, chunk_size=chunk_size)

        def loss(w: Tensor) -> Tensor:
            t = torch.zeros(6, dtype=torch.int64)
            return (weights * nn.functional.cross_entropy(linear(w, x), t, reduction="none")).mean()

        close(F.to_dense(), Hessian(loss, w).to_dense())

    def test_batch_scale(self):
        """Trap: the gradient of a mean loss over N samples has second moment F / N."""
        w, x = sampled(2, CLASSES), sampled(3, 2, seed=1)
        p = torch.softmax(linear(w, x), 1)
        moment = torch.zeros(6, 6, dtype=FLOAT64)
        for t in itertools.product(range(CLASSES), repeat=3):
            loss = lambda w, t=t: nn.functional.cross_entropy(linear(w, x), torch.tensor(t))  # noqa: E731
            g = torch.func.grad(loss)(w).reshape(-1)
            moment += math.prod(float(p[n, k]) for n, k in enumerate(t)) * torch.outer(g, g)
        close(3 * moment, Fisher(linear, "categorical", w, x).to_dense())

    def test_a_module_and_its_damping(self):
        net, x = nn.Linear(2, CLASSES).double(), sampled(5, 2)
        F = Fisher(net, "categorical", None, x, damping=0.2)
        eye = torch.eye(9, dtype=FLOAT64)
        close(F.to_dense(), Fisher(net, "categorical", None, x).to_dense() + 0.2 * eye)
        assert F.damping == 0.2
        assert F.positive_definite
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        assert F.domain == Space.of(parameters)
        close(F.domain.ravel(F @ parameters), F.to_dense() @ F.domain.ravel(parameters))

    def test_against_curvlinops(self):
        curvlinops = pytest.importorskip("curvlinops", reason="the oracle is not installed")
        net, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double(), sampled(5, 2)
        theirs = curvlinops.GGNLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            list(net.parameters()),
            [(x, torch.zeros(5, dtype=torch.int64))],
            check_deterministic=False,
        )
        ours = Fisher(net, "categorical", None, x)
        close(ours.to_dense(), (theirs @ torch.eye(ours.shape[0], dtype=FLOAT64)).detach())

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_differentiable_in_point_inputs_weights_and_damping(self, likelihood, chunk_size):
        y, x, weights = point(), sampled(3, 2, seed=7), sampled(3, seed=2).square()
        v, damping = sampled(20, seed=3), torch.tensor(0.3, dtype=FLOAT64)

        def quadratic(w: Tensor, x: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
            F = Fisher(
                mlp,
                likelihood,
                {**y, "w": w},
                x,
                weights=weights,
                damping=damping,
                chunk_size=chunk_size,
            )
            return v @ (F @ v)

        at = (y["w"], x, weights, damping)
        for i, gradient in enumerate(torch.func.grad(quadratic, (0, 1, 2, 3))(*at)):
            direction = sampled(*at[i].shape, seed=20 + i)
            ends = [
                quadratic(*(a + sign * 1e-5 * direction if j == i else a for j, a in enumerate(at)))
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / 2e-5
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)

    def test_mapped(self):
        ys, v = torch.stack([sampled(2, 3), sampled(2, 3, seed=1)]), sampled(6)
        x = sampled(5, 2, seed=7)

        def product(w: Tensor) -> Tensor:
            return Fisher(linear, "categorical", w, x, damping=0.1) @ v

        close(torch.func.vmap(product)(ys)[1], product(ys[1]))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"likelihood": "poisson"}, ValueError, r"likelihood='poisson'; expected one of"),
            ({"likelihood": nn.HuberLoss()}, TypeError, r"likelihood is a HuberLoss; expected"),
            ({"weights": torch.ones(4)}, ValueError, r"weights has shape \(4,\); expected \(5,\)"),
            ({"weights": torch.ones(5)}, TypeError, r"weights is torch.float32 on cpu; expected"),
            ({"weights": -torch.ones(5, dtype=FLOAT64)}, ValueError, r"weights has negative"),
            ({"damping": -1.0}, ValueError, r"damping=-1.0; expected one number >= 0"),
            ({"chunk_size": 0}, ValueError, r"chunk_size=0"),
            ({"inputs": torch.zeros(0, 2)}, ValueError, r"inputs: leading axes of \[0\]"),
            ({"model": lambda w, x: (x @ w,)}, TypeError, r"the model's output is a tuple"),
            (
                {"model": lambda w, x: (x @ w).sum(0)},
                ValueError,
                r"output has shape \(3,\); expected \(5, ...\), samples on axis 0",
            ),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {
            "model": linear,
            "likelihood": "categorical",
            "y": sampled(2, CLASSES),
            "inputs": sampled(5, 2),
            **change,
        }
        with pytest.raises(error, match=message):
            Fisher(**arguments)


class TestSampled:
    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_tends_to_the_exact_matrix(self, likelihood):
        """Within 2% for 2e5 draws."""
        y, x = point(), sampled(8, 2, seed=7)
        F = SampledFisher(mlp, likelihood, y, x, generator=seeded(), samples=25_000)
        exact = Fisher(mlp, likelihood, y, x).to_dense()
        assert F.rank == 200_000
        error = torch.linalg.matrix_norm(F.to_dense() - exact) / torch.linalg.matrix_norm(exact)
        assert float(error) < 0.02

    def test_tends_to_the_exact_matrix_over_many_inputs(self):
        w, x = sampled(3, CLASSES), sampled(200_000, 3, seed=7)
        sample = SampledFisher(linear, "categorical", w, x, generator=seeded())
        exact = Fisher(linear, "categorical", w, x).to_dense()
        error = torch.linalg.matrix_norm(sample.to_dense() - exact)
        assert float(error) < 0.02 * float(torch.linalg.matrix_norm(exact))

    def test_positions(self):
        y, x = point(), sampled(4, 2, seed=7)
        F = SampledFisher(images, "categorical", y, x, generator=seeded(), samples=10_000)
        exact = Fisher(images, "categorical", y, x).to_dense()
        error = torch.linalg.matrix_norm(F.to_dense() - exact)
        assert float(error) < 0.05 * float(torch.linalg.matrix_norm(exact))

    def test_the_root_of_the_weights_is_in_the_scores(self):
        """Trap: with it the weighted Fisher is met, without it missed by far."""
        w, x = sampled(2, CLASSES), sampled(10_000, 2, seed=7)
        weights = torch.sigmoid(3 * sampled(10_000, seed=8))
        exact = Fisher(linear, "categorical", w, x, weights=weights).to_dense()

        def error(**options: bool) -> float:
            F = SampledFisher(
                linear,
                "categorical",
                w,
                x,
                generator=seeded(),
                samples=10,
                weights=weights,
                **options,
            )
            difference = torch.linalg.matrix_norm(F.to_dense() - exact)
            return float(difference / torch.linalg.matrix_norm(exact))

        assert error() < 0.02
        assert error(root_weights=False) > 0.15

    def test_rows_are_the_scores_of_the_drawn_labels(self):
        w, x = sampled(2, CLASSES), sampled(5, 2, seed=7)
        F = SampledFisher(linear, "categorical", w, x, generator=seeded(3), samples=2)
        p = torch.softmax(linear(w, x), 1)
        for n, row in enumerate(F.rows.reshape(5, 2, 2, CLASSES)):
            for score in row:
                # x s^T with s = p - e_t for one of the labels t.
                t = int((score[0] / x[n, 0]).argmin())
                close(score, torch.outer(x[n], p[n] - torch.eye(CLASSES, dtype=FLOAT64)[t]))

    def test_seeds_and_chunks(self):
        y, x = point(), sampled(7, 2, seed=7)

        def rows(seed: int, chunk_size: int | None = None) -> Tensor:
            return SampledFisher(
                mlp, "categorical", y, x, generator=seeded(seed), samples=3, chunk_size=chunk_size
            ).rows

        before = torch.get_rng_state()
        assert torch.equal(rows(0), rows(0))
        assert not torch.equal(rows(0), rows(1))
        close(rows(0, 2), rows(0))
        assert torch.equal(torch.get_rng_state(), before)

    def test_is_solved_in_factor_form(self):
        y, x, b = point(), sampled(5, 2, seed=7), sampled(20, seed=9)
        F = SampledFisher(mlp, "categorical", y, x, generator=seeded(), damping=0.1)
        assert isinstance(F, EmpiricalFisher)
        assert F.low_rank_plus_diagonal
        assert F.positive_definite
        close(Woodbury().prepare(F).solve(b).value, torch.linalg.solve(F.to_dense(), b), 1e-9)
        close(F.damping, torch.tensor(0.1, dtype=FLOAT64))

    def test_rows_are_differentiable_with_the_labels_held(self):
        x, v = sampled(5, 2, seed=7), sampled(6)

        def quadratic(w: Tensor) -> Tensor:
            F = SampledFisher(linear, Gaussian(), w, x, generator=seeded(), samples=2)
            return v @ (F @ v)

        # The labels are z + noise at w itself: with them held, the scores move by x^T dw.
        w, dw = sampled(2, CLASSES), sampled(2, CLASSES, seed=5)
        slope = torch.func.jvp(quadratic, (w,), (dw,))[1]
        F = SampledFisher(linear, Gaussian(), w, x, generator=seeded(), samples=2)
        moved = torch.einsum("ni,nc->nic", x, x @ dw).reshape(5, 6).repeat_interleave(2, 0)
        close(slope, 2 * ((F.rows @ v) * (moved @ v)).mean())

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"samples": 0}, ValueError, r"samples=0; expected at least 1"),
            (
                {"generator": None},
                TypeError,
                r"generator is a NoneType; expected a torch.Generator",
            ),
            ({"damping": math.nan}, ValueError, r"damping=nan"),
            ({"chunk_size": -1}, ValueError, r"chunk_size=-1"),
            ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\)"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {"generator": seeded(), **change}
        with pytest.raises(error, match=message):
            SampledFisher(linear, "categorical", sampled(2, 3), sampled(5, 2), **arguments)


def test_float32_is_kept():
    x, w = sampled(5, 2).float(), sampled(2, CLASSES).float()
    for likelihood in (Categorical(), Bernoulli(), Gaussian(variance=0.1)):
        assert Fisher(linear, likelihood, w, x, damping=0.1).to_dense().dtype == torch.float32
        F = SampledFisher(linear, likelihood, w, x, generator=seeded(), damping=0.1)
        assert F.to_dense().dtype == torch.float32
