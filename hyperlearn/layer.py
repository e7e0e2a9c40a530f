"""`ImplicitLayer`: a module whose output is a solution, as in deep equilibrium models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from hyperlearn.inner.method import InnerInfo, InnerMethod
from hyperlearn.solutions import Differentiate, argmin, fixed_point, root
from solvers import LinearSolver

Tree = Any
Kind = Literal["fixed_point", "root", "argmin"]
_SOLVE: dict[str, Callable[..., Any]] = {
    "fixed_point": fixed_point,
    "root": root,
    "argmin": argmin,
}


class ImplicitLayer(nn.Module):
    """``z* = f(z*, inputs)``: the fixed point of a module, as a module.

    Gradients reach the module's parameters and the inputs by the implicit function theorem: memory
    does not grow with the iterations. Source: Bai, Kolter & Koltun (2019), arXiv:1909.01377.

    Parameters
    ----------
    module
        ``f(z, *inputs)``: a map like z for ``"fixed_point"``, a residual like z for ``"root"``, a
        scalar for ``"argmin"``.
    initial
        ``initial(*inputs)``: where z starts, with the shape and dtype that z is to have. By default
        zeros like the first input.
    kind
        See above.
    by_sample
        Solve for each sample along the first axis of z and of all inputs by itself (mapped by
        ``torch.func.vmap``), to its own convergence: the module is called with one sample, without
        the axis in front. Otherwise z is one unknown, samples and all, as a module with batch
        statistics needs it; its tolerance is one for all samples together.
    method, linear_solver, differentiate
        As for `root`.

    Attributes
    ----------
    info
        What the last solve said (`inner.InnerInfo`); after a backward pass with the adjoint's.

    Raises
    ------
    ValueError
        An unknown kind, or inputs of unequal numbers of samples.

    Notes
    -----
    A module that is random (dropout in training mode) has no fixed point: mapped, torch refuses it;
    otherwise the solve says that it did not converge. Buffers (running statistics) are read and not
    updated.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> class Cell(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner, self.outer = torch.nn.Linear(3, 3), torch.nn.Linear(2, 3)
    ...
    ...     def forward(self, z, u):
    ...         return torch.tanh(0.3 * self.inner(z) + self.outer(u))
    >>> _ = torch.manual_seed(0)
    >>> layer = hl.ImplicitLayer(Cell().double(), initial=lambda u: u.new_zeros(len(u), 3))
    >>> z = layer(torch.randn(5, 2, dtype=torch.float64))
    >>> z.sum().backward()
    >>> z.shape, layer.info.converged, layer.module.inner.weight.grad.shape
    (torch.Size([5, 3]), True, torch.Size([3, 3]))
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        initial: Callable[..., Tree] | None = None,
        kind: Kind = "fixed_point",
        by_sample: bool = True,
        method: InnerMethod | None = None,
        linear_solver: LinearSolver | None = None,
        differentiate: Differentiate = "implicit",
    ) -> None:
        super().__init__()
        if kind not in _SOLVE:
            raise ValueError(f"kind={kind!r}; expected one of {tuple(_SOLVE)}")
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module is a {type(module).__name__}; expected a torch.nn.Module: for a function "
                f"use hyperlearn.{kind}"
            )
        self.module, self.initial, self.kind, self.by_sample = module, initial, kind, by_sample
        self.method, self.linear_solver = method, linear_solver
        self.differentiate = differentiate
        self.info: InnerInfo | None = None

    def forward(self, *inputs: Any, z0: Tree = None) -> Tree:
        """The solution for these inputs; `z0` is where to start."""
        if z0 is None:
            if self.initial is not None:
                z0 = self.initial(*inputs)
            elif inputs and isinstance(inputs[0], torch.Tensor):
                z0 = torch.zeros_like(inputs[0])
            else:
                raise ValueError("no input to take z's shape from; expected initial= or z0=")
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        if not self.by_sample:
            return self._solved(z0, state, inputs)
        _check_samples(z0, inputs)
        mapped = torch.func.vmap(self._solved, in_dims=(0, None, 0))
        return mapped(z0, state, inputs)

    def _solved(self, z0: Tree, state: dict[str, torch.Tensor], inputs: tuple[Any, ...]) -> Tree:
        module, buffers = self.module, set(dict(self.module.named_buffers()))

        def called(z: Tree, x: tuple[dict[str, torch.Tensor], tuple[Any, ...]]) -> Tree:
            state, inputs = x
            # A module may write to its buffers, as batch norm does in training: to copies.
            parameters = {k: v.clone() if k in buffers else v for k, v in state.items()}
            return torch.func.functional_call(module, parameters, (z, *inputs))

        answer = _SOLVE[self.kind](
            called,
            z0,
            (state, inputs),
            method=self.method,
            linear_solver=self.linear_solver,
            differentiate=self.differentiate,
            return_info=True,
        )
        self.info = answer.info
        return answer.y

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"kind={self.kind!r}, by_sample={self.by_sample}, method={self.method}, "
            f"linear_solver={self.linear_solver}, differentiate={self.differentiate!r}"
        )


def _check_samples(z0: Tree, inputs: tuple[Any, ...]) -> None:
    leaves = torch.utils._pytree.tree_leaves((z0, inputs))
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"z0 and the inputs have shapes {shapes}; by_sample expects one number of samples in "
            "front of each: by_sample=False takes them as they are"
        )
