"""Columns of records that grow: sealed chunks, compressed and checked, and an open tail.

A table is a group with one dataset a metric. HDF5 cannot be appended to safely: its indices are
rewritten in place, and a process that dies meanwhile leaves a broken file. So no index is ever
touched here. The datasets are made longer than they are filled, their last chunks stored raw at
known places; a record is written there, past HDF5, by ``pwrite``. Then come its checksum and last,
in eight bytes, the number of records that count. A process that dies anywhere leaves a file that
opens, whose records up to that number are whole. Disk space is taken before, so a full disk stops
a longer table from being made, and never a record from being written.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from hyperlearn.runs import guarded
from hyperlearn.runs.guarded import DamagedError

# Records a chunk. Columns of numbers take 4 KiB each.
CHUNK = 512
MOST_OPEN = 256 * CHUNK
# Text columns are twice as wide as their first entry, in multiples of so much: room costs little,
# as it is compressed in the end, and a longer entry a new file.
TEXT_UNIT = 64
ALL_FILTERS = 0xFFFFFFFF  # a chunk's mask: none of them was applied
FILLS = {"f": np.nan, "i": -1, "b": False}
# The axes of a plot, as HDF5 dimension scales.
SCALES = ("step", "seconds", "oracle_calls")
_UINT32, _INT64 = struct.Struct("<I"), struct.Struct("<q")
_KINDS: dict[str, tuple[type, ...]] = {"q": (int, np.integer), "?": (bool, np.bool_)}


@dataclass
class Table:
    """Layout of a table, where its tail lies in the file, and how much of it is filled.

    Parameters
    ----------
    dtypes
        Of each column, in their order; text is fixed-length UTF-8.
    length
        Records that count.
    capacity
        Records that there is room for.
    """

    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    length: int = 0
    capacity: int = 0
    first_open: int = 0  # record that the tail starts with
    places: list[list[int]] = field(default_factory=list)  # of each chunk, columns and checksums
    counter: int = 0  # where the number of records stands in the file

    def __post_init__(self) -> None:
        self._codes = {name: _code(dtype) for name, dtype in self.dtypes.items()}
        self._row = struct.Struct("<" + "".join(self._codes.values()))
        sizes = [struct.calcsize("<" + code) for code in self._codes.values()]
        starts = np.cumsum([0, *sizes]).tolist()
        self._slices = list(zip(starts[:-1], sizes, strict=True))
        # What a record may lack: a whole number or truth value has nothing to stand for that.
        self._absent: dict[str, Any] = {
            name: {"f": np.nan, "S": ""}.get(dtype.kind) for name, dtype in self.dtypes.items()
        }

    def fitting(self, record: Mapping[str, Any]) -> dict[str, np.dtype[Any]]:
        """The columns that there must be for a record too: new ones, or wider ones."""
        found = dict(self.dtypes)
        for name, value in record.items():
            needed = _dtype_for(value, name)
            present = found.get(name)
            if present is None:
                # Earlier records lack it: a number that was not measured is NaN.
                missing = self.length > 0 and needed.kind in "ib"
                found[name] = np.dtype(np.float64) if missing else needed
            else:
                found[name] = _wider(present, needed, name)
        for name in found.keys() - record.keys():
            if found[name].kind in "ib":
                found[name] = np.dtype(np.float64)
        return found

    def append(self, descriptor: int, record: Mapping[str, Any]) -> bool:
        """Write a record to the tail; False if it does not fit and the table must be made anew."""
        if self.length >= self.capacity:
            return False
        try:
            row = self._packed(record)
        except (struct.error, KeyError, TypeError, AttributeError):
            return False
        chunk, within = divmod(self.length - self.first_open, CHUNK)
        *places, checksum = self.places[chunk]
        pwrite = os.pwrite
        written = 0
        for place, (start, size) in zip(places, self._slices, strict=True):
            written += pwrite(descriptor, row[start : start + size], place + within * size)
        written += pwrite(descriptor, _UINT32.pack(zlib.crc32(row)), checksum + within * 4)
        if written != len(row) + 4:
            raise OSError(f"{written} of {len(row) + 4} bytes were written")
        _put(descriptor, _INT64.pack(self.length + 1), self.counter)
        self.length += 1
        return True

    def extend(self, descriptor: int, block: Mapping[str, NDArray[Any]]) -> None:
        """Write many records, of this table's columns, for which there is room."""
        arrays = [np.asarray(block[name]).astype(dtype) for name, dtype in self.dtypes.items()]
        count = len(arrays[0])
        rows = np.concatenate(
            [array.reshape(count, 1).view(np.uint8).reshape(count, -1) for array in arrays], axis=1
        )
        checksums = np.array([zlib.crc32(row) for row in rows], dtype=np.uint32)
        done = 0
        while done < count:
            chunk, within = divmod(self.length + done - self.first_open, CHUNK)
            part = slice(done, min(count, done + CHUNK - within))
            for place, array in zip(self.places[chunk], [*arrays, checksums], strict=True):
                data = array[part].tobytes()
                _put(descriptor, data, place + within * array.dtype.itemsize)
            done = part.stop
        _put(descriptor, _INT64.pack(self.length + count), self.counter)
        self.length += count

    def _packed(self, record: Mapping[str, Any]) -> bytes:
        """The bytes of a record, column by column; raises where it does not fit the columns."""
        if not record.keys() <= self._codes.keys():
            raise KeyError("a column is missing")
        values = []
        for name, code in self._codes.items():
            value = record.get(name, self._absent[name])
            kind = type(value)
            if code == "d":
                if kind is not float:
                    value = _number(value)
            elif code == "q" or code == "?":
                if not isinstance(value, _KINDS[code]) or (code == "q" and kind is bool):
                    raise TypeError(name)
            else:
                value = value.encode()
                if len(value) > self.dtypes[name].itemsize:
                    raise TypeError(name)  # struct would cut it off
            values.append(value)
        return self._row.pack(*values)


