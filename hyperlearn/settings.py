"""Settings given as text: ``key=value`` onto frozen dataclasses, and what keys there are."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Setting", "SettingsError", "known_settings", "override", "unknown_name"]


class SettingsError(ValueError):
    """An assignment ``key=value`` that cannot be carried out."""


@dataclass(frozen=True)
class Setting:
    """One field that text can set.

    Parameters
    ----------
    key
        Its name; ``"solver.maxiter"`` for a field of a field.
    owner
        Class that it belongs to.
    value
        Present value.
    type
        Its annotation.
    meaning
        From the class's docstring.
    """

    key: str
    owner: str
    value: Any
    type: Any
    meaning: str

    @property
    def expected(self) -> str:
        """The type in words."""
        return _in_words(self.type)

    def parse(self, text: str) -> Any:
        """The value that a text stands for.

        Raises
        ------
        SettingsError
            It stands for none of this type.

        Examples
        --------
        >>> setting = Setting("step_size", "NHGD", 1.0, float | None, "Outer step.")
        >>> setting.parse("1e4"), setting.parse("none")
        (10000.0, None)
        """
        try:
            return _parse(self.type, text.strip())
        except ValueError:
            raise SettingsError(f"{self.key}={text}: expected {self.expected}") from None


def override(objects: Sequence[Any], assignments: Iterable[str]) -> tuple[Any, ...]:
    """Frozen dataclasses with some fields replaced, each by the object that knows its key.

    Parameters
    ----------
    objects
        Instances of frozen dataclasses. A field that is itself one is reached with a dot.
    assignments
        ``"key=value"``; the text is parsed as the field's annotated type: int, float (``1e4``),
        bool (``true``, ``false``), str, a Literal, or None (``none``) where that is a choice.

    Returns
    -------
    tuple
        As many objects as were given; one that is not addressed is returned as it is.

    Raises
    ------
    SettingsError
        An assignment without ``=``, an unknown key, a key given twice or known to two objects, a
        value of the wrong type, or one that the class itself refuses.

    Examples
    --------
    >>> from hyperlearn import ImplicitDifferentiation
    >>> (method,) = override([ImplicitDifferentiation()], ["step_size=1e4", "solver.maxiter=20"])
    >>> method.step_size, method.solver.maxiter
    (10000.0, 20)
    >>> override([method], ["dampin=1"])
    Traceback (most recent call last):
        ...
    hyperlearn.settings.SettingsError: unknown setting 'dampin' of ImplicitDifferentiation: did \
you mean 'damping'? --list-settings shows all of them
    """
    known = [{setting.key: setting for setting in known_settings(item)} for item in objects]
    changes: list[dict[str, Any]] = [{} for _ in objects]
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not (equals and key):
            raise SettingsError(f"{assignment!r}: expected key=value, e.g. step_size=0.1")
        owners = [i for i, settings in enumerate(known) if key in settings]
        if not owners:
            raise SettingsError(_unknown_key(key, objects, known))
        if len(owners) > 1:
            both = " and ".join(type(objects[i]).__name__ for i in owners)
            raise SettingsError(f"setting {key!r} is ambiguous: {both} both have it")
        (owner,) = owners
        if key in changes[owner]:
            raise SettingsError(f"setting {key!r} is given twice")
        changes[owner][key] = known[owner][key].parse(text)
    return tuple(map(_replaced, objects, changes))


def known_settings(item: Any) -> list[Setting]:
    """Every field of a dataclass instance that `override` can set, nested ones with a dot.

    Examples
    --------
    >>> from hyperlearn import Budget
    >>> [(setting.key, setting.expected) for setting in known_settings(Budget(steps=3))][:2]
    [('steps', 'a whole number or none'), ('seconds', 'a number or none')]
    """
    cls = type(item)
    annotations, meanings = get_type_hints(cls), _meanings(cls)
    settings: list[Setting] = []
    for f in fields(item):
        value = getattr(item, f.name)
        if is_dataclass(value):
            nested = known_settings(value)
            settings += [replace(setting, key=f"{f.name}.{setting.key}") for setting in nested]
        elif _in_words(annotations[f.name]):
            meaning = meanings.get(f.name, "")
            settings.append(Setting(f.name, cls.__name__, value, annotations[f.name], meaning))
    return settings


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """An error's text: the nearest known names, and all of them.

    Examples
    --------
    >>> unknown_name("method", "nhdg", ["nhgd", "cg10"])
    "unknown method 'nhdg': did you mean 'nhgd'? Known: nhgd, cg10"
    """
    known = list(known)
    return f"unknown {kind} {name!r}: {_nearest(name, known)}Known: {', '.join(known)}"


def _unknown_key(key: str, objects: Sequence[Any], known: Sequence[Mapping[str, Setting]]) -> str:
    names = [name for settings in known for name in settings]
    owners = " and ".join(type(item).__name__ for item in objects)
    inside = [name for name in names if name.startswith(f"{key}.")]
    if inside:
        return f"{key!r} is a group of settings of {owners}: set {', '.join(inside)}"
    nearest = _nearest(key, names)
    return f"unknown setting {key!r} of {owners}: {nearest}--list-settings shows all of them"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def _replaced(item: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """`item` with its changes, all at once: one of them may be valid only with another."""
    if not changes:
        return item
    flat = {key: value for key, value in changes.items() if "." not in key}
    for name in {key.partition(".")[0] for key in changes if "." in key}:
        inner = {
            key.partition(".")[2]: value
            for key, value in changes.items()
            if key.startswith(f"{name}.")
        }
        flat[name] = _replaced(getattr(item, name), inner, f"{prefix}{name}.")
    try:
        return replace(item, **flat)
    except SettingsError:
        raise
    except ValueError as error:
        given = ", ".join(f"{prefix}{key}={value}" for key, value in changes.items())
        raise SettingsError(f"cannot set {given}: {error}") from error


def _parse(annotation: Any, text: str) -> Any:
    options = _alternatives(annotation)
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        try:
            return _parse_one(option, text)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_one(option: Any, text: str) -> Any:
    if get_origin(option) is Literal:
        return _choose({str(choice): choice for choice in get_args(option)}, text)
    if option is bool:
        return _choose({"true": True, "false": False}, text.lower())
    if option is int:
        return _whole_number(text)
    if option is float and math.isfinite(float(text)):
        return float(text)
    if option is str:
        return text
    raise ValueError(text)


def _choose(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e4
        if not number.is_integer():
            raise
        return int(number)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "none",
}


def _in_words(annotation: Any) -> str:
    """Empty if text cannot express the type."""
    words: list[str] = []
    for option in _alternatives(annotation):
        if get_origin(option) is Literal:
            words += map(str, get_args(option))
        elif option not in _WORDS:
            return ""
        else:
            words.append(_WORDS[option])
    return " or ".join(words)


def _meanings(cls: type) -> dict[str, str]:
    """Parameter descriptions from NumPy docstrings; a subclass's own come first."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        for names, text in _documented_parameters(base):
            for name in names:
                if not text.startswith("As for"):  # says only where to look: in a base class
                    found.setdefault(name, text)
    return found


def _documented_parameters(cls: type) -> Iterator[tuple[list[str], str]]:
    docstring = inspect.cleandoc(cls.__doc__ or "")
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n---|\Z)", docstring, re.M | re.S)
    # An entry is a line at the margin, its names, and the indented lines below it.
    entries = re.split(r"^(?=\S)", section[1], flags=re.M)[1:] if section else []
    for entry in entries:
        head, _, text = entry.partition("\n")
        names = head.partition(" :")[0].split(",")
        yield [name.strip() for name in names], " ".join(text.split())
