"""Hessians of losses in the outputs of a model: in closed form, or by differentiating twice.

With z the outputs for a batch, a loss ``L(z, t)`` has the Hessian ``H = d^2 L / d z^2``. For the
losses that follow, a sample (or position) of weight c contributes c times

    cross-entropy     diag(p) - p p^T ,  p = softmax(z)
    logistic          diag(p (1 - p)) ,  p = sigmoid(z)
    squared           I .
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial, singledispatch
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from operators.curvature.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from operators.space import Tree
from operators.tracing import readable


@singledispatch
def fisher_product(likelihood: Likelihood, outputs: Tensor, tangent: Tensor) -> Tensor:
    """``H u`` for the Fisher information ``H = E[s s^T]`` of each term, s its score in z.

    Raises
    ------
    TypeError
        No closed form is known of this likelihood.
    """
    raise TypeError(
        f"{type(likelihood).__name__} has no closed form of its Fisher information; "
        "expected Categorical, Bernoulli or Gaussian"
    )


@fisher_product.register
def _(likelihood: Categorical, outputs: Tensor, tangent: Tensor) -> Tensor:
    p = torch.softmax(outputs, likelihood.axis)
    pulled = p * tangent
    return pulled - p * pulled.sum(likelihood.axis, keepdim=True)


@fisher_product.register
def _(likelihood: Bernoulli, outputs: Tensor, tangent: Tensor) -> Tensor:
    # 1 - sigmoid(z) would lose its digits for large z.
    return torch.sigmoid(outputs) * torch.sigmoid(-outputs) * tangent


@fisher_product.register
def _(likelihood: Gaussian, outputs: Tensor, tangent: Tensor) -> Tensor:
    return tangent / likelihood.variance


class OutputHessian(ABC):
    """``H u`` for the Hessian H of a loss in the outputs of a model, chunk by chunk of a batch.

    `shares` says once what each sample brings, the loss's normaliser over the whole batch
    included, so that a mean is right for chunks of any size. Two that are made of the same loss are
    equal; the weights inside a loss of torch.nn are leaves of a pytree, so that an operator that
    holds one is differentiable with respect to them.
    """

    @abstractmethod
    def shares(self, targets: Tree, dtype: torch.dtype) -> Tree:
        """Tensors with a leading axis N: what `product` needs of each sample."""

    @abstractmethod
    def product(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tree:
        """``H u`` for a chunk that holds this fraction of the samples of the batch."""

    @abstractmethod
    def check(self, outputs: Tree, targets: Tree) -> None:
        """Raise where outputs and targets of a chunk do not belong together."""

    def positive_semidefinite(self, targets: Tree) -> bool:
        """Whether H is known to be so (values under ``torch.func.vmap`` are not known)."""
        return True


@dataclass(frozen=True)
class HalfSquare(OutputHessian):
    """``L = |z|^2 / 2``, whose Hessian is the identity."""

    def shares(self, targets: Tree, dtype: torch.dtype) -> Tree:
        """Nothing."""
        return None

    def product(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tree:
        """U itself."""
        return tangent

    def check(self, outputs: Tree, targets: Tree) -> None:
        """Any outputs will do."""


@dataclass(frozen=True)
class Differentiated(OutputHessian):
    """``H u = d/dz <grad L(z), u>`` for any twice differentiable loss.

    Parameters
    ----------
    loss
        ``loss(outputs, targets)``, a scalar: a mean over samples, or a sum where its attribute
        ``reduction`` says so.
    """

    loss: Callable[[Tree, Tree], Tensor]

    def shares(self, targets: Tree, dtype: torch.dtype) -> Tree:
        """The targets."""
        return targets

    def product(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tree:
        """One sweep back through the gradient of the loss."""
        gradient = torch.func.grad(lambda z: self.loss(z, share))
        curved = torch.func.vjp(gradient, outputs)[1](tangent)[0]
        sums = getattr(self.loss, "reduction", "mean") == "sum"
        return curved if sums else pytree.tree_map(lambda part: fraction * part, curved)

    def check(self, outputs: Tree, targets: Tree) -> None:
        """The loss is a scalar."""
        value = self.loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss returned {got}; expected a scalar tensor, the mean over the batch"
            )

    def positive_semidefinite(self, targets: Tree) -> bool:
        """No: that the loss is convex is for the user to say."""
        return False


@dataclass(frozen=True, eq=False)
class _ClosedForm(OutputHessian):
    """Sum over samples of a weight times the Fisher information of a likelihood."""

    likelihood: ClassVar[Likelihood]
    name: ClassVar[str]

    sums: bool
    weight: Tensor | None

    @classmethod
    def of(cls, loss: Any) -> Self:
        """With the settings of a loss of torch.nn."""
        settings = {field.name: getattr(loss, field.name, None) for field in fields(cls)}
        return cls(**{**settings, "sums": loss.reduction == "sum"})

    def product(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tree:
        return share * fisher_product(self.likelihood, outputs, tangent)

    def check(self, outputs: Tree, targets: Tree) -> None:
        for what, value in (("the model's output", outputs), ("targets", targets)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{what} is a {type(value).__name__}; expected a tensor for {self.name}, or a "
                    "loss of one's own"
                )
        # A copy of axis 0 is what torch would make of (N, 1) and (N,): wrong in silence.
        if targets.is_floating_point() and targets.shape != outputs.shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}, the outputs {tuple(outputs.shape)}; "
                "expected the same"
            )

    def positive_semidefinite(self, targets: Tree) -> bool:
        """Looked up: no weight is negative."""
        share = self.shares(targets, torch.get_default_dtype())
        return readable(share) and bool((share >= 0).all())


@dataclass(frozen=True, eq=False)
class _CrossEntropy(_ClosedForm):
    """``-(sum_n c_n)^-1 sum_n w_{t_n} log softmax(z_n)_{t_n}`` with torch's settings."""

    likelihood: ClassVar[Likelihood] = Categorical()
    name: ClassVar[str] = "CrossEntropyLoss"

    ignore_index: int
    label_smoothing: float

    def shares(self, targets: Tree, dtype: torch.dtype) -> Tree:
        """Weights ``(N, 1)`` or ``(N, 1, ...)``, which broadcast over the classes."""
        smoothing = self.label_smoothing
        of_class = None if self.weight is None else self.weight.to(dtype)
        if targets.is_floating_point():
            # Probabilities q: -sum_c w_c q_c log p_c has the Hessian (sum_c w_c q_c) (D - p p^T).
            classes = targets.shape[1]
            q = (1 - smoothing) * targets.to(dtype) + smoothing / classes
            if of_class is not None:
                q = q * of_class.reshape(-1, *(1,) * (q.ndim - 2))
            c = q.sum(1, keepdim=True)
            return c if self.sums else c / (targets.numel() / classes)
        counts = targets != self.ignore_index
        c, normaliser = counts.to(dtype), counts.sum()
        if of_class is not None:
            of_target = of_class[torch.where(counts, targets, 0)] * c
            c = (1 - smoothing) * of_target + smoothing * of_class.mean() * c
            normaliser = of_target.sum()
        # Without class weights the label is of no account, smoothed or not.
        return (c if self.sums else c / normaliser).unsqueeze(1)

    def check(self, outputs: Tree, targets: Tree) -> None:
        super().check(outputs, targets)
        if outputs.ndim < 2:
            raise ValueError(
                f"the model's output has shape {tuple(outputs.shape)}; expected (N, C) or "
                "(N, C, ...), classes on axis 1"
            )
        if targets.is_floating_point():
            return
        if targets.dtype != torch.int64:
            raise TypeError(f"targets is {targets.dtype}; expected torch.int64 classes")
        expected = outputs.shape[:1] + outputs.shape[2:]
        if targets.shape != expected:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; expected {tuple(expected)} for outputs "
                f"of shape {tuple(outputs.shape)}"
            )
        ignored = self.ignore_index
        wrong = (targets != ignored) & ((targets < 0) | (targets >= outputs.shape[1]))
        if readable(wrong) and bool(wrong.any()):
            raise ValueError(
                f"targets holds {int(targets[wrong][0])}; expected classes 0 to "
                f"{outputs.shape[1] - 1}, or {ignored} for what is ignored"
            )


