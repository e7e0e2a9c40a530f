"""One run, one HDF5 file, written as the run goes.

Schema 1::

    /                   attributes: format = "hyperlearn-run", schema = 1, status, message, created
    /config             attributes, one a setting; groups nest
    /environment        attributes: versions, git revision, threads, seed
    /history/<metric>   growing 1-D arrays of one length, one entry a record
    /certificates/<f>   the fields of `Certificate`, one entry a record
    /attachments/<a>    arrays that the experiment stores at the start
    /result/{x,y}       final variables, with the nesting as groups

Each record is appended by opening, writing and closing the file, so that whatever was recorded is
readable after a crash, and by others while the run goes on. HDF5's file locks are off: under them a
reader at the wrong moment would end the run.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
import torch
from torch import Tensor

from hyperlearn.certificate import Certificate

Tree = Any
FORMAT, SCHEMA = "hyperlearn-run", 1


class RunFileError(ValueError):
    """A file is not a run of ours, or cannot be used as one."""


@dataclass
class Run:
    """What a run has found, and how it went.

    Parameters
    ----------
    x, y
        Final outer and inner variables, nested as given; None if the run never came that far.
    history
        ``metric -> (records,)``; among them ``step``, ``seconds``, ``outer_loss``,
        ``hypergradient_norm``, the oracle counts and the problem's metrics.
    certificates
        ``field -> (records,)``.
    certificate
        The last one, of the last hypergradient; None if there was none.
    status
        ``"finished"``, ``"running"`` (also: killed), ``"interrupted"``, ``"diverged"`` or
        ``"failed"``.
    message
        Why it ended.
    config, environment
        Settings and surroundings.
    attachments
        Arrays that the experiment stored.
    path
        Its file, if there is one.
    """

    x: Tree = None
    y: Tree = None
    history: dict[str, np.ndarray] = field(default_factory=dict)
    certificates: dict[str, np.ndarray] = field(default_factory=dict)
    certificate: Certificate | None = None
    status: str = "running"
    message: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    attachments: dict[str, np.ndarray] = field(default_factory=dict)
    path: Path | None = None

    @property
    def name(self) -> str:
        """Method and seed, for legends."""
        method = self.config.get("method", {})
        label = self.config.get("label") or method.get("class") or "run"
        return f"{label}, seed {self.environment.get('seed', '?')}"


class RunFile:
    """Writes a run to HDF5, record by record.

    Parameters
    ----------
    path
        Of the file; its folder is made.
    config, environment, attachments
        Written at once.
    overwrite
        Replace an existing run file. Any other existing file is never touched.

    Raises
    ------
    FileExistsError
        The file exists and `overwrite` is False.
    RunFileError
        The file exists, is to be overwritten, and is not a run of ours.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        attachments: Mapping[str, np.ndarray],
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            if not overwrite:
                raise FileExistsError(
                    f"{self.path} exists; choose another file, or ask to overwrite it"
                )
            with _open_run(self.path):
                pass  # refuses to replace what is not a run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a setting that cannot be stored leaves no damaged file behind.
        part = self.path.with_name(self.path.name + ".part")
        try:
            self._create(part, config, environment, attachments)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def _create(
        path: Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        attachments: Mapping[str, np.ndarray],
    ) -> None:
        with h5py.File(path, "w", locking=False) as file:
            file.attrs.update(
                format=FORMAT,
                schema=SCHEMA,
                status="running",
                message="",
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            )
            _write_settings(file.create_group("config"), config)
            _write_settings(file.create_group("environment"), environment)
            group = file.create_group("attachments")
            for name, array in attachments.items():
                # HDF5 has no filters for what is a scalar or empty.
                filters = {"compression": "gzip", "shuffle": True} if np.size(array) > 1 else {}
                group.create_dataset(name, data=array, **filters)
            file.create_group("history")
            file.create_group("certificates")

    def append(self, record: Mapping[str, float | int], certificate: Certificate | None) -> None:
        """Add one record to ``/history`` and, if there is one, ``/certificates``."""
        with h5py.File(self.path, "r+", locking=False) as file:
            for name, value in record.items():
                _append(file["history"], name, value)
            if certificate is not None:
                for f in fields(certificate):
                    _append(file["certificates"], f.name, getattr(certificate, f.name))

    def finish(self, status: str, message: str, result: Mapping[str, Tree]) -> None:
        """Write ``/result`` and the status."""
        with h5py.File(self.path, "r+", locking=False) as file:
            file.attrs.update(status=status, message=message)
            group = file.require_group("result")
            for name, tree in result.items():
                _write_tree(group, name, tree)


def load_run(path: str | Path) -> Run:
    """Read a run file, finished or not; a record that a crash cut short is left out.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    RunFileError
        It is not HDF5, not a run, damaged, or of a schema that this version does not know.
    """
    path = Path(path)
    patience = time.monotonic() + 1.0
    while True:
        try:
            return _read_run(path)
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, RuntimeError, KeyError) as error:
            # Either it is damaged, or a run is writing to it at this moment.
            if time.monotonic() > patience:
                raise RunFileError(f"{path} is damaged, not a readable run: {error}") from error
        time.sleep(0.1)


def _read_run(path: Path) -> Run:
    with _open_run(path) as file:
        certificates = _whole_records({n: _read_array(d) for n, d in file["certificates"].items()})
        return Run(
            x=_read_tree(file, "result/x"),
            y=_read_tree(file, "result/y"),
            history=_whole_records({name: d[()] for name, d in file["history"].items()}),
            certificates=certificates,
            certificate=_last_certificate(certificates),
            status=str(file.attrs["status"]),
            message=str(file.attrs["message"]),
            config=_read_settings(file["config"]),
            environment=_read_settings(file["environment"]),
            attachments={name: d[()] for name, d in file["attachments"].items()},
            path=path,
        )


