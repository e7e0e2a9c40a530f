"""What a kernel is learnt by: validation residual, leave-one-out, likelihood, kernel flow, sums."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlearn.gp.pde import Equation, State
from hyperlearn.gp.posterior import Posterior
from solvers import CholeskyFactor

# Points at which to validate, drawn anew: of the generator, for each equation.
Sampler = Callable[[torch.Generator], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Held:
    """Validation equations at some points, with the state that they are linearised at."""

    equations: Sequence[Equation]
    states: Sequence[State]

    def batch(self, size: int | None, generator: torch.Generator) -> Held:
        """A random part of the points of each equation: `size` of the largest, the others alike."""
        if size is None:
            return self
        most = max(len(equation.points) for equation in self.equations)
        if size > most:
            raise ValueError(f"outer_batch_size={size}, but there are {most} validation points")
        equations, states = [], []
        for equation, state in zip(self.equations, self.states, strict=True):
            n = len(equation.points)
            count = max(1, round(size * n / most))
            index = torch.randperm(n, generator=generator)[:count].to(equation.points.device)
            equations.append(equation.rows(index))
            states.append({name: value[index] for name, value in state.items()})
        return Held(equations, states)


class Objective(ABC):
    """An outer loss ``J(theta)`` of the Gaussian process given the linearised equations."""

    # Equations that are held out, if any.
    validation: Sequence[Equation] = ()

    @abstractmethod
    def loss(
        self, posterior: Posterior, held: Held, params: object, generator: torch.Generator
    ) -> Tensor:
        """A scalar, differentiable in the kernel's parameters."""


@dataclass(frozen=True, eq=False)
class ValidationResidual(Objective):
    """``mean |R(u)|^2`` at points that were held out (arXiv 2510.05568): weighted over equations.

    Parameters
    ----------
    validation
        Equations at validation points, as those of the PDE; observations that were held out too,
        which count in units of their noise.
    weights
        Of each equation; ones by default.
    linearised
        The residual's Taylor expansion at the current state, as published; at convergence that is
        the residual itself. Otherwise the residual of the new function, which costs the evaluation
        of each derivative by itself.
    sampler
        Draws new validation points before each Gauss-Newton iteration: then the loss is an integral
        over the domain, estimated (optimise, then discretise: OTD); with fixed points it is their
        sum (DTO). For equations without data.
    """

    validation: Sequence[Equation]
    weights: Sequence[float] | None = None
    linearised: bool = True
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        if not self.validation:
            raise ValueError("validation is empty; expected one Equation at least")
        if self.weights is not None and len(self.weights) != len(self.validation):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.validation)} validation equations"
            )

    def loss(  # noqa: D102
        self, posterior: Posterior, held: Held, params: object, generator: torch.Generator
    ) -> Tensor:
        weights = self.weights or [1.0] * len(held.equations)
        total = posterior.target.new_zeros(())
        for weight, equation, state in zip(weights, held.equations, held.states, strict=True):
            if self.linearised:
                blocks, target = equation.linearised(state, params)
                residual = posterior.evaluate(blocks) - target
            else:
                residual = equation.values(posterior.state(equation), params).flatten()
            if equation.noise:
                residual = residual / equation.noise
            total = total + weight * residual.square().mean()
        return total


@dataclass(frozen=True, eq=False)
class LeaveOneOut(Objective):
    """``mean e_i^2`` with ``e_i = alpha_i / (A^-1)_ii``: each equation predicted from all others.

    Needs no validation points (Rippa 1999). What was observed with noise counts in units of it.
    Costs the inverse, ``2 n^3 / 3`` flops, and twice that for its derivative.

    Parameters
    ----------
    equations
        Which of the PDE's equations count, by position; all by default.
    """

    equations: Sequence[int] | None = None

    def loss(  # noqa: D102
        self, posterior: Posterior, held: Held, params: object, generator: torch.Generator
    ) -> Tensor:
        inverse = posterior.factor.inverse().diagonal()
        errors = posterior.alpha / inverse / posterior.scale
        variance = posterior.linearised.noise
        errors = errors / torch.where(variance > 0, variance, 1.0).sqrt()
        if self.equations is not None:
            parts = posterior.linearised.split(errors)
            errors = torch.cat([parts[k] for k in self.equations])
        return errors.square().mean()


