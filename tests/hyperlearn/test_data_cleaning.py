"""Data cleaning on tiny synthetic images: the corruption, the losses, and every method."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hyperlearn as hl
from hyperlearn.datasets import DatasetError
from hyperlearn.experiments.data_cleaning import (
    METHODS,
    CleaningData,
    DataCleaning,
    auc,
    clean,
    cleaning_problem,
    split_and_corrupt,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SMALL = DataCleaning(train_size=60, validation_size=20, selection_size=10)


def images(n: int, seed: int = 0, classes: int = 10) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 4, 4): noise, and a bright pixel that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    pixels = torch.randint(0, 80, (n, 16), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), labels] = 255
    return pixels.reshape(n, 4, 4), labels


def split(task: DataCleaning = SMALL, n: int = 100, **changes: Any) -> CleaningData:
    (pixels, labels), (test_pixels, test_labels) = images(n), images(30, seed=1)
    arguments = {
        "images": pixels,
        "labels": labels,
        "test_images": test_pixels,
        "test_labels": test_labels,
    }
    return split_and_corrupt(task, **arguments | changes)


class TestSplit:
    def test_reproducible(self):
        first, second = split(), split()
        for name in vars(first):
            one, other = getattr(first, name), getattr(second, name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name

    def test_data_seed_and_nothing_else_decides(self):
        torch.manual_seed(1)
        first = split()
        torch.manual_seed(2)
        assert torch.equal(split().train_labels, first.train_labels)
        other = split(replace(SMALL, data_seed=1))
        assert not torch.equal(other.train_index, first.train_index)

    def test_labels_are_corrupted_once(self):
        """Neither reading the data nor a run redraws or adds to the noise."""
        pixels, labels = images(100)
        before = labels.clone()
        data = split(images=pixels, labels=labels)
        assert torch.equal(labels, before)  # the caller's labels are not touched
        given_labels = data.train_labels.clone()
        for _ in range(2):
            method = tiny(METHODS["identity"])
            run = clean(method, SMALL, data=data, budget=hl.Budget(steps=5), seed=3)
            assert torch.equal(data.train_labels, given_labels)
            np.testing.assert_array_equal(run.attachments["given_labels"], given_labels.numpy())
        again = split(images=pixels, labels=labels)
        assert torch.equal(again.train_labels, given_labels)

    @pytest.mark.parametrize("corruption", [0.0, 0.2, 0.5, 1.0])
    def test_rate(self, corruption):
        """A uniform redraw hits the true label with probability 1/10."""
        n = 20_000
        task = DataCleaning(
            train_size=n, validation_size=1, selection_size=0, corruption=corruption
        )
        labels = torch.arange(n + 1) % 10
        pixels = torch.zeros(n + 1, 1)
        data = split_and_corrupt(task, pixels, labels, pixels[:1], labels[:1])
        expected = corruption * (1 - 1 / 10)
        spread = math.sqrt(expected * (1 - expected) / n)
        assert abs(float(data.corrupted.float().mean()) - expected) <= 4 * spread
        if corruption:
            # Each pair of a true and a given label is as likely as any other.
            wrong = data.corrupted
            counts = torch.bincount(
                data.true_labels[wrong] * 10 + data.train_labels[wrong], minlength=100
            ).reshape(10, 10)
            assert (counts.diagonal() == 0).all()
            cell = n * expected / 90
            off_diagonal = counts[~torch.eye(10, dtype=torch.bool)]
            assert ((off_diagonal - cell).abs() < 5 * math.sqrt(cell)).all()

    def test_parts(self):
        """Disjoint parts of the given images, each with its own label."""
        pixels, labels = images(100)
        data = split()
        rows = pixels.reshape(100, -1).float() / 255
        where = {tuple(row.tolist()): i for i, row in enumerate(rows)}
        assert len(where) == 100
        parts = {
            "train": (data.train_images, data.true_labels),
            "validation": (data.validation_images, data.validation_labels),
            "selection": (data.selection_images, data.selection_labels),
        }
        found = {}
        for name, (part, part_labels) in parts.items():
            found[name] = [where[tuple(row.tolist())] for row in part]
            assert torch.equal(part_labels, labels[found[name]])
        assert [len(set(index)) for index in found.values()] == [60, 20, 10]
        for one, other in itertools.combinations(found.values(), 2):
            assert not set(one) & set(other)
        assert data.train_index.tolist() == found["train"]
        assert data.train_images.dtype == torch.float32
        assert data.train_labels.dtype == torch.int64
        test_pixels, test_labels = images(30, seed=1)
        assert torch.equal(data.test_images, test_pixels.reshape(30, -1).float() / 255)
        assert torch.equal(data.test_labels, test_labels)

    def test_float_images_are_taken_as_they_are(self):
        pixels, _ = images(100)
        floats = pixels.double() / 255
        assert torch.equal(split(images=floats).train_images, split().train_images)

    def test_all_of_the_images(self):
        task = replace(SMALL, train_size=70)
        assert sorted(split(task).train_index.tolist()) != list(range(70))
        assert len(split(task).train_images) == 70


class TestBadData:
    @pytest.mark.parametrize("bad", [-1, 10])
    @pytest.mark.parametrize("part", ["labels", "test_labels"])
    def test_labels_out_of_range(self, part, bad):
        labels = (images(100) if part == "labels" else images(30, seed=1))[1]
        labels[7] = bad
        with pytest.raises(DatasetError, match=f"1 of .* labels outside 0..9; first: {bad}"):
            split(**{part: labels})

    @pytest.mark.parametrize("part", ["images", "test_images"])
    def test_nan_pixels(self, part):
        pixels = images(100 if part == "images" else 30)[0].float() / 255
        pixels[3, 1, 2] = math.nan
        with pytest.raises(DatasetError, match=r"1 of .* pixels not finite"):
            split(**{part: pixels})

    def test_lengths_differ(self):
        with pytest.raises(DatasetError, match="100 images but 99 labels"):
            split(labels=images(100)[1][:99])

    def test_empty(self):
        with pytest.raises(DatasetError, match="empty"):
            split(images=torch.zeros(0, 4, 4), labels=torch.zeros(0, dtype=torch.long))

    def test_more_than_there_is(self):
        with pytest.raises(ValueError, match=r"= 101; the data set has 100 training images"):
            split(replace(SMALL, train_size=71))

    @pytest.mark.parametrize(
        "setting",
        [
            {"validation_size": 0},
            {"train_size": 0},
            {"selection_size": -1},
            {"corruption": 1.1},
            {"corruption": math.nan},
            {"l2": -1.0},
        ],
    )
    def test_settings(self, setting):
        (name, value), *_ = setting.items()
        with pytest.raises(ValueError, match=f"{name}={value}; expected"):
            DataCleaning(**setting)

    def test_empty_validation_set(self):
        data = split()
        empty = replace(
            data,
            validation_images=data.validation_images[:0],
            validation_labels=data.validation_labels[:0],
        )
        with pytest.raises(ValueError, match="outer_data is empty"):
            cleaning_problem(empty, SMALL)


class TestProblem:
    def reference(
        self, weight: Tensor, bias: Tensor, pixels: Tensor, labels: Tensor
    ) -> list[float]:
        """Cross-entropy of each image in double precision, by a loop."""
        losses = []
        for image, label in zip(pixels.double(), labels.tolist(), strict=True):
            scores = [float(weight[c].double() @ image + bias[c].double()) for c in range(10)]
            top = max(scores)
            norm = top + math.log(sum(math.exp(score - top) for score in scores))
            losses.append(norm - scores[label])
        return losses

    def test_losses(self):
        data = split()
        task = replace(SMALL, l2=0.3)
        problem = cleaning_problem(data, task)
        generator = torch.Generator().manual_seed(0)
        y = {
            "weight": torch.randn(10, 16, generator=generator),
            "bias": torch.randn(10, generator=generator),
        }
        x = torch.randn(60, generator=generator)
        losses = self.reference(y["weight"], y["bias"], data.train_images, data.train_labels)
        weights = [1 / (1 + math.exp(-value)) for value in x.double().tolist()]
        expected = sum(s * loss for s, loss in zip(weights, losses, strict=True)) / 60
        found = problem.inner_loss(y, x, problem.inner_data)
        assert float(found) == pytest.approx(expected, rel=1e-5)
        # A batch carries its indices along: the weights follow the samples.
        index = torch.tensor([5, 0, 33])
        batch = {name: leaf[index] for name, leaf in problem.inner_data.items()}
        expected = sum(weights[i] * losses[i] for i in index.tolist()) / 3
        assert float(problem.inner_loss(y, x, batch)) == pytest.approx(expected, rel=1e-5)

        whole = problem.oracles().inner(
            problem.y_space.ravel(y), problem.x_space.ravel(x), problem.inner_data
        )
        square = float((y["weight"] ** 2).sum() + (y["bias"] ** 2).sum())
        assert float(whole - found) == pytest.approx(0.3 * square, rel=1e-5)

        outer = self.reference(
            y["weight"], y["bias"], data.validation_images, data.validation_labels
        )
        found = problem.outer_loss(y, x, problem.outer_data)
        assert float(found) == pytest.approx(sum(outer) / 20, rel=1e-5)

    def test_likelihood_is_the_inner_loss_taken_apart(self):
        problem = cleaning_problem(split(), SMALL)
        x = torch.linspace(-2, 2, 60)
        y = {"weight": torch.linspace(-1, 1, 160).reshape(10, 16), "bias": torch.arange(10.0)}
        parts = problem.likelihood
        losses = parts.sample_loss(y, problem.inner_data)
        weights = parts.sample_weight(x, problem.inner_data)
        assert losses.shape == weights.shape == (60,)
        found = problem.inner_loss(y, x, problem.inner_data)
        torch.testing.assert_close((weights * losses).mean(), found)

    def test_start(self):
        problem = cleaning_problem(split(), replace(SMALL, initial_logit=1.5, radius=2.0))
        assert torch.equal(problem.x0, torch.full((60,), 1.5))
        assert problem.project_inner == hl.Ball(2.0)
        uniform = problem.outer_loss(problem.y0, problem.x0, problem.outer_data)
        assert float(uniform) == pytest.approx(math.log(10), rel=1e-6)

    def test_metrics(self):
        data = split()
        problem = cleaning_problem(data, SMALL)
        perfect = {"weight": torch.eye(10, 16), "bias": torch.zeros(10)}
        assert problem.metrics["test_accuracy"](perfect, problem.x0) == 1.0
        assert problem.metrics["selection_accuracy"](perfect, problem.x0) == 1.0
        shifted = {"weight": torch.eye(10, 16).roll(1, dims=0), "bias": torch.zeros(10)}
        assert problem.metrics["test_accuracy"](shifted, problem.x0) == 0.0
        good = torch.where(data.corrupted, -3.0, 3.0)
        assert problem.metrics["weight_auc"](perfect, good) == 1.0
        assert problem.metrics["weight_auc"](perfect, -good) == 0.0
        assert problem.metrics["weight_auc"](perfect, problem.x0) == 0.5

    def test_no_selection_set(self):
        task = replace(SMALL, selection_size=0)
        assert "selection_accuracy" not in cleaning_problem(split(task), task).metrics


class TestAuc:
    @PROPERTY
    @given(
        st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=25).filter(
            lambda pairs: len({positive for _, positive in pairs}) == 2
        )
    )
    def test_counts_pairs(self, pairs):
        """With scores from seven values there are ties in nearly every example."""
        score = torch.tensor([float(s) for s, _ in pairs])
        positive = torch.tensor([p for _, p in pairs])
        wins = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for (a, _), (b, _) in itertools.product(
                [pair for pair in pairs if pair[1]], [pair for pair in pairs if not pair[1]]
            )
        ]
        assert auc(score, positive) == pytest.approx(sum(wins) / len(wins), rel=1e-12)

    @pytest.mark.parametrize("positive", [True, False])
    def test_one_class(self, positive):
        assert math.isnan(auc(torch.arange(3.0), torch.full((3,), positive)))


def tiny(method: hl.Method) -> hl.Method:
    return replace(method, inner_batch_size=16, step_size=min(method.step_size, 1.0))


class TestMethods:
    @pytest.mark.parametrize("name", METHODS)
    def test_three_steps(self, name):
        """On the tiny task each method runs, gives a finite hypergradient, and certifies it."""
        data = split()
        run = clean(
            tiny(METHODS[name]), SMALL, data=data, budget=hl.Budget(steps=3), every=1, label=name
        )
        assert run.status == "finished"
        assert run.history["step"].tolist() == [0, 1, 2, 3]
        for column in ("outer_loss", "test_accuracy", "selection_accuracy", "weight_auc"):
            assert np.isfinite(run.history[column]).all()
        assert run.history["outer_loss"][-1] < math.log(10)
        assert run.config["label"] == name
        assert run.config["task"]["corruption"] == 0.5
        assert run.certificate is not None
        np.testing.assert_array_equal(run.attachments["true_labels"], data.true_labels.numpy())
        np.testing.assert_array_equal(run.attachments["train_index"], data.train_index.numpy())
        moved = float((run.x - 0).abs().max())
        assert (moved == 0) == (name == "none")

    @pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
    def test_direction(self, name):
        """One step tells wrong labels from right ones: their weights fall behind."""
        task = replace(SMALL, train_size=300, validation_size=100, selection_size=0)
        method = replace(tiny(METHODS[name]), inner_batch_size=100, inner_steps=40)
        data = split(task, n=400)
        run = clean(method, task, data=data, budget=hl.Budget(steps=1), every=1)
        assert run.history["weight_auc"][0] == 0.5
        wrong = int(data.corrupted.sum())
        chance = math.sqrt(301 / (12 * wrong * (300 - wrong)))  # spread of the AUC of a guess
        assert run.history["weight_auc"][-1] > 0.5 + 4 * chance

    def test_names(self):
        with pytest.raises(KeyError, match="best"):
            clean("best", SMALL, data=split(), budget=hl.Budget(steps=1))

    def test_truncated_solvers_say_so(self):
        assert METHODS["cg10"].solver.maxiter == METHODS["neumann10"].solver.maxiter == 10
        assert METHODS["cg40"].solver.maxiter == METHODS["neumann40"].solver.maxiter == 40
        for name in ("cg10", "cg40", "neumann10", "neumann40"):
            assert METHODS[name].solver.truncated

    def test_only_the_hypergradient_differs(self):
        """The comparison is fair: but for tuned step sizes the loop is the same for all."""
        names = ("inner_steps", "inner_batch_size", "outer_batch_size", "inner_decay", "momentum")
        assert len({tuple(getattr(m, name) for name in names) for m in METHODS.values()}) == 1