def environment(seed: int) -> dict[str, Any]:
    """Versions and surroundings of this process, to be stored with a run."""
    revision, dirty = _git_state()
    return {
        "seed": seed,
        "hyperlearn": _version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "git_revision": revision,
        "git_dirty": dirty,
    }


def _version() -> str:
    try:
        return version("hyperlearn")
    except PackageNotFoundError:  # on the path, but not installed
        return "unknown"


@functools.cache
def _git_state() -> tuple[str, bool | None]:
    """Revision of the checkout that the package runs from, as of first use; or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        # No lock, no terminal, no repository above an installed package's environment.
        env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, env=env
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # tracked here, not just nested
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", None


def _open_run(path: Path) -> h5py.File:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run file (HDF5)")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise RunFileError(f"{path} is not an HDF5 file; expected a run written by hyperlearn")
    file = h5py.File(path, "r", locking=False)
    if file.attrs.get("format") != FORMAT:
        found = ", ".join(sorted(file)) or "nothing"
        file.close()
        raise RunFileError(f"{path} is HDF5 but not a hyperlearn run (it holds {found})")
    if file.attrs.get("schema") != SCHEMA:
        schema = file.attrs.get("schema")
        file.close()
        raise RunFileError(f"{path} has run schema {schema}; this version reads schema {SCHEMA}")
    return file


def _append(group: h5py.Group, name: str, value: float | int | str | bool | None) -> None:
    if isinstance(value, str):
        dtype: Any = h5py.string_dtype()
    elif isinstance(value, (bool, np.bool_)):
        dtype = np.bool_
    elif isinstance(value, (int, np.integer)):
        dtype = np.int64
    else:
        dtype, value = np.float64, np.nan if value is None else value  # None: not measured
    if name not in group:
        chunks = (64,) if isinstance(value, str) else (512,)
        group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=chunks, dtype=dtype)
    dataset = group[name]
    dataset.resize(dataset.shape[0] + 1, axis=0)
    dataset[-1] = value


def _write_settings(group: h5py.Group, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _write_settings(group.create_group(name), value)
        else:
            try:
                group.attrs[name] = h5py.Empty("f") if value is None else value
            except TypeError as error:
                raise TypeError(
                    f"setting {name}={value!r} cannot be stored; expected a number, text, None, or "
                    f"a list of numbers ({error})"
                ) from error


def _read_settings(group: h5py.Group) -> dict[str, Any]:
    settings: dict[str, Any] = {name: _read_settings(child) for name, child in group.items()}
    for name, value in group.attrs.items():
        if isinstance(value, h5py.Empty):
            settings[name] = None
        else:
            settings[name] = _plain(value)
    return settings


def _write_tree(group: h5py.Group, name: str, tree: Tree) -> None:
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # HDF5 and numpy have no such type; float32 holds it
            group.create_dataset(name, data=tensor.float().numpy()).attrs["dtype"] = "bfloat16"
        else:
            group.create_dataset(name, data=tensor.numpy())
        return
    # Children in the order of creation: that of a dictionary is the order of the flat vector.
    child = group.create_group(name, track_order=True)
    if isinstance(tree, Mapping):
        child.attrs["kind"] = "dict"
        items = [(_link_name(str(key)), value) for key, value in tree.items()]
    else:
        child.attrs["kind"] = type(tree).__name__
        items = [(f"{i:06d}", value) for i, value in enumerate(tree)]
    for key, value in items:
        _write_tree(child, key, value)


def _link_name(key: str) -> str:
    """A key as the name of an HDF5 link, where a slash would nest; undone by `unquote`."""
    return key.replace("%", "%25").replace("/", "%2F")


def _read_tree(file: h5py.Group, name: str) -> Tree:
    if name not in file:
        return None
    node = file[name]
    if isinstance(node, h5py.Dataset):
        tensor = torch.as_tensor(node[()])
        return tensor.bfloat16() if node.attrs.get("dtype") == "bfloat16" else tensor
    if node.attrs["kind"] == "dict":
        return {unquote(name): _read_tree(node, name) for name in node}
    values = [_read_tree(node, key) for key in sorted(node)]
    return values if node.attrs["kind"] == "list" else tuple(values)


def _read_array(dataset: h5py.Dataset) -> np.ndarray:
    if h5py.check_string_dtype(dataset.dtype):
        return np.asarray(dataset.asstr()[()])
    return np.asarray(dataset[()])


def _whole_records(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    length = min(map(len, columns.values()), default=0)
    return {name: column[:length] for name, column in columns.items()}


def _last_certificate(columns: Mapping[str, np.ndarray]) -> Certificate | None:
    # A file may be older than the last fields, which have defaults.
    known = [f for f in fields(Certificate) if f.name in columns and len(columns[f.name])]
    if not {f.name for f in fields(Certificate) if f.default is MISSING} <= {f.name for f in known}:
        return None
    values = {f.name: _plain(columns[f.name][-1]) for f in known}
    optional = [f.name for f in known if "None" in str(f.type)]
    values.update({name: None for name in optional if np.isnan(values[name])})
    return Certificate(**values)


def _plain(value: Any) -> Any:
    """A Python scalar for a numpy one."""
    return value.item() if isinstance(value, np.generic) else value
