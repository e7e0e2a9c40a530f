"""What can still be read of a damaged run file, and a new file of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np

from hyperlearn.runs import codec, columns, guarded
from hyperlearn.runs.guarded import FORMAT, SCHEMA, RunFileError
from hyperlearn.runs.run import Run

# Where HDF5's superblock, of version 2 or 3, says how long the file is meant to be.
END_OF_FILE = slice(28, 36)
FILLING, MOST_FILLED = bytes(range(1, 256)) * 4096, 1 << 32


def recovered(path: Path) -> Run | None:
    """Whatever reads as it was written; None where that is nothing.

    A column whose chunk is damaged ends before it, and then so do the others: records are whole or
    not there. A file that was cut short is filled up with nothing, so that what is left of it can
    be looked at; the file itself is not changed.
    """
    try:
        with guarded.opened(path) as file:
            return _read(file, path)
    except guarded.DamagedError:
        pass
    except RunFileError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        try:
            shutil.copyfile(path, copy)
            with copy.open("r+b") as raw:
                end = int.from_bytes(os.pread(raw.fileno(), 36, 0)[END_OF_FILE], "little")
                size = copy.stat().st_size
                # A length that was damaged itself is no reason to fill the disk.
                if not size < end < MOST_FILLED + size:
                    return None
                # Not with zeros: a checksum of zeros is zero, and so what is lost would pass.
                raw.seek(size)
                for start in range(size, end, len(FILLING)):
                    raw.write(FILLING[: end - start])
            with guarded.opened(copy) as file:
                return _read(file, path)
        except (OSError, RunFileError):
            return None


def _read(file: h5py.File, path: Path) -> Run | None:
    """Part by part; what cannot be read is left out."""
    try:
        sound = guarded.attribute(file, "format", str) == FORMAT
        sound = sound and guarded.attribute(file, "schema", int) == SCHEMA
    except (OSError, RunFileError):
        return None
    if not sound:
        return None

    def part(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except (RunFileError, OSError):
            return otherwise

    def values(name: str) -> dict[str, Any]:
        group = part(lambda: guarded.group_of(file, name), None)
        names = (
            []
            if group is None
            else part(lambda: [unquote(n) for n in codec.stored_names(group)], [])
        )
        missing = object()
        found = {name: part(partial(codec.read, group, name), missing) for name in names}
        return {name: value for name, value in found.items() if value is not missing}

    from hyperlearn.runs.writer import checkpoint_steps

    return Run(
        result=values("result"),
        history=_whole_records(file, "history"),
        certificates=_whole_records(file, "certificates"),
        status="damaged",
        message="what could be read of a damaged file",
        config=part(lambda: codec.read(file, "config"), {}),
        environment=part(lambda: codec.read(file, "environment"), {}),
        attachments=values("attachments"),
        units=part(lambda: codec.read(file, "units"), {}),
        checkpoints=tuple(part(lambda: checkpoint_steps(file), [])),
        path=path,
    )


def _whole_records(file: h5py.File, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """The records before the first one of which anything is damaged."""
    try:
        group = guarded.group_of(file, name)
        table = columns.locate(file, name)
        length = columns.intact(file, name)
        datasets = {
            column: guarded.dataset_of(group, guarded.link_name(column)) for column in table.dtypes
        }
    except (RunFileError, OSError):
        return {}
    found: dict[str, list[np.ndarray[Any, Any]]] = {column: [] for column in datasets}
    for start in range(0, length, columns.CHUNK):
        rows = slice(start, min(start + columns.CHUNK, length))
        try:
            parts = {column: guarded.array(dataset, rows) for column, dataset in datasets.items()}
        except (RunFileError, OSError):
            break
        for column, values in parts.items():
            found[column].append(values)
    return {column: np.concatenate(parts) for column, parts in found.items() if parts}


def recover(path: str | Path, out: str | Path) -> Run:
    """Write what can still be read of a damaged run to a new file, and return it.

    Raises
    ------
    RunFileError
        Nothing can be read.
    FileExistsError
        `out` exists.
    """
    from hyperlearn.runs.reader import load_run
    from hyperlearn.runs.state import checkpoints
    from hyperlearn.runs.writer import RunFile

    path, out = Path(path), Path(out)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run file (HDF5)")
    run = recovered(path)
    if run is None:
        raise RunFileError(f"{path}: nothing of a run can be read")
    tables = {"history": run.history, "certificates": run.certificates}
    present = {name: len(next(iter(block.values()), ())) for name, block in tables.items()}
    with RunFile(
        out,
        config=run.config,
        environment=run.environment,
        attachments=run.attachments,
        units=run.units,
    ) as file:
        for name, block in tables.items():
            if block:
                file.extend(block, table=name)
        for step, state, lengths in checkpoints(path):
            if all(lengths[name] <= present[name] for name in lengths):
                file.checkpoint(step, state, keep=len(run.checkpoints) + 1, lengths=lengths)
        message = f"what could be read of {path.name}"
        file.finish("recovered", message, run.result, keep=len(run.checkpoints) + 1)
    return load_run(out)
