"""Tensors that a function closes over, lifted into its arguments.

``lambda y, x: A @ y - x`` depends on A without being given it. A derivative rule that knows y and x
alone would take A for a constant, and under torch.func could not even read it. So a copy of the
function is made whose closure holds what the rule hands it: the closure conversion of compilers.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from operators.closures import Closure, contents, is_library
from operators.hidden_tensors import refuse_changes, versions
from operators.tracing import tracked


class Lifting:
    """Functions as they are now, and the tensors they close over that are differentiated or mapped.

    The functions are copied, cells and defaults with them: what a name of the enclosing function is
    bound to later, as the variable of a loop, does not reach them, as it does not reach a graph of
    torch. Names that a function binds itself (``nonlocal``) stay shared with the original.

    Parameters
    ----------
    *functions
        Functions; None and other callables are left as they are.

    Attributes
    ----------
    tensors
        Those in the cells and defaults of the functions, of functions and partials in there, and
        of dicts, lists and tuples in there. What objects, modules and globals hold is not lifted.
    """

    def __init__(self, *functions: Any) -> None:
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._seen: set[int] = set()
        for function in functions:
            self._search(function)
        self.functions = self._bound(functions, self.tensors)

    def bound(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The functions with these in place of `tensors`."""
        return self._bound(self.functions, tensors) if self.tensors else self.functions

    def _bound(self, functions: Sequence[Any], tensors: Sequence[Any]) -> tuple[Any, ...]:
        made: dict[int, Any] = {}
        return tuple(self._copied(function, tensors, made) for function in functions)

    def called(self, index: int) -> Callable[..., Any]:
        """The function of that number, of ``(y, (x, tensors))`` in place of ``(y, x)``."""

        def function(y: Any, x: tuple[Any, Sequence[Tensor]]) -> Any:
            return self.bound(x[1])[index](y, x[0])

        return function

    def _search(self, value: Any) -> None:
        if isinstance(value, Tensor):
            lifted = (value.is_floating_point() or value.is_complex()) and tracked(value)
            if lifted and id(value) not in self._places:
                self._places[id(value)] = len(self.tensors)
                self.tensors.append(value)
            return
        parts = _parts(value)
        if parts and id(value) not in self._seen:
            self._seen.add(id(value))
            for part in parts:
                self._search(part)

    def _copied(self, value: Any, tensors: Sequence[Any], made: dict[int, Any]) -> Any:
        if isinstance(value, Tensor):
            place = self._places.get(id(value))
            return value if place is None else tensors[place]
        if id(value) in made:
            return made[id(value)]
        if not _parts(value) or not self._reaches(value, set()):
            return value
        copied = lambda part: self._copied(part, tensors, made)  # noqa: E731
        if isinstance(value, types.FunctionType):
            own = _written(value.__code__)
            cells = tuple(
                old if name in own else types.CellType()
                for name, old in zip(
                    value.__code__.co_freevars, value.__closure__ or (), strict=True
                )
            )
            twin = types.FunctionType(
                value.__code__, value.__globals__, value.__name__, None, cells
            )
            # Before its cells are filled: a recursive function is in one of them.
            made[id(value)] = twin
            for cell, old in zip(cells, value.__closure__ or (), strict=True):
                if cell is not old and _is_bound(old):
                    cell.cell_contents = copied(contents(old))
            twin.__defaults__ = copied(value.__defaults__)
            twin.__kwdefaults__ = copied(value.__kwdefaults__)
            twin.__dict__.update(value.__dict__)
            return twin
        if isinstance(value, partial):
            keywords = copied(value.keywords)
            return partial(copied(value.func), *map(copied, value.args), **keywords)
        if isinstance(value, dict):
            return {key: copied(part) for key, part in value.items()}
        return type(value)(copied(part) for part in value)

    def _reaches(self, value: Any, seen: set[int]) -> bool:
        """Whether a copy is another: of a function always, of a container if it holds such."""
        if isinstance(value, Tensor):
            return id(value) in self._places
        if isinstance(value, types.FunctionType):
            return not is_library(value)
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._reaches(part, seen) for part in _parts(value))


class Watch:
    """What functions reach, as it was when they were solved for: a derivative needs the same.

    Parameters
    ----------
    name
        The function's, for the message.
    closure
        What it reaches.
    """

    def __init__(self, name: str, closure: Closure) -> None:
        self.name, self.closure = name, closure
        self._versions: list[tuple[Tensor, int]] = []

    def __tensors__(self) -> list[Tensor]:
        """None: what is noted here is compared, and no function computes with it."""
        return []

    def settle(self) -> None:
        """Take things as they are now; what the functions change themselves is their own affair."""
        self.closure.settle()
        self._versions = versions(self.closure.tensors)

    def check(self) -> None:
        """Raise RuntimeError where something has changed since."""
        name = self.closure.rebound()
        if name is not None:
            raise RuntimeError(
                f"{name!r}, which {self.name} reads, was bound to something else after the solve: "
                "the derivative would be that of another problem; make it part of x, or a local "
                "variable"
            )
        refuse_changes(self._versions, self.name)


def _written(code: types.CodeType) -> set[str]:
    """Names of enclosing functions that code binds anew, functions inside it included."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _written(constant)
    return found & set(code.co_freevars)


def _parts(value: Any) -> list[Any]:
    """What is looked through; nothing for what is left as it is."""
    if isinstance(value, types.FunctionType):
        if is_library(value):
            return []
        cells = [contents(cell) for cell in value.__closure__ or ()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if type(value) in (list, tuple):
        return list(value)
    return list(value.values()) if type(value) is dict else []


def _is_bound(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
