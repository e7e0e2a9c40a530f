"""Values as HDF5 and back: settings, tensors, and nested structures of them. No pickles.

A number, a truth value, text or None is an attribute. A tensor or array is a dataset. Anything
nested is a group whose attribute ``kind`` says what it is: ``dict``, ``list``, ``tuple``,
``object`` (a dataclass, with its ``class``), ``field``. Long lists of numbers are datasets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperlearn.runs import guarded
from hyperlearn.runs.guarded import DamagedError, RunFileError

Tree = Any
LONGEST_ATTRIBUTE = 16_000
_LARGEST = 2**63


@dataclass(frozen=True, eq=False)
class Field:
    """A function given by its values at points: a PDE's solution, a learnt length-scale.

    Parameters
    ----------
    values
        ``(n_1, ..., n_d)`` on a grid, or ``(n,)`` at scattered points.
    coordinates
        Name and positions of each axis, in order: ``(n_i,)`` on a grid; of scattered points
        ``(n,)`` each.
    units
        Of the values; empty for none.
    coordinate_units
        Of each coordinate that has one.

    Raises
    ------
    ValueError
        The lengths are neither those of a grid nor those of scattered points.

    Examples
    --------
    >>> import torch
    >>> x, t = torch.linspace(0, 1, 5), torch.linspace(0, 2, 3)
    >>> u = Field(torch.outer(x, t), {"x": x, "t": t}, units="m/s", coordinate_units={"t": "s"})
    >>> u.is_grid
    True
    """

    values: NDArray[Any] | Tensor
    coordinates: Mapping[str, NDArray[Any] | Tensor]
    units: str = ""
    coordinate_units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        lengths = [tuple(c.shape) for c in self.coordinates.values()]
        if not lengths:
            raise ValueError("Field: no coordinates; expected the positions of each axis")
        if not self.is_grid and (len(shape) != 1 or any(length != shape for length in lengths)):
            given = ", ".join(f"{name} {tuple(c.shape)}" for name, c in self.coordinates.items())
            raise ValueError(
                f"Field: values {shape} with coordinates {given}; "
                "expected one position for each place along an axis (a grid), or for each value"
            )
        unknown = set(self.coordinate_units) - set(self.coordinates)
        if unknown:
            raise ValueError(f"Field: units of {sorted(unknown)}, which are no coordinates")

    @property
    def is_grid(self) -> bool:
        """Whether each axis of the values has a coordinate of its own."""
        shape = tuple(self.values.shape)
        return [tuple(c.shape) for c in self.coordinates.values()] == [(n,) for n in shape]

    def to_xarray(self) -> Any:
        """An `xarray.DataArray`, with dimensions of the coordinates' names, or ``point``."""
        from hyperlearn.runs.frames import xarray

        attrs = {"units": self.units} if self.units else {}
        grid = self.is_grid
        coordinates = {
            name: (
                name if grid else "point",
                np.asarray(c),
                {"units": self.coordinate_units[name]} if name in self.coordinate_units else {},
            )
            for name, c in self.coordinates.items()
        }
        dims = list(self.coordinates) if grid else ["point"]
        return xarray().DataArray(np.asarray(self.values), coordinates, dims, attrs=attrs)


def write(group: h5py.Group, name: str, value: Tree) -> None:
    """Store a value under a name.

    Raises
    ------
    TypeError
        It is, or holds, something that cannot be stored.
    """
    _write(group, guarded.link_name(name), value, name)


def read(group: h5py.Group, name: str) -> Tree:
    """What `write` stored; an object as a dictionary of its fields and its ``class``.

    Raises
    ------
    RunFileError
        There is no such value, or it cannot be read (`guarded`).
    """
    return _read(group, guarded.link_name(name), 0)


def read_all(group: h5py.Group) -> dict[str, Tree]:
    """Every value of a group."""
    return {unquote(name): _read(group, name, 0) for name in stored_names(group)}


def stored_names(group: h5py.Group) -> list[str]:
    """Names of the values in a group, as links."""
    where = f"{group.file.filename}:{group.name}"
    with guarded.damage(where):
        attributes = [name for name in group.attrs if name not in ("kind", "class")]
    return [*attributes, *guarded.names_of(group)]


# --- writing ----------------------------------------------------------------------------------


