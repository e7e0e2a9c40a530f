"""The inverse of an operator as an operator: `Inverse`, given a solver from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.closures import hidden
from operators.cost import Cost
from operators.linear_operator import LinearOperator
from operators.tracing import forward_over_forward


class Prepared(Protocol):
    """A solver bound to an operator; both methods return an object with a ``value``."""

    def solve(self, b: Tensor, /) -> Any:
        """``x`` with ``A x = b``."""

    def solve_transpose(self, b: Tensor, /) -> Any:
        """``x`` with ``A^T x = b``."""


class Solver(Protocol):
    """What `Inverse` asks of a solver; those of the package `solvers` are such."""

    def prepare(self, A: Any, /) -> Prepared:
        """Do the work that depends on A alone."""


class Inverse(LinearOperator):
    """``A^-1``, lazily: a product is a solve.

    Parameters
    ----------
    operator
        A, square.
    solver
        Object with ``prepare(A)``, as every solver of the package `solvers`. It is asked at the
        first product; what it prepares (a factorisation) serves every later product, those with
        the transpose and those of derivatives.

    Raises
    ------
    ValueError
        A is not square; or, at a product that is to be differentiated, a function inside A closes
        over a tensor that is being differentiated: it would get a silent zero gradient, and has to
        be handed over as an argument (``Hessian(loss, y, x)``, not ``Hessian(lambda y: ..., y)``).
    NotImplementedError
        At a product under forward over forward mode, which torch gets wrong; forward over reverse,
        reverse over forward and reverse over reverse are right.

    Notes
    -----
    With ``x = A^-1 b`` the derivatives are solves with the same prepared A, never sweeps through
    the solver:

        x' = A^-1 (b' - A' x) ,     b_bar = A^-T x_bar ,     A_bar = -b_bar x^T ,

    where ``A_bar`` is contracted with the derivative of A by its tensors. They hold to the accuracy
    of the solves. Under vmap over b alone the batch is one block of right-hand sides; over the
    tensors of A it is a loop.

    Examples
    --------
    >>> import torch, operators as ops, solvers
    >>> A = ops.Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
    >>> x = ops.Inverse(A, solvers.DenseCholesky()) @ torch.tensor([5.0, 4.0])
    >>> x.round(decimals=5)
    tensor([1., 1.])
    """

    _parameters = ("operator",)
    _transient = ("_factor",)
    _factor: _Factor | None = None

    def __init__(self, operator: LinearOperator, solver: Solver) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"operator is a {type(operator).__name__}; expected an operator, e.g. Dense(matrix)"
            )
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"{operator!r} is not square and has no inverse")
        if isinstance(solver, type) or not hasattr(solver, "prepare"):
            raise TypeError(f"solver is {solver!r}; expected a solver object, as solvers.CG() is")
        super().__init__(operator.codomain, operator.domain, operator.structure.inverse())
        self.operator, self.solver = operator, solver

    def _apply(self, b: Tensor, transpose: bool) -> Tensor:
        if forward_over_forward():
            raise NotImplementedError(
                f"{self!r} under a jvp inside a jvp, where torch would drop derivatives without a "
                "word (pytorch#197867); use forward over reverse, jacfwd(jacrev(f)), instead"
            )
        tensors, treespec = pytree.tree_flatten(self.operator)
        if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            _refuse_hidden_tensors(self.operator)
        if self._factor is None:
            self._factor = _Factor(self.solver)
        solution: Tensor = _Solve.apply(b, transpose, treespec, self._factor, *tensors)
        return solution

    def _matvec(self, v: Tensor) -> Tensor:
        return self._apply(v, transpose=False)

    def _matmat(self, block: Tensor) -> Tensor:
        return self._apply(block, transpose=False)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self._apply(v, transpose=True)

    def _cost(self) -> Cost:
        return Cost(solves=1)

    def _exact_logdet(self) -> Tensor | None:
        logdet = self.operator._exact_logdet()
        return None if logdet is None else -logdet

    def _describe(self) -> str:
        return f"by {self.solver}"


class _Factor:
    """What the solver prepared, for the values that the tensors of A have now."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.prepared: Prepared | None = None
        self.versions: list[int | None] = []

    def of(self, A: LinearOperator) -> Prepared:
        watched = [*A.tensors, *hidden(A)]
        # Inference tensors do not count their changes: for them every solve prepares anew.
        versions = [None if t.is_inference() else t._version for t in watched]
        if self.prepared is None or None in versions or versions != self.versions:
            self.prepared, self.versions = self.solver.prepare(A), versions
        return self.prepared


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


class _Solve(torch.autograd.Function):
    """``(b, tensors of A) -> A^-1 b``, or ``A^-T b``."""

    @staticmethod
    def forward(
        b: Tensor, transpose: bool, treespec: pytree.TreeSpec, factor: _Factor, *tensors: Tensor
    ) -> Tensor:
        prepared = factor.of(pytree.tree_unflatten(list(tensors), treespec))
        value: Tensor = (prepared.solve_transpose if transpose else prepared.solve)(b).value
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.transpose, ctx.treespec, ctx.factor, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (x_bar,) = outputs
        x, *tensors = ctx.saved_tensors
        b_bar = _Solve.apply(x_bar, not ctx.transpose, ctx.treespec, ctx.factor, *tensors)
        gradients: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if any(ctx.needs_input_grad[4:]):
            product = partial(_product, ctx.treespec, ctx.transpose, x)
            gradients = _pulled_back(product, tensors, -b_bar)
        return b_bar, None, None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
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
        solution: Tensor = _Solve.apply(right, ctx.transpose, ctx.treespec, ctx.factor, *tensors)
        return solution

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        b: Tensor,
        transpose: bool,
        treespec: pytree.TreeSpec,
        factor: _Factor,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        b_dim, tensor_dims = in_dims[0], in_dims[4:]
        if all(dim is None for dim in tensor_dims):
            assert b_dim is not None
            columns = b.movedim(b_dim, -1)  # (n, B) or (n, k, B)
            block = columns.reshape(columns.shape[0], -1)
            solution = _Solve.apply(block, transpose, treespec, factor, *tensors)
            return solution.reshape(columns.shape), columns.ndim - 1
        solutions = []
        for i in range(info.batch_size):
            b_i = b if b_dim is None else b.select(b_dim, i)
            one = [
                tensor if dim is None else tensor.select(dim, i)
                for tensor, dim in zip(tensors, tensor_dims, strict=True)
            ]
            # Another matrix: its own factor.
            solutions.append(_Solve.apply(b_i, transpose, treespec, _Factor(factor.solver), *one))
        return torch.stack(solutions), 0


def _refuse_hidden_tensors(operator: LinearOperator) -> None:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    own: set[int] = set()
    for tensor in hidden(operator):
        if not wrapped(tensor):
            if not (tensor.requires_grad and torch.is_grad_enabled()):
                continue
            # A module that is called by its parameters, which are those of the operator.
            own = own or {_address(t) for t in operator.tensors if not wrapped(t)}
            if _address(tensor) in own:
                continue
        raise ValueError(
            f"a function in {operator!r} closes over a tensor of shape {tuple(tensor.shape)} that "
            "is being differentiated or mapped; its derivative through the inverse would be a "
            "silent zero: hand it over as an argument, e.g. Hessian(loss, y, x) with loss(y, x)"
        )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
