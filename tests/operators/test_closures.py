"""`Closure`: what functions reach without being given it, and whether it was bound anew."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators import Diagonal, Hessian, LinearOperator, Space
from operators.closures import MOST_WATCHED, Closure


def scripted(source: str, **scope: Any) -> dict[str, Any]:
    """Names of a script: its functions read each other, and what is in `scope`, as globals."""
    scope = {"__name__": "__main__", "torch": torch, **scope}
    exec(source, scope)
    return scope


class Slotted:
    __slots__ = ("other", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, y: Tensor) -> Tensor:
        return self.x * y


class Layered:
    """Its methods call each other and read a global."""

    @property
    def weight(self) -> Tensor:
        return self.made()

    def outer(self, y: Tensor) -> Tensor:
        return self.weight * y

    @staticmethod
    def made() -> Tensor:
        return HELD["x"]

    def train(self) -> Tensor:
        return UNUSED


class Constant:
    x = torch.ones(2)

    def __call__(self, y: Tensor) -> Tensor:
        return self.x * y


class Unregistered(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.parts = [{"x": x}]

    def forward(self, y: Tensor) -> Tensor:
        return self.parts[0]["x"] * y


def module_of(**names: Any) -> types.ModuleType:
    module = types.ModuleType("mine")
    vars(module).update(names)
    return module


class Own(LinearOperator):
    def __init__(self, _: Any) -> None:
        super().__init__(Space.flat(2, torch.float32), Space.flat(2, torch.float32))

    def _matvec(self, v: Tensor) -> Tensor:
        return HELD["x"] * v


HELD: dict[str, Tensor] = {}
UNUSED = torch.ones(7)


def closing(x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: x * y


def with_attribute(x: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(y):
        return y

    loss.x = x
    return loss


def wrapped(x: Tensor) -> Callable[[Tensor], Tensor]:
    def decorator(function):
        @wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    return decorator(closing(x))


def of_class(x: Tensor) -> Any:
    Constant.x = x
    return Constant()


def layered(x: Tensor) -> Any:
    HELD["x"] = x
    return Layered().outer


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "a closure": closing,
    "a default": lambda x: scripted("def loss(y, x=x, *, z=1): return x * y", x=x)["loss"],
    "a keyword default": lambda x: scripted("def loss(y, *, x=x): return x * y", x=x)["loss"],
    "a global": lambda x: scripted("def loss(y): return x * y", x=x)["loss"],
    "a global in a function inside": lambda x: scripted(
        "def loss(y):\n    return (lambda z: [x * z for _ in range(1)][0])(y)", x=x
    )["loss"],
    "a global of a function that it calls": lambda x: scripted(
        "def loss(y): return helper(y)\ndef helper(y): return {'a': x}['a'] * y", x=x
    )["loss"],
    "an entry of a global": lambda x: scripted(
        "def loss(y): return cfg['x'][0] * y", cfg={"x": [x]}
    )["loss"],
    "a class that is global": lambda x: scripted(
        "class Settings:\n    weights = [x]\ndef loss(y): return Settings.weights[0] * y", x=x
    )["loss"],
    "a module that is imported": lambda x: scripted(
        "def loss(y): return package.settings.x * y",
        package=module_of(settings=module_of(x=x, other=UNUSED)),
    )["loss"],
    "a method of an operator of one's own": lambda x: Own(layered(x)),
    "a partial": lambda x: partial(torch.mul, x),
    "a keyword of a partial": lambda x: partial(torch.mul, other=x),
    "a bound method of a tensor": lambda x: x.dot,
    "an object": lambda x: closing(x).__get__(x),
    "slots": Slotted,
    "a class attribute": of_class,
    "methods that call each other": layered,
    "an attribute of a function": with_attribute,
    "a decorator": wrapped,
    "torch.func": lambda x: torch.func.grad(closing(x)),
    "a parameter": lambda x: nn.ParameterList([nn.Parameter(x)]),
    "an attribute of a module": Unregistered,
    "a distribution": lambda x: torch.distributions.Normal(x, 1.0, validate_args=False).log_prob,
    "an operator": lambda x: Diagonal(x).__matmul__,
    "a function in an operator": lambda x: Hessian(lambda y: (x * y**2).sum(), torch.ones(2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_is_found_by(way):
    x = torch.tensor([1.0, 2.0])
    found = Closure(WAYS[way](x)).tensors
    assert x.data_ptr() in [tensor.data_ptr() for tensor in found]
    assert UNUSED.data_ptr() not in [tensor.data_ptr() for tensor in found]


def test_what_the_code_does_not_name_is_not_found():
    scope = scripted(
        "def loss(y): return used * y.x\ndef other(y): return x * y",
        x=torch.ones(2),
        used=torch.zeros(2),
    )
    assert [tensor is scope["used"] for tensor in Closure(scope["loss"]).tensors] == [True]


def test_an_object_says_what_it_uses():
    class Honest:
        def __init__(self):
            self.used, self.unused = torch.zeros(1), torch.zeros(2)

        def __tensors__(self):
            return [self.used]

    honest = Honest()
    assert [tensor is honest.used for tensor in Closure(honest).tensors] == [True]


def test_circles_and_depth():
    circle: list[Any] = [torch.ones(1)]
    circle.append({"again": circle})
    deep: Any = circle
    for _ in range(5000):
        deep = [deep]
    assert len(Closure(deep).tensors) == 1


class Settings:
    def __init__(self) -> None:
        self.x, self.rate = torch.ones(2), 1.0


def rebinding() -> dict[str, tuple[Any, Callable[[], None]]]:
    """Functions, and ways to bind anew what they reach."""
    scope = scripted("def loss(y): return x * y * rate", x=torch.ones(2), rate=1.0)
    settings, held, listed = Settings(), {"rate": 1.0}, [1.0, torch.ones(1)]
    slotted, module = Slotted(torch.ones(2)), nn.Linear(2, 1)
    cell = 1.0

    def set_cell():
        nonlocal cell
        cell = 2.0

    config = module_of(rate=1.0)
    imported = scripted("def loss(y): return config.rate * y", config=config)

    return {
        "a cell": (lambda y: cell * y, set_cell),
        "a name in a module": (imported["loss"], lambda: setattr(config, "rate", 2.0)),
        "a global number": (scope["loss"], lambda: scope.update(rate=2.0)),
        "a global tensor": (scope["loss"], lambda: scope.update(x=torch.ones(2))),
        "a tensor in an object": (
            lambda y: settings.x * y,
            lambda: setattr(settings, "x", torch.ones(2)),
        ),
        "a number in an object": (
            lambda y: settings.rate * y,
            lambda: setattr(settings, "rate", 2.0),
        ),
        "an entry of a dictionary": (lambda y: held["rate"] * y, lambda: held.update(rate=2.0)),
        "another entry of it": (lambda y: held["rate"] * y, lambda: held.update(more=2.0)),
        "an entry of a list": (lambda y: listed[0] * y, lambda: listed.__setitem__(0, 2.0)),
        "a longer list": (lambda y: sum(listed) * y, lambda: listed.append(2.0)),
        "a shorter list": (lambda y: sum(listed) * y, lambda: listed.clear()),
        "a slot": (slotted, lambda: setattr(slotted, "x", torch.ones(2))),
        "a parameter of a module": (
            lambda y: module(y),
            lambda: setattr(module, "weight", nn.Parameter(torch.ones(1, 2))),
        ),
        "a setting of a module": (lambda y: module(y), lambda: module.eval()),
    }


@pytest.mark.parametrize("which", rebinding())
def test_bound_anew(which):
    function, rebind = rebinding()[which]
    closure = Closure(function)
    assert not closure.changed()
    rebind()
    assert closure.changed()


def test_an_equal_number_is_no_other():
    settings = Settings()
    closure = Closure(lambda y: settings.rate * y)
    settings.rate = float("1.0")
    assert not closure.changed()


def test_what_functions_write_themselves_is_not_watched():
    """A counter, a log, a cache; but what is beside them in the same object is."""
    settings, calls, count = Settings(), [], 0

    def loss(y):
        nonlocal count
        count += 1
        calls.append(1)
        settings.seen = y
        settings.calls = count
        return settings.rate * y

    closure = Closure(loss)
    loss(torch.ones(2))
    assert closure.changed()
    closure.settle()
    loss(torch.ones(2))
    assert not closure.changed()
    settings.rate = 2.0
    assert closure.changed()


def test_of_long_lists_the_length_is_watched_and_the_tensors_are_found():
    x = torch.ones(1)
    long: list[Any] = [0.0] * MOST_WATCHED + [x]
    closure = Closure(lambda y: long[-1] * y)
    assert [tensor is x for tensor in closure.tensors] == [True]
    long.append(0.0)
    assert closure.changed()


def test_what_reaches_everything_is_passed_by():
    # pytest rewrites this assert to call its own module, whose configuration leads to its session,
    # and so to every test: 14,000 objects in a small one, millions in a large one.
    x, log = torch.ones(1), logging.getLogger(__name__)

    def loss(y: Tensor) -> Tensor:
        assert y.shape == (2,)
        log.debug("a value of y")
        return x * y

    closure = Closure(loss)
    assert closure.names >= {"shape", "debug"}
    assert [tensor is x for tensor in closure.tensors] == [True]
    assert len(closure._bound) == 2


def test_modules_inside_others_are_theirs():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    closure = Closure(lambda y: net(y))
    assert closure.modules == [net]
    assert len(closure.tensors) == 4
