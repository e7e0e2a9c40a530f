"""Hyper-data-cleaning: learn a weight for every training sample so that wrong labels count less.

Inner problem: softmax regression with bias on the weighted training set,

    G(W, x) = (1/n) sum_i sigmoid(x_i) CE(W; image_i, label_i) + l2 |W|^2 ,

outer problem: cross-entropy on a small, clean validation set, over the n numbers x.
Source of the task: Franceschi et al. (2017), arXiv:1703.01785, section 5.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from hyperlearn import datasets
from hyperlearn.budget import Budget
from hyperlearn.methods import (
    NHGD,
    FixedOuter,
    IdentityHessian,
    ImplicitDifferentiation,
    Method,
    Unrolled,
)
from hyperlearn.outer import minimize
from hyperlearn.problem import BilevelProblem, WeightedLikelihood
from hyperlearn.projections import Ball
from hyperlearn.regularizer import L2
from hyperlearn.runs import Run
from solvers import CG, Neumann

Tree = Any


@dataclass(frozen=True, kw_only=True)
class DataCleaning:
    """Settings of the task.

    Parameters
    ----------
    dataset
        ``"mnist"`` or ``"fashion-mnist"``.
    train_size
        Training images, with noisy labels; drawn by `data_seed` from the data set's training part.
    validation_size
        Clean images of the outer problem, from the same part and disjoint.
    selection_size
        Clean images that no run sees, likewise, for choosing settings. The data set's test images
        are only ever reported.
    corruption
        Share of training labels that are replaced by a uniform draw from the classes (which may
        hit the true one).
    l2
        Weight of the inner penalty ``l2 |W|^2``.
    initial_logit
        Every x_i at the start; 0 gives the weight 1/2.
    radius
        Project W onto this ball; None for no constraint.
    data_seed
        Of the split and of the corruption, both drawn once.
    """

    dataset: str = "mnist"
    train_size: int = 50_000
    validation_size: int = 5_000
    selection_size: int = 5_000
    corruption: float = 0.5
    l2: float = 1e-4
    initial_logit: float = 0.0
    radius: float | None = None
    data_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_size", "validation_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.selection_size < 0:
            raise ValueError(f"selection_size={self.selection_size}; expected at least 0")
        if not 0 <= self.corruption <= 1:
            raise ValueError(f"corruption={self.corruption}; expected a share from 0 to 1")
        if not self.l2 >= 0:
            raise ValueError(f"l2={self.l2}; expected a number >= 0")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius={self.radius}; expected a positive number, or None")
        if not math.isfinite(self.initial_logit):
            raise ValueError(f"initial_logit={self.initial_logit}; expected a finite number")


@dataclass(frozen=True)
class CleaningData:
    """Images as float32 rows in [0, 1], labels as int64; the parts are disjoint.

    Parameters
    ----------
    train_images, train_labels
        ``(n, 784)`` and the given, partly wrong labels ``(n,)``.
    true_labels
        Of the training images.
    train_index
        Their positions in the data set's training images.
    validation_images, validation_labels, selection_images, selection_labels
        Clean.
    test_images, test_labels
        Clean.
    classes
        Number of classes.
    """

    train_images: Tensor
    train_labels: Tensor
    true_labels: Tensor
    train_index: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    selection_images: Tensor
    selection_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def corrupted(self) -> Tensor:
        """Which given labels differ from the true ones (a redraw may hit the true label)."""
        return self.train_labels != self.true_labels


def load_data(settings: DataCleaning) -> CleaningData:
    """Read, check, split and corrupt.

    Raises
    ------
    hyperlearn.datasets.DatasetError
        The data set is missing, damaged, or holds labels or pixels out of range.
    ValueError
        The parts are larger than the data set.
    """
    images = datasets.load(settings.dataset)
    pixels = torch.as_tensor(images.train_images)
    labels = torch.as_tensor(images.train_labels, dtype=torch.long)
    test = torch.as_tensor(images.test_images)
    return split_and_corrupt(
        settings, pixels, labels, test, torch.as_tensor(images.test_labels, dtype=torch.long)
    )


def split_and_corrupt(
    settings: DataCleaning,
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: int = 10,
) -> CleaningData:
    """The same from tensors: images ``(n, ...)`` as uint8 in 0..255 or floats in [0, 1].

    Raises
    ------
    hyperlearn.datasets.DatasetError
        NaN pixels, labels out of range, or an empty set.
    ValueError
        The parts are larger than the set.
    """
    for part, pixels, given in (
        ("training images", images, labels),
        ("test images", test_images, test_labels),
    ):
        datasets.validate_images(pixels, given, classes=classes, name=part)
    sizes = (settings.train_size, settings.validation_size, settings.selection_size)
    if sum(sizes) > len(images):
        raise ValueError(
            f"train_size + validation_size + selection_size = {sum(sizes)}; the data set has "
            f"{len(images)} training images"
        )
    generator = torch.Generator().manual_seed(settings.data_seed)
    order = torch.randperm(len(images), generator=generator)[: sum(sizes)]
    train, validation, selection = torch.split(order, list(sizes))
    redrawn = torch.rand(len(train), generator=generator) < settings.corruption
    draw = torch.randint(classes, (len(train),), generator=generator)
    true_labels = labels[train]
    return CleaningData(
        train_images=_rows(images[train]),
        train_labels=torch.where(redrawn, draw, true_labels),
        true_labels=true_labels,
        train_index=train,
        validation_images=_rows(images[validation]),
        validation_labels=labels[validation],
        selection_images=_rows(images[selection]),
        selection_labels=labels[selection],
        test_images=_rows(test_images),
        test_labels=test_labels,
        classes=classes,
    )


def _rows(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    return flat.float() / 255.0 if not images.is_floating_point() else flat.float()


def cleaning_problem(data: CleaningData, settings: DataCleaning) -> BilevelProblem:
    """The bilevel problem on given data."""

    def logits(y: Tree, images: Tensor) -> Tensor:
        # (10 x 784) @ (784 x B) is 2.5 times faster on a CPU than the transposed product.
        return (y["weight"] @ images.T).T + y["bias"]

    def sample_loss(y: Tree, batch: Tree) -> Tensor:
        return F.cross_entropy(logits(y, batch["images"]), batch["labels"], reduction="none")

    def sample_weight(x: Tensor, batch: Tree) -> Tensor:
        return torch.sigmoid(x[batch["index"]])

    def inner_loss(y: Tree, x: Tensor, batch: Tree) -> Tensor:
        return (sample_weight(x, batch) * sample_loss(y, batch)).mean()

    def outer_loss(y: Tree, x: Tensor, batch: Tree) -> Tensor:
        return sample_loss(y, batch).mean()

    def accuracy(images: Tensor, labels: Tensor) -> Any:
        def metric(y: Tree, x: Tensor) -> float:
            return float((logits(y, images).argmax(1) == labels).float().mean())

        return metric

    metrics = {"test_accuracy": accuracy(data.test_images, data.test_labels)}
    if len(data.selection_labels):
        metrics["selection_accuracy"] = accuracy(data.selection_images, data.selection_labels)
    metrics["weight_auc"] = lambda y, x: auc(x, ~data.corrupted)
    size, pixels = data.train_images.shape
    return BilevelProblem(
        inner_loss,
        outer_loss,
        x0=torch.full((size,), settings.initial_logit),
        y0={"weight": torch.zeros(data.classes, pixels), "bias": torch.zeros(data.classes)},
        inner_data={
            "images": data.train_images,
            "labels": data.train_labels,
            "index": torch.arange(size),
        },
        outer_data={"images": data.validation_images, "labels": data.validation_labels},
        regularizer=L2(settings.l2),
        project_inner=None if settings.radius is None else Ball(settings.radius),
        likelihood=WeightedLikelihood(sample_loss=sample_loss, sample_weight=sample_weight),
        metrics=metrics,
        name="data-cleaning",
    )


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count half.

    NaN where one of the two classes is empty. Costs a sort.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = rankdata(score.detach().cpu().numpy())
    rank_sum = float(np.sum(ranks[positive.cpu().numpy()]))
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


# Steps and damping come from the grid of `validation/cleaning.py`: 9 settings a method, 30 seconds
# each on a corruption of its own; among those within one standard error of the method's best
# accuracy on the held-out images, the smallest outer step, then the best accuracy.
_SHARED: dict[str, Any] = {"inner_steps": 10, "inner_batch_size": 1024, "inner_step_size": 0.8}


def _cg(maxiter: int) -> CG:
    return CG(maxiter=maxiter, stop_at_maxiter=True)


def _neumann(maxiter: int) -> Neumann:
    step_size = _SHARED["inner_step_size"]  # the series then equals unrolling at a stationary y
    return Neumann(step_size=step_size, maxiter=maxiter, stop_at_maxiter=True)


METHODS: dict[str, Method] = {
    "nhgd": NHGD(step_size=3e3, damping=0.03, **(_SHARED | {"inner_step_size": 0.5})),
    "cg10": ImplicitDifferentiation(solver=_cg(10), step_size=3e3, **_SHARED),
    "cg40": ImplicitDifferentiation(solver=_cg(40), step_size=1e4, **_SHARED),
    "neumann10": ImplicitDifferentiation(solver=_neumann(10), step_size=3e3, **_SHARED),
    "neumann40": ImplicitDifferentiation(solver=_neumann(40), step_size=1e4, **_SHARED),
    "identity": IdentityHessian(step_size=1e4, **_SHARED),
    "unrolled": Unrolled(step_size=3e3, **_SHARED),
    "none": FixedOuter(step_size=0.0, **(_SHARED | {"inner_step_size": 0.02})),
}


def clean(
    method: str | Method,
    settings: DataCleaning,
    *,
    budget: Budget,
    seed: int = 0,
    data: CleaningData | None = None,
    label: str | None = None,
    **options: Any,
) -> Run:
    """Run the whole task with one method.

    Parameters
    ----------
    method
        A key of `METHODS`, or a method of your own.
    settings
        Of the task.
    budget, seed
        As for `minimize`.
    data
        From `load_data`, to save reading it again.
    label
        What to call the method in legends; by default its key, or the name of its class.
    options
        More arguments of `minimize`: record, overwrite, resume, every, progress, callbacks.

    Raises
    ------
    KeyError
        An unknown method name.
    """
    label = label or (method if isinstance(method, str) else type(method).__name__)
    chosen = METHODS[method] if isinstance(method, str) else method
    data = data or load_data(settings)
    return minimize(
        cleaning_problem(data, settings),
        chosen,
        budget=budget,
        seed=seed,
        config={"label": label, "task": settings},
        attachments={
            "given_labels": data.train_labels.numpy(),
            "true_labels": data.true_labels.numpy(),
            "train_index": data.train_index.numpy(),
        },
        **options,
    )
