"""The flat layout of a nested structure of tensors: an isomorphism between a tree and R^n."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# A nested structure (dict, list, tuple, named tuple, dataclass, ...) whose leaves are tensors.
Tree = Any


@dataclass(frozen=True)
class Space:
    """Coordinates for every tree that has the structure, shapes, dtype and device of one example.

    ``ravel`` stacks the leaves, each in row-major order, into a vector of length ``size``;
    ``unravel`` is its inverse. Both are differentiable and pass through ``torch.func``.

    Parameters
    ----------
    treespec
        Structure of the tree, as ``torch.utils._pytree`` gives it.
    shapes
        Shape of each leaf, in order.
    dtype, device
        Common to all leaves.

    Examples
    --------
    >>> import torch
    >>> space = Space.of({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    >>> space.size
    8
    >>> space.ravel({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    tensor([0., 0., 0., 0., 0., 0., 1., 1.])
    """

    treespec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tree: Tree, name: str = "tree") -> Space:
        """Space of the trees that look like `tree`.

        Parameters
        ----------
        tree
            A tensor, or a nested structure of tensors, of one floating dtype on one device.
        name
            What to call the argument in error messages.

        Raises
        ------
        TypeError
            A leaf is not a floating-point tensor, or leaves differ in dtype or device.
        ValueError
            There is no leaf.
        """
        if isinstance(tree, torch.nn.Module):
            raise TypeError(
                f"{name} is a {type(tree).__name__} module; expected its parameters as a dict of "
                "tensors: pass dict(module.named_parameters()) and call the module through "
                "torch.func.functional_call"
            )
        leaves, treespec = flatten(tree)
        if not leaves:
            raise ValueError(f"{name} holds no tensor; expected at least one")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{name} has a leaf of type {type(leaf).__name__}; expected tensors"
                )
            if not leaf.is_floating_point():
                raise TypeError(
                    f"{name} has a leaf of dtype {leaf.dtype}; expected a floating dtype"
                )
        for what in ("dtype", "device"):
            seen = {getattr(leaf, what) for leaf in leaves}
            if len(seen) > 1:
                raise TypeError(
                    f"{name} mixes {what}s {sorted(map(str, seen))}; convert its leaves to one"
                )
        shapes = tuple(leaf.shape for leaf in leaves)
        return cls(treespec, shapes, leaves[0].dtype, leaves[0].device)

    @classmethod
    def flat(cls, size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Space:
        """R^size itself: the space of plain vectors of shape ``(size,)``."""
        leaf = pytree.tree_structure(0)
        return cls(leaf, (torch.Size([size]),), dtype, torch.device(device))

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def is_flat(self) -> bool:
        """Whether the trees are plain vectors ``(size,)``."""
        return self.treespec.is_leaf() and len(self.shapes[0]) == 1

    def holds(self, tree: Tree) -> bool:
        """Whether `tree` has this structure and these shapes."""
        leaves, treespec = pytree.tree_flatten(tree)
        return (
            treespec == self.treespec
            and all(isinstance(leaf, Tensor) for leaf in leaves)
            and tuple(leaf.shape for leaf in leaves) == self.shapes
        )

    def nests(self, tree: Tree) -> bool:
        """Whether `tree` is to be taken as nested, and not as a plain vector or block."""
        return not isinstance(tree, Tensor) or (not self.is_flat and self.holds(tree))

    def check(self, tree: Tree, name: object = "tree") -> None:
        """Raise unless `tree` is in this space; `name` is what to call it.

        Raises
        ------
        ValueError
            Another structure or other shapes.
        TypeError
            Another dtype or device.
        """
        if not self.holds(tree):
            order = (
                ""
                if self.treespec.is_leaf()
                else " (the order of a dictionary's keys counts: it is that of the flat vector)"
            )
            raise ValueError(f"{name} has structure {_describe(tree)}; expected {self}{order}")
        for leaf in pytree.tree_leaves(tree):
            if leaf.dtype != self.dtype or leaf.device != self.device:
                raise TypeError(
                    f"{name} has dtype {leaf.dtype} on {leaf.device}; "
                    f"expected {self.dtype} on {self.device}"
                )

    def coordinates(self, value: Tree, name: object = "tree") -> Tensor:
        """Vector ``(size,)`` of a tree of the space, or of a vector that holds its coordinates."""
        plain = Space.flat(self.size, self.dtype, self.device)
        return (plain if plain.holds(value) else self).ravel(value, name)

    def ravel(self, tree: Tree, name: object = "tree") -> Tensor:
        """Vector ``(size,)`` of a tree; raises as `check` does."""
        self.check(tree, name)
        leaves = pytree.tree_leaves(tree)
        if len(leaves) == 1:
            return leaves[0].reshape(-1)
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def unravel(self, vector: Tensor) -> Tree:
        """Tree of a vector ``(size,)``."""
        if len(self.shapes) == 1:
            # Not by a split, whose views refuse to be changed in place.
            return pytree.tree_unflatten([vector.reshape(self.shapes[0])], self.treespec)
        pieces = torch.split(vector, [shape.numel() for shape in self.shapes])
        leaves = [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.treespec)

    def __str__(self) -> str:
        skeleton = pytree.tree_unflatten([tuple(shape) for shape in self.shapes], self.treespec)
        return f"{skeleton} of {str(self.dtype).removeprefix('torch.')} on {self.device}"


def flatten(tree: Tree) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of a tree; a dataclass that holds tensors is a node of it.

    torch is told of a dataclass when the first one of its class is met.
    """
    leaves, treespec = pytree.tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if _is_node(leaf)}
    if not unknown:
        return leaves, treespec
    for cls in unknown:
        pytree.register_dataclass(cls)
    return flatten(tree)


def _is_node(leaf: Any) -> bool:
    if not is_dataclass(leaf) or isinstance(leaf, type):
        return False
    held = [getattr(leaf, field.name) for field in fields(leaf)]
    return any(isinstance(part, Tensor) or _is_node(part) for part in pytree.tree_leaves(held))


def check_tensor(value: Any, name: str, shape: str) -> None:
    """Raise TypeError unless the argument of this name is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor {shape}")


def _describe(tree: Tree) -> str:
    return str(
        pytree.tree_map(
            lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__,
            tree,
        )
    )