def _write(group: h5py.Group, name: str, value: Tree, label: str) -> None:
    if name in ("kind", "class"):
        name = f"%{ord(name[0]):02x}{name[1:]}"  # unquoted like any other
    if value is None:
        group.attrs[name] = h5py.Empty("f")
    elif isinstance(value, (bool, np.bool_)):
        group.attrs[name] = np.bool_(value)
    elif isinstance(value, (int, np.integer)):
        if not -_LARGEST <= value < _LARGEST:
            raise TypeError(f"{label}={value} cannot be stored; expected a number of 64 bits")
        group.attrs[name] = np.int64(value)
    elif isinstance(value, (float, np.floating)):
        group.attrs[name] = np.float64(value)
    elif isinstance(value, str):
        _write_text(group, name, value)
    elif isinstance(value, Tensor):
        _write_tensor(group, name, value)
    elif isinstance(value, np.ndarray):
        _write_array(group, name, value, label)
    elif isinstance(value, (torch.dtype, torch.device)):
        _write_text(group, name, str(value))
    elif isinstance(value, Field):
        _write_field(group, name, value)
    elif isinstance(value, torch.Generator):
        made = _write_children(group, name, "object", {"seed": value.initial_seed()}, label)
        _write_text(made, "class", "Generator")
    elif callable(value):  # of code there is only its name
        called = getattr(value, "__qualname__", type(value).__qualname__)
        made = _write_children(group, name, "object", {"name": called}, label)
        _write_text(made, "class", "function")
    elif isinstance(value, Mapping):
        _write_children(group, name, "dict", value, label)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        made = _write_children(group, name, "object", parts, label)
        _write_text(made, "class", type(value).__qualname__)
    elif isinstance(value, (list, tuple)):
        _write_sequence(group, name, value, label)
    else:
        raise TypeError(
            f"{label}={_shown(value)} cannot be stored; expected numbers, text, None, tensors, "
            "arrays, or lists, tuples, dictionaries and dataclasses of these"
        )


def _write_children(
    group: h5py.Group, name: str, kind: str, parts: Mapping[Any, Any], label: str
) -> h5py.Group:
    # In the order of creation: that of a dictionary is the order of the flat vector.
    made = group.create_group(name, track_order=True)
    guarded.set_text(made, "kind", kind)
    for key, part in parts.items():
        if not isinstance(key, str) or not key or "\0" in key:
            raise TypeError(f"{label} has the key {key!r}, which cannot be stored; expected text")
        _write(made, guarded.link_name(key), part, f"{label}.{key}")
    return made


def _write_sequence(group: h5py.Group, name: str, value: Sequence[Any], label: str) -> None:
    kind = "list" if isinstance(value, list) else "tuple"
    kinds = {type(part) for part in value}
    if len(value) > 8 and kinds in ({int}, {float}):
        numbers = np.asarray(value, dtype=np.int64 if kinds == {int} else np.float64)
        made = _dataset(group, name, numbers.shape, numbers.dtype)
        _fill(made, (numbers[rows] for rows in guarded.slabs(numbers.shape, 8)))
        guarded.set_text(made, "kind", kind)
        return
    if hasattr(value, "_fields"):  # a NamedTuple comes back as a dictionary
        parts = dict(zip(value._fields, value, strict=True))
        _write_children(group, name, "dict", parts, label)
        return
    _write_children(group, name, kind, {f"{i:06d}": v for i, v in enumerate(value)}, label)


def _write_text(group: h5py.Group, name: str, text: str) -> None:
    encoded = text.encode()
    if len(encoded) <= LONGEST_ATTRIBUTE and "\0" not in text:
        guarded.set_text(group, name, text)
        return
    # Long, or with a zero byte, which ends a text in HDF5: its bytes.
    data = np.frombuffer(encoded, dtype=np.uint8)
    made = _dataset(group, name, data.shape, data.dtype, compressed=True)
    _fill(made, (data[rows] for rows in guarded.slabs(data.shape, 1)))
    guarded.set_text(made, "kind", "text")


def _write_array(group: h5py.Group, name: str, value: NDArray[Any], label: str) -> None:
    dtype: Any = value.dtype
    if dtype.kind == "U":
        value = np.char.encode(value, "utf-8")
        dtype = h5py.string_dtype("utf-8", max(1, value.dtype.itemsize))
        value = value.astype(dtype)
    elif dtype.kind not in "biufc":
        raise TypeError(f"{label} is an array of {dtype}; expected numbers or text")
    made = _dataset(group, name, value.shape, dtype, compressed=True)
    guarded.set_text(made, "kind", "array")
    _fill(made, (value[rows] for rows in guarded.slabs(value.shape, dtype.itemsize)))


def _write_tensor(group: h5py.Group, name: str, value: Tensor) -> None:
    value = value.detach()
    narrow = value.dtype in (torch.bfloat16,)  # HDF5 has no such type; float32 holds it
    dtype = np.dtype(np.float32) if narrow else _numpy_dtype(value.dtype)
    made = _dataset(group, name, tuple(value.shape), dtype)
    guarded.set_text(made, "kind", "tensor")
    guarded.set_text(made, "dtype", str(value.dtype).removeprefix("torch."))

    def parts() -> Iterator[NDArray[Any]]:
        for rows in guarded.slabs(tuple(value.shape), dtype.itemsize):
            part = value[rows].cpu()
            yield (part.float() if narrow else part).numpy()

    _fill(made, parts())


def _fill(dataset: h5py.Dataset, parts: Iterator[NDArray[Any]]) -> None:
    """Write slab by slab, and a checksum over all: HDF5's own takes zeros for a sound chunk."""
    checksum = 0
    slabs = guarded.slabs(dataset.shape, dataset.dtype.itemsize)
    for rows, part in zip(slabs, parts, strict=True):
        whole = np.ascontiguousarray(part)
        checksum = guarded.checksum(whole, checksum)
        dataset[rows] = whole.reshape(np.shape(part))
    dataset.attrs["crc32"] = np.uint32(checksum)


