"""Matrices at the door: `as_operator` of tensors and sparse matrices, with the facts looked up."""

from __future__ import annotations

from typing import Any

import scipy.sparse
import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils import _pytree as pytree

from operators import Dense, LinearOperator, Sparse
from operators.elementary import asymmetry, largest_entry
from operators.structure import Structure
from operators.tracing import readable, tracked


def as_operator(A: Any, name: str = "A") -> LinearOperator:
    """The operator of a matrix; operators stay as they are.

    Parameters
    ----------
    A
        Operator, dense tensor ``(m, n)``, sparse torch tensor, or scipy sparse matrix.
    name
        What to call it in error messages.

    Raises
    ------
    TypeError
        Something else.
    ValueError
        A tensor that is no matrix.

    Notes
    -----
    Of a matrix whose values can be read it is looked up whether it is symmetric (up to rounding)
    or triangular, in one pass; of an operator nothing is looked up: it knows what it was told.

    Examples
    --------
    >>> import torch
    >>> as_operator(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).symmetric
    True
    """
    if isinstance(A, LinearOperator):
        return A
    if scipy.sparse.issparse(A):
        return looked_up(Sparse.from_scipy(A))
    if not isinstance(A, Tensor):
        raise TypeError(
            f"{name} is a {type(A).__name__}; expected an operator, a tensor (m, n) or a sparse "
            "matrix of torch or scipy (a numpy array: torch.from_numpy)"
        )
    if A.layout != torch.strided:
        return looked_up(Sparse.from_torch(A))
    if A.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; expected a matrix (m, n)")
    return looked_up(Dense(A))


def looked_up(A: LinearOperator) -> LinearOperator:
    """A `Dense` or `Sparse` operator with the facts that its entries show; others unchanged."""
    m, n = A.shape
    if m != n or not readable(*A.tensors):
        return A
    if type(A) is Dense and not (A.symmetric or A.lower_triangular or A.upper_triangular):
        M = A.matrix.detach()
        scale = 100 * torch.finfo(M.dtype).eps * largest_entry(M) if n else M.new_zeros(())
        symmetric = bool(asymmetry(M) <= scale)
        lower = not symmetric and not bool(M.triu(1).any())
        upper = not symmetric and not lower and not bool(M.tril(-1).any())
        if symmetric or lower or upper:
            facts = Structure(symmetric=symmetric, lower_triangular=lower, upper_triangular=upper)
            return A._derived(A.matrix, facts)
    if type(A) is Sparse and not A.symmetric:
        transposed, order = A.pattern.transpose()
        values = A.values.detach()
        if transposed is A.pattern and A.pattern.nnz:
            gap = (values - values.index_select(0, order)).abs().amax()
            if bool(gap <= 100 * torch.finfo(values.dtype).eps * values.abs().amax()):
                return Sparse(
                    A.values, A.pattern, domain=A.domain, codomain=A.codomain, symmetric=True
                )
    return A


def numbers(A: LinearOperator, where: str) -> LinearOperator:
    """The operator of the plain values of its tensors: what is differentiated is left behind.

    Raises
    ------
    ValueError
        The tensors are mapped over by ``torch.func.vmap``, where there is no one matrix to prepare.
    TypeError
        They are on the meta device.
    """
    if A.device.type == "meta":
        raise TypeError(f"{where}: {A!r} is on the meta device, which holds no numbers")
    leaves, treespec = pytree.tree_flatten(A)
    if not any(isinstance(leaf, Tensor) and tracked(leaf) for leaf in leaves):
        return A
    plain: LinearOperator = pytree.tree_unflatten([_value(t, where) for t in leaves], treespec)
    return plain


def values(tree: Any) -> Any:
    """The plain values of nested tensors; None where ``torch.func.vmap`` maps over one of them."""
    leaves, treespec = pytree.tree_flatten(tree)
    plain = [_plain(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    mapped = any(leaf is None for leaf in plain)
    return None if mapped else pytree.tree_unflatten(plain, treespec)


def _value(tensor: Tensor, where: str) -> Tensor:
    plain = _plain(tensor)
    if plain is None:
        raise ValueError(
            f"{where}: the operator holds a tensor that torch.func.vmap maps over; use "
            "solvers.solve(A, b, solver=...) inside vmap, or a Stacked operator outside"
        )
    return plain


def _plain(tensor: Tensor) -> Tensor | None:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return None
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()
