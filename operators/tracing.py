"""What can be done while torch.func traces: which values can be read, which derivatives trusted."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree


def readable(*tensors: Tensor) -> bool:
    """Whether the values are there to read: not so of what vmap maps over or a graph records."""
    return not recording() and all(_readable(tensor) for tensor in tensors)


def recording() -> bool:
    """Whether torch.fx records the operations, as the search for a sparsity pattern does."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def forward_over_forward() -> bool:
    """Whether one ``torch.func.jvp`` runs inside another.

    There torch drops the derivatives of what the ``jvp`` of an autograd.Function computes, and says
    nothing (pytorch#197867): a Function must not be used, or its result refused.
    """
    levels = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in levels) > 1


def plainly() -> AbstractContextManager[object]:
    """No transform, no graph: what is kept outlives the mode under which it was first asked for."""
    stack = ExitStack()
    for mode in (torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad()):
        stack.enter_context(mode)
    return stack


def outside() -> AbstractContextManager[object]:
    """No transform that is under way; others can be begun, which they cannot be `plainly`.

    For tensors of `plain_values` alone: what belongs to a transform under way must not enter.
    """
    return temporarily_clear_interpreter_stack()


def plain_values(tree: Any, refusal: str) -> Any:
    """Nested tensors without history or transforms.

    Raises
    ------
    ValueError
        With the message `refusal`: ``torch.func.vmap`` maps over one of them.
    """

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not readable(leaf):
            raise ValueError(refusal)
        while _functorch.is_functorch_wrapped_tensor(leaf):
            leaf = _functorch.get_unwrapped(leaf)
        # Under a transform this too would be wrapped.
        with outside():
            return leaf.detach()

    return pytree.tree_map(plain, tree)


def place(tensor: Tensor) -> tuple[int, int]:
    """Where the values of a tensor are, and which version of them; (0, 0) inside vmap.

    What torch.func wraps to differentiate keeps its place.
    """
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return (0, 0)
        tensor = _functorch.get_unwrapped(tensor)
    if tensor.is_inference() or tensor.device == torch.device("meta"):
        return (0, 0)
    return (tensor.data_ptr(), tensor._version)


def wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func has the tensor in hand."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def untransformed(*tensors: Tensor) -> bool:
    """Whether no transform and no forward mode is under way, whatever it is of."""
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(_functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    )


def memory(tensor: Tensor) -> int:
    """Which piece of memory holds the values of a tensor, or of what torch.func wraps in it."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    # Not the address: nothing that is empty, or has no values, has one.
    return int(tensor.untyped_storage()._cdata)


def tracked(tensor: Tensor) -> bool:
    """Whether something differentiates with respect to it or maps over it."""
    return (
        _functorch.is_functorch_wrapped_tensor(tensor)
        or _functorch.is_legacy_batchedtensor(tensor)
        or (torch.is_grad_enabled() and tensor.requires_grad)
        or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None)
    )


def differentiating() -> bool:
    """Whether a derivative may be under way: a graph is recorded, or a transform traces."""
    return (
        torch.is_grad_enabled()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast: what is solved to a tolerance needs the products in the precision of A."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _readable(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.device != torch.device("meta")
