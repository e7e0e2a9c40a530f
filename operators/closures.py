"""The tensors that a function reaches without being given them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.linear_operator import LinearOperator


def closed_over(value: Any) -> list[Tensor]:
    """Tensors that `value` holds: in closures, defaults, partials, methods, modules and objects.

    What a function reads from its module's globals is not seen. An object may say itself what it
    uses by a method ``__tensors__``.
    """
    return list(_search(value, set()))


def constants(function: Any) -> tuple[Any, ...]:
    """Identities and plain values that a function's closure, defaults and partials hold directly.

    Containers are opened, objects are not: a counter in one is no constant of the function.
    """
    found: list[Any] = []
    waiting, seen = [function], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (str, bytes, int, float, complex, type(None))):
            found.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            found.append(id(value))
            if isinstance(value, (types.FunctionType, partial, dict, list, tuple, set, frozenset)):
                waiting += _parts(value)
    return tuple(found)


def _search(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, _PLAIN):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    for part in _parts(value):
        yield from _search(part, seen)


_PLAIN = (str, bytes, int, float, complex, type, types.ModuleType, type(None), torch.dtype)


def _parts(value: Any) -> list[Any]:
    if hasattr(value, "__tensors__"):
        return list(value.__tensors__())
    if isinstance(value, LinearOperator):
        return [*value.tensors, *hidden(value)]
    if isinstance(value, torch.nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        cells = (contents(cell) for cell in value.__closure__ or ())
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def hidden(operator: LinearOperator) -> list[Tensor]:
    """Tensors that functions in an operator and its operands reach without being given them."""
    found: list[Tensor] = []
    for name, value in operator.__dict__.items():
        if name in ("_source", "_fixed", *operator._transient):
            continue
        if name in operator._parameters:
            leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, LinearOperator))
            for leaf in leaves:
                if isinstance(leaf, LinearOperator):
                    found += hidden(leaf)
                elif not isinstance(leaf, Tensor):
                    found += closed_over(leaf)
        elif callable(value):
            found += closed_over(value)
    return found


def contents(cell: types.CellType) -> Any:
    """What a cell of a closure holds; None for a name that is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
