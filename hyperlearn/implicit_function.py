"""The implicit function theorem as a rule of differentiation: ``x -> y*(x)``, whoever solves.

With ``F(y*(x), x) = 0`` and ``A = d_y F``,

    dy = -A^-1 (d_x F dx)          (forward),
    x_bar = -(d_x F)^T A^-T y_bar  (reverse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import (  # type: ignore[attr-defined]
    get_unwrapped,
    is_dead_tensor_wrapper,
    is_legacy_batchedtensor,
)
from torch.utils import _pytree as pytree

from hyperlearn.conditions import Conditions
from hyperlearn.inner.equation import DENSE, Axes, Equation, batched
from hyperlearn.inner.method import InnerInfo, InnerMethod, wide
from operators import Dense, LinearOperator
from operators.solve_rule import Factor, apply_inverse
from operators.space import flatten
from operators.tracing import (
    differentiating,
    forward_over_forward,
    full_precision,
    place,
)
from solvers import (
    GMRES,
    Auto,
    DenseLU,
    LinearSolver,
    NotConvergedError,
    PreparedSolver,
    SingularError,
)

Tree = Any
Rule = Literal["implicit", "identity"] | InnerMethod


@dataclass(frozen=True)
class Outer:
    """The nested x taken apart: its tensors, and the rest, which no transform touches.

    Called with tensors it puts x together again.
    """

    treespec: pytree.TreeSpec
    rest: tuple[Any, ...]
    moving: tuple[bool, ...]

    @classmethod
    def of(cls, x: Tree) -> tuple[Outer, list[Tensor]]:
        """The parts of x."""
        leaves, treespec = flatten(x)
        moving = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        rest = tuple(None if moves else leaf for leaf, moves in zip(leaves, moving, strict=True))
        tensors = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        return cls(treespec, rest, moving), tensors

    def __call__(self, tensors: Sequence[Tensor]) -> Tree:
        """``x`` of such tensors."""
        supply = iter(tensors)
        leaves = [
            next(supply) if moves else leaf
            for moves, leaf in zip(self.moving, self.rest, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.treespec)


# Solves for plain numbers: (equation, y0 of (B, n)) -> (y of (B, n), what it says, A at y or None,
# a solver prepared near y or None).
Solve = Callable[[Equation, Tensor], "Solved"]


@dataclass(frozen=True)
class Solved:
    """What an inner solve hands over.

    Parameters
    ----------
    y
        ``(B, n)``.
    info
        What it says of itself.
    matrix
        A at y, ``(B, n, n)``, where the solve has formed it.
    byproduct
        A solver prepared for A at y, or near it, or for that of each member of a batch.
    """

    y: Tensor
    info: InnerInfo
    matrix: Tensor | None = None
    byproduct: PreparedSolver | None = None


class Problem:
    """One inner problem, or nested batches of it, and how it is differentiated.

    Parameters
    ----------
    conditions
        ``F(y, x) = 0`` of a member.
    solve
        The inner solver.
    outer
        Puts x together.
    linear_solver
        Applies ``A^-1`` and ``A^-T``. None forms A up to 256 unknowns and takes `solvers.Auto`
        beyond.
    mode
        ``"implicit"``; ``"identity"``, with I for A (Luketina et al. 2016, arXiv:1511.06727, where
        F is a gradient: T1-T2); or a method: the derivative is that of one step S from the
        solution, ``dy = d_x S dx`` (Bolte et al. 2023, arXiv:2305.13768; of the fixed-point
        iteration Fung et al. 2022, arXiv:2103.12803; of Newton's it is the implicit one).
    """

    def __init__(
        self,
        conditions: Conditions,
        solve: Solve,
        outer: Outer,
        linear_solver: LinearSolver | None,
        mode: Rule = "implicit",
    ) -> None:
        self.conditions, self.solve, self.outer = conditions, solve, outer
        self.linear_solver, self.mode = linear_solver, mode
        # Of the batches, as for `Equation`.
        self.sizes: tuple[int, ...] = ()
        self.axes: tuple[Axes, ...] = ()
        # What inner solves have said.
        self.log: list[InnerInfo] = []
        # Of a single problem: what its solve handed over, where its y is, and A prepared there.
        self._solved: Solved | None = None
        self._place = (0, 0)
        self._factor: Factor | None = None

    def batched(self, count: int, axes: Axes) -> Problem:
        """The same for a batch of x, with the same log."""
        batch = copy(self)
        batch.sizes, batch.axes = (count, *self.sizes), (axes, *self.axes)
        return batch

    def equation(self, tensors: Sequence[Tensor]) -> Equation:
        """As a method sees it."""
        return Equation(
            self.conditions, self.outer, tensors, self.sizes, self.axes, self.linear_solver
        )

    def run(self, y0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Solve for plain numbers; y0 and the result are ``(*sizes, n)``, and steps ``sizes``."""
        with torch.no_grad():
            block = y0.reshape(math.prod(self.sizes), *y0.shape[len(self.sizes) :])
            # A copy: where no step is taken, y is not y0's memory; nor has one start for all
            # members, which is one piece of memory, room for forward mode.
            solved = self.solve(self.equation(tensors), block.detach().clone())
        if self.conditions.watch is not None:
            self.conditions.watch.settle()
        self.log.append(solved.info)
        # No view, which could not be changed in place by whoever gets it.
        y = solved.y.reshape(*self.sizes, solved.y.shape[-1]).clone()
        if not self.sizes:
            self._solved, self._place = solved, place(y)
        steps = solved.info.member_iterations
        if steps is None:
            steps = torch.zeros(len(block), dtype=torch.long, device=y.device)
        return y, steps.reshape(self.sizes)

    def residual(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``F``, ``(*sizes, n)``."""
        result: Tensor = batched(self.conditions.residual, self.outer, self.axes)(y, tuple(tensors))
        return result

    def invert(self, y: Tensor, tensors: Sequence[Tensor], b: Tensor, transpose: bool) -> Tensor:
        """``A^-1 b`` or ``A^-T b`` at y, ``(*sizes, n)``; b itself where a rule has I for A."""
        if self.mode != "implicit":
            return b
        one = partial(self._invert, transpose=transpose)
        result: Tensor = batched(one, self.outer, self.axes)(y, tuple(tensors), b)
        return result

    def _invert(self, y: Tensor, x: Tree, b: Tensor, *, transpose: bool) -> Tensor:
        conditions, log = self.conditions, self.log[0].adjoint
        # At the solution of a single problem one factorisation serves every derivative.
        here = self._solved is not None and self._place == place(y) != (0, 0)
        factor = self._factor if here else None
        n, right = conditions.space.size, b
        if self.linear_solver is None and n <= DENSE and not conditions.given:
            # LAPACK has no half precision.
            A: LinearOperator = Dense(wide(self._matrix(y, x, here)))
            right = b.to(A.dtype)
            solver: LinearSolver = DenseLU(rcond=n * torch.finfo(A.dtype).eps)
        else:
            A = conditions.operator(y, x)
            solver = self.linear_solver or Auto()
            near = None if self._solved is None else self._solved.byproduct
            if factor is None and near is not None and near.A.shape == A.shape:
                # It was prepared at y or a step before: in its measure A is the identity, nearly.
                refined = GMRES(
                    rtol=solver.tolerance(b.dtype), preconditioner=near, maxiter=20, strict=True
                )
                try:
                    return apply_inverse(A, b, Factor(refined, log), transpose=transpose)
                except NotConvergedError:
                    pass  # too far: A is prepared as it is now
        factor = factor or Factor(solver, log)
        if here:
            self._factor = factor
        try:
            return apply_inverse(A, right, factor, transpose=transpose).to(b.dtype)
        except SingularError as error:
            raise SingularError(
                f"A = d_y F, F of the {conditions.noun}, of {n} unknowns is singular at the "
                f"solution: y is no differentiable function of x there, as where minima are not "
                "isolated; regularise the inner problem, or give linear_solver=, as "
                f"solvers.SVD() ({error})"
            ) from error

    def _matrix(self, y: Tensor, x: Tree, here: bool) -> Tensor:
        """A at y; the one that the solve has formed, where no derivative goes through it."""
        if here and not differentiating():
            assert self._solved is not None
            if self._solved.matrix is not None:
                return self._solved.matrix[0]
        return self.conditions.dense(y, x)

    def pull_back(
        self, y: Tensor, tensors: Sequence[Tensor], y_bar: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """``-(d_x F)^T A^-T y_bar``, for the tensors of x that need it."""
        self.unchanged()
        moving = [i for i, need in enumerate(needed) if need and tensors[i].is_floating_point()]
        found: list[Tensor | None] = [None] * len(tensors)
        if moving:
            q = self.invert(y, tensors, y_bar, transpose=True)
            at = partial(self._with, y, tensors, moving)
            for i, bar in zip(
                moving, torch.func.vjp(at, *(tensors[i] for i in moving))[1](-q), strict=True
            ):
                found[i] = bar
        return found

    def push_forward(
        self, y: Tensor, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> Tensor:
        """``-A^-1 d_x F x_dot``."""
        self.unchanged()
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        at = partial(self._with, y, tensors, moving)
        primals = tuple(tensors[i] for i in moving)

        # d_x F x_dot as the derivative by w of <(d_x F)^T w, x_dot>: a jvp here, inside another
        # one, would be forward over forward.
        def along(w: Tensor) -> Tensor:
            bars = torch.func.vjp(at, *primals)[1](w)
            terms = [(bar * tangents[i]).sum() for i, bar in zip(moving, bars, strict=True)]
            return torch.stack(terms).sum()

        pushed = torch.func.grad(along)(torch.zeros_like(y))
        return self.invert(y, tensors, -pushed, transpose=False)

    def _with(
        self, y: Tensor, tensors: Sequence[Tensor], moving: Sequence[int], *moved: Tensor
    ) -> Tensor:
        full = placed(tensors, moving, moved)
        if isinstance(self.mode, str):
            return self.residual(y, full)
        # y - S(y, x), with I for its linearisation: x_bar = (d_x S)^T y_bar.
        return y - self._stepped(self.mode, y, full)

    def _stepped(self, method: InnerMethod, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """One step S of the method."""
        equation = self.equation(tensors)
        block = y.reshape(math.prod(self.sizes), y.shape[-1])
        return method.advance(equation, method.begin(equation, block))["y"].reshape(y.shape)

    def unchanged(self) -> None:
        """Raise RuntimeError where what the functions reach is no more what it was."""
        if self.conditions.watch is not None:
            self.conditions.watch.check()


def solution(problem: Problem, y0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``y*(x)``, flat, differentiable in the tensors of x; and how many steps that took.

    Raises
    ------
    NotImplementedError
        Under forward over forward mode.
    """
    if forward_over_forward():
        raise NotImplementedError(
            "a solution under a jvp inside a jvp, where torch would drop derivatives without a "
            "word (pytorch#197867); use forward over reverse, jacfwd(jacrev(f)), instead"
        )
    with full_precision(y0.device):
        y, steps = _Implicit.apply(problem, y0, *tensors)
    return y, steps


class _Implicit(torch.autograd.Function):
    """``(y0, tensors of x) -> y*``; y0 gets no derivative, the solution does not depend on it."""

    @staticmethod
    def forward(problem: Problem, y0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return problem.run(y0, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.problem, _, *tensors = inputs
        y, steps = outputs
        ctx.mark_non_differentiable(steps)
        ctx.save_for_backward(y, *tensors)
        ctx.save_for_forward(y, *tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        y_bar = outputs[0]
        _refuse_legacy_vmap(y_bar)
        y, *tensors = map(living, ctx.saved_tensors)
        with full_precision(y.device):
            bars = ctx.problem.pull_back(y, tensors, y_bar, ctx.needs_input_grad[2:])
        return None, None, *bars

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        y, *tensors = map(living, ctx.saved_tensors)
        moving = list(tangents[2:])
        _refuse_legacy_vmap(*moving)
        if all(tangent is None for tangent in moving):
            return torch.zeros_like(y), None
        with full_precision(y.device):
            return ctx.problem.push_forward(y, tensors, moving), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], problem: Problem, y0: Tensor, *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        count, y0_dim, dims = info.batch_size, in_dims[1], in_dims[2:]
        y0 = y0.expand(count, *y0.shape) if y0_dim is None else y0.movedim(y0_dim, 0)
        moved = [
            tensor if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
        axes = tuple(None if dim is None else 0 for dim in dims)
        return _Implicit.apply(problem.batched(count, axes), y0, *moved), (0, 0)


def placed(
    tensors: Sequence[Tensor], places: Sequence[int], moved: Sequence[Tensor]
) -> list[Tensor]:
    """The tensors with others in these places."""
    full = list(tensors)
    for i, tensor in zip(places, moved, strict=True):
        full[i] = tensor
    return full


def _refuse_legacy_vmap(*tensors: Tensor | None) -> None:
    if any(tensor is not None and is_legacy_batchedtensor(tensor) for tensor in tensors):
        raise NotImplementedError(
            "a derivative of a solution for a batch of directions by torch's older vmap "
            "(is_grads_batched=True, or vectorize=True of torch.autograd.functional); use "
            "torch.func.jacrev or jacfwd instead"
        )


def living(tensor: Tensor) -> Tensor:
    """Without what transforms that are over have wrapped around it.

    A graph that ``torch.func.vjp`` has left behind keeps its tensors so. torch's own operations
    take no notice; a Function to which they are handed on does.
    """
    while is_dead_tensor_wrapper(tensor):
        tensor = get_unwrapped(tensor)
    return tensor
