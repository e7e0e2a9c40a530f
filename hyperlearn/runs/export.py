"""Runs as CSV, Parquet and NetCDF, for other programs to read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hyperlearn.runs import frames
from hyperlearn.runs.run import Run

WHAT = ("history", "certificates")
# The key of a Parquet file's metadata that holds settings and surroundings, as JSON.
METADATA = b"hyperlearn"


def export(run: Run, out: str | Path, *, what: str | None = None, overwrite: bool = False) -> Path:
    """Write the records of a run to a file of another format, by its suffix.

    * ``.csv``: a column a metric, a row a record, in as many digits as bring the numbers back
      exactly (to pandas before 3.1 with ``float_precision="round_trip"``). No units, no settings.
    * ``.parquet``: the same; units are metadata of the columns (``units``), settings and
      surroundings are JSON in that of the file (``hyperlearn``).
    * ``.nc``, NetCDF 4: `Run.to_xarray`, with units and settings as attributes, and the fields of
      the result over their coordinates.

    Parameters
    ----------
    run
        Whose records.
    out
        The file; its folder is made.
    what
        ``"history"`` or ``"certificates"``. By default the history and, in NetCDF, which can hold
        more than one table, the certificates as well.
    overwrite
        Replace an existing file.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileExistsError
        It exists, and `overwrite` is False.
    ImportError
        A package that the format needs is not installed.
    ValueError
        An unknown suffix or table, a table without records, or an array that NetCDF cannot hold.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> folder = tempfile.TemporaryDirectory()
    >>> run = Run(history={"step": np.arange(2), "outer_loss": np.array([1.0, 0.1])})
    >>> print(export(run, folder.name + "/run.csv").read_text())
    step,outer_loss
    0,1.0
    1,0.1
    """
    out = Path(out)
    if out.suffix not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise ValueError(
            f"{out}: cannot write {out.suffix or 'without a suffix'}; expected {known}"
        )
    if what is not None and what not in WHAT:
        raise ValueError(f"what={what!r}; expected {' or '.join(WHAT)}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another file, or ask to overwrite it")
    if not (run.certificates if what == "certificates" else run.history):
        where = run.name if run.path is None else str(run.path)
        raise ValueError(
            f"{where} has no records of {what or 'history'}; there is nothing to write"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside it first: what cannot be written whole is not written.
    part = out.with_name(f"{out.name}.part")
    try:
        _WRITERS[out.suffix](run, part, what)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _table(run: Run, what: str | None) -> Mapping[str, NDArray[Any]]:
    return run.certificates if what == "certificates" else run.history


def _write_csv(run: Run, path: Path, what: str | None) -> None:
    columns = {name: np.asarray(values) for name, values in _table(run, what).items()}
    frames.pandas().DataFrame(columns).to_csv(path, index=False)


def _write_parquet(run: Run, path: Path, what: str | None) -> None:
    arrow, parquet = frames.needed("pyarrow"), frames.needed("pyarrow.parquet")
    columns = {name: arrow.array(np.asarray(v)) for name, v in _table(run, what).items()}
    units = {} if what == "certificates" else run.units
    columns_described = [
        arrow.field(name, column.type, metadata={"units": units[name]} if units.get(name) else None)
        for name, column in columns.items()
    ]
    metadata = {METADATA: json.dumps(_described(run), default=_jsonable)}
    schema = arrow.schema(columns_described, metadata)
    parquet.write_table(arrow.table(list(columns.values()), schema=schema), path)


def _described(run: Run) -> dict[str, Any]:
    return {
        "status": run.status,
        "message": run.message,
        "config": run.config,
        "environment": run.environment,
        "units": run.units,
    }


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else str(value)


def _write_netcdf(run: Run, path: Path, what: str | None) -> None:
    frames.needed("h5netcdf")
    dataset = run.to_xarray()
    certificates = [f"certificate_{name}" for name in run.certificates]
    if what == "certificates":
        dataset = dataset[certificates].reset_coords(drop=True)
    elif what == "history":
        dataset = dataset.drop_vars(certificates)
    for name, variable in dataset.variables.items():
        if variable.dtype.kind == "c":
            raise ValueError(f"{name} is complex; NetCDF has real numbers only: write its parts")
    surroundings = {f"environment.{k}": v for k, v in frames.flat(run.environment).items()}
    attributes = {**dataset.attrs, "message": run.message, **surroundings}
    dataset.attrs = {name: _attribute(value) for name, value in attributes.items()}
    # Without the mark for missing values, which NaN is already.
    encoding = {name: {"_FillValue": None} for name in dataset.variables}
    dataset.to_netcdf(path, engine="h5netcdf", encoding=encoding)


def _attribute(value: Any) -> Any:
    """A number or text: NetCDF has neither truth values nor None."""
    plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    return value if plain else str(value)


_WRITERS: dict[str, Callable[[Run, Path, str | None], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".nc": _write_netcdf,
}
