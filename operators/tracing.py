"""What can be done while torch.func traces: which values can be read, which derivatives trusted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch


def readable(*tensors: Tensor) -> bool:
    """Whether the values are there to read: not so of what ``torch.func.vmap`` maps over."""
    return all(_readable(tensor) for tensor in tensors)


def forward_over_forward() -> bool:
    """Whether one ``torch.func.jvp`` runs inside another.

    There torch drops the derivatives of what the ``jvp`` of an autograd.Function computes, and says
    nothing (pytorch#197867): a Function must not be used, or its result refused.
    """
    levels = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in levels) > 1


def _readable(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.device != torch.device("meta")
