"""Natural hypergradient descent: the empirical Fisher of the inner trajectory for the Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.methods.method import ImplicitEstimator, ImplicitMethod
from hyperlearn.methods.trajectory import InnerStep, Trajectory
from hyperlearn.oracles import Oracles, batch_length
from hyperlearn.problem import BilevelProblem, WeightedLikelihood
from operators import FisherStream, LinearOperator
from solvers import LinearSolver, Woodbury

Tree = Any


@dataclass(frozen=True, kw_only=True)
class NHGD(ImplicitMethod):
    """Empirical Fisher along the inner trajectory x `Woodbury`, refreshed by every inner step.

    For an inner loss that is a negative log-likelihood, Hessian = Fisher at the minimum of a
    well-specified model, so the gradients that SGD computes anyway give

        A = (damping + curvature of the regulariser) I + sum_t w_t g_t g_t^T

    and no Hessian product is needed. A has rank T << d above its damping: off the span of the
    gradients the method is T1-T2 with ``q = d_y g / damping``: `damping` is *the* parameter.

    Parameters
    ----------
    damping
        Outside the average, never forgotten; in units of the Hessian.
    initial
        ``H_0 = initial I`` of the published recursion, inside the average; 0 for none.
    rho
        Smoothing ``H <- (1 - rho) H + rho g g^T``; None for the exact mean.
    window
        Keep the newest gradients only; None keeps all since the last reset.
    reset
        ``"outer"``: start afresh with each inner solve. ``"never"``: carry the state over (set a
        window).
    batch_scale
        Multiply rows by ``sqrt(B)``: a mean over B independent samples has ``E[g g^T] = F / B`` at
        the minimum. With the full batch (``inner_batch_size=None``) nothing is drawn, the gradient
        vanishes at the minimum, and A tends to its damping: use ``rows="sample"`` there.
    rows
        ``"batch"``: one row an inner step, the minibatch gradient (as published).
        ``"sample"``: `samples_per_step` single-sample gradients of the batch, at the cost of
        computing them; needs the problem's `likelihood`.
    samples_per_step
        For ``rows="sample"``.
    weight_correction
        For an inner loss weighted by s_i: scale scores by ``sqrt(s_i)`` instead of ``s_i``, since
        the Hessian is ``E[s grad l grad l^T]`` and not ``E[s^2 ...]``. Exact for ``rows="sample"``.
        A batch row takes one more gradient, and adds ``B - 1`` times the outer product of the mean
        of ``sqrt(s) grad l``, which does not vanish at the minimum. Needs the problem's
        `likelihood`. Off by default: with wrong labels the plain square down-weights just the
        outliers at which Fisher and Hessian differ.
    solver
        `Woodbury` (default) or `ShermanMorrison`: the same numbers.
    cross, cross_batches
        Estimator of C; the paper uses ``"end"`` with M = 5.

    Notes
    -----
    Source: arXiv:2602.10905, algorithm 1. Departures, by option: damping stands outside the average
    (the published smoothed recursion forgets ``H_0`` and its inverse then grows without bound; that
    is ``damping=0, initial=..., rho=...``), and rows carry the batch factor. Always: scores exclude
    the problem's `regularizer`, whose curvature is added. Where a projection was active the row is
    the step that was really taken, penalty included, one a step whatever `rows` says.
    Under smoothing from ``initial=0`` the weights of T gradients sum to ``1 - (1-rho)^T``.
    An outer step costs T gradients, one outer gradient, one cross product, and O(T^2 d) flops.
    """

    damping: float = 0.1
    initial: float = 0.0
    rho: float | None = None
    window: int | None = None
    reset: Literal["outer", "never"] = "outer"
    batch_scale: bool = True
    rows: Literal["batch", "sample"] = "batch"
    samples_per_step: int = 16
    weight_correction: bool = False
    solver: LinearSolver = field(default_factory=Woodbury)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("damping", self.damping >= 0, "a number >= 0")
        self._require("initial", self.initial >= 0, "a number >= 0")
        self._require("rho", self.rho is None or 0 < self.rho < 1, "0 < rho < 1, or None")
        self._require("window", self.window is None or self.window >= 1, "at least 1, or None")
        self._require("reset", self.reset in ("outer", "never"), "'outer' or 'never'")
        self._require("rows", self.rows in ("batch", "sample"), "'batch' or 'sample'")
        self._require("samples_per_step", self.samples_per_step >= 1, "at least 1")
        if self.reset == "never" and self.window is None:
            raise ValueError(
                "NHGD: reset='never' keeps every gradient; set window, e.g. window=200"
            )

    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> ImplicitEstimator:
        """A fresh estimator for one run.

        Raises
        ------
        ValueError
            ``rows="sample"`` or `weight_correction` without the problem's `likelihood` and
            `inner_data`; damping, initial and the regulariser's curvature all zero.
        """
        by_sample = self.rows == "sample" or self.weight_correction
        if by_sample and (problem.likelihood is None or problem.inner_data is None):
            raise ValueError(
                "NHGD: rows='sample' and weight_correction=True need "
                "BilevelProblem(inner_data=..., likelihood="
                "WeightedLikelihood(sample_loss=..., sample_weight=...))"
            )
        return _FisherEstimator(self, problem, oracles, generator)


class _FisherEstimator(ImplicitEstimator):
    method: NHGD

    def __init__(
        self, method: NHGD, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> None:
        super().__init__(method, problem, oracles, generator)
        self.generator = generator
        self.stream = FisherStream(
            problem.y_space,
            damping=method.damping + oracles.regularizer.curvature,
            initial=method.initial,
            rho=method.rho,
            window=method.window,
        )

    def state(self) -> dict[str, Any]:
        return super().state() | {"stream": self.stream.state()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.stream.restore(state["stream"])

    def operator(self, trajectory: Trajectory) -> tuple[LinearOperator | None, float]:
        operator, damping = self.stream.operator(), self.method.damping
        if self.method.initial:  # what the average has left of H_0 damps as well
            damping = float(operator.damping) - self.oracles.regularizer.curvature
        return operator, damping

    def solve_inner(self, y: Tensor, x: Tensor) -> Trajectory:
        trajectory = super().solve_inner(y, x)
        if self.method.reset == "outer":
            self.stream.reset()
        for step in trajectory.steps:
            for row in self._rows(step, x):
                self.stream.push(row)
        return trajectory

    def _rows(self, step: InnerStep, x: Tensor) -> list[Tensor]:
        """What one inner step contributes: batch factor and sample weights enter here."""
        if step.projected:
            # The score points out of the feasible set; what SGD really followed does not.
            return [self._batch_factor(step.batch) * step.gradient]
        if self.method.rows == "sample":
            return self._sample_rows(step, x)
        if self.method.weight_correction:
            score = self.oracles.score(step.y, x, step.batch, self._root_weighted_loss)
        else:
            score = step.score
        return [self._batch_factor(step.batch) * score]

    def _batch_factor(self, batch: Tree) -> float:
        return math.sqrt(batch_length(batch)) if self.method.batch_scale else 1.0

    def _likelihood(self) -> WeightedLikelihood:
        assert self.problem.likelihood is not None  # NHGD.start has checked
        return self.problem.likelihood

    def _root_weighted_loss(self, y: Tree, x: Tree, batch: Tree) -> Tensor:
        likelihood = self._likelihood()
        weight = likelihood.sample_weight(x, batch)
        return (weight.sqrt() * likelihood.sample_loss(y, batch)).mean()

    def _sample_rows(self, step: InnerStep, x: Tensor) -> list[Tensor]:
        oracles, likelihood = self.oracles, self._likelihood()
        count = min(self.method.samples_per_step, batch_length(step.batch))
        chosen = torch.randperm(batch_length(step.batch), generator=self.generator)[:count]
        batch = pytree.tree_map(lambda leaf: leaf[chosen.to(leaf.device)], step.batch)
        weight = likelihood.sample_weight(oracles.x_space.unravel(x), batch)
        power = 0.5 if self.method.weight_correction else 1.0

        def loss(y: Tensor, sample: Tree) -> Tensor:
            alone = pytree.tree_map(lambda leaf: leaf[None], sample)  # a batch of one
            return likelihood.sample_loss(oracles.y_space.unravel(y), alone).sum()

        oracles.charge("gradients", batch)
        scores = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(step.y, batch)
        return list(weight[:, None] ** power * scores)
