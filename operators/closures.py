"""What functions reach without being given it: tensors, and names that may be bound anew."""

from __future__ import annotations

import dis
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Set
from functools import lru_cache, partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from operators.linear_operator import LinearOperator

_PLAIN = (str, bytes, int, float, complex, type(None))
_CODE = (types.FunctionType, types.BuiltinFunctionType, type)
# Packages whose objects hold nothing that a function computes with, though they reach everything:
# an ``assert`` in a test leads to pytest's session, and so to every other test.
_APART = {"logging", "pytest", "_pytest", "pluggy", "hypothesis", "tqdm", "matplotlib", "IPython"}
# Packages whose globals hold no tensors of a user's.
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "scipy", "operators"} | _APART
# Of longer containers the length is watched, and not every entry.
MOST_WATCHED = 256


class _Bound(NamedTuple):
    """A name and what it is bound to: ``read(holder, name)`` was `value`."""

    read: Callable[[Any, Any], Any]
    holder: Any
    name: Any
    value: Any

    def stands(self) -> bool:
        """Whether the name is still bound to the same thing, or an equal number."""
        now, then = self.read(self.holder, self.name), self.value
        return now is then or (isinstance(now, _PLAIN) and isinstance(then, _PLAIN) and now == then)


class Closure:
    """What functions reach by closures, defaults, partials, methods, objects, modules and globals.

    Parameters
    ----------
    *roots
        Functions, or objects that hold some.

    Attributes
    ----------
    tensors
        The tensors that were found.
    modules
        The torch modules that were found, but for those inside another one.
    names
        Names that the code loads, of globals and of attributes.

    Notes
    -----
    Code is read for the names of globals and methods, never run; so what it gets by a computed name
    (``getattr``, ``importlib``) is not found. Of an object every attribute counts, whether the code
    reads it or not, unless it says itself what it uses by a method ``__tensors__``; but loggers,
    progress bars, figures and what belongs to a test runner are passed by. Costs a few
    microseconds for each object that is reached, and `changed` a tenth of that.
    """

    def __init__(self, *roots: Any) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.names: set[str] = set()
        self._bound: list[_Bound] = []
        # What was seen, by identity; it is held meanwhile, so that no identity is used twice.
        self._seen: dict[int, Any] = {}
        self._inside: set[int] = set()
        self._classes: dict[type, None] = {}
        self._waiting: list[Any] = list(roots)
        while self._waiting or self._named_methods():
            value = self._waiting.pop()
            if not isinstance(value, (*_PLAIN, types.ModuleType)) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._visit(value)
        self._seen, self._classes = {}, {}

    def changed(self) -> bool:
        """Whether a name that was found is bound to something else by now."""
        return any(not bound.stands() for bound in self._bound)

    def by_name(self) -> list[Tensor]:
        """The tensors that code reads by a name of its own: of an enclosing function or a global.

        Without those that an object has as attributes, which code may leave alone.
        """
        return [
            bound.value
            for bound in self._bound
            if isinstance(bound.value, Tensor)
            and (bound.read is contents or (bound.read is _item and "__builtins__" in bound.holder))
        ]

    def rebound(self) -> str | None:
        """A name that the code reads and that is bound to something else by now; None for none.

        Attributes count if the code loads one of that name, of the others `changed` tells; and the
        parameters of modules unless ``functional_call`` puts others in their place.
        """
        called = self.modules if "functional_call" in self.names else []
        parts = [part for module in called for part in module.modules()]
        swapped = {id(held) for part in parts for held in (part._parameters, part._buffers)}
        for bound in self._bound:
            read = bound.read is not _attribute or bound.name in self.names
            if read and id(bound.holder) not in swapped and not bound.stands():
                return str(bound.name) if isinstance(bound.name, str) else "a container"
        return None

    def settle(self) -> None:
        """Watch no longer what has changed since: the functions write it themselves, as a counter.

        To be called after they have run.
        """
        self._bound = [bound for bound in self._bound if bound.stands()]

    # --- the search ---------------------------------------------------------------------------

    def _visit(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            self._waiting += [getattr(value, "__func__", None), value.__self__]
        elif isinstance(value, partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, LinearOperator):
            self._waiting += [*value.tensors, *_held(value)]
        elif hasattr(type(value), "__tensors__"):
            self._waiting += value.__tensors__()
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._entries(_item, value, value)
        elif isinstance(value, (list, deque)):
            self._entries(_element, value, range(len(value)))
        elif isinstance(value, (tuple, set, frozenset)):
            self._waiting += value
        elif isinstance(value, type):
            self._class(value)
        elif _package(type(value)) not in _APART:
            self._entries(_attribute, value, _attributes(value))
            self._waiting.append(type(value))

    def _watch(self, read: Callable[[Any, Any], Any], holder: Any, name: Any) -> None:
        value = read(holder, name)
        self._bound.append(_Bound(read, holder, name, value))
        self._waiting.append(value)

    def _entries(self, read: Callable[[Any, Any], Any], holder: Any, names: Iterable[Any]) -> None:
        names = list(names)
        if read is not _attribute:
            self._watch(_length, holder, None)
        if len(names) > MOST_WATCHED:
            self._waiting += [read(holder, name) for name in names]
            return
        for name in names:
            self._watch(read, holder, name)

    def _function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            self._watch(contents, cell, None)
        self._waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self._waiting += vars(function).values()
        if is_library(function):
            return
        loaded, attributes = _loaded(function.__code__)
        self.names |= loaded | attributes
        self._named(function.__globals__, loaded, attributes)

    def _named(self, scope: dict[str, Any], names: Set[str], attributes: Set[str]) -> None:
        for name in names & scope.keys():
            value = scope[name]
            if isinstance(value, types.ModuleType):
                # ``settings.x`` after ``import settings``.
                if value.__name__.partition(".")[0] not in _LIBRARIES:
                    further = attributes - {name}
                    self._named(vars(value), further, further)
            elif isinstance(value, _CODE):
                self._waiting.append(value)
            else:
                self._watch(_item, scope, name)

    def _module(self, module: nn.Module) -> None:
        if id(module) not in self._inside:
            self.modules.append(module)
            self._inside |= {id(part) for part in module.modules()}
        for held in (module._parameters, module._buffers, module._modules):
            self._entries(_item, held, held)
        public = [name for name in vars(module) if not name.startswith("_")]
        self._entries(_attribute, module, public)
        self._waiting += [type(module), type(module).forward]

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not is_library(base) and base not in self._classes:
                self._classes[base] = None
                for name, value in vars(base).items():
                    if isinstance(value, (Tensor, dict, list, tuple)) and not name.startswith("__"):
                        self._watch(_item, vars(base), name)

    def _named_methods(self) -> bool:
        """Methods of the classes seen so far whose names the code seen so far loads."""
        for cls in self._classes:
            for name, value in vars(cls).items():
                code = _code_of(value)
                named = name in self.names or name == "__call__" or issubclass(cls, LinearOperator)
                if named and code is not None and id(code) not in self._seen:
                    self._waiting.append(code)
        return bool(self._waiting)


def hidden(operator: LinearOperator) -> list[Tensor]:
    """Tensors that functions in an operator and its operands reach without being given them."""
    return closure_of(operator).tensors


def closure_of(operator: LinearOperator) -> Closure:
    """What functions in an operator and its operands reach; its own tensors are no part of it."""
    return Closure(*_held(operator))


def _held(operator: LinearOperator) -> list[Any]:
    """What an operator and its operands are made of besides tensors and what no product reads."""
    found: list[Any] = [type(operator)]
    skipped = {*operator._transient, *operator._unread, "_source", "_fixed", "_probed"}
    for name, value in operator.__dict__.items():
        if name in skipped:
            continue
        if name not in operator._parameters:
            found.append(value)
            continue
        leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, LinearOperator))
        for leaf in leaves:
            if isinstance(leaf, LinearOperator):
                found += _held(leaf)
            elif not isinstance(leaf, Tensor):
                found.append(leaf)
    return found


