"""Minibatches without replacement within an epoch, from an explicit generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.oracles import batch_length

Tree = Any


class Minibatches:
    """An endless stream of batches of nested tensors.

    Each epoch is one random permutation; a last, incomplete batch is dropped.

    Parameters
    ----------
    data
        Nested tensors with a common leading axis; None yields None.
    batch_size
        Samples a batch; None yields all of the data each time.
    generator
        On the CPU; the only source of randomness.
    name
        What to call the data in errors.

    Raises
    ------
    ValueError
        A batch size below 1, or above the number of samples.
    """

    def __init__(
        self, data: Tree, batch_size: int | None, generator: torch.Generator, name: str = "data"
    ) -> None:
        self.data, self.batch_size, self.generator = data, batch_size, generator
        self.length = batch_length(data)
        if data is not None and batch_size is not None and not 1 <= batch_size <= self.length:
            raise ValueError(
                f"batch size {batch_size} for {name} of {self.length} samples; expected 1 to "
                f"{self.length}, or None for all of them"
            )
        self._order = torch.empty(0, dtype=torch.long)
        self._position = 0

    @property
    def is_full(self) -> bool:
        """Whether each batch is all of the data."""
        return self.data is None or self.batch_size in (None, self.length)

    def state(self) -> dict[str, Any]:
        """What of the present shuffle is still to come."""
        return {"order": self._order, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._order, self._position = state["order"], state["position"]

    def draw(self, count: int = 1) -> Tree:
        """`count` fresh batches, joined into one."""
        if self.data is None or self.batch_size is None:
            return self.data
        index = torch.cat([self._next_index(self.batch_size) for _ in range(count)])
        # index_select is four times faster than indexing for rows of images on a CPU.
        return pytree.tree_map(lambda leaf: leaf.index_select(0, index.to(leaf.device)), self.data)

    def _next_index(self, size: int) -> Tensor:
        if self._position + size > len(self._order):
            self._order = torch.randperm(self.length, generator=self.generator)
            self._position = 0
        index = self._order[self._position : self._position + size]
        self._position += size
        return index
