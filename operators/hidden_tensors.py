"""Tensors that a derivative would pass by: those that functions in an operator reach unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch
from torch.utils import _pytree as pytree

from operators.closures import Closure
from operators.linear_operator import LinearOperator
from operators.space import Tree
from operators.tracing import memory, tracked, wrapped


def refuse_hidden_tensors(A: LinearOperator, closure: Closure) -> None:
    """Raise where a function inside A reaches a tensor that is being differentiated or mapped.

    Parameters
    ----------
    A, closure
        Operator, and what functions inside it reach (`operators.closures.closure_of`).

    Raises
    ------
    ValueError
        There is one, and A has no tensor of its own in its place.
    """

    def given() -> set[int]:
        # Those of a module that is called by its parameters share memory with what A has.
        return {memory(tensor) for tensor in A.tensors if not wrapped(tensor)} | _called_by(
            A, closure
        )

    tensor = _first_hidden(closure, given)
    if tensor is not None:
        raise ValueError(
            f"a function in {A!r} closes over a tensor of shape {tuple(tensor.shape)} that "
            "is being differentiated or mapped; its derivative through the inverse would be a "
            "silent zero: hand it over as an argument, as Hessian(loss, y, x) with loss(y, x), or "
            "solve under torch.no_grad() where no derivative is wanted"
        )


def refuse_closed_over(name: str, closure: Closure, x: Tree) -> None:
    """Raise where a function of x reaches a tensor, being differentiated, that is no part of x.

    A tensor that is handed over in x and closed over as well is refused too, unless it is a
    parameter of a module: the function may use the one that gets no derivative.

    Parameters
    ----------
    name
        The function's, for the message.
    closure
        What it reaches.
    x
        What it is given.

    Raises
    ------
    ValueError
        There is one.
    """

    def given() -> set[int]:
        parts = {memory(part) for module in closure.modules for part in _tensors(module)}
        own = {
            memory(leaf)
            for leaf in pytree.tree_leaves(x)
            if isinstance(leaf, Tensor) and not wrapped(leaf)
        }
        return own & parts | _called_by(x, closure)

    # A module that is called by what x holds, inside a transform that has put wrapped ones in it.
    leaves = {id(leaf) for leaf in pytree.tree_leaves(x)}
    called = "functional_call" in closure.names
    parts = [part for module in closure.modules for part in _tensors(module)] if called else []
    excused = {id(part) for part in parts if id(part) in leaves}
    tensor = _first_hidden(closure, given, excused)
    if tensor is not None:
        raise ValueError(
            f"{name} closes over a tensor of shape {tuple(tensor.shape)} that is being "
            "differentiated or mapped, or x holds an object with such; its derivative through "
            f"the solution would be a silent zero: make it part of x, as in {name}(y, x) (of a "
            "module dict(module.named_parameters()), with torch.func.functional_call); where it is "
            "a constant, close over tensor.detach() (of a module: module.requires_grad_(False)); "
            "or solve under torch.no_grad()"
        )


def versions(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """The tensors that count their changes in place, each with its count now."""
    return [(t, t._version) for t in tensors if not (wrapped(t) or t.is_inference())]


def refuse_changes(noted: Sequence[tuple[Tensor, int]], owner: str) -> None:
    """Raise RuntimeError where a tensor that `owner` closes over has changed since `versions`."""
    for tensor, version in noted:
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that {owner} closes over was modified by "
                f"an inplace operation after the solve (version {tensor._version}, then "
                f"{version}): the derivative would be that of another problem; change a copy"
            )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _first_hidden(
    closure: Closure, given: Callable[[], set[int]], excused: Set[int] = frozenset()
) -> Tensor | None:
    """The first tensor that is differentiated or mapped and not excused.

    One that torch.func wraps is excused by its identity, another one if its memory is given.
    """
    known: set[int] | None = None
    for tensor in closure.tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if wrapped(tensor):
            # What a transform that is over has left behind is a constant.
            dead: bool = _functorch.is_dead_tensor_wrapper(tensor)  # type: ignore[attr-defined]
            if dead or id(tensor) in excused:
                continue
        elif not tracked(tensor):
            continue
        else:
            known = given() if known is None else known
            if memory(tensor) in known:
                continue
        return tensor
    return None


def _called_by(value: Any, closure: Closure) -> set[int]:
    """Memory of a module's parameters where ``functional_call`` puts others in their place."""
    given: set[int] = set()
    if "functional_call" in closure.names:
        for names in _dictionaries(value):
            fitting = [module for module in closure.modules if _fits(names, module)]
            # Of two modules that fit, one may be called as it is.
            if len(fitting) == 1:
                parameters = dict(fitting[0].named_parameters())
                given |= {memory(parameters[name]) for name in names if name in parameters}
    return given


def _dictionaries(value: Any) -> Iterator[dict[str, Tensor]]:
    """Dictionaries of tensors by name among the parameters of an operator."""
    if isinstance(value, LinearOperator):
        value = [value.__dict__.get(name) for name in value._parameters]
    if isinstance(value, dict) and all(isinstance(entry, Tensor) for entry in value.values()):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _dictionaries(part)


def _fits(names: dict[str, Tensor], module: nn.Module) -> bool:
    own = dict([*module.named_parameters(), *module.named_buffers()])
    return bool(names) and all(
        name in own and own[name].shape == tensor.shape for name, tensor in names.items()
    )
