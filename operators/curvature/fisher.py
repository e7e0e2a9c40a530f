"""The Fisher matrix of a model's likelihood: exact (`Fisher`), or from drawn labels.

For labels t that follow the model, ``p(t | f)`` with f the model's outputs, the scores
``g = d(-log p(t | f)) / d y`` have the second moment

    F = (1/N) sum_n w_n E_t[g_n g_n^T] = (1/N) sum_n w_n J_n^T H_n J_n .

Three matrices go by the name, and differ in the labels that they take. `Fisher` takes the
expectation over the model's own, and equals the Gauss-Newton matrix of the mean negative
log-likelihood. `SampledFisher` draws them, so that it is F in expectation. `EmpiricalFisher` takes
the labels that were observed: no estimate of F unless they follow the model (Kunstner, Hennig and
Balles, 2019, arXiv:1905.12558).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from operators.curvature.batch import batch_size, check_chunk_size, check_weights, chunks
from operators.curvature.empirical_fisher import EmpiricalFisher
from operators.curvature.likelihood import Likelihood, likelihood_of
from operators.curvature.model_curvature import ModelCurvature, checked_damping
from operators.curvature.module import as_function
from operators.curvature.output_hessian import fisher_product
from operators.curvature.scores import (
    Model,
    drawn_scores,
    drawn_targets,
    pulled_back,
    scale_of_rows,
    score_terms,
)
from operators.linear_operator import Scalar
from operators.space import Space, Tree


class Fisher(ModelCurvature):
    """``F = (1/M) sum_n w_n J_n^T H_n J_n + damping I``: exact, by products with the model.

    ``H_n`` is the Fisher information of the likelihood at the outputs: ``diag(p) - p p^T`` for a
    categorical one, ``diag(p (1 - p))`` for Bernoulli, ``I / variance`` for a Gaussian. The labels
    do not enter. M is the number of terms: N samples, times the positions where each has several.

    Parameters
    ----------
    model
        ``model(y, inputs)``, or a `torch.nn.Module`, whose positional arguments a tuple of inputs
        is.
    likelihood
        ``"categorical"`` (outputs are logits ``(N, C)`` or ``(N, C, ...)``), ``"bernoulli"``
        (logits ``(N, ..., C)``), ``"gaussian"`` (means ``(N, ..., C)``, variance 1), a
        `Likelihood` such as ``Gaussian(variance=0.1)``, or a loss of torch.nn that is one (see
        `likelihood_of`).
    y
        Point; None for the parameters of a module that require gradients.
    inputs
        Nested tensors with a leading axis of length N.
    weights
        ``w_n >= 0``, of shape ``(N,)``: those of the samples in the mean negative log-likelihood
        ``(1/N) sum_n w_n l_n``; by default ones.
    chunk_size
        Samples that go through the model at once, for memory; None for all, which is faster.
    damping
        ``>= 0``. The operator includes it. A penalty ``c |y|^2`` of the loss is no part of the
        likelihood: add its Hessian, ``2 c``, here.

    Attributes
    ----------
    damping
        The multiple of the identity that is inside the operator; a scalar tensor if it was given
        as one.

    Raises
    ------
    ValueError, TypeError
        As `GaussNewton`.

    Notes
    -----
    Scale: this is the matrix of one sample, the mean over the batch. The gradient of a mean loss
    over B samples has the second moment ``F / B`` where its mean is zero: scale such gradients by
    ``B^(1/2)`` before their outer products are taken for F. For cost and memory see
    `ModelCurvature`. Differentiable with respect to y, floating inputs, weights, the variance of
    a `Gaussian`, and damping.
    Source: Amari (1998, doi:10.1162/089976698300017746, section 2); Martens (2014,
    arXiv:1412.1193, section 9).

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> F = Fisher(lambda w, x: x @ w, "bernoulli", torch.zeros(2, 1), x)
    >>> F.to_dense()  # p (1 - p) = 1/4
    tensor([[0.2500, 0.2500],
            [0.2500, 0.5000]])
    """

    _parameters: ClassVar[tuple[str, ...]] = ("y", "inputs", "weights", "likelihood", "damping")

    def __init__(
        self,
        model: nn.Module | Model,
        likelihood: str | nn.Module | Likelihood,
        y: Tree | None,
        inputs: Tree,
        *,
        weights: Tensor | None = None,
        chunk_size: int | None = None,
        damping: Scalar = 0.0,
    ) -> None:
        self.likelihood, self.weights = likelihood_of(likelihood), weights
        function, point = as_function(model, y)
        space = Space.of(point, "y")
        checked_damping(damping, space)
        check_chunk_size(chunk_size)
        count = batch_size(inputs, "inputs")
        if weights is not None:
            check_weights(weights, count, space)
        with torch.no_grad():
            score_terms(function, self.likelihood, point, next(chunks(inputs, chunk_size)))
        super().__init__(
            model,
            y,
            inputs,
            damping=damping,
            chunk_size=chunk_size,
            positive_semidefinite=True,
        )

    def _shares(self) -> Tensor:
        if self.weights is not None:
            return self.weights
        count = batch_size(self.inputs, "inputs")
        return torch.ones(count, dtype=self.dtype, device=self.device)

    def _curve(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tensor:
        f = self.likelihood.terms(outputs)
        w = share.reshape(-1, *(1,) * (outputs.ndim - 1))
        scale = fraction * self.likelihood.weight(f) / f.shape[0]
        return scale * w * fisher_product(self.likelihood, outputs, tangent)


class SampledFisher(EmpiricalFisher):
    """``(1/(M S)) sum_n w_n sum_s g_ns g_ns^T + damping I`` with labels drawn from the model.

    S labels are drawn for every input, ``t_ns ~ p(. | f_n)``, and the scores ``g_ns`` kept as
    rows: F in factor form, for `solvers.Woodbury`. In expectation it is `Fisher`; the error
    falls as ``(N S)^(-1/2)``, and the rank is at most ``N S``.

    Parameters
    ----------
    model, likelihood, y, inputs, weights, damping
        As for `Fisher`.
    generator
        Where the labels come from; of the device of y.
    samples
        S, draws for every input.
    root_weights
        Whether a score of weight w counts as ``w g g^T``, as in the Hessian of a weighted
        likelihood: each score is scaled by ``w^(1/2)``. False for ``w^2 g g^T``, what the gradient
        of the weighted loss of a sample gives, which is not that Hessian unless w is 0 or 1.
    chunk_size
        Samples whose gradients are computed at once; the rows are held in any case.

    Raises
    ------
    ValueError, TypeError
        As `Fisher`; or samples is not positive.

    Notes
    -----
    Costs one run of the model and a vmapped sweep back for each draw; holds ``N S d`` numbers.
    The rows are differentiable with respect to y and inputs with the labels held fixed, which is
    not the derivative of F: that of the draws is missing.

    Examples
    --------
    >>> import torch
    >>> x, generator = torch.tensor([[1.0], [2.0]]), torch.Generator().manual_seed(0)
    >>> F = SampledFisher(
    ...     lambda w, x: x @ w, "gaussian", torch.zeros(1, 1), x, generator=generator, samples=20000
    ... )
    >>> F.rank, bool((F.to_dense() - 2.5).abs() < 0.1)
    (40000, True)
    """

    def __init__(
        self,
        model: nn.Module | Model,
        likelihood: str | nn.Module | Likelihood,
        y: Tree | None,
        inputs: Tree,
        *,
        generator: torch.Generator,
        samples: int = 1,
        weights: Tensor | None = None,
        root_weights: bool = True,
        chunk_size: int | None = None,
        damping: Scalar = 0.0,
    ) -> None:
        likelihood = likelihood_of(likelihood)
        function, point = as_function(model, y)
        space = Space.of(point, "y")
        check_chunk_size(chunk_size)
        checked_damping(damping, space)
        scale = scale_of_rows(weights, batch_size(inputs, "inputs"), space, root_weights)
        targets = drawn_targets(function, likelihood, point, inputs, samples, generator, chunk_size)
        scores = drawn_scores(function, likelihood, point, inputs, targets)
        rows = pulled_back(function, likelihood, point, inputs, scores, chunk_size)
        # (N, S, d) to (N S, d): the draws of an input stand together.
        per_row = (scale / (samples * scores.shape[2])).repeat_interleave(samples)
        super().__init__(rows.flatten(0, 1), damping, per_row, space=space)