@dataclass(frozen=True, eq=False)
class _Logistic(_ClosedForm):
    """``-mean w (a t log p + (1 - t) log(1 - p))`` with torch's settings."""

    likelihood: ClassVar[Likelihood] = Bernoulli()
    name: ClassVar[str] = "BCEWithLogitsLoss"

    pos_weight: Tensor | None

    def shares(self, targets: Tree, dtype: torch.dtype) -> Tree:
        """Weights, as the targets are."""
        weight, a = self.weight, self.pos_weight
        t = targets.to(dtype)
        c = torch.ones_like(t) if a is None else a.to(dtype) * t + (1 - t)
        c = c if weight is None else c * weight.to(dtype)
        return c if self.sums else c / targets.numel()

    def check(self, outputs: Tree, targets: Tree) -> None:
        super().check(outputs, targets)
        if not targets.is_floating_point():
            raise TypeError(f"targets is {targets.dtype}; expected {outputs.dtype}")


@dataclass(frozen=True, eq=False)
class _Squared(_Logistic):
    """``mean (z - t)^2``: the mean is over all entries, so that H is ``2 / (N C) I``."""

    likelihood: ClassVar[Likelihood] = Gaussian()
    name: ClassVar[str] = "MSELoss"

    def shares(self, targets: Tree, dtype: torch.dtype) -> Tree:
        """Weights, as the targets are."""
        scale = 2.0 if self.sums else 2.0 / targets.numel()
        return torch.full_like(targets, scale, dtype=dtype)


