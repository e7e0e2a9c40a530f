"""Differentiating through the steps of an inner method: all of them, the last K, or one.

What comes out is the derivative of what the steps compute, at a cost that grows with their number,
and not that of the solution, which it tends to as the steps converge: later than the point itself,
so that a converged point says nothing of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyperlearn.implicit_function import Problem, living, placed
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import InnerMethod, State, spread


@dataclass(frozen=True, kw_only=True)
class Unroll:
    """Differentiate through the steps of the inner method.

    Parameters
    ----------
    steps
        K: only the last K, the point before them held fixed (where the solve took fewer, it goes on
        to K); None for all, from y0 on, which then has a derivative too. At a stationary point
        K steps of gradient descent of size s give the Neumann series of K terms,
        ``s sum_{j<K} (I - s A)^j`` for ``A^-1``.
    checkpoint
        Keep every ``sqrt(K)``-th state and compute those between once more on the way back:
        memory ``O(sqrt(K))`` states in place of K graphs, for one more evaluation of each step.
        Of no effect on forward mode, which keeps nothing.

    Notes
    -----
    Source: Franceschi et al. (2017), arXiv:1703.01785, for the two modes; Shaban et al. (2019),
    arXiv:1810.10667, for truncation; Griewank & Walther, Evaluating Derivatives (2008), chapter 12,
    for checkpoints.
    """

    steps: int | None = None
    checkpoint: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if self.steps is not None and not (whole and self.steps >= 1):
            raise ValueError(f"Unroll: steps={self.steps!r}; expected at least 1, or None for all")


MODES = "'implicit', 'unrolled', 'truncated(K)', 'one_step', 'identity', or an Unroll"


def mode_of(differentiate: Any) -> str | Unroll:
    """``"implicit"``, ``"identity"``, ``"one_step"``, or what is to be unrolled.

    Raises
    ------
    ValueError
        Anything else.
    """
    if isinstance(differentiate, Unroll) or differentiate in ("implicit", "identity", "one_step"):
        mode: str | Unroll = differentiate
        return mode
    if differentiate == "unrolled":
        return Unroll()
    found = re.fullmatch(r"truncated\((\d+)\)", str(differentiate))
    if found and int(found[1]) >= 1:
        return Unroll(steps=int(found[1]))
    raise ValueError(f"differentiate={differentiate!r}; expected {MODES}")


def unrolled(
    mode: Unroll,
    problem: Problem,
    method: InnerMethod,
    y0: Tensor,
    tensors: Sequence[Tensor],
    steps: Tensor,
) -> Tensor:
    """The last point of the steps, differentiable through the last K of them.

    Parameters
    ----------
    mode
        K, and whether to keep checkpoints.
    problem, method, y0, tensors
        What is solved, how, from where.
    steps
        How many steps the solve took: a number, or under vmap one for each member.
    """
    taken = problem.log[-1].member_iterations
    assert taken is not None
    # From a start that is a solution, too, there is a step to go through, or K; as far as allowed.
    least = min(mode.steps or 1, method.maxiter)
    steps = steps.clamp_min(least)
    longest = max(int(taken.max()) if taken.numel() else 0, least)
    shortest = max(int(taken.min()) if taken.numel() else 0, least)
    depth = longest if mode.steps is None else mode.steps
    frozen = max(shortest - depth, 0)  # steps that no member differentiates
    y0 = y0 if mode.steps is None else y0.detach()
    constants = [tensor.detach() for tensor in tensors]
    state = _floating(method.begin(problem.equation(constants if frozen else tensors), y0[None]))

    def advance(state: State, t: int, steps: Tensor, tensors: Sequence[Tensor]) -> State:
        equation = problem.equation(tensors)
        if depth < longest and t <= longest - depth:
            # Of each member the last K steps count; the first of them starts at a fixed point.
            held = _held(equation, state)
            early = (steps - depth >= t)[None]
            state = {k: torch.where(spread(early, v), held[k], v) for k, v in state.items()}
        new = _floating(method.advance(equation, state))
        if shortest < longest:
            # A member that had converged stays where it is.
            over = (steps <= t)[None]
            new = {k: torch.where(spread(over, v), state[k], v) for k, v in new.items()}
        return new

    for _ in range(frozen):
        moved = method.advance(problem.equation(constants), state)
        state = {k: v.detach() for k, v in _floating(moved).items()}
    count = longest - frozen
    if not mode.checkpoint or count < 4 or _pushed(tensors):
        for t in range(frozen, longest):
            state = advance(state, t, steps, tensors)
        return state["y"][0]
    names = sorted(state)
    length = math.isqrt(count - 1) + 1
    for first in range(frozen, longest, length):
        last = min(first + length, longest)

        def segment(
            steps: Tensor, *parts: Tensor, first: int = first, last: int = last
        ) -> tuple[Tensor, ...]:
            problem.unchanged()
            current = dict(zip(names, parts[: len(names)], strict=True))
            for t in range(first, last):
                current = advance(current, t, steps, parts[len(names) :])
            return tuple(current[name] for name in names)

        moved = _Checkpointed.apply(segment, steps, *(state[name] for name in names), *tensors)
        state = dict(zip(names, moved, strict=True))
    return state["y"][0]


def _held(equation: Equation, state: State) -> State:
    """The state with its point held fixed; F and A there depend on x all the same."""
    held = {name: value.detach() for name, value in state.items()}
    held["F"] = equation.residual(held["y"])
    if "A" in held:
        held["A"] = equation.matrix(held["y"])
    return held


def _pushed(tensors: Sequence[Tensor]) -> bool:
    """Whether forward mode goes along with the steps: it keeps nothing, so no checkpoints."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _floating(state: State) -> State:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def _moving(ctx: Any) -> tuple[list[Tensor], list[int], Callable[..., Any]]:
    """The tensors of a checkpoint, which of them are floating, and the function of those alone."""
    tensors = [living(tensor) for tensor in ctx.saved_tensors]
    moving = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]
    return tensors, moving, lambda *moved: ctx.function(*placed(tensors, moving, moved))


class _Checkpointed(torch.autograd.Function):
    """``function(*tensors)``, of which only the tensors are kept until the way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
        # What a step passes through must not be saved and returned as one tensor.
        return tuple(value.view_as(value) for value in function(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> tuple[Tensor | None, ...]:
        tensors, moving, of_moving = _moving(ctx)
        found: list[Tensor | None] = [None] * len(tensors)
        pulled = torch.func.vjp(of_moving, *(tensors[i] for i in moving))[1](tuple(bars))
        for i, bar in zip(moving, pulled, strict=True):
            found[i] = bar
        return None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (tensors, moving, of_moving), given = _moving(ctx), tangents[1:]
        primals = tuple(tensors[i] for i in moving)
        directions = tuple(
            torch.zeros_like(tensors[i]) if given[i] is None else given[i] for i in moving
        )
        return torch.func.jvp(of_moving, primals, directions)[1]
