"""Likelihoods against Hessians of torch's losses, and against expectations over their labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from operators.curvature.likelihood import Bernoulli, Categorical, Gaussian, likelihood_of

FLOAT64 = torch.float64
LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "logistic": nn.BCEWithLogitsLoss(),
    "squares": nn.MSELoss(),
}


def outputs(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=FLOAT64)


def labels(name: str, f: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "cross-entropy":
        return torch.randint(f.shape[1], (len(f),), generator=generator)
    return torch.rand(f.shape, generator=generator, dtype=f.dtype).round()


def root_of(likelihood, f: Tensor) -> Tensor:
    # A single class has none: its likelihood is constant.
    return torch.stack([torch.zeros_like(f), *likelihood.columns(f)], -1)  # (M, C, K)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=20)
@given(classes=st.integers(1, 6), scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
def test_columns_are_a_root_of_the_hessian_of_the_loss(name, classes, scale, seed):
    f = outputs(3, classes, seed=seed, scale=scale)
    t = labels(name, f)
    root = root_of(likelihood_of(LOSSES[name]), f)
    for n in range(3):
        hessian = torch.func.hessian(lambda g, n=n: LOSSES[name](g[None], t[n][None]))(f[n])
        torch.testing.assert_close(root[n] @ root[n].T, hessian, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["cross-entropy", "logistic"])
def test_score_is_the_gradient_of_the_log_likelihood(name):
    f = outputs(4, 3)
    t = labels(name, f)
    loss = {"cross-entropy": nn.CrossEntropyLoss, "logistic": nn.BCEWithLogitsLoss}[name]
    gradient = torch.func.grad(lambda g: loss(reduction="sum")(g, t))(f)
    weight = 1 / 3 if name == "logistic" else 1.0  # a mean over entries: w^(1/2) of the score
    score = likelihood_of(LOSSES[name]).score(f, t)
    torch.testing.assert_close(score, weight**0.5 * gradient, rtol=1e-12, atol=1e-14)


def test_gaussian_score_and_hessian_follow_the_variance():
    f, t = outputs(4, 3), outputs(4, 3, seed=1)
    likelihood = Gaussian(variance=0.3)
    gradient = torch.func.grad(lambda g: ((g - t) ** 2).sum() / (2 * 0.3))(f)
    torch.testing.assert_close(likelihood.score(f, t), gradient, rtol=1e-12, atol=1e-14)
    root = root_of(likelihood, f)
    eye = torch.eye(3, dtype=FLOAT64).expand(4, 3, 3)
    torch.testing.assert_close(root @ root.mT, eye / 0.3, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("likelihood", [*map(likelihood_of, LOSSES.values()), Gaussian(variance=2)])
def test_scores_of_drawn_labels_have_the_fisher_as_second_moment(likelihood):
    draws = 200_000
    f = outputs(1, 3, seed=5)
    many = f.expand(draws, 3)
    drawn = likelihood.sample(many, torch.Generator().manual_seed(0))
    scores = likelihood.score(many, drawn)
    root = root_of(likelihood, f)[0]
    fisher = root @ root.T
    assert float((scores.T @ scores / draws - fisher).norm() / fisher.norm()) < 0.02
    assert float(scores.mean(0).norm()) < 0.02  # the expected score is zero
    assert torch.equal(drawn, likelihood.sample(many, torch.Generator().manual_seed(0)))


def test_terms_put_the_classes_last_and_keep_those_of_a_sample_together():
    f = outputs(2, 3, 5)
    terms = Categorical().terms(f)
    assert torch.equal(terms[0 * 5 + 4], f[0, :, 4])
    assert torch.equal(terms[1 * 5 + 2], f[1, :, 2])
    assert torch.equal(Gaussian().terms(f)[1 * 3 + 2], f[1, 2])
    assert Bernoulli().terms(outputs(4)).shape == (4, 1)
    targets = torch.arange(10).reshape(2, 5) % 3
    assert torch.equal(Categorical().target_terms(f, targets), targets.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "likelihood", "message"),
    [((3,), Categorical(), "classes on axis 1"), ((0, 3), Gaussian(), "N samples first")],
)
def test_outputs_that_are_refused(shape, likelihood, message):
    with pytest.raises(ValueError, match=message):
        likelihood.terms(torch.zeros(shape))


def test_targets_that_are_refused():
    f = outputs(4, 3)
    with pytest.raises(TypeError, match="integer classes"):
        Categorical().target_terms(f, torch.zeros(4))
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        Categorical().target_terms(f, torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes 0 to 2"):
        Categorical().target_terms(f, torch.tensor([0, 1, -100, 2]))
    with pytest.raises(TypeError, match="int64"):
        Gaussian().target_terms(f, torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \(4, 3\)"):
        Bernoulli().target_terms(f, torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("poisson", ValueError, "categorical"),
        (nn.L1Loss(), TypeError, "L1Loss"),
        (nn.MSELoss(reduction="sum"), ValueError, "reduction=sum"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "weight"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), ValueError, "label_smoothing=0.1"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), ValueError, "pos_weight"),
    ],
)
def test_losses_that_are_refused(spec, error, message):
    with pytest.raises(error, match=message):
        likelihood_of(spec)


def test_variance_is_positive():
    with pytest.raises(ValueError, match="variance"):
        Gaussian(variance=0.0)
    assert likelihood_of(Gaussian(variance=2.0)) == Gaussian(variance=2.0)
