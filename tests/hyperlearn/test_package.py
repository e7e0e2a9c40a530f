"""One import is enough: the lower packages under hyperlearn's name are the very same modules."""

import importlib
import pkgutil
from importlib.resources import files

import pytest

import hyperlearn as hl
import operators
import solvers


@pytest.mark.parametrize("package", [operators, solvers])
def test_aliases_are_the_packages_and_all_of_their_modules(package):
    name = package.__name__
    assert getattr(hl, name) is package
    assert importlib.import_module(f"hyperlearn.{name}") is package
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    assert modules
    for module in modules:
        # A second copy of a module would have second classes, and isinstance would fail.
        alias = importlib.import_module(f"hyperlearn.{name}.{module}")
        assert alias is importlib.import_module(f"{name}.{module}")


@pytest.mark.parametrize("package", [operators, solvers, hl])
def test_public_names_exist_and_the_package_is_typed(package):
    for name in package.__all__:
        assert hasattr(package, name)
    assert files(package).joinpath("py.typed").is_file()
