"""`KernelGram`: the Gram matrix of functionals, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.cost import Cost
from operators.kernels.representers import (
    Block,
    Kernels,
    Representers,
    block_of_pairs,
    weighted_block,
)
from operators.linear_operator import LinearOperator
from operators.space import Space
from operators.structure import Structure
from operators.tracing import forward_over_forward, readable, wrapped

# Entries of a tile: a few arrays of it fit in the cores' caches; a GPU wants larger ones.
_TILE = {"cpu": 320 * 320, "cuda": 4096 * 4096}


def gram(
    kernel: Kernels, left: Block | Sequence[Block], right: Block | Sequence[Block] | None = None
) -> KernelGram:
    """``(L_i M_j k)_ij``: the Gram matrix of functionals, as an operator.

    Parameters
    ----------
    kernel
        A kernel, or one for each field by name.
    left, right
        Functionals, or a list of them whose rows are stacked; with several fields, dictionaries by
        field. `right` is `left` by default: then the matrix is symmetric positive semidefinite.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.rand(50, 2, dtype=torch.float64)
    >>> u, lap = ops.Functionals.value_at(x), ops.Functionals.laplacian_at(x)
    >>> K = ops.gram(ops.Matern(0.3, nu=3.5), [u, lap])
    >>> K.shape, K.positive_semidefinite
    ((100, 100), True)
    >>> (K @ torch.ones(100, dtype=torch.float64)).shape
    torch.Size([100])
    """
    rows = Representers(kernel, left)
    return KernelGram(rows, None if right is None else Representers(kernel, right))


class KernelGram(LinearOperator):
    """``K_ij = <phi_i, psi_j>`` of two families of `Representers`; never formed unless asked for.

    A product computes the entries tile by tile, uses them and forgets them: memory O(n + m) beside
    a tile, also in its derivative, which computes each tile again. Of a symmetric matrix half of
    the tiles are computed.

    Parameters
    ----------
    left, right
        Rows and columns; without `right` the matrix is that of `left` with itself.

    Raises
    ------
    ValueError
        The two have other kernels, or points of other dimensions.
    TypeError
        They are not `Representers`, or of another dtype or device.
    """

    _parameters = ("left", "right")

    def __init__(self, left: Representers, right: Representers | None = None) -> None:
        for name, rows in (("left", left), ("right", right)):
            if rows is not None and not isinstance(rows, Representers):
                raise TypeError(f"{name} is a {type(rows).__name__}; expected Representers")
        columns = left if right is None else right
        _check_alike(left, columns)
        super().__init__(
            Space.flat(len(columns), columns.dtype, columns.device),
            Space.flat(len(left), left.dtype, left.device),
            Structure(symmetric=True, positive_semidefinite=True) if right is None else None,
        )
        self.left, self.right = left, right

    @property
    def points(self) -> Tensor:
        """Where each row's functional sits, ``(n, d)``."""
        return torch.cat(self.left.points)

    @property
    def orders(self) -> Tensor:
        """Highest derivative in each row, ``(n,)``."""
        return self.left.orders

    def to_dense(self) -> Tensor:
        """Matrix ``(n, m)``, differentiable; of a symmetric one half is computed."""
        leaves, plan = self._plan()
        if forward_over_forward():
            return plan.dense(leaves)
        dense: Tensor = _Assembled.apply(plan, *leaves)
        return dense

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries ``(..., k, m)`` at integer indices ``(..., k)`` and ``(..., m)``.

        Blocks of rows of different kinds are computed each for all of the indices, and selected: a
        few times the work of the entries alone.
        """
        right = self.left if self.right is None else self.right
        total = None
        for left_lifts, here in _picked(self.left, rows):
            for right_lifts, there in _picked(right, columns):
                block = block_of_pairs(self.left.kernels, left_lifts, right_lifts)
                if block is None:
                    continue
                # where, not a product: what was computed for other rows may be infinite.
                mask = here[..., :, None] & there[..., None, :]
                term = torch.where(mask, block, 0.0)
                total = term if total is None else total + term
        if total is None:
            shape = (*rows.shape[:-1], rows.shape[-1], columns.shape[-1])
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        return total

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        leaves, plan = self._plan()
        if forward_over_forward():
            return plan.product(leaves, block)
        product: Tensor = _Applied.apply(plan, block, *leaves)
        return product

    def _transpose(self) -> LinearOperator:
        assert self.right is not None
        return KernelGram(self.right, self.left)

    def _exact_diagonal(self) -> Tensor | None:
        return self.left.variances() if self.right is None else None

    def _cost(self) -> Cost:
        return Cost(flops=30 * self.shape[0] * self.shape[1])

    def _describe(self) -> str:
        return ", ".join(repr(kernel) for kernel in self.left.kernels.values())

    def _plan(self) -> tuple[list[Tensor], _Plan]:
        kernels = self.left.kernels
        sides = [self.left.lifts] if self.right is None else [self.left.lifts, self.right.lifts]
        leaves, treespec = pytree.tree_flatten((kernels, *sides))
        kernel_count = len(pytree.tree_leaves(kernels))
        sizes = [self.left.sizes] if self.right is None else [self.left.sizes, self.right.sizes]
        counts = [[len(pytree.tree_leaves(block)) for block in side] for side in sides]
        return leaves, _Plan(treespec, kernel_count, sizes, counts, _side(self.device))


def _check_alike(left: Representers, right: Representers) -> None:
    ours, spec = pytree.tree_flatten(left.kernels)
    theirs, other_spec = pytree.tree_flatten(right.kernels)
    pairs = zip(ours, theirs, strict=False)
    if spec != other_spec or not all(
        a is b or not readable(a, b) or torch.equal(a, b) for a, b in pairs
    ):
        raise ValueError(
            f"rows of {left.kernels} and columns of {right.kernels}; expected the same kernels"
        )
    if (left.dtype, left.device) != (right.dtype, right.device):
        raise TypeError(
            f"rows are {left.dtype} on {left.device}, columns {right.dtype} on {right.device}"
        )
    x, y = left.points[0], right.points[0]
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"rows at points of dimension {x.shape[-1]}, columns at points of dimension "
            f"{y.shape[-1]}"
        )


def _side(device: torch.device) -> int:
    return int(_TILE.get(device.type, _TILE["cuda"]) ** 0.5)


def _picked(rows: Representers, index: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """For each block: its lifts at the indices, clamped to it, and which of them are its own."""
    lowest, highest = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    if lowest < 0 or highest >= len(rows):
        raise IndexError(f"indices {lowest} to {highest}; expected 0 to {len(rows) - 1}")
    start = 0
    for lifts, size in zip(rows.lifts, rows.sizes, strict=True):
        own = (index >= start) & (index < start + size)
        if bool(own.any()):
            local = (index - start).clamp(0, size - 1)
            yield pytree.tree_map(lambda leaf, at=local: leaf[at], lifts), own
        start += size


class _Tile(NamedTuple):
    """Rows i0:i1 of a block of the left and j0:j1 of one of the right; starts in the matrix."""

    left: int
    i0: int
    i1: int
    right: int
    j0: int
    j1: int
    row: int
    column: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.i1 - self.i0)

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.j1 - self.j0)

    @property
    def diagonal(self) -> bool:
        return self.row == self.column


class _Plan:
    """How tensors make a Gram matrix: the tree they fill, and the tiles."""

    def __init__(
        self,
        treespec: pytree.TreeSpec,
        kernel_count: int,
        sizes: list[list[int]],
        counts: list[list[int]],
        side: int,
    ) -> None:
        self.treespec, self.kernel_count = treespec, kernel_count
        self.sizes, self.counts = sizes, counts
        self.symmetric = len(sizes) == 1
        self.shape = (sum(sizes[0]), sum(sizes[-1]))
        pieces = [_pieces(side_sizes, side) for side_sizes in sizes]
        self.tiles = [
            _Tile(*left[:3], *right[:3], left[3], right[3])
            for left in pieces[0]
            for right in pieces[-1]
            if not self.symmetric or right[3] <= left[3]
        ]
        # Where the leaves of each block stand among all leaves.
        self.places: list[list[range]] = []
        start = kernel_count
        for side_counts in counts:
            places = []
            for count in side_counts:
                places.append(range(start, start + count))
                start += count
            self.places.append(places)

    def inputs(self, tile: _Tile, leaves: Sequence[Any]) -> list[Any]:
        """Tensors of the kernels, of the tile's rows, of its columns; or what is told of them."""
        left, right = self.places[0][tile.left], self.places[-1][tile.right]
        return [
            *leaves[: self.kernel_count],
            *(_rows(leaves[k], tile.i0, tile.i1) for k in left),
            *(_rows(leaves[k], tile.j0, tile.j1) for k in right),
        ]

    def function(self, tile: _Tile, W: Tensor | None = None) -> Callable[..., Tensor | None]:
        """The tile as a function of `inputs`, or `weighted_block` of it; None where it is zero."""
        kernels_spec, *sides = self.treespec.children()
        left_spec = sides[0].children()[tile.left]
        right_spec = sides[-1].children()[tile.right]
        p, q = self.kernel_count, self.kernel_count + self.counts[0][tile.left]

        def entries(*inputs: Tensor) -> Tensor | None:
            kernels = pytree.tree_unflatten(list(inputs[:p]), kernels_spec)
            left = pytree.tree_unflatten(list(inputs[p:q]), left_spec)
            right = pytree.tree_unflatten(list(inputs[q:]), right_spec)
            if W is None:
                return block_of_pairs(kernels, left, right)
            return weighted_block(kernels, left, right, W)

        return entries

    def entries(self, tile: _Tile, leaves: Sequence[Tensor]) -> Tensor | None:
        return self.function(tile)(*self.inputs(tile, leaves))

    def dense(self, leaves: Sequence[Tensor]) -> Tensor:
        """The matrix."""
        if any(wrapped(leaf) for leaf in leaves):
            return self._dense_by_pieces(leaves)
        matrix = torch.empty(self.shape, dtype=leaves[-1].dtype, device=leaves[-1].device)
        for tile in self.tiles:
            block = self.entries(tile, leaves)
            matrix[tile.rows, tile.columns] = 0.0 if block is None else block
            if self.symmetric and not tile.diagonal:
                matrix[tile.columns, tile.rows] = 0.0 if block is None else block.T
        return matrix

    def _dense_by_pieces(self, leaves: Sequence[Tensor]) -> Tensor:
        """Without writing in place, which transforms do not follow."""
        found: dict[tuple[int, int], Tensor] = {}
        for tile in self.tiles:
            block = self.entries(tile, leaves)
            if block is None:
                block = leaves[-1].new_zeros(tile.i1 - tile.i0, tile.j1 - tile.j0)
            found[tile.row, tile.column] = block
            if self.symmetric and not tile.diagonal:
                found[tile.column, tile.row] = block.mT
        rows = sorted({row for row, _ in found})
        columns = sorted({column for _, column in found})
        return torch.cat([torch.cat([found[i, j] for j in columns], -1) for i in rows], -2)

    def product(self, leaves: Sequence[Tensor], v: Tensor) -> Tensor:
        """``K V``."""
        pieces: dict[int, Tensor] = {}

        def put(at: int, term: Tensor) -> None:
            pieces[at] = pieces[at] + term if at in pieces else term

        for tile in self.tiles:
            block = self.entries(tile, leaves)
            if block is None:
                put(tile.row, v[tile.columns].new_zeros(tile.i1 - tile.i0, v.shape[1]))
                if self.symmetric and not tile.diagonal:
                    put(tile.column, v.new_zeros(tile.j1 - tile.j0, v.shape[1]))
                continue
            put(tile.row, block @ v[tile.columns])
            if self.symmetric and not tile.diagonal:
                put(tile.column, block.mT @ v[tile.rows])
        return torch.cat([pieces[at] for at in sorted(pieces)])

    def transposed_product(self, leaves: Sequence[Tensor], v: Tensor) -> Tensor:
        """``K^T V``."""
        if self.symmetric:
            return self.product(leaves, v)
        pieces: dict[int, Tensor] = {}
        for tile in self.tiles:
            block = self.entries(tile, leaves)
            if block is None:
                term = v.new_zeros(tile.j1 - tile.j0, v.shape[1])
            else:
                term = block.mT @ v[tile.rows]
            at = tile.column
            pieces[at] = pieces[at] + term if at in pieces else term
        return torch.cat([pieces[at] for at in sorted(pieces)])

    def pulled_back(
        self,
        leaves: Sequence[Tensor],
        cotangent: Callable[[_Tile], Tensor],
        needed: Sequence[bool] | None = None,
    ) -> list[Tensor]:
        """Gradient of ``sum_tiles <W_tile, K_tile>`` by each leaf, tile by tile.

        Of leaves that are not `needed` it is zero, and costs nothing.
        """
        plain = not torch.is_grad_enabled() and not any(wrapped(leaf) for leaf in leaves)
        shared: list[Tensor | None] = [None] * self.kernel_count
        pieces: list[dict[int, Tensor]] = [{} for _ in leaves]
        for tile in self.tiles:
            W = cotangent(tile)
            inputs = self.inputs(tile, leaves)
            if plain:
                asked = inputs if needed is None else self.inputs(tile, needed)
                found = _pulled(self.function(tile, W), inputs, asked)
            else:
                found = _pulled_by_func(self.function(tile), inputs, W)
            left, right = self.places[0][tile.left], self.places[-1][tile.right]
            for k, part in enumerate(found[: self.kernel_count]):
                shared[k] = _sum(shared[k], part)
            for k, part in zip(left, found[self.kernel_count :], strict=False):
                if part is not None:
                    before = pieces[k].get(tile.i0)
                    pieces[k][tile.i0] = part if before is None else before + part
            for k, part in zip(right, found[self.kernel_count + len(left) :], strict=True):
                if part is not None:
                    before = pieces[k].get(tile.j0)
                    pieces[k][tile.j0] = part if before is None else before + part
        gradients = []
        for k, leaf in enumerate(leaves):
            if k < self.kernel_count:
                known = shared[k]
                gradients.append(torch.zeros_like(leaf) if known is None else known)
            elif not pieces[k]:
                gradients.append(torch.zeros_like(leaf))
            else:
                gradients.append(torch.cat([pieces[k][at] for at in sorted(pieces[k])]))
        return gradients


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term


