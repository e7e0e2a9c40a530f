"""The Kronecker factors of the layers of a module on a batch: `FactorEstimator`.

For a layer ``z = W abar`` with inputs ``abar = (a, 1)`` (the bias is the last column of W) and
scores ``s = d(-log p) / dz``, the Fisher information of W is ``E[s s^T (x) abar abar^T]``, and its
Kronecker approximation (Martens and Grosse, 2015, arXiv:1503.05671, eq. 1)

    F = S (x) A ,    A = E[abar abar^T] ,    S = E[s s^T] .

Both factors are means over the batch: F approximates the Hessian of the *mean* loss and does not
grow with the batch. Scores are those of single terms of the loss, so that the ``1 / N`` of the mean
enters each factor once, as the weight of a sample, and never as its square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from operators.curvature.likelihood import Likelihood, likelihood_of
from operators.curvature.module import FunctionalModule
from operators.curvature.weight_sharing import (
    Layer,
    WeightSharing,
    identity,
    input_moment,
    score_moment,
)
from operators.precision import in_single
from operators.space import Space, Tree
from operators.tracing import outside, plain_values, readable

_MAPPED = (
    "torch.func.vmap maps over inputs or targets, of which no factors can be computed there; "
    "make them outside, batch by batch (the damping may be mapped over)"
)

FisherKind = Literal["type-2", "mc", "empirical", "forward-only"]


class Factors(NamedTuple):
    """``S`` ``(p, p)`` of the outputs and ``A`` ``(d, d)`` of the inputs of a layer.

    A convolution of G groups has stacks ``(G, p, p)`` and ``(G, d, d)``: its groups are layers of
    their own.
    """

    S: Tensor
    A: Tensor

    def shifts(self, damping: Tensor) -> Factors:
        """``l^(1/2) / pi`` and ``pi l^(1/2)``: what factored damping l adds to S and A.

        ``pi^2 = (tr A / d) / (tr S / p)`` (Martens and Grosse, 2015, section 6.3).
        """
        in_S, in_A = (factor.diagonal(0, -2, -1).mean(-1) for factor in self)
        # Where one is zero the ratio says nothing, and pi = 1. A second `where` keeps derivatives
        # of what is not taken finite: those of a square root at zero are not.
        both = (in_S > 0) & (in_A > 0)
        pi = torch.where(both, torch.where(both, in_A, 1.0) / torch.where(both, in_S, 1.0), 1.0)
        pi = pi.sqrt()[..., None, None]
        some = damping > 0
        root = torch.where(some, torch.where(some, damping, 1.0).sqrt(), 0.0)
        return Factors(root / pi, pi * root)

    def damped(self, damping: Tensor) -> Factors:
        """``S + l^(1/2) / pi I`` and ``A + pi l^(1/2) I``."""
        shifts = zip(self, self.shifts(damping), strict=True)
        return Factors(*(factor + shift * _eye(factor) for factor, shift in shifts))

    def inverse(self, layer: str) -> Factors:
        """``S^-1`` and ``A^-1``, by Cholesky.

        Raises
        ------
        ValueError
            One of them is singular to working precision; the message names the layer.
        """
        inverses = []
        for which, factor in zip("SA", self, strict=True):
            root, info = in_single(torch.linalg.cholesky_ex, factor)
            if readable(info) and bool(info.any()):
                raise ValueError(
                    f"{which} of layer {layer!r} is singular to working precision with the damping "
                    "it has; expected a larger damping"
                )
            inverse = in_single(torch.cholesky_solve, _eye(root).expand_as(root), root)
            inverses.append((inverse + inverse.mT) / 2)
        return Factors(*inverses)


def _eye(factor: Tensor) -> Tensor:
    return torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)


class FactorEstimator:
    """``(inputs, targets) -> {layer: (S, A)}`` for the Linear and Conv2d layers of a module.

    Parameters
    ----------
    module, likelihood, fisher, weight_sharing, parameters, mc_samples, generator
        As for `KFAC.from_module`.

    Raises
    ------
    ValueError
        A parameter is in a layer of another kind, or in two layers; or a setting is out of range.
    TypeError
        `module` is not a module.

    Notes
    -----
    The scores are taken at the outputs of the layers, so gradients of weights are never computed:
    a sweep back costs about one forward pass, and there are C - 1 of them (C for likelihoods other
    than the categorical) for ``"type-2"``, `mc_samples` for ``"mc"``, one for ``"empirical"``, none
    for ``"forward-only"``. Memory is that of one graph, of the factors, and of the patches of one
    convolution at a time.
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        *,
        fisher: FisherKind = "type-2",
        weight_sharing: WeightSharing = "expand",
        parameters: Iterable[str] | None = None,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module")
        if fisher not in ("type-2", "mc", "empirical", "forward-only"):
            raise ValueError(
                f"fisher={fisher!r}; expected 'type-2', 'mc', 'empirical' or 'forward-only'"
            )
        if weight_sharing not in ("expand", "reduce"):
            raise ValueError(f"weight_sharing={weight_sharing!r}; expected 'expand' or 'reduce'")
        if mc_samples < 1 or (mc_samples > 1 and fisher != "mc"):
            raise ValueError(f"mc_samples={mc_samples}; expected >= 1, and 1 unless fisher='mc'")
        self.module, self.likelihood = module, likelihood_of(likelihood)
        self.fisher, self.reduce = fisher, weight_sharing == "reduce"
        self.mc_samples, self.generator = mc_samples, generator
        self.names = _selected(module, parameters)
        self.layers: dict[str, Layer] = _layers(module, self.names)

    @property
    def space(self) -> Space:
        """Space of the parameters, in the order of the module."""
        parameters = dict(self.module.named_parameters())
        return Space.of({name: parameters[name].detach() for name in self.names}, "module")

    def __call__(
        self, inputs: Tree, targets: Tensor | None = None
    ) -> tuple[dict[str, Factors], int]:
        """Factors of each layer, and the number of samples that they are a mean over.

        Raises
        ------
        ValueError
            The batch is empty; the output is no function of one sample (BatchNorm or dropout in
            training mode); a layer is not called, or more than once, or not with the samples on its
            first axis; the outputs are not finite; targets are missing or do not fit; or
            ``torch.func.vmap`` maps over the batch.
        TypeError
            The module does not return a tensor, or targets has the wrong kind of dtype.
        """
        if self.fisher == "empirical" and targets is None:
            raise ValueError("fisher='empirical' needs targets: the labels that were observed")
        # The factors are constants, of numbers, whatever transform is under way.
        with outside():
            return self._factors(*plain_values((inputs, targets), _MAPPED))

    def _factors(self, inputs: Tree, targets: Tensor | None) -> tuple[dict[str, Factors], int]:
        tape = _Tape(self)
        outputs, f = tape.forward(inputs)
        if not bool(torch.isfinite(f).all()):
            raise ValueError("the outputs of the module are not finite; expected finite numbers")
        tape.check(len(outputs))
        if self.fisher == "forward-only":
            S = {name: identity(layer) for name, layer in self.layers.items()}
        else:
            S = tape.score_moments(f, self._columns(outputs.detach(), targets))
            # The mean over the terms of the loss and over the labels drawn for each.
            S = {name: total / (len(f) * self.mc_samples) for name, total in S.items()}
        return {name: Factors(S[name], A) for name, A in tape.A.items()}, len(outputs)

    def _columns(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """What to send back from the M terms of the loss: each ``(M, C)``."""
        likelihood, f = self.likelihood, self.likelihood.terms(outputs)
        if self.fisher == "mc":
            if self.generator is None:
                self.generator = torch.Generator(f.device).manual_seed(0)
            for _ in range(self.mc_samples):
                yield likelihood.score(f, likelihood.sample(f, self.generator))
        elif targets is not None and self.fisher == "empirical":
            yield likelihood.score(f, likelihood.target_terms(outputs, targets))
        else:
            # Terms of one sample go one after the other: together they would add products of the
            # scores of different terms, whose expectation is zero.
            terms = len(f) // len(outputs)
            for column in likelihood.columns(f):
                for t in range(terms):
                    alone = torch.zeros_like(column)
                    alone[t::terms] = column[t::terms]
                    yield alone


class _Tape:
    """One forward pass: A of every layer, and the edges of the graph at their outputs."""

    def __init__(self, estimator: FactorEstimator) -> None:
        self.estimator = estimator
        self.layers = estimator.layers
        self.A: dict[str, Tensor] = {}
        self.batches: dict[str, int] = {}
        self.edges: dict[str, GradientEdge] = {}

    def forward(self, inputs: Tree) -> tuple[Tensor, Tensor]:
        """Outputs of the module, and as terms; it keeps its state, its gradients and its hooks."""
        model = FunctionalModule(self.estimator.module)
        backward = self.estimator.fisher != "forward-only"
        y = {
            name: model.state[name].detach().requires_grad_(backward)
            for name in self.estimator.names
        }
        args: Any = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        options: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            args, options = (), dict(inputs)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(backward))
            for name, layer in self.layers.items():
                hook = partial(self._record, name)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            outputs = model(y, *args, **options)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"the module returned a {type(outputs).__name__}; expected one tensor"
                )
            return outputs, self.estimator.likelihood.terms(outputs)

    def _record(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any], z: Tensor
    ) -> None:
        if name in self.A:
            raise ValueError(
                f"layer {name!r} is called more than once in a forward pass; recurrent layers have "
                "no Kronecker factors here: leave it out with parameters=[...]"
            )
        x = (args[0] if args else options["input"]).detach()
        weight, bias = (key in self.estimator.names for key in parameter_names(name))
        self.A[name] = input_moment(
            self.layers[name], x, weight=weight, bias=bias, reduce=self.estimator.reduce
        )
        self.batches[name] = len(x)
        if z.requires_grad:
            # The edge stays that of z where an activation goes on to overwrite z.
            self.edges[name] = get_gradient_edge(z)

    def check(self, count: int) -> None:
        """Raise unless every layer saw the samples of the batch, once."""
        for name in self.layers:
            if name not in self.A:
                raise ValueError(
                    f"layer {name!r} is not called in the forward pass; leave it out with "
                    "parameters=[...]"
                )
            if self.batches[name] != count:
                raise ValueError(
                    f"layer {name!r} got inputs of length {self.batches[name]} on the first axis, "
                    f"but there are {count} samples; expected the samples first, in every layer"
                )
            if self.estimator.fisher != "forward-only" and name not in self.edges:
                raise ValueError(
                    f"the output of layer {name!r} has no gradient: the module switches it off "
                    "(torch.no_grad); leave the layer out with parameters=[...]"
                )

    def score_moments(self, f: Tensor, columns: Iterator[Tensor]) -> dict[str, Tensor]:
        """``sum s s^T`` of the scores of each layer, over what is sent back from f."""
        S = {name: torch.zeros_like(identity(layer)) for name, layer in self.layers.items()}
        edges = list(self.edges.values())
        for column in columns:
            scores = torch.autograd.grad(f, edges, column, retain_graph=True, allow_unused=True)
            for name, score in zip(self.edges, scores, strict=True):
                if score is not None:  # None: f does not depend on this layer
                    reduce = self.estimator.reduce
                    S[name] += score_moment(self.layers[name], score, reduce=reduce)
        return S


