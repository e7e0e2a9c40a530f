"""Settings as the objects that they were: frozen dataclasses, found by name among those loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import torch

PACKAGES = ("operators", "solvers", "hyperlearn")


def restored(value: Any, classes: Sequence[type] = ()) -> Any:
    """Replace dictionaries with a ``class`` by objects of that class.

    A class is looked up by its name among `classes`, the dataclasses of this library, and the
    subclasses of methods and solvers that are loaded. A file cannot have anything imported.

    Raises
    ------
    ValueError
        A class is not known, or refuses its fields.
    """
    return _restored(value, {cls.__qualname__: cls for cls in [*_known(), *classes]})


def _restored(value: Any, known: dict[str, type]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_restored(part, known) for part in value)
    if not isinstance(value, dict):
        return value
    parts = {key: _restored(part, known) for key, part in value.items() if key != "class"}
    if "class" not in value:
        return parts
    name = value["class"]
    if name not in known:
        raise ValueError(
            f"settings of the class {name!r}, which is not known here: import it, or hand it over "
            "in classes="
        )
    cls = known[name]
    own = {f.name: f for f in fields(cls) if f.init}
    unknown = parts.keys() - own.keys()
    if unknown:
        raise ValueError(f"{name} has no setting {sorted(unknown)[0]!r} in this version")
    hints = get_type_hints(cls)
    return cls(**{key: _typed(part, hints.get(key)) for key, part in parts.items()})


def _typed(value: Any, hint: Any) -> Any:
    """Dtypes and devices are stored as text."""
    if isinstance(value, str) and "torch.dtype" in str(hint):
        return getattr(torch, value.removeprefix("torch."), value)
    if isinstance(value, str) and "torch.device" in str(hint):
        return torch.device(value)
    return value


def _known() -> list[type]:
    found: list[type] = []
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] in PACKAGES:
            found += [
                value
                for value in vars(module).values()
                if isinstance(value, type) and is_dataclass(value) and value.__module__ == name
            ]
    for cls in list(found):
        found += _subclasses(cls)
    return list(dict.fromkeys(found))


def _subclasses(cls: type) -> list[type]:
    below: list[type] = []
    sub: type
    for sub in cls.__subclasses__():
        below += [sub, *_subclasses(sub)]
    return [sub for sub in below if is_dataclass(sub)]
