"""``A V`` from the nonzeros of A, and its adjoint: two bilinear maps that are closed under d.

With `multiply` (values, V) -> A V and `sample` (U, V) -> the entries of ``U V^T`` at the nonzeros,

    d/dA <U, A V> = sample(U, V),    d/dV <U, A V> = A^T U,    d/dU <s, sample(U, V)> = S V,

so that derivatives of any order, forward or reverse, and maps over batches are products of the same
two kinds, and each of them runs on a kernel. Nothing dense of size ``m n`` appears anywhere.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from operators.sparse.pattern import Pattern
from operators.tracing import forward_over_forward, recording

# Numbers gathered at once in `sample`: on a CPU they shall stay in its second-level cache.
CHUNK = {"cpu": 1 << 17}
LARGE_CHUNK = 1 << 26


def multiply(values: Tensor, block: Tensor, pattern: Pattern) -> Tensor:
    """``A V`` for ``V`` of shape ``(n,)`` or ``(n, k)``.

    Parameters
    ----------
    values
        Nonzeros of A, ``(nnz,)``.
    block
        ``V``.
    pattern
        Where the nonzeros are.

    Raises
    ------
    ValueError
        Shapes do not fit.

    Notes
    -----
    ``2 nnz k`` flops by the CSR kernel of torch (MKL, cuSPARSE), with 32-bit indices. To any order
    differentiable in both arguments, by autograd and torch.func. A batch of V is one product with a
    wider block; a batch of values is one product with a block-diagonal matrix, whose pattern takes
    20 bytes for each of its nonzeros and is kept. One jvp inside another runs without the kernel.

    Examples
    --------
    >>> import torch
    >>> eye = Pattern.eye(2)
    >>> torch.func.vmap(lambda a: multiply(a, torch.ones(2), eye))(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """
    if values.shape != (pattern.nnz,) or block.shape[0] != pattern.shape[1]:
        raise ValueError(
            f"values of shape {tuple(values.shape)} and a block of shape {tuple(block.shape)} for "
            f"{pattern}; expected ({pattern.nnz},) and ({pattern.shape[1]},) or "
            f"({pattern.shape[1]}, k)"
        )
    if _untracked(values, block):
        return _csr_product(values, block, pattern)
    if _beyond_functions(values, block):
        return _scattered_product(values, block, pattern)
    result: Tensor = _Multiply.apply(values, block, pattern)
    return result


def sample(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Entries ``sum_k U_ik V_jk`` of ``U V^T`` at the nonzeros (i, j): the adjoint of `multiply`.

    Parameters
    ----------
    left, right
        ``U`` of shape ``(m,)`` or ``(m, k)``, and ``V`` of ``(n,)`` or ``(n, k)``.
    pattern
        Where the nonzeros are.

    Raises
    ------
    ValueError
        Shapes do not fit.

    Notes
    -----
    ``2 nnz k`` flops; besides the result it holds a bounded number of gathered entries.

    Examples
    --------
    >>> import torch
    >>> sample(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), Pattern.eye(2))
    tensor([3., 8.])
    """
    m, n = pattern.shape
    if left.shape[0] != m or right.shape[0] != n or left.shape[1:] != right.shape[1:]:
        raise ValueError(
            f"left of shape {tuple(left.shape)} and right of {tuple(right.shape)} for {pattern}; "
            f"expected ({m},) and ({n},), or ({m}, k) and ({n}, k)"
        )
    if _untracked(left, right):
        return _sampled(left, right, pattern)
    if _beyond_functions(left, right):
        return _gathered_products(left, right, pattern.rows, pattern.columns)
    result: Tensor = _Sample.apply(left, right, pattern)
    return result


def _untracked(*tensors: Tensor) -> bool:
    """Whether nobody differentiates or maps: what an autograd.Function costs (30 us) is saved."""
    return not (
        recording()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or any(map(_functorch.is_legacy_batchedtensor, tensors))
    )


def _beyond_functions(*tensors: Tensor) -> bool:
    """Whether torch differentiates its own operations rightly here, but no autograd.Function.

    See `forward_over_forward`; ``is_grads_batched`` maps without a Function's `vmap`; and a graph
    that torch.fx records says which entries depend on which only where it is made of those.
    """
    return (
        recording()
        or forward_over_forward()
        or any(map(_functorch.is_legacy_batchedtensor, tensors))
    )


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, block: Tensor, pattern: Pattern) -> Tensor:
        return _csr_product(values, block, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Pattern], output: Tensor) -> None:
        values, block, ctx.pattern = inputs
        ctx.save_for_backward(values, block)
        ctx.save_for_forward(values, block)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        values, block = ctx.saved_tensors
        if cotangent is None:
            return None, None, None
        to_values = to_block = None
        if ctx.needs_input_grad[0]:
            to_values = sample(cotangent, block, ctx.pattern)
        if ctx.needs_input_grad[1]:
            transposed, order = ctx.pattern.transpose()
            to_block = multiply(values.index_select(0, order), cotangent, transposed)
        return to_values, to_block, None

    @staticmethod
    def jvp(ctx: Any, values_t: Tensor | None, block_t: Tensor | None, _: None) -> Any:
        values, block = ctx.saved_tensors
        terms = []
        if values_t is not None:
            terms.append(multiply(values_t, block, ctx.pattern))
        if block_t is not None:
            terms.append(multiply(values, block_t, ctx.pattern))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], values: Tensor, block: Tensor, pattern: Pattern
    ) -> tuple[Tensor, int]:
        count, (m, n) = info.batch_size, pattern.shape
        if in_dims[0] is None:
            columns = block.movedim(in_dims[1], 1)
            product = multiply(values, columns.reshape(n, columns[0].numel()), pattern)
            return product.reshape(m, *columns.shape[1:]), 1
        values = values.movedim(in_dims[0], 0).reshape(count * pattern.nnz)
        block = _stacked(block, in_dims[1], count)
        product = multiply(values, block, pattern.block_diagonal(count))
        return product.reshape(count, m, *product.shape[1:]), 0


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        return _sampled(left, right, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Pattern], output: Tensor) -> None:
        left, right, ctx.pattern = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        left, right = ctx.saved_tensors
        if cotangent is None:
            return None, None, None
        to_left = to_right = None
        if ctx.needs_input_grad[0]:
            to_left = multiply(cotangent, right, ctx.pattern)
        if ctx.needs_input_grad[1]:
            transposed, order = ctx.pattern.transpose()
            to_right = multiply(cotangent.index_select(0, order), left, transposed)
        return to_left, to_right, None

    @staticmethod
    def jvp(ctx: Any, left_t: Tensor | None, right_t: Tensor | None, _: None) -> Any:
        left, right = ctx.saved_tensors
        terms = []
        if left_t is not None:
            terms.append(sample(left_t, right, ctx.pattern))
        if right_t is not None:
            terms.append(sample(left, right_t, ctx.pattern))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], left: Tensor, right: Tensor, pattern: Pattern
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        left, right = _stacked(left, in_dims[0], count), _stacked(right, in_dims[1], count)
        entries = sample(left, right, pattern.block_diagonal(count))
        return entries.reshape(count, pattern.nnz), 0