def parameter_names(layer: str) -> tuple[str, str]:
    """Names of weight and bias of a layer."""
    prefix = f"{layer}." if layer else ""
    return f"{prefix}weight", f"{prefix}bias"


def _selected(module: nn.Module, parameters: Iterable[str] | None) -> tuple[str, ...]:
    """Names of the parameters to include, in the order of the module."""
    if parameters is None:
        names = tuple(name for name, y in module.named_parameters() if y.requires_grad)
        if not names:
            raise ValueError("no parameter of the module requires gradients; name parameters=[...]")
        return names
    if isinstance(parameters, str):
        raise TypeError(f"parameters is the string {parameters!r}; expected a list of names")
    known = [name for name, _ in module.named_parameters()]
    chosen: set[str] = set()
    for wanted in parameters:
        found = {name for name in known if name == wanted or name.startswith(f"{wanted}.")}
        if not found:
            raise ValueError(
                f"parameters has {wanted!r}, which is neither a parameter nor a layer with any; "
                f"the module has {known}"
            )
        chosen |= found
    if not chosen:
        raise ValueError("parameters is empty; expected at least one name")
    return tuple(name for name in known if name in chosen)


def _layers(module: nn.Module, names: tuple[str, ...]) -> dict[str, Layer]:
    """The layers of the parameters; raises where one has no factors, or a parameter has two."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    layers: dict[str, Layer] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or leaf not in ("weight", "bias"):
            kinds = ((other, isinstance(part, Layer)) for other, part in module.named_modules())
            raise ValueError(
                f"parameter {name!r} is in {type(layer).__name__} {owner!r}, which has no Kronecker"
                " factors; choose among the Linear and Conv2d layers by "
                f"parameters={[other for other, holds in kinds if holds]}"
            )
        shared = aliases[id(module.get_parameter(name))]
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(map(repr, shared))} are one parameter; its curvature is not a "
                "Kronecker product of one layer: leave it out with parameters=[...]"
            )
        layers[owner] = layer
    return layers
