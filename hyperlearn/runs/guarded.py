"""Reading HDF5 that may be damaged, or made to do harm.

HDF5 itself has links into other files, data kept in other files, datasets made of other files'
parts, filters that are loaded as code, and shapes of any size that cost no byte. A run has none of
these: what has is refused.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hyperlearn.runs.run import Run

FORMAT, SCHEMA = "hyperlearn-run", 2
# HDF5's own: gzip, shuffle, checksum.
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
# gzip cannot do better: 258 bytes a code of two bits.
MOST_COMPRESSED = 1032
DEEPEST = 64
# Some of HDF5 crashes where two threads are in it at once, and h5py's own lock is not around all.
LOCK = threading.RLock()
# Written and read so many bytes at a time: memory is that of a slab and not of another copy.
SLAB = 1 << 25
CHUNK = 1 << 20


class RunFileError(ValueError):
    """A file is not a run of ours, or cannot be used as one.

    Attributes
    ----------
    recovered
        What can still be read of a damaged run; None where that is nothing.
    """

    def __init__(self, message: str, recovered: Run | None = None) -> None:
        super().__init__(message)
        self.recovered = recovered


class DamagedError(RunFileError):
    """A part of a run does not read as it was written."""


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """A run file to read: without HDF5's locks, under which a reader would stop the writer.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    RunFileError
        It is not HDF5, not a run, damaged, or of a schema that this version does not know.
    """
    with LOCK:
        yield from _opened(path)


def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run file (HDF5)")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise RunFileError(f"{path} is not an HDF5 file; expected a run written by hyperlearn")
    try:
        file = _file(path)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        raise DamagedError(f"{path} is damaged, not a readable run: {error}") from error
    with file:
        with damage(path):
            found, schema = _text(file.attrs.get("format")), file.attrs.get("schema")
            names = ", ".join(sorted(file)) or "nothing"
        if not isinstance(found, str) or found != FORMAT:
            raise RunFileError(f"{path} is HDF5 but not a hyperlearn run (it holds {names})")
        if not isinstance(schema, (int, np.integer)) or schema != SCHEMA:
            raise RunFileError(
                f"{path} has run schema {schema}; this version reads schema {SCHEMA}"
            )
        yield file


def _file(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "file locking" not in str(error):
            raise
        # Somebody in this process has it open already, with locks.
        return h5py.File(path, "r")


@contextmanager
def damage(where: object) -> Iterator[None]:
    """What HDF5 says of a broken file, as a `DamagedError` that names the place."""
    try:
        yield
    except (RunFileError, FileNotFoundError, PermissionError, MemoryError):
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DamagedError(f"{where} is damaged, not a readable run: {error}") from error


def child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """What a group holds under a name, if it lies in this file.

    Raises
    ------
    DamagedError
        There is nothing of the name, or it cannot be read.
    RunFileError
        It is a link, to elsewhere in the file or into another file.
    """
    with damage(f"{group.file.filename}:{group.name}/{name}"):
        link = group.get(name, getlink=True)
        if link is None:
            raise DamagedError(
                f"{group.file.filename} is damaged, not a readable run: {group.name} has no {name}"
            )
        if not isinstance(link, h5py.HardLink):
            kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
            raise RunFileError(
                f"{group.file.filename}: {name} in {group.name} is {kind}; a run holds none, "
                "and it is not followed"
            )
        found = group[name]
        if not isinstance(found, h5py.Datatype) and h5py.h5o.get_info(found.id).rc > 1:
            raise RunFileError(
                f"{group.file.filename}: {name} in {group.name} is held under another name too; "
                "refused"
            )
        if isinstance(found, h5py.Dataset):
            _check(found)
        elif not isinstance(found, h5py.Group):
            raise RunFileError(
                f"{group.file.filename}: {name} in {group.name} is a {type(found).__name__}; "
                "expected a group or an array"
            )
        return found


def link_name(key: str) -> str:
    """A key as the name of an HDF5 link, where a slash would nest; undone by ``unquote``."""
    name = key.replace("%", "%25").replace("/", "%2F")
    return "%2E" if name == "." else name


def group_of(group: h5py.Group, name: str) -> h5py.Group:
    """The same, where only a group will do."""
    found = child(group, name)
    if not isinstance(found, h5py.Group):
        raise RunFileError(f"{group.file.filename}: {found.name} is an array; expected a group")
    return found


def dataset_of(group: h5py.Group, name: str) -> h5py.Dataset:
    """The same, where only an array will do."""
    found = child(group, name)
    if not isinstance(found, h5py.Dataset):
        raise RunFileError(f"{group.file.filename}: {found.name} is a group; expected an array")
    return found


def names_of(group: h5py.Group) -> list[str]:
    """Names in a group, in their order."""
    with damage(f"{group.file.filename}:{group.name}"):
        return list(group)


def attribute(holder: h5py.Group | h5py.Dataset, name: str, kind: type, default: Any = None) -> Any:
    """An attribute of a type; `default`, if there is one, where it is missing.

    Raises
    ------
    DamagedError
        It is missing and there is no default.
    RunFileError
        It is of another type.
    """
    where = f"{holder.file.filename}:{holder.name}"
    with damage(where):
        value = holder.attrs.get(name, default)
    value = _text(value) if isinstance(value, bytes) else value
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        raise DamagedError(f"{where} is damaged, not a readable run: no attribute {name}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RunFileError(
            f"{where}: attribute {name} is {_shown(value)}; expected {kind.__name__}"
        )
    return value


def set_text(holder: h5py.Group | h5py.Dataset, name: str, text: str) -> None:
    """An attribute of text of a fixed length.

    Text of a variable length lies in a heap that has no checksum; this in a header that has one.
    """
    encoded = text.encode()
    dtype = h5py.string_dtype("utf-8", max(1, len(encoded)))
    holder.attrs.create(name, np.array(encoded, dtype=dtype), dtype=dtype)


def _text(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def array(dataset: h5py.Dataset, rows: slice | None = None) -> NDArray[Any]:
    """Numbers, truth values or text of a dataset that `child` has let through.

    Raises
    ------
    DamagedError
        They cannot be read, or their checksum is wrong.
    """
    with damage(f"{dataset.file.filename}:{dataset.name}"):
        if rows is not None:
            values = np.asarray(dataset[rows])
        else:
            values = np.empty(dataset.shape, dataset.dtype)
            places = slabs(dataset.shape, dataset.dtype.itemsize)
            for place, part in zip(places, parts_of(dataset), strict=True):
                values[place] = part
        if h5py.check_string_dtype(dataset.dtype):
            return np.asarray(np.char.decode(np.asarray(values, dtype=bytes), "utf-8"))
        return values


def parts_of(dataset: h5py.Dataset) -> Iterator[NDArray[Any]]:
    """All of a dataset, slab by slab; after the last its checksum is compared.

    Raises
    ------
    DamagedError
        It is wrong.
    """
    found = 0
    for rows in slabs(dataset.shape, dataset.dtype.itemsize):
        part = np.asarray(dataset[rows])
        found = checksum(part, found)
        yield part
    stored = dataset.attrs.get("crc32")
    if stored is not None and found != stored:
        raise DamagedError(f"{dataset.file.filename}: {dataset.name} is damaged")


def checksum(values: NDArray[Any], before: int = 0) -> int:
    """CRC-32 of the bytes, after those of `before`."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)


