"""Scores of single samples: ``g_n = J_n^T s_n``, s the gradient of ``-log p(t | f)`` in f.

Outputs are handled as the ``(M, C)`` terms of `operators.curvature.likelihood`: P for each of N
samples, ``M = N P``, with ``P = 1`` where a sample has one vector of outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.curvature.batch import batch_size, check_weights, chunks
from operators.curvature.likelihood import Likelihood
from operators.space import Space, Tree

Model = Callable[[Tree, Tree], Tree]


def score_terms(model: Model, likelihood: Likelihood, y: Tree, inputs: Tree) -> tuple[Tensor, int]:
    """Terms f ``(M, C)`` of the outputs, and P.

    Raises
    ------
    TypeError
        The output is not a tensor.
    ValueError
        Its leading axis is not that of the inputs.
    """
    outputs = checked_outputs(model(y, inputs), inputs)
    f = likelihood.terms(outputs)
    return f, f.shape[0] // outputs.shape[0]


def checked_outputs(outputs: Tree, inputs: Tree) -> Tensor:
    """The outputs of a model, one tensor with samples on axis 0.

    Raises
    ------
    TypeError, ValueError
        As `score_terms`.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model's output is a {type(outputs).__name__}; expected a tensor (N, ...)"
        )
    count = batch_size(inputs, "inputs")
    if outputs.ndim == 0 or outputs.shape[0] != count:
        raise ValueError(
            f"the model's output has shape {tuple(outputs.shape)}; expected ({count}, ...), "
            "samples on axis 0 as in the inputs"
        )
    return outputs


def observed_scores(
    model: Model, likelihood: Likelihood, y: Tree, inputs: Tree, targets: Tensor
) -> Tensor:
    """Gradients in f of ``-log p`` of the targets: ``(N, 1, P, C)``.

    Raises
    ------
    TypeError, ValueError
        The targets do not fit the outputs.
    """
    outputs = checked_outputs(model(y, inputs), inputs)
    f = likelihood.terms(outputs)
    scores = likelihood.score(f, likelihood.target_terms(outputs, targets))
    return scores.reshape(outputs.shape[0], 1, -1, f.shape[1])


def drawn_targets(
    model: Model,
    likelihood: Likelihood,
    y: Tree,
    inputs: Tree,
    samples: int,
    generator: torch.Generator,
    chunk_size: int | None = None,
) -> Tensor:
    """Targets drawn from the model, ``(N, S, P, ...)``: constants, whatever is differentiated.

    The draws do not depend on how the batch is cut.

    Raises
    ------
    ValueError
        `samples` is not positive.
    TypeError
        `generator` is none.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}; expected at least 1 draw for every input")
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is a {type(generator).__name__}; expected a torch.Generator, as in "
            "torch.Generator().manual_seed(0)"
        )
    with torch.no_grad():
        parts = [score_terms(model, likelihood, y, part)[0] for part in chunks(inputs, chunk_size)]
        f = torch.cat(parts).detach()
        drawn = torch.stack([likelihood.sample(f, generator) for _ in range(samples)], 1)
    return _by_sample(drawn, batch_size(inputs, "inputs"))


def drawn_scores(
    model: Model, likelihood: Likelihood, y: Tree, inputs: Tree, targets: Tensor
) -> Tensor:
    """Gradients in f of ``-log p`` of `drawn_targets`: ``(N, S, P, C)``."""
    f = score_terms(model, likelihood, y, inputs)[0]
    by_term = targets.transpose(1, 2).flatten(0, 1)
    scores = [likelihood.score(f, drawn) for drawn in by_term.unbind(1)]
    return _by_sample(torch.stack(scores, 1), len(targets))


def _by_sample(of_terms: Tensor, count: int) -> Tensor:
    """``(N P, S, ...)`` as ``(N, S, P, ...)``."""
    return of_terms.reshape(count, -1, *of_terms.shape[1:]).transpose(1, 2)


def pulled_back(
    model: Model,
    likelihood: Likelihood,
    y: Tree,
    inputs: Tree,
    cotangents: Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """``J_n^T c_nk``, of shape ``(N, K, d)``, for cotangents ``(N, K, P, C)`` of the terms.

    One vmapped run of the model and K sweeps back for each sample, `chunk_size` samples at once.
    """
    space = Space.of(y, "y")

    def of_sample(sample: Tree, cotangent: Tensor) -> Tensor:
        def terms(y: Tree) -> Tensor:
            return likelihood.terms(model(y, pytree.tree_map(lambda leaf: leaf[None], sample)))

        pull = torch.func.vjp(terms, y)[1]
        return torch.func.vmap(lambda c: space.ravel(pull(c)[0]))(cotangent)

    rows: Tensor = torch.func.vmap(of_sample, chunk_size=chunk_size)(inputs, cotangents)
    return rows


def scale_of_rows(weights: Tensor | None, count: int, space: Space, root_weights: bool) -> Tensor:
    """What the outer product of each sample's score counts for in a mean over N: ``(N,)``.

    Scores of unweighted log-likelihoods count by w where their Hessian is meant
    (`root_weights`), and by ``w^2`` where the rows are gradients of weighted losses.

    Raises
    ------
    ValueError, TypeError
        As `check_weights`.
    """
    if weights is None:
        return torch.full((count,), 1 / count, dtype=space.dtype, device=space.device)
    check_weights(weights, count, space)
    return (weights if root_weights else weights**2) / count