# --- in the file ------------------------------------------------------------------------------


def write_table(
    file: h5py.File,
    name: str,
    dtypes: Mapping[str, np.dtype[Any]],
    length: int,
    *,
    source: h5py.File | None,
    capacity: int | None,
    units: Mapping[str, str],
) -> None:
    """A table of the given columns, with the first `length` records of that in another file.

    Parameters
    ----------
    file, name
        Where to.
    dtypes
        Columns; what the source lacks is filled with NaN, -1, False or empty text.
    length
        Records.
    source
        Where they come from; None for none.
    capacity
        Room, at least `length`. None for no more than that, all of it compressed and checked.
    units
        Of columns.
    """
    group = file.create_group(name, track_order=True)
    old = None if source is None else guarded.group_of(source, name)
    sealed = length if capacity is None else length // CHUNK * CHUNK
    room = length if capacity is None or not dtypes else -(-capacity // CHUNK) * CHUNK
    first = 0 if source is None else locate(source, name).first_open
    columns: list[NDArray[Any]] = []
    for column, dtype in dtypes.items():
        link = guarded.link_name(column)
        before = guarded.dataset_of(old, link) if old is not None and link in old else None
        kept = 0 if before is None or before.dtype != dtype else min(sealed, first)
        made = _column(group, link, dtype, sealed, room, before, kept // CHUNK * CHUNK)
        columns.append(_tail(before, dtype, sealed, length, room))
        _write_tail(made, columns[-1], sealed)
    checksums = np.zeros(max(0, room - sealed), np.uint32)
    for i in range(length - sealed):
        checksums[i] = zlib.crc32(b"".join(column[i : i + 1].tobytes() for column in columns))
    integrity = file.require_group("integrity")
    made = integrity.create_dataset(
        name, shape=(len(checksums),), maxshape=(None,), chunks=(CHUNK,), dtype=np.uint32
    )
    _write_tail(made, checksums, 0)
    made.attrs["first"] = sealed
    file.require_group("records").create_dataset(name, data=np.int64(length))
    _describe(group, units)


def locate(file: h5py.File, name: str) -> Table:
    """Where the tail of a table lies.

    Raises
    ------
    RunFileError
        There is no such table, or its parts do not fit together.
    """
    group = guarded.group_of(file, name)
    integrity = guarded.dataset_of(guarded.group_of(file, "integrity"), name)
    records = guarded.dataset_of(guarded.group_of(file, "records"), name)
    where = f"{file.filename}:{name}"
    datasets = {unquote(link): guarded.dataset_of(group, link) for link in guarded.names_of(group)}
    with guarded.damage(where):
        length = int(records[()])
    lengths = {dataset.shape for dataset in datasets.values()}
    first = guarded.attribute(integrity, "first", int)
    capacity = first + len(integrity)
    consistent = lengths <= {(capacity,)} and 0 <= first <= length <= capacity
    if not consistent:
        raise DamagedError(
            f"{where} is damaged, not a readable run: {length} records, in columns of "
            f"{[dataset.shape for dataset in datasets.values()]}"
        )
    places = []
    with guarded.damage(where):
        for start in range(first, capacity, CHUNK):
            row = [_place(dataset, start) for dataset in datasets.values()]
            places.append([*row, _place(integrity, start - first)])
        counter = records.id.get_offset()
    return Table(
        {column: dataset.dtype for column, dataset in datasets.items()},
        length,
        capacity,
        first,
        places,
        0 if counter is None else counter,
    )


def verify(file: h5py.File, name: str, *, growing: bool = False) -> int:
    """Number of records; those of the tail are compared with their checksums.

    The sealed chunks have HDF5's own, which is compared when they are read. Where the run is
    `growing`, records may have come since the number was read.

    Raises
    ------
    DamagedError
        A record does not read as it was written, or the number of records is wrong.
    """
    table, whole = _checked_tail(file, name)
    counted = table.length - table.first_open
    if not all(whole[:counted]):
        first = table.first_open + whole.index(False)
        raise DamagedError(f"{file.filename} is damaged: record {first} of {name} is not whole")
    # One record more may be whole: the process died before it was counted.
    if not growing and len(whole) - counted == 2 and all(whole[counted:]):
        raise DamagedError(f"{file.filename} is damaged: {name} holds more than {table.length}")
    return table.length


def intact(file: h5py.File, name: str) -> int:
    """Number of records before the first damaged one of the tail."""
    table, whole = _checked_tail(file, name)
    counted = whole[: table.length - table.first_open]
    return table.first_open + (counted.index(False) if False in counted else len(counted))


def _checked_tail(file: h5py.File, name: str) -> tuple[Table, list[bool]]:
    """Which records of the tail, and up to two beyond those that count, fit their checksums."""
    table = locate(file, name)
    group = guarded.group_of(file, name)
    tail = slice(table.first_open, min(table.length + 2, table.capacity))
    with guarded.damage(f"{file.filename}:{name}"):
        stored = guarded.dataset_of(guarded.group_of(file, "integrity"), name)[
            : tail.stop - tail.start
        ]
        read = [guarded.dataset_of(group, guarded.link_name(c))[tail] for c in table.dtypes]
    return table, [
        zlib.crc32(b"".join(column[i : i + 1].tobytes() for column in read)) == int(checksum)
        for i, checksum in enumerate(stored)
    ]


def room_for(length: int) -> int:
    """Records to make room for: half as many again, so that growing costs a constant a record.

    And not many more than can be compared with their checksums in a moment.
    """
    return (length + min(length // 2, MOST_OPEN)) // CHUNK * CHUNK + CHUNK


def _column(
    group: h5py.Group,
    name: str,
    dtype: np.dtype[Any],
    sealed: int,
    room: int,
    before: h5py.Dataset | None,
    kept: int,
) -> h5py.Dataset:
    """A dataset of `room` places, the first `sealed` written; `kept` of them as they are packed."""
    if before is not None and kept:
        with guarded.damage(before.name):
            group.copy(before, name, without_attrs=True)
            made = group[name]
            made.resize((kept,))
            made.resize((room,))
            if kept < sealed:
                made[kept:sealed] = before[kept:sealed]
            return made
    made = group.create_dataset(
        name,
        shape=(room,),
        maxshape=(None,),
        chunks=(CHUNK,),
        dtype=dtype,
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        fletcher32=True,
    )
    if sealed:
        made[:sealed] = _converted(before, dtype, slice(0, sealed))
    return made


def _tail(
    before: h5py.Dataset | None, dtype: np.dtype[Any], sealed: int, length: int, room: int
) -> NDArray[Any]:
    tail = np.full(max(0, room - sealed), _fill(dtype), dtype=dtype)
    if length > sealed:
        tail[: length - sealed] = _converted(before, dtype, slice(sealed, length))
    return tail


def filled(dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """What stands for records that lack a column."""
    return np.full(count, _fill(dtype), dtype=dtype)


def _converted(before: h5py.Dataset | None, dtype: np.dtype[Any], rows: slice) -> NDArray[Any]:
    count = rows.stop - rows.start
    if before is None:
        return np.full(count, _fill(dtype), dtype=dtype)
    with guarded.damage(before.name):
        return np.asarray(before[rows]).astype(dtype)


def _write_tail(dataset: h5py.Dataset, tail: NDArray[Any], first: int) -> None:
    """Chunks past all filters, so that the place of each number in the file is known."""
    for start in range(0, len(tail), CHUNK):
        part = tail[start : start + CHUNK]
        part = np.concatenate([part, np.zeros(CHUNK - len(part), part.dtype)])
        dataset.id.write_direct_chunk((first + start,), part.tobytes(), filter_mask=ALL_FILTERS)


def _place(dataset: h5py.Dataset, row: int) -> int:
    info = dataset.id.get_chunk_info_by_coord((row,))
    if info.byte_offset is None or info.size != CHUNK * dataset.dtype.itemsize:
        raise DamagedError(f"{dataset.file.filename}: {dataset.name} has no open tail")
    return int(info.byte_offset)


def _describe(group: h5py.Group, units: Mapping[str, str]) -> None:
    """Units, and the axes of a plot as dimension scales: xarray and others read them."""
    scales = [group[name] for name in SCALES if name in group]
    for scale in scales:
        scale.make_scale(scale.name.rpartition("/")[2])
    for name, dataset in group.items():
        guarded.set_text(dataset, "units", units.get(unquote(name), ""))
        if name not in SCALES:
            # Readers of netCDF take one for the axis: the last, which is to be the step.
            for scale in reversed(scales):
                dataset.dims[0].attach_scale(scale)


# --- types ------------------------------------------------------------------------------------


def _dtype_for(value: Any, name: str) -> np.dtype[Any]:
    if isinstance(value, str):
        wide = TEXT_UNIT * (2 * len(value.encode()) // TEXT_UNIT + 1)
        return h5py.string_dtype("utf-8", wide)
    if isinstance(value, (bool, np.bool_)):
        return np.dtype(np.bool_)
    if isinstance(value, (int, np.integer)):
        return np.dtype(np.int64)
    if value is None or isinstance(value, (float, np.floating)):  # None: not measured
        return np.dtype(np.float64)
    raise TypeError(f"{name}={value!r} cannot be recorded; expected a number, text or None")


def _wider(present: np.dtype[Any], needed: np.dtype[Any], name: str) -> np.dtype[Any]:
    if present == needed:
        return present
    if "S" in (present.kind, needed.kind):
        if present.kind != needed.kind:
            raise TypeError(f"{name} is text in one record and a number in another")
        return max(present, needed, key=lambda dtype: dtype.itemsize)
    return np.dtype(np.float64)


def _code(dtype: np.dtype[Any]) -> str:
    codes = {"f": "d", "i": "q", "b": "?"}
    return f"{dtype.itemsize}s" if dtype.kind == "S" else codes[dtype.kind]


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(value)
    return np.nan if value is None else float(value)


def _fill(dtype: np.dtype[Any]) -> Any:
    return "" if dtype.kind == "S" else FILLS[dtype.kind]


def _put(descriptor: int, data: bytes, place: int) -> None:
    written = os.pwrite(descriptor, data, place)
    if written != len(data):
        raise OSError(f"{written} of {len(data)} bytes were written")