def _flatten(form: _ClosedForm) -> tuple[list[Any], tuple[Any, ...]]:
    """Weights are leaves; the settings beside them stay as they are."""
    settings = {field.name: getattr(form, field.name) for field in fields(form)}
    weights = [name for name in settings if name.endswith("weight")]
    return [settings.pop(name) for name in weights], (tuple(weights), tuple(settings.items()))


def _unflatten(
    cls: type[_ClosedForm], leaves: Iterable[Any], context: tuple[Any, ...]
) -> _ClosedForm:
    weights, settings = context
    return cls(**dict(settings), **dict(zip(weights, leaves, strict=True)))


# A subclass of a loss may compute something else.
CLOSED_FORMS: dict[type[nn.Module], type[_ClosedForm]] = {
    nn.CrossEntropyLoss: _CrossEntropy,
    nn.BCEWithLogitsLoss: _Logistic,
    nn.MSELoss: _Squared,
}

for _cls in CLOSED_FORMS.values():
    pytree.register_pytree_node(_cls, _flatten, partial(_unflatten, _cls))

NAMED: dict[str, type[nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "binary-cross-entropy": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}


def output_hessian(loss: str | Callable[[Tree, Tree], Tensor]) -> OutputHessian:
    """The Hessian of a loss, in closed form for those of `NAMED`.

    Raises
    ------
    ValueError
        No such name, or a loss without a reduction.
    TypeError
        Not a loss.
    """
    if isinstance(loss, str):
        if loss not in NAMED:
            raise ValueError(f"loss={loss!r}; expected one of {list(NAMED)}, or a function")
        loss = NAMED[loss]()
    if not callable(loss):
        raise TypeError(
            f"loss is a {type(loss).__name__}; expected one of {list(NAMED)}, or a function "
            "loss(outputs, targets)"
        )
    if getattr(loss, "reduction", "mean") == "none":
        raise ValueError(
            f"loss is a {type(loss).__name__} with reduction='none'; expected 'mean' or 'sum'"
        )
    closed_form = CLOSED_FORMS.get(type(loss)) if isinstance(loss, nn.Module) else None
    return Differentiated(loss) if closed_form is None else closed_form.of(loss)
