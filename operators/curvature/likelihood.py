"""Likelihoods ``p(t | f)`` of a model's outputs f, as curvature sees them: scores and their Fisher.

A loss here is the mean of ``-w log p(t | f)`` over its terms: the samples of a batch and, for
sequences and images, their positions. The Fisher information of one term in f is

    H = w E[s s^T] ,    s = d(-log p(t | f)) / d f ,    t ~ p(. | f) .

For the three families here f is a natural parameter, and H is the Hessian of the term itself,
whatever its target (Martens, 2014, arXiv:1412.1193, section 9.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from operators.linear_operator import Scalar
from operators.tracing import readable


@dataclass(frozen=True, kw_only=True)
class Likelihood(ABC):
    """``-w log p(t | f)`` of one term.

    Parameters
    ----------
    over_entries
        Whether the loss is a mean over the C outputs of a term too, so that ``w = 1 / C``; else
        ``w = 1``.
    """

    over_entries: bool = False

    # Axis of the C outputs of a term in the outputs of a model.
    axis: ClassVar[int] = -1

    def terms(self, outputs: Tensor) -> Tensor:
        """Outputs ``(N, ...)`` of a model as ``(M, C)``: M terms, those of a sample together.

        Raises
        ------
        ValueError
            No batch axis, no sample, or no output.
        """
        if outputs.ndim == 1 and self.axis == -1:
            outputs = outputs[:, None]
        if outputs.ndim < 2 or not outputs.numel():
            raise ValueError(
                f"the module returned shape {tuple(outputs.shape)}; expected (N, ..., C) with N "
                "samples first" + (", and the classes on axis 1: (N, C, ...)" * (self.axis == 1))
            )
        outputs = outputs.movedim(self.axis, -1)
        return outputs.reshape(-1, outputs.shape[-1])

    def weight(self, f: Tensor) -> float:
        """``w``."""
        return 1 / f.shape[1] if self.over_entries else 1.0

    @abstractmethod
    def columns(self, f: Tensor) -> Iterator[Tensor]:
        """Columns ``r_1, r_2, ...`` ``(M, C)`` with ``sum_k r_k r_k^T = H`` for every term."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from ``p(. | f)``, one for each term."""

    @abstractmethod
    def target_terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets of the M terms, checked against the outputs of the model."""

    @abstractmethod
    def _score(self, f: Tensor, targets: Tensor) -> Tensor:
        """``s``."""

    def score(self, f: Tensor, targets: Tensor) -> Tensor:
        """``w^(1/2) s``, ``(M, C)``: the mean of its outer products over targets is H."""
        return self.weight(f) ** 0.5 * self._score(f, targets)


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """``p(t | f) = softmax(f)_t``; its loss is the cross-entropy, H is ``diag(p) - p p^T``.

    Outputs are ``(N, C)`` or ``(N, C, ...)``, targets integers ``(N,)`` or ``(N, ...)``.

    Examples
    --------
    >>> import torch
    >>> f = torch.tensor([[0.0, 1.0, 2.0]])
    >>> r, p = torch.stack(list(Categorical().columns(f))), torch.softmax(f, 1)
    >>> len(r), bool(torch.allclose(r[:, 0].T @ r[:, 0], torch.diag(p[0]) - p.T @ p))
    (2, True)
    """

    axis: ClassVar[int] = 1

    def columns(self, f: Tensor) -> Iterator[Tensor]:
        """The ``C - 1`` columns that are left of a root of H.

        With ``r = p^(1/2)`` elementwise, ``D (I - r r^T)`` with ``D = diag(r)`` is a root of H. The
        reflection ``Q = I - u u^T / (1 + r_1)``, ``u = r + e_1``, takes r to ``-e_1``: in
        ``D (I - r r^T) Q`` the first column is zero, and the others are those of ``D Q``.
        """
        r = torch.softmax(f, 1).sqrt()
        u = r.clone()
        u[:, 0] += 1
        image = -r * u / (1 + r[:, :1])
        for k in range(1, f.shape[1]):
            column = image * u[:, k, None]
            column[:, k] += r[:, k]
            yield column

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Classes ``(M,)``."""
        return torch.multinomial(torch.softmax(f, 1), 1, generator=generator)[:, 0]

    def target_terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Classes ``(M,)``."""
        expected = outputs.shape[:1] + outputs.shape[2:]
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(f"targets is {targets.dtype}; expected integer classes")
        if targets.shape != expected:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; expected {tuple(expected)} for outputs "
                f"{tuple(outputs.shape)}"
            )
        if bool(((targets < 0) | (targets >= outputs.shape[1])).any()):
            raise ValueError(
                f"targets has values from {int(targets.min())} to {int(targets.max())}; expected "
                f"classes 0 to {outputs.shape[1] - 1}: leave out what is to be ignored"
            )
        return targets.reshape(-1).long()

    def _score(self, f: Tensor, targets: Tensor) -> Tensor:
        return torch.softmax(f, 1) - nn.functional.one_hot(targets, f.shape[1]).to(f.dtype)


class _Entrywise(Likelihood):
    """A product of likelihoods of single outputs: H is diagonal."""

    @abstractmethod
    def _information(self, f: Tensor) -> Tensor:
        """Fisher information of each output, ``(M, C)``."""

    def columns(self, f: Tensor) -> Iterator[Tensor]:
        """The C columns of the diagonal root of H."""
        root = (self.weight(f) * self._information(f)).sqrt()
        for k in range(f.shape[1]):
            column = torch.zeros_like(f)
            column[:, k] = root[:, k]
            yield column

    def target_terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets ``(M, C)``."""
        if not targets.is_floating_point():
            raise TypeError(f"targets is {targets.dtype}; expected {outputs.dtype}")
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; expected {tuple(outputs.shape)}, that "
                "of the outputs"
            )
        return self.terms(targets)