def contents(cell: types.CellType, _: None = None) -> Any:
    """What a cell of a closure holds; None for a name that is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _item(holder: Any, name: Any) -> Any:
    return holder.get(name)


def _element(holder: Any, name: int) -> Any:
    return holder[name] if name < len(holder) else None


def _attribute(holder: Any, name: str) -> Any:
    return getattr(holder, name, None)


def _length(holder: Any, _: None) -> int:
    return len(holder)


def _attributes(value: Any) -> list[str]:
    slots: list[str] = []
    for cls in type(value).__mro__:
        own = vars(cls).get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    return [*vars(value), *slots] if hasattr(value, "__dict__") else slots


def is_library(value: Any) -> bool:
    """Whether a function or class belongs to a package that holds no tensors of a user's."""
    return _package(value) in _LIBRARIES


def _package(value: Any) -> str:
    return (value.__module__ or "").partition(".")[0]


def _code_of(value: Any) -> types.FunctionType | None:
    """The function behind an entry of a class: a method, static or not, or a property."""
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    return value if isinstance(value, types.FunctionType) else None


@lru_cache(maxsize=4096)
def _loaded(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the globals and of the attributes that code loads, nested functions included."""
    names: set[str] = set()
    attributes: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(step.argval)
        elif isinstance(step.argval, types.CodeType):
            inner = _loaded(step.argval)
            names |= inner[0]
            attributes |= inner[1]
    return frozenset(names), frozenset(attributes)
