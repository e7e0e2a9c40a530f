"""The derivative rule of ``x = A^-1 b``, whoever solves: `apply_inverse`."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableSequence, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.closures import Closure, closure_of
from operators.hidden_tensors import refuse_changes, refuse_hidden_tensors, versions
from operators.linear_operator import LinearOperator
from operators.stacked import Stacked
from operators.tracing import differentiating, forward_over_forward, full_precision, wrapped


class Prepared(Protocol):
    """A solver bound to an operator; both methods return an object with a ``value``."""

    def solve(self, b: Tensor, /) -> Any:
        """``x`` with ``A x = b``."""

    def solve_transpose(self, b: Tensor, /) -> Any:
        """``x`` with ``A^T x = b``."""


class Solver(Protocol):
    """What `Inverse` asks of a solver; those of the package `solvers` are such.

    One with an attribute ``stacks`` that is true is given a batch, under vmap over the tensors of
    A, as one `Stacked` operator; others get its members one by one.
    """

    def prepare(self, A: Any, /) -> Prepared:
        """Do the work that depends on A alone."""


class Factor:
    """What the solver prepared, for the values that the tensors of A have now.

    `log`, where there is one, takes what each solution says of itself.
    """

    def __init__(self, solver: Solver, log: MutableSequence[Any] | None = None) -> None:
        self.solver, self.log = solver, log
        self.prepared: Prepared | None = None
        self.prepared_for: tuple[Closure, list[int | None]] | None = None
        self._derived: Factor | None = None
        self._batch: tuple[list[Any], Sequence[Tensor], Factor] | None = None
        self._closure: Closure | None = None

    @property
    def reached(self) -> list[Tensor]:
        """Tensors that functions inside A reach, where they were looked for."""
        return [] if self._closure is None else self._closure.tensors

    @property
    def of_derivatives(self) -> Factor:
        """The same for the solves of derivatives, which an absolute tolerance does not suit."""
        if self._derived is None:
            self._derived = _OfDerivatives(self)
        return self._derived

    def closure(self, A: LinearOperator) -> Closure:
        """What functions inside A reach; searched anew where a name has been bound anew."""
        if self._closure is None or self._closure.changed():
            self._closure = closure_of(A)
        return self._closure

    def of(self, A: LinearOperator) -> Prepared:
        """The prepared solver; prepared anew where A is another than it was then.

        So it is where a tensor has changed in place, or a name in a function was bound anew.
        """
        closure = self.closure(A)
        # Inference tensors do not count their changes: for them every solve prepares anew.
        watched = [*A.tensors, *closure.tensors]
        versions = [None if t.is_inference() else t._version for t in watched]
        if self.prepared is None or None in versions or (closure, versions) != self.prepared_for:
            self.prepared, self.prepared_for = self.solver.prepare(A), (closure, versions)
            closure.settle()
        return self.prepared

    def of_batch(self, tensors: Sequence[Tensor], axes: Sequence[int | None]) -> Factor:
        """The one for a batch along these axes; kept, so that its derivatives reuse the factors."""
        # What belongs to another transform, or does not count its changes, is not recognised.
        if any(wrapped(t) or t.is_inference() for t in tensors):
            return Factor(self.solver, self.log)
        same = [(t.data_ptr(), t.shape, t.stride(), t._version) for t in tensors]
        key = [*same, *axes]
        if self._batch is None or self._batch[0] != key:
            # The tensors are kept: their memory goes to no others.
            self._batch = key, tensors, Factor(self.solver, self.log)
        return self._batch[2]

    def solve(self, A: LinearOperator, b: Tensor, transpose: bool) -> Tensor:
        """``A^-1 b`` or ``A^-T b``."""
        prepared = self.of(A)
        solution = (prepared.solve_transpose if transpose else prepared.solve)(b)
        if self.log is not None:
            self.log.append(solution.info)
        value: Tensor = solution.value
        return value


class Given(Factor):
    """What was prepared before, for whatever values: those of the tensors that it was made of."""

    def __init__(self, prepared: Prepared, solver: Solver, log: MutableSequence[Any] | None = None):
        super().__init__(solver, log)
        self.prepared = prepared

    def of(self, A: LinearOperator) -> Prepared:
        """As given."""
        assert self.prepared is not None
        return self.prepared


class _OfDerivatives(Factor):
    """What another factor has prepared, by relative tolerances alone where it has others."""

    def __init__(self, base: Factor) -> None:
        super().__init__(base.solver, base.log)
        self.base = base

    @property
    def reached(self) -> list[Tensor]:
        return self.base.reached

    @property
    def of_derivatives(self) -> Factor:
        return self

    def closure(self, A: LinearOperator) -> Closure:
        return self.base.closure(A)

    def of(self, A: LinearOperator) -> Prepared:
        prepared = self.base.of(A)
        relative: Prepared = getattr(prepared, "relative", prepared)
        return relative

    def of_batch(self, tensors: Sequence[Tensor], axes: Sequence[int | None]) -> Factor:
        return self.base.of_batch(tensors, axes).of_derivatives


def apply_inverse(
    A: LinearOperator, b: Tensor, factor: Factor, *, transpose: bool = False
) -> Tensor:
    """``A^-1 b``, or ``A^-T b``, differentiable with respect to b and the tensors of A.

    Parameters
    ----------
    A, b
        Square operator; ``(n,)`` or ``(n, k)``.
    factor
        Who solves; keeps what was prepared for later solves, those of derivatives among them.
    transpose
        Which of the two.

    Raises
    ------
    ValueError
        Something is differentiated, and a function inside A closes over a tensor that is, too.
    NotImplementedError
        Under forward over forward mode.
    """
    if forward_over_forward():
        raise NotImplementedError(
            f"the inverse of {A!r} under a jvp inside a jvp, where torch would drop derivatives "
            "without a word (pytorch#197867); use forward over reverse, jacfwd(jacrev(f)), instead"
        )
    tensors, treespec = pytree.tree_flatten(A)
    if differentiating():
        refuse_hidden_tensors(A, factor.closure(A))
    with full_precision(b.device):
        solution: Tensor = _Solve.apply(b, transpose, treespec, factor, *tensors)
    return solution


def _product(treespec: pytree.TreeSpec, transpose: bool, x: Tensor, *tensors: Tensor) -> Tensor:
    A: LinearOperator = pytree.tree_unflatten(list(tensors), treespec)
    A = A.T if transpose else A
    return A._matvec(x) if x.ndim == 1 else A._matmat(x)


def _pulled_back(
    product: Callable[..., Tensor], tensors: Sequence[Tensor], w: Tensor
) -> tuple[Tensor, ...]:
    """Gradient of ``<w, product(*tensors)>``."""
    numbers = tuple(range(len(tensors)))
    return torch.func.grad(lambda *moved: (product(*moved) * w).sum(), numbers)(*tensors)


def _gradients(
    product: Callable[..., Tensor], tensors: Sequence[Tensor], w: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The same, of the tensors that are asked for."""
    if torch.is_grad_enabled() or wrapped(w) or any(wrapped(tensor) for tensor in tensors):
        return _pulled_back(product, tensors, w)
    # Nobody differentiates further: plain autograd keeps no graph of the gradient, and is quicker.
    with torch.enable_grad():
        moved = [t.detach().requires_grad_(ask) for t, ask in zip(tensors, needed, strict=True)]
        asked = [tensor for tensor in moved if tensor.requires_grad]
        image = product(*moved)
    if not image.requires_grad:
        return (None,) * len(tensors)
    found = iter(torch.autograd.grad(image, asked, w, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in moved)


class _Solve(torch.autograd.Function):
    """``(b, tensors of A) -> A^-1 b``, or ``A^-T b``."""

    @staticmethod
    def forward(
        b: Tensor, transpose: bool, treespec: pytree.TreeSpec, factor: Factor, *tensors: Tensor
    ) -> Tensor:
        return factor.solve(pytree.tree_unflatten(list(tensors), treespec), b, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.transpose, ctx.treespec, ctx.factor, *tensors = inputs
        # Tensors that functions reach belong to A too, though torch does not know.
        ctx.reached = versions(ctx.factor.reached)
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (x_bar,) = outputs
        refuse_changes(ctx.reached, "a function in A")
        x, *tensors = ctx.saved_tensors
        factor = ctx.factor.of_derivatives
        with full_precision(x.device):
            b_bar = _Solve.apply(x_bar, not ctx.transpose, ctx.treespec, factor, *tensors)
            gradients: tuple[Tensor | None, ...] = (None,) * len(tensors)
            if any(ctx.needs_input_grad[4:]):
                product = partial(_product, ctx.treespec, ctx.transpose, x)
                gradients = _gradients(product, tensors, -b_bar, ctx.needs_input_grad[4:])
        return b_bar, None, None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with full_precision(ctx.saved_tensors[0].device):
            return _Solve._pushed(ctx, *tangents)

    @staticmethod
    def _pushed(ctx: Any, *tangents: Any) -> Tensor:
        b_tangent, _, _, _, *tensor_tangents = tangents
        x, *tensors = ctx.saved_tensors
        right = torch.zeros_like(x) if b_tangent is None else b_tangent
        moving = [i for i, tangent in enumerate(tensor_tangents) if tangent is not None]
        if moving:

            def product(*moved: Tensor) -> Tensor:
                full = list(tensors)
                for i, tensor in zip(moving, moved, strict=True):
                    full[i] = tensor
                return _product(ctx.treespec, ctx.transpose, x, *full)

            primals = tuple(tensors[i] for i in moving)
            directions = tuple(tensor_tangents[i] for i in moving)

            # A' x, as the derivative by w of <A_bar(w), A'>: a jvp here, inside another one, would
            # be forward over forward for an Inverse inside A.
            def along(w: Tensor) -> Tensor:
                pairs = zip(_pulled_back(product, primals, w), directions, strict=True)
                return sum(((a * d).sum() for a, d in pairs), w.new_zeros(()))

            right = right - torch.func.grad(along)(torch.zeros_like(right))
        factor = ctx.factor.of_derivatives
        solution: Tensor = _Solve.apply(right, ctx.transpose, ctx.treespec, factor, *tensors)
        return solution

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        b: Tensor,
        transpose: bool,
        treespec: pytree.TreeSpec,
        factor: Factor,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        b_dim, tensor_dims = in_dims[0], in_dims[4:]
        if all(dim is None for dim in tensor_dims):
            assert b_dim is not None
            columns = b.movedim(b_dim, -1)  # (n, B) or (n, k, B)
            block = columns.reshape(columns.shape[0], math.prod(columns.shape[1:]))
            solution = _Solve.apply(block, transpose, treespec, factor, *tensors)
            return solution.reshape(columns.shape), columns.ndim - 1
        # Other matrices, each with its factor.
        count = info.batch_size
        if not getattr(factor.solver, "stacks", False):
            solutions = []
            for i in range(count):
                b_i = b if b_dim is None else b.select(b_dim, i)
                one = [
                    tensor if dim is None else tensor.select(dim, i)
                    for tensor, dim in zip(tensors, tensor_dims, strict=True)
                ]
                fresh = Factor(factor.solver, factor.log)
                solutions.append(_Solve.apply(b_i, transpose, treespec, fresh, *one))
            return torch.stack(solutions), 0
        leading = [_leading(t, dim, count) for t, dim in zip(tensors, tensor_dims, strict=True)]
        batched: LinearOperator = pytree.tree_unflatten(leading, treespec)
        batch = _leading(b, b_dim, count)  # (B, n) or (B, n, k)
        single = batch.ndim == 2
        batch = batch[..., None] if single else batch
        inner = batched if isinstance(batched, Stacked) else None
        if inner is not None:
            # A batch of batches is one larger batch.
            rows = torch.func.vmap(lambda b: inner.scattered(b, transpose=not transpose))(batch)
            batch = rows.flatten(0, 1)
            batched = pytree.tree_map(lambda tensor: tensor.flatten(0, 1), inner.batched)
        stack = Stacked.of(batched)
        members, spec = pytree.tree_flatten(stack)
        flat = stack.gathered(batch, transpose=transpose)
        whole = factor.of_batch(tensors, tensor_dims)
        solution = _Solve.apply(flat, transpose, spec, whole, *members)
        rows = stack.scattered(solution, transpose=transpose)
        if inner is not None:
            rows = rows.unflatten(0, (count, len(inner)))
            rows = torch.func.vmap(lambda x: inner.gathered(x, transpose=not transpose))(rows)
        return rows[..., 0] if single else rows, 0


def _leading(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """The batch axis in front; repeated where there is none."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