def _pieces(sizes: list[int], side: int) -> list[tuple[int, int, int, int]]:
    """``(block, start, end, start in the matrix)``, of about equal sizes up to `side`."""
    found, offset = [], 0
    for block, size in enumerate(sizes):
        if not size and any(sizes):
            continue  # an empty tile would stand where the next one starts
        count = max(1, -(-size // side))
        cuts = [size * k // count for k in range(count + 1)]
        for a, b in pairwise(cuts):
            found.append((block, a, b, offset + a))
        offset += size
    return found


def _pulled(
    f: Callable[..., Tensor | None], inputs: list[Tensor], needed: Sequence[Any]
) -> Sequence[Tensor | None]:
    """Gradient of a number by plain autograd: nothing outside is differentiated."""
    with torch.enable_grad():
        moved = [
            x.detach().requires_grad_(ask is not False)
            for x, ask in zip(inputs, needed, strict=True)
        ]
        value = f(*moved)
        asked = [x for x in moved if x.requires_grad]
        if value is None or not value.requires_grad:
            return [None] * len(inputs)
        found = iter(torch.autograd.grad(value, asked, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in moved]


def _rows(leaf: Any, start: int, end: int) -> Any:
    return leaf[start:end] if isinstance(leaf, Tensor) else leaf


def _pulled_by_func(
    f: Callable[..., Tensor | None], inputs: list[Tensor], W: Tensor
) -> Sequence[Tensor | None]:
    """Gradient of ``<W, f>``, for further differentiation."""
    if f(*inputs) is None:
        return [None] * len(inputs)
    found: Sequence[Tensor] = torch.func.vjp(f, *inputs)[1](W)
    return found


class _Applied(torch.autograd.Function):
    """``(V, leaves) -> K V``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan: _Plan, v: Tensor, *leaves: Tensor) -> Tensor:
        return plan.product(leaves, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (y_bar,) = outputs
        plan: _Plan = ctx.plan
        v, *leaves = ctx.saved_tensors
        v_bar = plan.transposed_product(leaves, y_bar) if ctx.needs_input_grad[1] else None
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if any(ctx.needs_input_grad[2:]):
            needed = ctx.needs_input_grad[2:]
            gradients = plan.pulled_back(leaves, _outer(plan, y_bar, v), needed)
        return None, v_bar, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        plan: _Plan = ctx.plan
        v, *leaves = ctx.saved_tensors
        _, v_tangent, *leaf_tangents = tangents
        total = torch.zeros(plan.shape[0], v.shape[1], dtype=v.dtype, device=v.device)
        if v_tangent is not None:
            total = total + plan.product(leaves, v_tangent)
        if any(tangent is not None for tangent in leaf_tangents):
            # K' V as the derivative by w of <pullback(w), tangents>: no forward mode in another.
            def along(w: Tensor) -> Tensor:
                pulled = plan.pulled_back(leaves, _outer(plan, w, v))
                pairs = zip(pulled, leaf_tangents, strict=True)
                return sum(((a * t).sum() for a, t in pairs if t is not None), w.new_zeros(()))

            total = total + torch.func.grad(along)(torch.zeros_like(total))
        return total


def _outer(plan: _Plan, y_bar: Tensor, v: Tensor) -> Callable[[_Tile], Tensor]:
    """Cotangent of a tile in ``<y_bar, K v>``; one off the diagonal stands for its mirror too."""

    def cotangent(tile: _Tile) -> Tensor:
        W = y_bar[tile.rows] @ v[tile.columns].mT
        if plan.symmetric and not tile.diagonal:
            W = W + v[tile.rows] @ y_bar[tile.columns].mT
        return W

    return cotangent


class _Assembled(torch.autograd.Function):
    """``leaves -> K``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan: _Plan, *leaves: Tensor) -> Tensor:
        return plan.dense(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, *leaves = inputs
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (K_bar,) = outputs
        plan, needed = ctx.plan, ctx.needs_input_grad[1:]
        return None, *plan.pulled_back(ctx.saved_tensors, _entries(plan, K_bar), needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        plan: _Plan = ctx.plan
        leaves, leaf_tangents = ctx.saved_tensors, tangents[1:]

        def along(W: Tensor) -> Tensor:
            pairs = zip(plan.pulled_back(leaves, _entries(plan, W)), leaf_tangents, strict=True)
            return sum(((a * t).sum() for a, t in pairs if t is not None), W.new_zeros(()))

        zeros = torch.zeros(plan.shape, dtype=leaves[-1].dtype, device=leaves[-1].device)
        derivative: Tensor = torch.func.grad(along)(zeros)
        return derivative


def _entries(plan: _Plan, K_bar: Tensor) -> Callable[[_Tile], Tensor]:
    def cotangent(tile: _Tile) -> Tensor:
        W = K_bar[tile.rows, tile.columns]
        if plan.symmetric and not tile.diagonal:
            W = W + K_bar[tile.columns, tile.rows].mT
        return W

    return cotangent