def slabs(shape: tuple[int, ...], itemsize: int) -> list[Any]:
    """Slices along the first axis of at most `SLAB` bytes, multiples of a chunk."""
    if not shape or 0 in shape:
        return [()] if not shape else []
    row = int(np.prod(shape[1:])) * itemsize
    chunk = chunks_of(shape, itemsize)[0]
    step = max(chunk, SLAB // row // chunk * chunk)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def chunks_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Blocks of whole rows of about a megabyte; a longer row is cut along its own axes."""
    chunks = [1] * len(shape)
    room = max(1, CHUNK // itemsize)
    for axis in reversed(range(len(shape))):
        chunks[axis] = min(shape[axis], room)
        room = max(1, room // chunks[axis])
    return tuple(chunks)


def _check(dataset: h5py.Dataset) -> None:
    where = f"{dataset.file.filename}: {dataset.name}"
    text = h5py.check_string_dtype(dataset.dtype)
    plain = dataset.dtype.kind in "biufcS" if text is None else text.length is not None
    if not plain or dataset.dtype.fields is not None or dataset.dtype.subdtype is not None:
        raise RunFileError(
            f"{where} is of type {dataset.dtype}; expected numbers, truth values or text of a "
            "fixed length"
        )
    if dataset.shape is None:
        raise RunFileError(f"{where} has no shape; expected an array")
    if dataset.external or dataset.is_virtual:
        raise RunFileError(f"{where} keeps its numbers in other files, which are not read")
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    if filters - FILTERS:
        raise RunFileError(
            f"{where} needs HDF5 filters {sorted(filters - FILTERS)}, which would be loaded as "
            "code; expected gzip, shuffle or Fletcher's checksum"
        )
    size, stored = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if size > MOST_COMPRESSED * stored:
        raise RunFileError(
            f"{where} declares {dataset.shape}, {size} bytes, of which {stored} are stored; refused"
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