@dataclass(frozen=True, eq=False)
class WeightedSum(Objective):
    """``sum_k w_k J_k``: a PDE's residual where it is held out, and predictions of observations.

    Parameters
    ----------
    parts
        Objectives with their weights. None with a `sampler`: what it drew would be of one of them.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> x = torch.rand(9, 2, dtype=torch.float64)
    >>> interior = hl.Equation(lambda u, lap_u: lap_u - u, x)
    >>> J = hl.WeightedSum([(1.0, hl.LeaveOneOut()), (1e4, hl.ValidationResidual([interior]))])
    >>> len(J.validation)
    1
    """

    parts: Sequence[tuple[float, Objective]]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; expected (weight, objective) once at least")
        for weight, part in self.parts:
            if not isinstance(part, Objective) or not math.isfinite(weight):
                raise TypeError(f"a part is ({weight!r}, {part!r}); expected (weight, objective)")
            if getattr(part, "sampler", None) is not None:
                raise ValueError(f"{type(part).__name__} has a sampler; expected fixed points")

    @property
    def validation(self) -> Sequence[Equation]:  # type: ignore[override]
        """Those of the parts, one after the other."""
        return [equation for _, part in self.parts for equation in part.validation]

    def loss(  # noqa: D102
        self, posterior: Posterior, held: Held, params: object, generator: torch.Generator
    ) -> Tensor:
        total, start = posterior.target.new_zeros(()), 0
        for weight, part in self.parts:
            end = start + len(part.validation)
            own = Held(held.equations[start:end], held.states[start:end])
            total = total + weight * part.loss(posterior, own, params, generator)
            start = end
        return total


@dataclass(frozen=True, eq=False)
class MarginalLikelihood(Objective):
    """Negative log marginal likelihood of the linearised equations.

    ``(b . A^-1 b + log det A + n log 2 pi) / 2`` for the rows as they are; with ``profile`` the
    variance of the process is at its best value: ``(n log(b . A^-1 b / n) + log det A) / 2``.

    Parameters
    ----------
    profile
        Whether to leave the variance of the process free.
    """

    profile: bool = True

    def loss(  # noqa: D102
        self, posterior: Posterior, held: Held, params: object, generator: torch.Generator
    ) -> Tensor:
        n = len(posterior.target)
        quadratic = posterior.target @ posterior.alpha
        # The rows were scaled to unit variance: b = S^-1 (S b), log det A = log det (S A S) - 2 log
        # S.
        logdet = posterior.factor.logdet() - 2 * posterior.scale.log().sum()
        if self.profile:
            return 0.5 * (n * (quadratic / n).log() + logdet)
        return 0.5 * (quadratic + logdet + n * torch.log(torch.tensor(2 * torch.pi)))


@dataclass(frozen=True, eq=False)
class KernelFlow(Objective):
    """``1 - b_c . A_cc^-1 b_c / b . A^-1 b`` for a random part c (Owhadi and Yoo 2019).

    The loss of accuracy when only some of the equations are kept: small for a good kernel. Noisy:
    the part is drawn anew at each evaluation.

    Parameters
    ----------
    fraction
        Of the equations that are kept.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction}; expected between 0 and 1")

    def loss(  # noqa: D102
        self, posterior: Posterior, held: Held, params: object, generator: torch.Generator
    ) -> Tensor:
        n = len(posterior.target)
        kept = torch.randperm(n, generator=generator)[: max(1, round(self.fraction * n))]
        kept = kept.sort().values.to(posterior.target.device)
        part = posterior.backend.part(posterior.rows, posterior.diagonal, posterior.factor, kept)
        target = posterior.target[kept]
        whole = posterior.target @ posterior.alpha
        return 1 - target @ CholeskyFactor(part).solve(target) / whole
