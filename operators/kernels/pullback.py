"""Blocks of pairs whose derivative is written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from operators.tracing import untransformed


class Rule(Protocol):
    """A block ``(..., n, m)`` as a function of tensors, and its derivative."""

    def value(self, *tensors: Tensor) -> Tensor:
        """The block."""

    def pulled_back(
        self, W: Tensor, needed: Sequence[bool], *tensors: Tensor
    ) -> list[Tensor | None]:
        """Gradient of ``<W, block>`` by each tensor that is needed."""


def block_of(rule: Rule, tensors: Sequence[Tensor], W: Tensor | None = None) -> Tensor:
    """The block; or with W ``<W, block>``, of which only the derivative is meant: it may be NaN.

    Under a transform, also one of other tensors, torch takes no Function of this form: there each
    elementwise step is differentiated by itself.
    """
    if untransformed(*tensors):
        applied = _Block.apply(rule, *tensors) if W is None else _Weighted.apply(rule, W, *tensors)
        value: Tensor = applied
        return value
    return weighted(rule.value(*tensors), W)


def weighted(block: Tensor, W: Tensor | None) -> Tensor:
    """``<W, block>``; without W the block."""
    return block if W is None else torch.dot(W.reshape(-1), block.reshape(-1))


class _Block(torch.autograd.Function):
    """``tensors -> block``."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, *tensors: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(*tensors)
        return rule.value(*tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (W,) = outputs
        return None, *ctx.rule.pulled_back(W, ctx.needs_input_grad[1:], *ctx.saved_tensors)


class _Weighted(torch.autograd.Function):
    """``tensors -> <W, block>`` without the block: NaN, of the right derivative."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, W: Tensor, *tensors: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(W, *tensors)
        return W.new_full((), torch.nan)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        W, *tensors = ctx.saved_tensors
        found = ctx.rule.pulled_back(W, ctx.needs_input_grad[2:], *tensors)
        return None, None, *(None if part is None else scale * part for part in found)
