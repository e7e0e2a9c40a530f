"""Runs as data frames: pandas and xarray, which are installed by ``hyperlearn[frames]``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperlearn.runs.codec import Field
from hyperlearn.runs.columns import SCALES

if TYPE_CHECKING:
    from hyperlearn.runs.run import Run


def pandas() -> Any:
    """The module, or an error that says how to install it."""
    return needed("pandas")


def xarray() -> Any:
    """The module, or an error that says how to install it."""
    return needed("xarray")


def needed(name: str) -> Any:
    """An optional package.

    Raises
    ------
    ImportError
        It is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"{name} is not installed; it comes with hyperlearn's extra frames: "
            'pip install "hyperlearn[frames]"'
        ) from error


def to_pandas(run: Run) -> Any:
    """See `Run.to_pandas`."""
    frame = pandas().DataFrame({name: np.asarray(v) for name, v in run.history.items()})
    frame.index.name = "record"
    frame.attrs.update(flat(run.config), units=dict(run.units))
    return frame


def to_xarray(run: Run) -> Any:
    """See `Run.to_xarray`."""
    xr = xarray()

    def column(name: str, values: Any, dim: str) -> Any:
        unit = run.units.get(name, "")
        return (dim, np.asarray(values), {"units": unit} if unit else {})

    history = {name: column(name, values, "record") for name, values in run.history.items()}
    axes = {name: history.pop(name) for name in SCALES if name in history}
    certificates = {
        f"certificate_{name}": column(name, values, "certificate")
        for name, values in run.certificates.items()
    }
    dataset = xr.Dataset({**history, **certificates}, axes, attrs=flat(run.config))
    dataset.attrs.update(status=run.status, seed=run.environment.get("seed", -1))
    for name, value in run.result.items():
        if isinstance(value, Field):
            array = value.to_xarray()
            # Two fields may have coordinates of one name and other points.
            array = array.rename({str(d): f"{name}_{d}" for d in (*array.dims, *array.coords)})
            dataset = dataset.merge({name: array})
    return dataset


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with dotted names, as text where data frames know no better."""
    return dict(_flat(settings, ""))


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{key}.")
        elif isinstance(part, bool) or part is None or not isinstance(part, (int, float, str)):
            yield f"{prefix}{key}", str(part)
        else:
            yield f"{prefix}{key}", part
