"""`Representers`: functionals lifted by their kernels, as rows that Gram matrices are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.kernels.functionals import Functionals
from operators.kernels.kernel import Kernel, Lift

# One block of rows: functionals of one field, or of several fields whose sum a row is.
Block = Functionals | Mapping[str, Functionals]
Kernels = Kernel | Mapping[str, Kernel]


class Representers:
    """Rows ``L_i = sum_f L_i^f`` on independent processes ``u_f ~ GP(0, k_f)``.

    What a row costs point by point (scaling, networks, their derivatives) is done here, once; Gram
    matrices of these rows then cost arithmetic on pairs alone. A pytree of its tensors.

    Parameters
    ----------
    kernel
        A kernel, or one for each field by name.
    rows
        `Functionals`; with several fields a dictionary of them by field, at the same points. Or a
        list of such blocks, whose rows are stacked.

    Raises
    ------
    ValueError
        There are no rows, a field has no kernel, the functionals of one block are at different
        points, or those of two blocks at points of different dimensions.
    TypeError
        A block is something else, or of another dtype or device than the first.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.rand(3, 2, dtype=torch.float64)
    >>> rows = [ops.Functionals.value_at(x), ops.Functionals.laplacian_at(x)]
    >>> R = ops.Representers(ops.RBF(0.3), rows)
    >>> len(R), R.orders.tolist()
    (6, [0, 0, 0, 2, 2, 2])
    """

    def __init__(self, kernel: Kernels, rows: Block | Sequence[Block]) -> None:
        kernels = dict(kernel) if isinstance(kernel, Mapping) else {"": kernel}
        for name, one in kernels.items():
            if not isinstance(one, Kernel):
                raise TypeError(
                    f"the kernel of {name or 'the field'} is a {type(one).__name__}; expected a "
                    "Kernel, or a dictionary of one for each field"
                )
        if not isinstance(rows, (Functionals, Mapping, Sequence)):
            raise TypeError(
                f"rows is a {type(rows).__name__}; expected Functionals or a list of them"
            )
        blocks = [rows] if isinstance(rows, (Functionals, Mapping)) else list(rows)
        if not blocks:
            raise ValueError("rows is an empty list; expected at least one block of functionals")
        parts = [_by_field(block, kernels) for block in blocks]
        self.kernels = kernels
        self.points = [next(iter(part.values())).points for part in parts]
        _check_alike(self.points)
        self.lifts: list[dict[str, Lift]] = [
            {name: kernels[name].lift(L) for name, L in part.items()} for part in parts
        ]
        self.block_orders = [max(L.order for L in part.values()) for part in parts]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        return [points.shape[-2] for points in self.points]

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.points[0].dtype

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.points[0].device

    @property
    def orders(self) -> Tensor:
        """Highest derivative in each row, ``(n,)``."""
        pairs = zip(self.block_orders, self.sizes, strict=True)
        return torch.cat([torch.full((size,), order) for order, size in pairs]).to(self.device)

    def variances(self) -> Tensor:
        """``L_i L_i k``, ``(n,)``."""
        found = []
        for lifts in self.lifts:
            rows = pytree.tree_map(lambda leaf: leaf.unsqueeze(1), lifts)
            block = block_of_pairs(self.kernels, rows, rows)
            assert block is not None
            found.append(block[..., 0, 0])
        return torch.cat(found)

    def scaled(self, factors: Tensor) -> Representers:
        """Each row times a number: ``(n,)``."""
        if factors.shape != (len(self),):
            raise ValueError(f"factors has shape {tuple(factors.shape)}; expected ({len(self)},)")
        lifts = [
            {name: self.kernels[name].scale_lift(lift, part) for name, lift in block.items()}
            for block, part in zip(self.lifts, factors.split(self.sizes), strict=True)
        ]
        return self._with(lifts)

    def _with(self, lifts: list[dict[str, Lift]]) -> Representers:
        copy = object.__new__(Representers)
        copy.__dict__.update(self.__dict__, lifts=lifts)
        return copy

    def __repr__(self) -> str:
        return f"Representers({len(self)} rows of {', '.join(map(repr, self.kernels.values()))})"


def block_of_pairs(
    kernels: Mapping[str, Kernel], left: Mapping[str, Lift], right: Mapping[str, Lift]
) -> Tensor | None:
    """``sum_f L_i^f M_j^f k_f`` of two blocks; None where they share no field."""
    total = None
    for name, lift in left.items():
        if name in right:
            term = kernels[name].pairs(lift, right[name])
            total = term if total is None else total + term
    return total


def weighted_block(
    kernels: Mapping[str, Kernel],
    left: Mapping[str, Lift],
    right: Mapping[str, Lift],
    W: Tensor,
) -> Tensor | None:
    """``sum_ij W_ij`` times the entry of `block_of_pairs`, for its derivative alone."""
    total = None
    for name, lift in left.items():
        if name in right:
            term = kernels[name].weighted_pairs(lift, right[name], W)
            total = term if total is None else total + term
    return total


def _check_alike(points: list[Tensor]) -> None:
    first = points[0]
    for k, x in enumerate(points[1:], start=1):
        if x.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"block {k} of rows is at points of dimension {x.shape[-1]}; those of block 0 have "
                f"dimension {first.shape[-1]}"
            )
        if (x.dtype, x.device) != (first.dtype, first.device):
            raise TypeError(
                f"block {k} of rows is {x.dtype} on {x.device}; block 0 is {first.dtype} on "
                f"{first.device}"
            )


def _by_field(block: Any, kernels: Mapping[str, Kernel]) -> dict[str, Functionals]:
    if isinstance(block, Functionals):
        if len(kernels) != 1:
            raise ValueError(
                f"there are kernels for {', '.join(kernels)}; expected rows by field, "
                f"as {{{next(iter(kernels))!r}: ...}}"
            )
        return {next(iter(kernels)): block}
    if not isinstance(block, Mapping) or not all(
        isinstance(L, Functionals) for L in block.values()
    ):
        raise TypeError(
            f"a block of rows is a {type(block).__name__}; expected Functionals, or a dictionary "
            "of Functionals by field"
        )
    if not block:
        raise ValueError("a block of rows is an empty dictionary; expected Functionals by field")
    unknown = [name for name in block if name not in kernels]
    if unknown:
        raise ValueError(f"no kernel for the field {unknown[0]!r}; there are {', '.join(kernels)}")
    first, *others = block.values()
    for other in others:
        if other.points is not first.points and (
            other.points.shape != first.points.shape
            or not bool((other.points == first.points).all())
        ):
            raise ValueError("the fields of one block of rows are taken at different points")
    return dict(block)


def _flatten(rows: Representers) -> tuple[list[Any], tuple[int, ...]]:
    return [rows.kernels, rows.points, rows.lifts], tuple(rows.block_orders)


def _unflatten(leaves: Any, orders: tuple[int, ...]) -> Representers:
    rows = object.__new__(Representers)
    rows.kernels, rows.points, rows.lifts = leaves
    rows.block_orders = list(orders)
    return rows


pytree.register_pytree_node(Representers, _flatten, _unflatten)
