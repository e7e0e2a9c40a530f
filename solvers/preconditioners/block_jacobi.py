"""`BlockJacobi`: the inverses of diagonal blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import Cost, Dense, LinearOperator, Sparse
from solvers.one_by_one import one_by_one
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.solution import SingularError, StructureError

# Columns of an operator without entries that are asked for at once.
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class BlockJacobi(Preconditioner):
    """``P = diag(A_11, ..., A_pp)^-1`` with diagonal blocks of A.

    Without a setting there is one block for each leaf of the nested parameters of A.

    Parameters
    ----------
    block_size
        Size of the blocks; what is left at the end makes a smaller one.
    blocks
        Their sizes, one by one.

    Notes
    -----
    Blocks of one size are inverted as one batch: ``2 b^3`` flops each, and ``2 n b`` flops a
    product. Of `Sparse` and `Dense` operators the blocks are read; others take n products.
    Symmetric, and positive definite, where A is.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0, 9.0], [1.0, 1.0, 9.0], [9.0, 9.0, 4.0]]))
    >>> BlockJacobi(block_size=2).prepare(A) @ torch.tensor([3.0, 2.0, 4.0])
    tensor([1., 1., 1.])
    """

    block_size: int | None = None
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.blocks is not None:
            raise ValueError("BlockJacobi: both block_size and blocks; expected one of them")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"BlockJacobi: block_size={self.block_size}; expected at least 1")
        if self.blocks is not None and (not self.blocks or min(self.blocks) < 1):
            raise ValueError(f"BlockJacobi: blocks={self.blocks}; expected sizes of at least 1")

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Invert the blocks.

        Raises
        ------
        StructureError
            A is not square, or has no nested parameters to take the blocks from.
        ValueError
            The sizes of the blocks do not add up to that of A.
        SingularError
            A block is singular.
        """
        return _BlockInverse(self, A)

    def sizes(self, A: LinearOperator) -> list[int]:
        """Sizes of the blocks of A."""
        n = A.shape[0]
        if self.block_size is not None:
            count, rest = divmod(n, self.block_size)
            return [self.block_size] * count + [rest] * (rest > 0)
        if self.blocks is not None:
            if sum(self.blocks) != n:
                raise ValueError(
                    f"BlockJacobi: blocks={self.blocks} add up to {sum(self.blocks)}; expected {n}"
                )
            return list(self.blocks)
        if A.domain.is_flat:
            raise StructureError(
                f"BlockJacobi: {A!r} acts on plain vectors; say block_size or blocks"
            )
        return [size for shape in A.domain.shapes if (size := torch.Size(shape).numel())]


class _BlockInverse(ApproximateInverse):
    def __init__(self, settings: BlockJacobi, A: LinearOperator) -> None:
        if A.shape[0] != A.shape[1]:
            raise StructureError(f"BlockJacobi needs a square operator; got {A!r}")
        super().__init__(settings, A, A.structure.inverse())
        sizes = torch.tensor(settings.sizes(A), device=A.device)
        flat, starts = _entries(A, sizes), sizes.cumsum(0) - sizes
        offsets = (sizes**2).cumsum(0) - sizes**2
        self.groups: list[tuple[Tensor, Tensor]] = []
        for b in sizes.unique().tolist():
            chosen = (sizes == b).nonzero()[:, 0]
            within = torch.arange(b * b, device=A.device)
            blocks = flat[offsets[chosen, None] + within].reshape(-1, b, b)
            inverse, failed = one_by_one(torch.linalg.inv_ex, blocks)
            if bool(failed.any()):
                which = int(chosen[failed.nonzero()[0, 0]])
                raise SingularError(
                    f"BlockJacobi: block {which} of {A!r} is singular; add damping, as "
                    "A + 1e-3 * Identity, or take other blocks"
                )
            if A.symmetric:
                inverse = (inverse + inverse.mT) / 2
            self.groups.append((starts[chosen, None] + within[:b], inverse))

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        image = torch.empty_like(block)
        for places, inverse in self.groups:
            image[places] = (inverse.mT if transpose else inverse) @ block[places]
        return image

    def _cost(self) -> Cost:
        return Cost(flops=sum(2 * inverse.numel() for _, inverse in self.groups))


def _entries(A: LinearOperator, sizes: Tensor) -> Tensor:
    """Entries of the diagonal blocks, row by row, one block after the other."""
    A.check_claims()
    n, which = A.shape[0], torch.arange(len(sizes), device=A.device)
    starts, offsets = sizes.cumsum(0) - sizes, (sizes**2).cumsum(0) - sizes**2
    if isinstance(A, Sparse):
        owner = torch.repeat_interleave(which, sizes, output_size=n)
        kept = owner[A.pattern.rows] == owner[A.pattern.columns]
        rows, columns = A.pattern.rows[kept], A.pattern.columns[kept]
        owner = owner[rows]
        rows, columns = rows - starts[owner], columns - starts[owner]
        places = offsets[owner] + rows * sizes[owner] + columns
        entries = A.values.new_zeros(int((sizes**2).sum()))
        return entries.index_add(0, places, A.values.detach()[kept])
    owner = torch.repeat_interleave(which, sizes**2)
    within = torch.arange(len(owner), device=A.device) - offsets[owner]
    rows = starts[owner] + torch.div(within, sizes[owner], rounding_mode="floor")
    columns = starts[owner] + within % sizes[owner]
    if isinstance(A, Dense):
        return A.matrix.detach()[rows, columns]
    entries = torch.empty(len(rows), dtype=A.dtype, device=A.device)
    index = torch.arange(n, device=A.device)
    for chunk in index.split(CHUNK):
        image = A._matmat((index[:, None] == chunk).to(A.dtype))
        asked = torch.isin(columns, chunk)
        entries[asked] = image[rows[asked], columns[asked] - chunk[0]]
    return entries
