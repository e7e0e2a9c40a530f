"""Objects by name: ``module:object``, or ``file.py:object``."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hyperlearn.settings import unknown_name


def imported(name: str) -> Any:
    """The object that ``module:object`` or ``file.py:object`` names.

    Modules are also looked for in the working directory; what stands beside a file can be
    imported by it.

    Raises
    ------
    ValueError
        It is no such name, the module cannot be found, or has no such object.
    FileNotFoundError
        There is no such file.
    """
    where, colon, path = name.rpartition(":")
    if not (where and colon and path):
        raise ValueError(
            f"{name} is no name of an object; expected MODULE:OBJECT or FILE.py:OBJECT"
        )
    if where.endswith(".py"):
        file = Path(where)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        # What stands next to the file can be imported by it, as if it were run.
        _search_first(str(file.resolve().parent))
        module = _loaded(file)
    else:
        _search_first("")  # a command, unlike python -m, does not look here
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"cannot import {where}: {error}") from error
    try:
        return operator.attrgetter(path)(module)
    except AttributeError as error:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(unknown_name("object", path, public)) from error


def _search_first(folder: str) -> None:
    if folder not in sys.path[:1]:
        sys.path.insert(0, folder)


def _loaded(file: Path) -> ModuleType:
    """A file as a module; once, so that a problem and its x come from the same one.

    Again when it has changed: a worker of a cluster outlives many sweeps.
    """
    name = f"_named_{file.resolve()}@{file.stat().st_mtime_ns}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses of the file look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
