"""`RunFile`: writes a run so that whatever was recorded survives whatever happens.

Two ways of writing, and neither can leave a broken file:

* a record goes into room that was made for it, in place, past HDF5 (`hyperlearn.runs.columns`);
* anything else, a checkpoint, a new metric, more room, the result, is written to a new file beside
  the old one, which takes its name when it is whole and on the disk (``fsync``, ``rename``).

After SIGKILL or a full disk the file is the old one or the new one. After a loss of power, records
since the last change of the second kind may be missing; a checkpoint that was reported is there.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch.utils import _pytree as pytree

from hyperlearn.certificate import Certificate
from hyperlearn.runs import codec, columns, guarded
from hyperlearn.runs.columns import Table
from hyperlearn.runs.guarded import FORMAT, SCHEMA, RunFileError
from hyperlearn.runs.lock import Lock
from hyperlearn.runs.run import Run
from hyperlearn.runs.sink import Sink

Tree = Any
TABLES = ("history", "certificates")
logger = logging.getLogger(__name__)

UNITS = {"seconds": "s"}
# Headers and indices in blocks of so many bytes, the first at the start of the file: what is left
# of one that was cut short can then be read.
META_BLOCK = 1 << 16
# A smaller file is put together in memory, and written at once; a larger one as it comes.
IN_MEMORY = 1 << 26


class RecordError(OSError):
    """A record could not be written; what was recorded before is in the file.

    Attributes
    ----------
    run
        Everything until then, from `hyperlearn.minimize`.
    """

    def __init__(self, message: str, run: Run | None = None) -> None:
        super().__init__(message)
        self.run = run


class RunFile:
    """A run that is being written; holds its lock.

    Parameters
    ----------
    path
        Of the file; its folder is made.
    config, environment
        Settings (see `hyperlearn.runs.codec`) and surroundings.
    attachments
        Arrays, fields and other values that are stored at the start.
    units
        Of metrics that have some.
    state
        A checkpoint of step 0 (see `checkpoint`), there as soon as the file is.
    overwrite
        Replace an existing run. Any other existing file is never touched.

    Raises
    ------
    FileExistsError
        The file exists and `overwrite` is False.
    RunFileError
        The file exists, is to be overwritten, and is not a run of ours.
    RunInUseError
        Another process writes it.
    OSError
        It cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        attachments: Mapping[str, Any] | None = None,
        units: Mapping[str, str] | None = None,
        state: Mapping[str, Tree] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(self.path, overwrite)
        self._lock = Lock(self.path)
        self._descriptor: int | None = None
        try:
            _check_replaceable(self.path, overwrite)
            self._units = {**UNITS, **(units or {})}

            def fill(new: h5py.File) -> None:
                new.attrs["schema"] = SCHEMA
                created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                _label(
                    new,
                    format=FORMAT,
                    id=uuid.uuid4().hex,
                    status="running",
                    message="",
                    created=created,
                )
                codec.write(new, "units", dict(self._units))
                codec.write(new, "config", dict(config))
                codec.write(new, "environment", dict(environment))
                codec.write(new, "attachments", dict(attachments or {}))
                group = new.create_group("checkpoints")
                if state is not None:
                    codec.write(group, "0", dict(state))
                    group["0"].attrs.update(dict.fromkeys(TABLES, 0))
                _label(new.create_group("result"), kind="dict")
                for table in TABLES:
                    columns.write_table(
                        new, table, {}, 0, source=None, capacity=0, units=self._units
                    )

            self._replace(fill, _bytes([dict(attachments or {}), dict(state or {})]))
        except BaseException:
            self.close()
            raise

    @classmethod
    def reopened(cls, path: str | Path, step: int, config: Mapping[str, Any]) -> RunFile:
        """Go on writing a run from one of its checkpoints: what was recorded later is dropped.

        `config` is that of the run, but that its budget may be another.

        Raises
        ------
        RunFileError
            It is no run, is damaged, or has no such checkpoint.
        RunInUseError
            Another process writes it.
        """
        self = cls.__new__(cls)
        self.path, self._descriptor = Path(path), None
        self._lock = Lock(self.path)
        try:
            with guarded.opened(self.path) as file:
                self._units = codec.read(file, "units")
                node = guarded.group_of(guarded.group_of(file, "checkpoints"), str(step))
                lengths = {name: guarded.attribute(node, name, int) for name in TABLES}
            self._rewrite(lengths=lengths, status=("running", ""), drop_result=True, config=config)
        except BaseException:
            self.close()
            raise
        return self

    # --- what a run writes --------------------------------------------------------------------

    def append(
        self, record: Mapping[str, float | int], certificate: Certificate | None = None
    ) -> None:
        """Add one record to ``/history`` and, if there is one, ``/certificates``.

        When this returns the record is in the file, whatever happens to the process.

        Raises
        ------
        RecordError
            It could not be written.
        """
        rows: dict[str, Mapping[str, Any]] = {}
        if certificate is not None:
            values = {f.name: getattr(certificate, f.name) for f in fields(certificate)}
            rows["certificates"] = {"step": record.get("step"), **values}
        rows["history"] = record  # last: its number of records is what counts
        try:
            for table, row in rows.items():
                if not self._append(table, row):
                    layout = self._tables[table]
                    wanted = layout.fitting(row)
                    room = columns.room_for(layout.length)
                    self._rewrite(dtypes={table: wanted}, capacities={table: room})
                    if not self._append(table, row):
                        raise RuntimeError(f"{table}: {dict(row)} does not fit {wanted}")
        except OSError as error:
            raise RecordError(
                f"{self.path}: a record could not be written ({error}); all "
                f"{self._tables['history'].length} before it are in the file: free some space, "
                "then resume the run"
            ) from error

    def extend(self, block: Mapping[str, np.ndarray[Any, Any]], *, table: str = "history") -> None:
        """Add many records to a table at once, each an entry of every array.

        All of them count, or none, whatever happens to the process.

        Raises
        ------
        ValueError
            The arrays are not of one length.
        RecordError
            They could not be written.
        """
        lengths = {name: len(column) for name, column in block.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of lengths {lengths}; expected one length")
        count = next(iter(lengths.values()))
        layout = self._tables[table]
        if not count:
            return
        # The longest text of a column says how wide it must be.
        longest = {name: max(column.tolist(), key=_width) for name, column in block.items()}
        wanted = layout.fitting(longest)
        try:
            if wanted != layout.dtypes or layout.length + count > layout.capacity:
                room = columns.room_for(layout.length + count)
                self._rewrite(dtypes={table: wanted}, capacities={table: room})
            absent = {
                name: columns.filled(dtype, count)
                for name, dtype in wanted.items()
                if name not in block
            }
            encoded = {
                name: np.char.encode(column, "utf-8") if column.dtype.kind == "U" else column
                for name, column in block.items()
            }
            assert self._descriptor is not None
            self._tables[table].extend(self._descriptor, encoded | absent)
        except OSError as error:
            raise RecordError(f"{self.path}: records could not be written ({error})") from error

    def checkpoint(
        self,
        step: int,
        state: Mapping[str, Tree],
        *,
        keep: int = 1,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        """Write a checkpoint, and forget all but the newest `keep`.

        Parameters
        ----------
        step
            Outer steps so far.
        state
            All that is needed to go on: see `hyperlearn.runs.codec` for what it may hold.
        keep
            How many to keep, this one included.
        lengths
            Records of each table that a resumed run starts from; all by default.

        Raises
        ------
        OSError
            It could not be written; the file is as it was.
        """
        counted = {name: t.length for name, t in self._tables.items()} | dict(lengths or {})

        def fill(new: h5py.File) -> None:
            group = new["checkpoints"]
            codec.write(group, str(step), dict(state))
            group[str(step)].attrs.update(counted)

        self._rewrite(keep=keep - 1, without=step, then=fill, added=_bytes(dict(state)))
        logger.debug("%s: checkpoint at step %d", self.path, step)

    def finish(
        self,
        status: str,
        message: str,
        result: Mapping[str, Tree],
        state: tuple[int, Mapping[str, Tree], Mapping[str, int]] | None = None,
        keep: int = 1,
    ) -> None:
        """Write ``/result``, the status and a last checkpoint, seal the tables, and let go."""

        def fill(new: h5py.File) -> None:
            for name, tree in result.items():
                codec.write(new["result"], name, tree)
            if state is not None:
                step, tree, lengths = state
                codec.write(new["checkpoints"], str(step), dict(tree))
                new["checkpoints"][str(step)].attrs.update(lengths)

        try:
            self._rewrite(
                status=(status, message),
                keep=keep if state is None else keep - 1,
                without=None if state is None else state[0],
                seal=True,
                drop_result=True,
                then=fill,
                added=_bytes([dict(result), None if state is None else dict(state[1])]),
            )
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file; what is in it stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._lock.release()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- how ----------------------------------------------------------------------------------

    def _append(self, table: str, row: Mapping[str, Any]) -> bool:
        if self._descriptor is None:
            raise RuntimeError(f"{self.path} is closed")
        return self._tables[table].append(self._descriptor, row)

    def _rewrite(
        self,
        *,
        dtypes: Mapping[str, Mapping[str, np.dtype[Any]]] | None = None,
        capacities: Mapping[str, int] | None = None,
        lengths: Mapping[str, int] | None = None,
        status: tuple[str, str] | None = None,
        keep: int | None = None,
        without: int | None = None,
        seal: bool = False,
        drop_result: bool = False,
        config: Mapping[str, Any] | None = None,
        then: Callable[[h5py.File], None] | None = None,
        added: int = 0,
    ) -> None:
        """The same file with something changed; `added` bytes of tensors come to it."""
        with guarded.opened(self.path) as old:

            def fill(new: h5py.File) -> None:
                new.attrs["schema"] = SCHEMA
                texts = ("format", "id", "status", "message", "created")
                _label(new, **{name: guarded.attribute(old, name, str) for name in texts})
                if status is not None:
                    _label(new, status=status[0], message=status[1])
                if config is not None:
                    codec.write(new, "config", dict(config))
                kept = ["units", "environment", "attachments"]
                for name in kept if config is not None else [*kept, "config"]:
                    old.copy(guarded.group_of(old, name), new, name, expand_refs=True)
                if drop_result:
                    _label(new.create_group("result"), kind="dict")
                else:
                    old.copy(guarded.group_of(old, "result"), new, "result", expand_refs=True)
                self._copy_checkpoints(old, new, lengths, keep, without)
                for name in TABLES:
                    table = columns.locate(old, name)
                    length = table.length if lengths is None else lengths[name]
                    room = (capacities or {}).get(name, columns.room_for(length))
                    columns.write_table(
                        new,
                        name,
                        (dtypes or {}).get(name, table.dtypes),
                        length,
                        source=old,
                        capacity=None if seal else room,
                        units=self._units,
                    )
                if then is not None:
                    then(new)

            self._replace(fill, self.path.stat().st_size + added)

    @staticmethod
    def _copy_checkpoints(
        old: h5py.File,
        new: h5py.File,
        lengths: Mapping[str, int] | None,
        keep: int | None,
        without: int | None,
    ) -> None:
        source, target = guarded.group_of(old, "checkpoints"), new.create_group("checkpoints")
        steps = [step for step in checkpoint_steps(old) if step != without]
        for step in steps[max(0, len(steps) - keep) :] if keep is not None else steps:
            node = guarded.group_of(source, str(step))
            if lengths is None or guarded.attribute(node, "history", int) <= lengths["history"]:
                source.copy(node, target, str(step))

    def _replace(self, fill: Callable[[h5py.File], None], size: int) -> None:
        """Write a file beside, have it on the disk, and let it take the name."""
        part = self.path.with_name(self.path.name + ".part")
        try:
            with _created(part, size) as new:
                fill(new)
            with guarded.opened(part) as new:
                tables = {name: columns.locate(new, name) for name in TABLES}
            descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            os.replace(part, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._tables = descriptor, tables
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    _tables: dict[str, Table]


@contextlib.contextmanager
def _created(path: Path, size: int) -> Iterator[h5py.File]:
    """A new file, of about that size, on the disk when the block is left without an error."""
    settings: dict[str, Any] = {
        # A format of 2016, whose headers and indices have checksums; numbers at multiples of 8.
        "libver": ("v110", "v110"),
        "alignment_threshold": 1,
        "alignment_interval": 8,
        "meta_block_size": META_BLOCK,
    }
    with guarded.LOCK:
        yield from _made(path, size, settings)


def _made(path: Path, size: int, settings: dict[str, Any]) -> Iterator[h5py.File]:
    sink = Sink(path)
    try:
        if size <= IN_MEMORY:
            with h5py.File.in_memory(**settings) as file:
                yield file
                file.flush()
                sink.write(file.id.get_file_image())
        else:
            with h5py.File(sink, "w", **settings) as file:
                yield file
    except BaseException:
        with contextlib.suppress(OSError):
            sink.close()
        raise
    sink.close()


def _bytes(tree: Tree) -> int:
    """Of the tensors and arrays in a nested structure."""
    leaves = pytree.tree_leaves(tree)
    arrays = [leaf.values if isinstance(leaf, codec.Field) else leaf for leaf in leaves]
    return sum(int(getattr(array, "nbytes", 0)) for array in arrays)


def _width(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else 0


def _label(holder: h5py.Group, **texts: str) -> None:
    for name, text in texts.items():
        guarded.set_text(holder, name, text)


def checkpoint_steps(file: h5py.File) -> list[int]:
    """Steps that a run has checkpoints of, in order."""
    names = guarded.names_of(guarded.group_of(file, "checkpoints"))
    wrong = [name for name in names if not name.isdecimal()]
    if wrong:
        raise RunFileError(f"{file.filename}: /checkpoints holds {wrong[0]!r}; expected steps")
    return sorted(map(int, names))


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; choose another file, or ask to overwrite it")
        with guarded.opened(path):
            pass  # refuses to replace what is not a run
