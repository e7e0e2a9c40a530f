"""`load_run`: a run file as a `Run`, read as it is asked for."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from hyperlearn.certificate import Certificate
from hyperlearn.runs import codec, columns, guarded
from hyperlearn.runs.guarded import DamagedError, RunFileError
from hyperlearn.runs.lock import is_written
from hyperlearn.runs.run import Run
from hyperlearn.runs.writer import checkpoint_steps

Tree = Any


def load_run(path: str | Path) -> Run:
    """Read a run file, finished or not, also while it is being written.

    Settings, the last certificate and the number of records are read, and checked; arrays when they
    are asked for. A run that goes on is as it was at this moment; load it again to follow it.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedError
        It is damaged; `recovered` holds what can still be read.
    RunFileError
        It is not HDF5, not a run, of a schema that this version does not know, or holds what a run
        never does: links to elsewhere, code, huge empty arrays.

    Examples
    --------
    >>> import tempfile, torch, hyperlearn as hl
    >>> folder = tempfile.TemporaryDirectory()
    >>> problem = hl.BilevelProblem(
    ...     lambda y, x: ((y - x) ** 2).sum(),
    ...     lambda y, x: ((y - 1) ** 2).sum(),
    ...     x0=torch.zeros(2),
    ...     y0=torch.zeros(2),
    ... )
    >>> method = hl.IdentityHessian(curvature=2.0, step_size=0.1)
    >>> _ = hl.minimize(problem, method, budget=hl.Budget(steps=20), record=folder.name + "/run.h5")
    >>> run = hl.load_run(folder.name + "/run.h5")
    >>> run.history["step"], run.setting("method") == method
    (array([ 0, 10, 20]), True)
    """
    path = Path(path)
    try:
        return _loaded(path)
    except DamagedError as error:
        from hyperlearn.runs.recovery import recovered

        error.recovered = recovered(path)
        raise


def _loaded(path: Path) -> Run:
    with guarded.opened(path) as file:
        for name in ("attachments", "result"):
            guarded.group_of(file, name)
        growing = is_written(path)
        # History last: a certificate is written before its record.
        lengths = {
            name: columns.verify(file, name, growing=growing)
            for name in ("certificates", "history")
        }
        certificates = Columns(path, file, "certificates", _certified(file, lengths))
        status = guarded.attribute(file, "status", str)
        message = guarded.attribute(file, "message", str, "")
        if status == "running" and not growing:
            status = "killed"
            message = "no process is writing it; it can be resumed from its last checkpoint"
        return Run(
            result=Values(path, file, "result"),
            history=Columns(path, file, "history", lengths["history"]),
            certificates=certificates,
            certificate=_last_certificate(certificates, file),
            status=status,
            message=message,
            config=codec.read(file, "config"),
            environment=codec.read(file, "environment"),
            attachments=Values(path, file, "attachments"),
            units=codec.read(file, "units"),
            checkpoints=tuple(checkpoint_steps(file)),
            path=path,
        )


def _certified(file: h5py.File, lengths: Mapping[str, int]) -> int:
    """Number of certificates, without one whose record a crash has cut off."""
    count, records = lengths["certificates"], lengths["history"]
    if not count:
        return 0
    steps = guarded.group_of(file, "history"), guarded.group_of(file, "certificates")
    if not records or any("step" not in group for group in steps):
        return count if records else 0
    last, newest = (
        guarded.array(guarded.dataset_of(group, "step"), slice(n - 1, n))[0]
        for group, n in zip(steps, (records, count), strict=True)
    )
    return count - 1 if newest > last else count


class _Lazy(Mapping[str, Any]):
    """Entries of a group, read from the file when they are asked for, and kept."""

    def __init__(self, path: Path, file: h5py.File, group: str, names: list[str]) -> None:
        self._path, self._group, self._names = path, group, names
        self._id = guarded.attribute(file, "id", str)
        self._read: dict[str, Any] = {}

    @abstractmethod
    def _entry(self, group: h5py.Group, name: str) -> Any:
        """Read one."""

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            with guarded.opened(self._path) as file:
                if guarded.attribute(file, "id", str) != self._id:
                    raise RunFileError(f"{self._path} is another run by now; load it again")
                self._read[name] = self._entry(guarded.group_of(file, self._group), name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<{self._group} of {os.fspath(self._path)}: {', '.join(self._names) or 'nothing'}>"


class Columns(_Lazy):
    """Metric -> array, of the records that there were when the run was loaded."""

    def __init__(self, path: Path, file: h5py.File, group: str, length: int) -> None:
        names = [unquote(link) for link in guarded.names_of(guarded.group_of(file, group))]
        super().__init__(path, file, group, names if length else [])
        self.length = length

    def _entry(self, group: h5py.Group, name: str) -> NDArray[Any]:
        dataset = guarded.dataset_of(group, guarded.link_name(name))
        return guarded.array(dataset, slice(0, self.length))


class Values(_Lazy):
    """Name -> value, of whatever kind."""

    def __init__(self, path: Path, file: h5py.File, group: str) -> None:
        names = [unquote(name) for name in codec.stored_names(guarded.group_of(file, group))]
        super().__init__(path, file, group, names)

    def _entry(self, group: h5py.Group, name: str) -> Tree:
        return codec.read(group, name)


def _last_certificate(certificates: Columns, file: h5py.File) -> Certificate | None:
    if not certificates.length:
        return None
    group = guarded.group_of(file, "certificates")
    row = slice(certificates.length - 1, certificates.length)
    # A file may be older than the last fields, which have defaults.
    known = [f for f in fields(Certificate) if f.name in certificates]
    if not {f.name for f in fields(Certificate) if f.default is MISSING} <= {f.name for f in known}:
        return None
    values: dict[str, Any] = {}
    for f in known:
        value = guarded.array(guarded.dataset_of(group, f.name), row)[0].item()
        missing = isinstance(value, float) and np.isnan(value) and "None" in str(f.type)
        values[f.name] = None if missing else value
    return Certificate(**values)
