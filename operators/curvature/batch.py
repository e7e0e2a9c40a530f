"""Batches: nested tensors whose leading axes count the same N samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from operators.space import Space, Tree
from operators.tracing import readable


def batch_size(batch: Tree, name: str) -> int:
    """Length N of the leading axis that all tensors of a batch share.

    Raises
    ------
    ValueError
        There is no tensor, one has no axes, their lengths differ, or N is 0.
    """
    leaves = pytree.tree_leaves(batch)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        raise ValueError(f"{name}: expected tensors (N, ...) with samples on axis 0, and no others")
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"{name}: leading axes of {sorted(sizes)}; expected one N > 0")
    return int(sizes.pop())


def chunks(batch: Tree, chunk_size: int | None) -> Iterator[Any]:
    """The batch in pieces of `chunk_size` samples, the last one as small as it comes.

    Raises
    ------
    ValueError
        As `batch_size`.
    """
    count = batch_size(batch, "inputs")
    size = chunk_size or count
    for start in range(0, count, size):
        yield pytree.tree_map(lambda leaf, i=start: leaf[i : i + size], batch)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise unless it is positive, or None for the whole batch.

    Raises
    ------
    ValueError
        Not so.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; expected at least 1, or None for all at once")


def check_weights(weights: Tensor, count: int, space: Space) -> None:
    """Raise unless these are weights of `count` samples.

    Raises
    ------
    ValueError
        Not ``(count,)``, or negative or NaN.
    TypeError
        Another dtype or device than that of the space.
    """
    if weights.shape != (count,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({count},)")
    if weights.dtype != space.dtype or weights.device != space.device:
        raise TypeError(
            f"weights is {weights.dtype} on {weights.device}; expected {space.dtype} on "
            f"{space.device}"
        )
    if readable(weights) and not bool((weights >= 0).all()):
        raise ValueError("weights has negative or NaN entries; expected all >= 0")