def _stacked(tensor: Tensor, batch_dim: int | None, count: int) -> Tensor:
    """The items of a batch one below the other; what is not batched, `count` times."""
    if batch_dim is None:
        batch = tensor.expand(count, *tensor.shape)
    else:
        batch = tensor.movedim(batch_dim, 0)
    return batch.reshape(count * batch.shape[1], *batch.shape[2:])


def _csr_product(values: Tensor, block: Tensor, pattern: Pattern) -> Tensor:
    dtype = values.dtype
    if values.device.type not in ("cpu", "cuda"):
        return _scattered_product(values, block, pattern)
    if values.device.type == "cpu" and dtype not in (torch.float32, torch.float64):
        # MKL has no kernel for half precision; its sums are better in single precision anyway.
        return _csr_product(values.float(), block.float(), pattern).to(dtype)
    if block.ndim == 2 and block.shape[1] == 1:
        # The kernel for vectors takes half the time of that for blocks.
        return _csr_product(values, block[:, 0], pattern)[:, None]
    matrix = torch.sparse_csr_tensor(
        *pattern.narrow(), values.detach(), size=pattern.shape, check_invariants=False
    )
    # The kernel reads a block by rows: columns that lie in one piece take ten times as long.
    block = block.detach().contiguous()
    product = block.new_empty(pattern.shape[0], *block.shape[1:])
    # With beta = 0 the result is written once; `matrix @ block` would first fill it with zeros.
    into = torch.addmv if block.ndim == 1 else torch.addmm
    into(product, matrix, block, beta=0, out=product)
    return product


def _scattered_product(values: Tensor, block: Tensor, pattern: Pattern) -> Tensor:
    """The same from torch's elementary operations: five to ten times the time of the kernel."""
    terms = block.index_select(0, pattern.columns)
    terms = terms * (values if block.ndim == 1 else values[:, None])
    return terms.new_zeros(pattern.shape[0], *block.shape[1:]).index_add(0, pattern.rows, terms)


def _sampled(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    chunk = CHUNK.get(left.device.type, LARGE_CHUNK)
    step = max(1, chunk // max(1, left[:1].numel()))
    entries = left.new_empty(pattern.nnz)
    for start in range(0, pattern.nnz, step):
        part = slice(start, start + step)
        entries[part] = _gathered_products(left, right, pattern.rows[part], pattern.columns[part])
    return entries


def _gathered_products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    terms = left.index_select(0, rows) * right.index_select(0, columns)
    return terms if left.ndim == 1 else terms.sum(1)


# The first CSR tensor of a process brings a warning that the layout may change; nothing of it is
# seen outside this module.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
    torch.sparse_csr_tensor(
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
        size=(0, 0),
        check_invariants=False,
    )
