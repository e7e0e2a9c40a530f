"""Which values can be read while torch.func traces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch


def readable(*tensors: Tensor) -> bool:
    """Whether the values are there to read: not so of what ``torch.func.vmap`` maps over."""
    return all(_readable(tensor) for tensor in tensors)


def _readable(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.device != torch.device("meta")