@dataclass(frozen=True, kw_only=True)
class Bernoulli(_Entrywise):
    """``p(t_c = 1 | f) = sigmoid(f_c)``, independently for each output; H is ``diag(p (1 - p))``.

    Outputs are ``(N,)`` or ``(N, ..., C)``, targets floats in [0, 1] of that shape.
    """

    def _information(self, f: Tensor) -> Tensor:
        return torch.sigmoid(f) * torch.sigmoid(-f)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros and ones ``(M, C)``."""
        return torch.bernoulli(torch.sigmoid(f), generator=generator)

    def _score(self, f: Tensor, targets: Tensor) -> Tensor:
        return torch.sigmoid(f) - targets


@dataclass(frozen=True, kw_only=True)
class Gaussian(_Entrywise):
    """``t ~ N(f, variance I)``; its loss is ``|f - t|^2 / (2 variance)``, H is ``I / variance``.

    Outputs are ``(N,)`` or ``(N, ..., C)``, targets floats of that shape.

    Parameters
    ----------
    variance
        ``> 0``; a scalar tensor is a variable of the operators that hold it.

    Raises
    ------
    ValueError
        The variance is not positive.
    """

    variance: Scalar = 1.0

    def __post_init__(self) -> None:
        known = not isinstance(self.variance, Tensor) or readable(self.variance)
        if known and not self.variance > 0:
            raise ValueError(f"variance={self.variance}; expected > 0")

    def _information(self, f: Tensor) -> Tensor:
        return torch.ones_like(f) / self.variance

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Targets ``(M, C)``."""
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return f + self.variance**0.5 * noise

    def _score(self, f: Tensor, targets: Tensor) -> Tensor:
        return (f - targets) / self.variance


pytree.register_pytree_node(
    Gaussian,
    lambda gaussian: ([gaussian.variance], gaussian.over_entries),
    lambda leaves, over_entries: _gaussian(next(iter(leaves)), over_entries),
)


def _gaussian(variance: Any, over_entries: bool) -> Gaussian:
    # A tree may hold anything in the place of a leaf.
    gaussian = object.__new__(Gaussian)
    gaussian.__dict__.update(variance=variance, over_entries=over_entries)
    return gaussian


def likelihood_of(spec: str | nn.Module | Likelihood) -> Likelihood:
    """The likelihood of a name or a loss.

    Parameters
    ----------
    spec
        ``"categorical"``, ``"bernoulli"``, ``"gaussian"`` (of variance 1); a `Likelihood`; or
        `torch.nn.CrossEntropyLoss`, `torch.nn.BCEWithLogitsLoss`, `torch.nn.MSELoss` with the mean
        as reduction. The last two are means over the C outputs of a term too: ``w = 1 / C``, and
        for MSELoss the variance is 1/2.

    Raises
    ------
    TypeError
        Neither of these.
    ValueError
        Another name, another reduction, or a setting of the loss that changes its curvature.
    """
    named: dict[str, Likelihood] = {
        "categorical": Categorical(),
        "bernoulli": Bernoulli(),
        "gaussian": Gaussian(),
    }
    losses: dict[type[nn.Module], Likelihood] = {
        nn.CrossEntropyLoss: Categorical(),
        nn.BCEWithLogitsLoss: Bernoulli(over_entries=True),
        nn.MSELoss: Gaussian(over_entries=True, variance=0.5),
    }
    if isinstance(spec, Likelihood):
        return spec
    if isinstance(spec, str):
        if spec not in named:
            raise ValueError(f"likelihood={spec!r}; expected one of {sorted(named)}")
        return named[spec]
    if type(spec) not in losses:
        raise TypeError(
            f"likelihood is a {type(spec).__name__}; expected one of {sorted(named)}, a "
            f"Likelihood, or {', '.join(loss.__name__ for loss in losses)}"
        )
    plain = {"reduction": "mean", "weight": None, "pos_weight": None, "label_smoothing": 0.0}
    for setting, value in plain.items():
        if getattr(spec, setting, value) != value:
            raise ValueError(
                f"likelihood is a {type(spec).__name__} with {setting}={getattr(spec, setting)}; "
                f"expected {setting}={value}: other losses are not the mean of one likelihood"
            )
    return losses[type(spec)]
