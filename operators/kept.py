"""A sweep through a function, recorded once and kept for further products: `Kept`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils import _pytree as pytree

from operators.closures import Closure
from operators.space import Tree


class Kept:
    """What a sweep recorded, for as long as its point stands and no transform needs it.

    The graph holds for the values that the tensors had (an optimiser may have stepped in place
    since), for what the names in the function were bound to (`operators.closures.Closure`), and for
    the grad mode that it was recorded in. A graph that goes on into a history of the tensors or of
    what the function reaches is freed by the first backward() through a product, and one that
    belongs to a transform under way (grad, jvp) ends with it: then each product has its own. So it
    is with inference tensors, which do not count their changes.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None
        self._closure = Closure()
        self._value: Any = None

    def get(
        self,
        leaves: Iterable[Any],
        record: Callable[[], tuple[Tree, Any]],
        function: Callable[..., Any],
    ) -> Any:
        """What `record` gives after its value, from the first time if that is still good.

        Parameters
        ----------
        leaves
            What the sweep depends on; tensors are watched.
        record
            Records the sweep: the value of the function, and what to keep.
        function
            Function that is swept through; what it reaches is watched too.
        """
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if (
            self._state is not None
            and self._state == _state([*tensors, *self._closure.tensors])
            and not self._closure.changed()
        ):
            return self._value
        closure = Closure(function)
        value, kept = record()
        closure.settle()
        loose = (
            leaf.requires_grad or _functorch.is_functorch_wrapped_tensor(leaf)
            for leaf in pytree.tree_leaves(value)
        )
        self._state, self._value = None, None
        if not any(loose):
            self._state = _state([*tensors, *closure.tensors])
            self._closure, self._value = closure, kept
        return kept


def _state(watched: list[Tensor]) -> tuple[Any, ...] | None:
    if any(tensor.is_inference() for tensor in watched):
        return None
    counts = tuple((tensor._version, tensor.requires_grad) for tensor in watched)
    return (torch.is_grad_enabled(), counts)