def _write_field(group: h5py.Group, name: str, value: Field) -> None:
    made = _write_children(
        group, name, "field", {"values": value.values, **value.coordinates}, name
    )
    guarded.set_text(made, "coordinates", "\n".join(value.coordinates))
    guarded.set_text(made["values"], "units", value.units)
    for axis, key in enumerate(value.coordinates):
        scale = made[guarded.link_name(key)]
        guarded.set_text(scale, "units", value.coordinate_units.get(key, ""))
        scale.make_scale(key)
        made["values"].dims[axis if value.is_grid else 0].attach_scale(scale)


def _dataset(
    group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any, compressed: bool = False
) -> h5py.Dataset:
    """An empty one."""
    if not compressed or 0 in shape or not shape:  # HDF5 has no filters for a scalar, or nothing
        return group.create_dataset(name, shape=shape, dtype=dtype)
    chunks = guarded.chunks_of(shape, np.dtype(dtype).itemsize)
    return group.create_dataset(
        name, shape=shape, dtype=dtype, chunks=chunks, compression="gzip", compression_opts=1,
        shuffle=True,
    )  # fmt: skip


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError as error:
        raise TypeError(f"a tensor of {dtype} cannot be stored; convert it first") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- reading ----------------------------------------------------------------------------------


def _read(group: h5py.Group, name: str, depth: int) -> Tree:
    where = f"{group.file.filename}:{group.name}/{unquote(name)}"
    if depth > guarded.DEEPEST:
        raise RunFileError(f"{where} is nested deeper than {guarded.DEEPEST}; refused")
    if name in ("kind", "class"):
        name = f"%{ord(name[0]):02x}{name[1:]}"
    with guarded.damage(where):
        if name in group.attrs:
            return _plain(group.attrs[name], where)
    node = guarded.child(group, name)
    kind = guarded.attribute(node, "kind", str)
    if isinstance(node, h5py.Dataset):
        return _read_dataset(node, kind, where)
    if kind == "field":
        return _read_field(node)
    names = stored_names(node)
    if kind in ("list", "tuple"):
        values = [_read(node, key, depth + 1) for key in sorted(names)]
        return values if kind == "list" else tuple(values)
    if kind not in ("dict", "object"):
        raise RunFileError(f"{where} is of kind {kind!r}, which this version does not know")
    found = {unquote(key): _read(node, key, depth + 1) for key in names}
    if kind == "object":
        return {"class": guarded.attribute(node, "class", str), **found}
    return found


def _read_dataset(node: h5py.Dataset, kind: str, where: str) -> Any:
    if kind == "tensor":
        return _read_tensor(node)
    values = guarded.array(node)
    if kind == "array":
        return values
    if kind == "text":
        return np.asarray(values, np.uint8).tobytes().decode("utf-8")
    if kind in ("list", "tuple"):
        numbers = values.tolist()
        return numbers if kind == "list" else tuple(numbers)
    raise RunFileError(f"{where} is of kind {kind!r}, which this version does not know")


def _read_tensor(node: h5py.Dataset) -> Tensor:
    where = f"{node.file.filename}:{node.name}"
    named = guarded.attribute(node, "dtype", str)
    dtype = getattr(torch, named, None)
    if not isinstance(dtype, torch.dtype):
        raise RunFileError(f"{where} is a tensor of {named!r}; expected a dtype of torch")
    with guarded.damage(where):
        # A slab at a time, and no second copy.
        tensor = torch.empty(node.shape, dtype=dtype)
        slabs = guarded.slabs(node.shape, node.dtype.itemsize)
        for rows, part in zip(slabs, guarded.parts_of(node), strict=True):
            tensor[rows] = torch.from_numpy(np.array(part))
    return tensor


def _read_field(node: h5py.Group) -> Field:
    where = f"{node.file.filename}:{node.name}"
    with guarded.damage(where):
        names = guarded.attribute(node, "coordinates", str).split("\n")
    datasets = {name: guarded.dataset_of(node, guarded.link_name(name)) for name in names}
    values = guarded.dataset_of(node, "values")
    units = {name: guarded.attribute(d, "units", str, "") for name, d in datasets.items()}
    kinds = {id(d): guarded.attribute(d, "kind", str) for d in (values, *datasets.values())}

    def loaded(dataset: h5py.Dataset) -> Any:
        return _read_dataset(dataset, kinds[id(dataset)], where)

    try:
        return Field(
            loaded(values),
            {name: loaded(dataset) for name, dataset in datasets.items()},
            guarded.attribute(values, "units", str, ""),
            {name: unit for name, unit in units.items() if unit},
        )
    except ValueError as error:
        raise DamagedError(f"{where} is damaged, not a readable run: {error}") from error


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, np.generic):
        value = value.decode() if isinstance(value, bytes) else value.item()
    if isinstance(value, (bool, int, float, str)):
        return value
    raise RunFileError(f"{where} is {_shown(value)}; expected a number, text or nothing")
