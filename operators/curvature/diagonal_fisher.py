"""The diagonal of a Fisher matrix of a batch, in O(d) memory.

What is kept of the scores is the sum of their squares,

    diag F = (1/M) sum_n w_n E_t[g_n^2] + damping ,

so that neither the rows (N x d) nor the matrix are ever there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from operators.curvature.batch import batch_size, check_chunk_size, chunks
from operators.curvature.likelihood import Likelihood, likelihood_of
from operators.curvature.model_curvature import checked_damping
from operators.curvature.module import as_function
from operators.curvature.scores import (
    Model,
    drawn_scores,
    drawn_targets,
    observed_scores,
    pulled_back,
    scale_of_rows,
    score_terms,
)
from operators.elementary import Diagonal
from operators.linear_operator import Scalar
from operators.space import Space, Tree, check_tensor
from operators.tracing import readable

# Scores of a chunk ``(n, K, P, C)``, few of the K at a time.
Scores = Iterable[Tensor]


class DiagonalFisher(Diagonal):
    """``diag(f) + damping I`` with f the diagonal of a Fisher matrix.

    Parameters
    ----------
    diagonal
        ``f >= 0``, of shape ``(d,)``.
    damping
        ``>= 0``, one number. The operator includes it.
    space
        Space of the parameters; by default plain vectors ``(d,)``.

    Attributes
    ----------
    values
        ``f + damping``.
    damping
        The multiple of the identity that is inside the operator; a scalar tensor if it was given
        as one.

    Raises
    ------
    ValueError
        A shape does not fit, or damping is negative or not one number.

    Notes
    -----
    `exact`, `sampled` and `empirical` compute the diagonals of `Fisher`, `SampledFisher` and
    `EmpiricalFisher`, in their scale. Memory is that of `chunk_size` gradients. The sampled one
    costs S sweeps back for every sample, the exact one as many as the likelihood has columns
    (C - 1 for C classes, else C).

    Examples
    --------
    >>> import torch
    >>> A = DiagonalFisher(torch.tensor([1.0, 0.0]), damping=0.5)
    >>> A @ torch.ones(2), A.damping
    (tensor([1.5000, 0.5000]), 0.5)
    """

    _parameters: ClassVar[tuple[str, ...]] = ("_values", "damping")

    def __init__(
        self, diagonal: Tensor, damping: Scalar = 0.0, *, space: Space | None = None
    ) -> None:
        check_tensor(diagonal, "diagonal", "(d,)")
        if diagonal.ndim != 1:
            raise ValueError(f"diagonal has shape {tuple(diagonal.shape)}; expected (d,)")
        if readable(diagonal) and not bool((diagonal >= 0).all()):  # NaN lands here too
            raise ValueError("diagonal has negative or NaN entries; expected a mean of squares")
        space = space or Space.flat(diagonal.shape[0], diagonal.dtype, diagonal.device)
        value = checked_damping(damping, space)
        super().__init__(diagonal + value, space)
        self.damping = value

    @classmethod
    def exact(
        cls,
        model: nn.Module | Model,
        likelihood: str | nn.Module | Likelihood,
        y: Tree | None,
        inputs: Tree,
        *,
        weights: Tensor | None = None,
        chunk_size: int = 16,
        damping: Scalar = 0.0,
    ) -> DiagonalFisher:
        """Diagonal of `Fisher`: the expectation over the model's labels, in closed form.

        Parameters
        ----------
        model, likelihood, y, inputs, weights, damping
            As for `Fisher`.
        chunk_size
            Gradients ``(d,)`` that are held at once.

        Raises
        ------
        ValueError, TypeError
            As `Fisher`.

        Examples
        --------
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> A = DiagonalFisher.exact(lambda w, x: x @ w, "bernoulli", torch.zeros(2, 1), x)
        >>> A.values
        tensor([0.2500, 0.5000])
        """

        def scores(model: Model, known: Likelihood, y: Tree, part: Tree, _: None) -> Scores:
            f, positions = score_terms(model, known, y, part)
            apart = torch.eye(positions, dtype=f.dtype, device=f.device)
            for column in known.columns(f):
                # The terms of one sample are independent: each is squared by itself.
                of_sample = column.reshape(-1, 1, positions, f.shape[1])
                for few in apart.split(chunk_size):
                    yield of_sample * few[:, :, None]

        return _accumulated(
            scores, model, likelihood, y, inputs, None, weights, True, chunk_size, damping
        )

    @classmethod
    def sampled(
        cls,
        model: nn.Module | Model,
        likelihood: str | nn.Module | Likelihood,
        y: Tree | None,
        inputs: Tree,
        *,
        generator: torch.Generator,
        samples: int = 1,
        weights: Tensor | None = None,
        root_weights: bool = True,
        chunk_size: int = 16,
        damping: Scalar = 0.0,
    ) -> DiagonalFisher:
        """Diagonal of a `SampledFisher`: labels drawn from the model.

        Parameters
        ----------
        model, likelihood, y, inputs, generator, samples, weights, root_weights, damping
            As for `SampledFisher`.
        chunk_size
            Gradients ``(d,)`` that are held at once.

        Raises
        ------
        ValueError, TypeError
            As `SampledFisher`.
        """
        known = likelihood_of(likelihood)
        function, point = as_function(model, y)
        check_chunk_size(chunk_size)
        targets = drawn_targets(function, known, point, inputs, samples, generator, chunk_size)

        def scores(*arguments: Any) -> Scores:
            return (drawn_scores(*arguments) / samples**0.5).split(chunk_size, 1)

        return _accumulated(
            scores,
            function,
            known,
            point,
            inputs,
            targets,
            weights,
            root_weights,
            chunk_size,
            damping,
        )

    @classmethod
    def empirical(
        cls,
        model: nn.Module | Model,
        likelihood: str | nn.Module | Likelihood,
        y: Tree | None,
        inputs: Tree,
        targets: Tensor,
        *,
        weights: Tensor | None = None,
        root_weights: bool = False,
        chunk_size: int = 16,
        damping: Scalar = 0.0,
    ) -> DiagonalFisher:
        """Diagonal of an `EmpiricalFisher`: the labels that were observed.

        Parameters
        ----------
        model, likelihood, y, inputs, targets, weights, root_weights, damping
            As for `EmpiricalFisher.from_model`.
        chunk_size
            Gradients ``(d,)`` that are held at once.

        Raises
        ------
        ValueError, TypeError
            As `EmpiricalFisher.from_model`.
        """

        def scores(*arguments: Any) -> Scores:
            return (observed_scores(*arguments),)

        return _accumulated(
            scores,
            model,
            likelihood,
            y,
            inputs,
            targets,
            weights,
            root_weights,
            chunk_size,
            damping,
        )


def _accumulated(
    scores: Callable[..., Scores],
    model: nn.Module | Model,
    likelihood: str | nn.Module | Likelihood,
    y: Tree | None,
    inputs: Tree,
    targets: Tensor | None,
    weights: Tensor | None,
    root_weights: bool,
    chunk_size: int,
    damping: Scalar,
) -> DiagonalFisher:
    """``sum_n c_n sum_k (J_n^T s_nk)^2 / P``, few gradients at a time."""
    known = likelihood_of(likelihood)
    function, point = as_function(model, y)
    space = Space.of(point, "y")
    check_chunk_size(chunk_size)
    value = checked_damping(damping, space)
    scale = scale_of_rows(weights, batch_size(inputs, "inputs"), space, root_weights)
    batch = (inputs, scale) if targets is None else (inputs, scale, targets)
    batch_size(batch, "inputs and targets")
    total = torch.zeros(space.size, dtype=space.dtype, device=space.device)
    for part, of_part, *labels in chunks(batch, chunk_size):
        for s in scores(function, known, point, part, labels[0] if labels else None):
            # K gradients of a sample at once leave room for so many samples.
            many = max(1, chunk_size // s.shape[1])
            for few, of_few, cotangents in chunks((part, of_part, s), many):
                rows = pulled_back(function, known, point, few, cotangents)
                per_row = of_few / cotangents.shape[2]
                total = total + torch.einsum("n,nkd->d", per_row, rows**2)
    return DiagonalFisher(total, value, space=space)
