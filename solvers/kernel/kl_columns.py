"""Columns of the inverse factor from small Gram matrices, batch by batch: `columns_of`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators import LinearOperator
from solvers.kernel.kl_pattern import Batch, KLPattern, pattern_tensor
from solvers.solution import NotPositiveDefiniteError

# Entries of A in one batch: what an evaluation of a kernel and its derivative hold, some tens of
# such arrays, stays in the order of 100 MB, and near the caches. Another device wants more at once.
ENTRIES, ELSEWHERE = 2**18, 2**23


def columns_of(A: LinearOperator, pattern: KLPattern, nugget: float = 0.0) -> Tensor:
    """Values of U with ``(A + nugget diag A)^-1 ~ U U^T``, ``(nnz,)`` in the order of the pattern.

    Differentiable with respect to the tensors of A, in reverse mode, any number of times.

    Parameters
    ----------
    A
        Operator with `submatrix`, symmetric.
    pattern
        For its functionals.
    nugget
        What the diagonal is multiplied by, less one.

    Raises
    ------
    NotPositiveDefiniteError
        A small Gram matrix is not positive definite to working precision.
    TypeError
        A has no cheap entries.

    Notes
    -----
    With s the places in column j, j the last of them, and ``A_ss = L L^T``,

        U_sj = A_ss^-1 e_j / (e_j^T A_ss^-1 e_j)^(1/2) = L^-T e_j ,

    which among all U with this pattern minimises ``KL(N(0, A) | N(0, (U U^T)^-1))`` (Schaefer,
    Katzfuss and Owhadi, 2021, arXiv:2004.14455, Theorem 2.1). Since the Cholesky factor of a
    leading block is the leading block of the factor, a supernode takes one factorisation: its
    columns are the columns of ``L^-T`` at their places.

    The derivative keeps no factor. In the backward pass the Gram matrix of a batch is evaluated and
    factorised again; with ``X = L^-T E`` and ``Y = L^-1 X_bar``,

        A_bar = -sym(X M L^-1) ,      M = Y^T, halved where its column is that of the row's place
                                          and zero beyond it,

    which is the rule of a Cholesky factor (Murray, 2016, arXiv:1602.07527) for these columns. So
    both passes hold one batch and the nnz values.
    """
    tensors, treespec = pytree.tree_flatten(A)
    values: Tensor = _Columns.apply(pattern, nugget, treespec, *tensors)
    return values


def gram_of(A: LinearOperator, rows: Tensor, batch: Batch) -> Tensor:
    """Symmetric ``(B, s, s)`` of functionals ``(B, s)``, piece by piece.

    Pieces of one differential order keep a kernel from evaluating, for every pair, the formulas of
    all orders that occur; and of two that mirror each other one is evaluated.
    """
    if batch.sorting is None:
        return _of_pieces(A, rows, batch.cuts)
    sorting = pattern_tensor(batch.sorting, rows.device)
    gram = _of_pieces(A, rows.gather(1, sorting), batch.cuts)
    back = sorting.argsort(1)
    return gram.gather(1, back[:, :, None].expand_as(gram)).gather(
        2, back[:, None, :].expand_as(gram)
    )


def _of_pieces(A: LinearOperator, rows: Tensor, cuts: list[int]) -> Tensor:
    pieces = [rows[:, a:b] for a, b in itertools.pairwise(cuts)]
    if len(pieces) == 1:
        return A.submatrix(rows, rows)
    blocks: list[list[Tensor]] = []
    for i, left in enumerate(pieces):
        mirrored = [blocks[j][i].mT for j in range(i)]
        blocks.append([*mirrored, *(A.submatrix(left, right) for right in pieces[i:])])
    return torch.cat([torch.cat(block, -1) for block in blocks], -2)


def _batches(pattern: KLPattern, device: torch.device) -> Iterator[Batch]:
    return pattern.batches(ENTRIES if device.type == "cpu" else ELSEWHERE)


class _Local:
    """The factorised Gram matrices of one batch."""

    def __init__(
        self, A: LinearOperator, batch: Batch, nugget: float, gram: Tensor | None = None
    ) -> None:
        self.rows = pattern_tensor(batch.rows, A.device)
        self.valid = torch.from_numpy(batch.valid).to(A.device)
        self.last = pattern_tensor(batch.last, A.device)
        self.entries = torch.from_numpy(batch.entries).to(A.device)
        self.weight = 1.0 + nugget
        gram = gram_of(A, self.rows, batch) if gram is None else gram
        # LAPACK has no half precision.
        wide = gram if gram.dtype == torch.float64 else gram.float()
        # Padding is a unit matrix behind the rest, which does not enter its factor.
        both = self.valid[:, :, None] & self.valid[:, None, :]
        eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
        self.scale = 1 + nugget * eye
        local = torch.where(both, wide * self.scale, eye)
        self.factor, failed = torch.linalg.cholesky_ex(local)
        self._check(A, failed, nugget)
        units = torch.nn.functional.one_hot(self.last, wide.shape[-1]).to(wide.dtype).mT
        self.units = units
        self.columns = torch.linalg.solve_triangular(self.factor.mT, units, upper=True)

    def _check(self, A: LinearOperator, failed: Tensor, nugget: float) -> None:
        wrong = failed.nonzero()[:, 0]
        if not len(wrong):
            return
        node = int(wrong[0])
        order = int(failed[node])
        functional = int(self.rows[node, order - 1])
        raise NotPositiveDefiniteError(
            f"KLCholesky of {A!r}: the Gram matrix of {int(self.valid[node].sum())} neighbours of "
            f"functional {functional} is not positive definite at its pivot {order}; "
            f"{len(wrong)} such in the batch. Raise nugget={nugget:g} (1e-12 to 1e-8 in float64, "
            "1e-5 in float32), add a diagonal to A, or drop functionals that others determine; for "
            "a very smooth kernel PivotedCholesky suits better"
        )

    def values(self) -> Tensor:
        """The stored entries of the columns."""
        return self.columns.mT[self.entries]

    def pulled_back(self, values_bar: Tensor) -> Tensor:
        """Gradient with respect to the Gram matrix."""
        zeros = torch.zeros(self.entries.shape, dtype=values_bar.dtype, device=values_bar.device)
        columns_bar = torch.masked_scatter(zeros, self.entries, values_bar).mT
        below = torch.linalg.solve_triangular(self.factor, columns_bar, upper=False).mT  # (B, m, s)
        along = torch.arange(below.shape[-1], device=below.device)
        place = self.last[:, :, None]
        half = 0.5 * ((along < place).to(below.dtype) + (along <= place).to(below.dtype))
        middle = torch.linalg.solve_triangular(self.factor.mT, (half * below).mT, upper=True)
        product = self.columns @ middle.mT
        both = self.valid[:, :, None] & self.valid[:, None, :]
        return torch.where(both, -0.5 * (product + product.mT) * self.scale, 0.0)


class _Columns(torch.autograd.Function):
    """``tensors of A -> values of U``."""

    @staticmethod
    def forward(
        pattern: KLPattern, nugget: float, treespec: pytree.TreeSpec, *tensors: Tensor
    ) -> Tensor:
        A: LinearOperator = pytree.tree_unflatten(list(tensors), treespec)
        values = torch.empty(pattern.nnz, dtype=A.dtype, device=A.device)
        for batch in _batches(pattern, A.device):
            values[batch.first : batch.end] = _Local(A, batch, nugget).values().to(A.dtype)
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pattern, ctx.nugget, ctx.treespec, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (values_bar,) = outputs
        tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        given = [tensors[i] for i in wanted]
        totals: list[Tensor] = [torch.zeros_like(tensor) for tensor in given]
        for batch in _batches(ctx.pattern, values_bar.device):
            rows = pattern_tensor(batch.rows, values_bar.device)

            def operator(*moved: Tensor) -> LinearOperator:
                full = list(tensors)
                for i, tensor in zip(wanted, moved, strict=True):
                    full[i] = tensor
                A: LinearOperator = pytree.tree_unflatten(full, ctx.treespec)
                return A

            def evaluated(*moved: Tensor, rows: Tensor = rows, batch: Batch = batch) -> Tensor:
                return gram_of(operator(*moved), rows, batch)

            # One evaluation serves the factor and the derivative. All of it is made of operations
            # that torch can differentiate once more.
            both: Any = torch.func.vjp(evaluated, *given)
            gram, pull = both
            local = _Local(operator(*given), batch, ctx.nugget, gram)
            part = values_bar[batch.first : batch.end].to(local.factor.dtype)
            gram_bar = local.pulled_back(part).to(gram.dtype)
            totals = [total + g for total, g in zip(totals, pull(gram_bar), strict=True)]
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, total in zip(wanted, totals, strict=True):
            gradients[i] = total
        return None, None, None, *gradients
