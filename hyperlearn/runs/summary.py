"""What stands in a run, for people: metrics with a small curve each, shapes, what is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hyperlearn.runs import codec, columns, guarded
from hyperlearn.runs.codec import Field
from hyperlearn.runs.guarded import RunFileError
from hyperlearn.runs.reader import Values
from hyperlearn.runs.run import Run
from hyperlearn.runs.writer import checkpoint_steps

BLOCKS = "▁▂▃▄▅▆▇█"
# What a run spends; everything else is a metric.
COSTS = (
    "step",
    "seconds",
    "gradients",
    "hessian_products",
    "cross_products",
    "oracle_calls",
    "oracle_samples",
)


@dataclass(frozen=True)
class Metric:
    """One metric over a run.

    Parameters
    ----------
    name, unit
        Its name, and its unit; empty for none.
    first, last
        Its first and its last value, also where that is NaN.
    best
        The smallest, or the largest where `maximize`; NaN aside. None for text.
    maximize
        Whether more is better.
    curve
        A sparkline.
    logarithmic
        Whether that has a logarithmic scale.
    """

    name: str
    unit: str
    first: Any
    best: float | None
    last: Any
    maximize: bool
    curve: str
    logarithmic: bool


def is_maximized(metric: str) -> bool:
    """Whether more of a metric is better, by its name: an accuracy or an AUC.

    Examples
    --------
    >>> is_maximized("test_accuracy"), is_maximized("outer_loss")
    (True, False)
    """
    return "accuracy" in metric.lower() or "auc" in metric.lower()


def metrics(run: Run, width: int = 24) -> list[Metric]:
    """Each metric of a run, but for what it costs (`COSTS`)."""
    return [_metric(run, name, width) for name in run.history if name not in COSTS]


def _metric(run: Run, name: str, width: int) -> Metric:
    values, more = np.asarray(run.history[name]), is_maximized(name)
    unit = run.units.get(name, "")
    if values.dtype.kind not in "biuf":
        return Metric(name, unit, str(values[0]), None, str(values[-1]), more, "", False)
    numbers = values.astype(np.float64)
    known = numbers[~np.isnan(numbers)]
    best = math.nan if not len(known) else float(known.max() if more else known.min())
    return Metric(
        name,
        unit,
        values[0].item(),
        best,
        values[-1].item(),
        more,
        sparkline(numbers, width),
        is_logarithmic(numbers),
    )


def is_logarithmic(values: ArrayLike) -> bool:
    """Whether values are positive and cover more than two decades."""
    numbers = np.asarray(values, dtype=np.float64)
    known = numbers[numbers < np.inf]  # without NaN
    return bool(len(known) and known.min() > 0 and known.max() / 100 > known.min())


def sparkline(values: ArrayLike, width: int = 24) -> str:
    """Values as a line of blocks of eight heights, from the smallest to the largest.

    Parameters
    ----------
    values
        ``(n,)``; where there are more than `width`, neighbours are averaged. NaN is a gap, infinity
        the highest block and minus infinity the lowest. On a logarithmic scale if they are positive
        and cover more than two decades.
    width
        Blocks at most.

    Examples
    --------
    >>> sparkline([0, 1, 2, float("nan"), 7])
    '▁▂▃ █'
    >>> sparkline([1, 10, 100, 1000])
    '▁▃▆█'
    """
    if width < 1:
        raise ValueError(f"sparkline: width={width}; expected at least 1")
    numbers = np.asarray(values, dtype=np.float64)
    if is_logarithmic(numbers):
        numbers = np.log(numbers)
    parts = np.array_split(numbers, width) if len(numbers) > width else numbers.reshape(-1, 1)
    # Of a part that has any, infinity is its average.
    averages = np.array([_mean(part) for part in parts])
    finite = averages[np.isfinite(averages)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    return "".join(_block(value, float(low), float(high)) for value in averages)


def _mean(part: NDArray[np.float64]) -> float:
    known = part[~np.isnan(part)]
    if not len(known):
        return math.nan
    if np.isinf(known).any():
        return float(known[np.isinf(known)][0])
    with np.errstate(over="ignore"):
        return float(known.mean())


def _block(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return " "
    if math.isinf(value):
        return BLOCKS[-1 if value > 0 else 0]
    # Halves first: the difference of two large numbers may be infinite.
    share = 0.5 if high == low else (value / 2 - low / 2) / (high / 2 - low / 2)
    return BLOCKS[min(len(BLOCKS) - 1, int(share * (len(BLOCKS) - 1) + 0.5))]


# --- settings ---------------------------------------------------------------------------------


def expression(settings: Any) -> str:
    """Settings in a line, an object as the call that makes it.

    Examples
    --------
    >>> expression({"class": "NHGD", "step_size": 0.1, "solver": {"class": "CG", "rtol": None}})
    'NHGD(step_size=0.1, solver=CG(rtol=None))'
    """
    if isinstance(settings, Mapping) and "class" in settings:
        parts = ", ".join(f"{k}={expression(v)}" for k, v in settings.items() if k != "class")
        return f"{printable(settings['class'])}({parts})"
    if isinstance(settings, Mapping):
        return "{" + ", ".join(f"{k}: {expression(v)}" for k, v in settings.items()) + "}"
    if isinstance(settings, (list, tuple)):
        left, right = "[]" if isinstance(settings, list) else "()"
        return left + ", ".join(map(expression, settings)) + right
    if isinstance(settings, (Tensor, np.ndarray)):
        return _of(_item("", settings))
    return printable(repr(settings))


def printable(text: object) -> str:
    r"""Text without what would steer a terminal; a file may hold anything.

    Examples
    --------
    >>> print(printable("red: \x1b[31m"))
    red: \x1b[31m
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


# --- shapes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A value that a run holds, as far as that is known without reading it.

    Parameters
    ----------
    name
        Dotted, of a value in a nested structure.
    kind
        ``"tensor"``, ``"array"``, ``"field"``, ``"text"``, ``"list"``, ``"tuple"``, or ``"value"``
        for a number, a truth value, a short text or None.
    shape, dtype
        Of arrays; of a field those of its values.
    note
        Coordinates of a field; a plain value itself.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    note: str = ""


def contents(run: Run, group: str) -> list[Item]:
    """What ``run.result`` or ``run.attachments`` holds; arrays in a file are not read.

    Parameters
    ----------
    run
        From a file or in memory.
    group
        ``"result"`` or ``"attachments"``.

    Raises
    ------
    RunFileError
        The file holds what a run never does.
    """
    held = getattr(run, group)
    if not isinstance(held, Values) or run.path is None:
        return [item for name, value in held.items() for item in _items(name, value)]
    with guarded.opened(run.path) as file:
        node = guarded.group_of(file, group)
        return list(_stored(node, "", 0))


def _stored(node: h5py.Group, prefix: str, depth: int) -> Iterator[Item]:
    """Leaf by leaf."""
    if depth > guarded.DEEPEST:
        raise RunFileError(f"{node.file.filename}:{node.name} is nested too deep; refused")
    for link in codec.stored_names(node):
        name = prefix + unquote(link)
        if link in node.attrs:
            note = printable(codec.read(node, unquote(link)))
            yield Item(name, "value", note=note if len(note) <= 60 else f"{note[:60]}...")
            continue
        found = guarded.child(node, link)
        kind = guarded.attribute(found, "kind", str)
        if isinstance(found, h5py.Dataset):
            dtype = "UTF-8" if kind == "text" else _dtype_of(found)
            yield Item(name, kind, tuple(found.shape), dtype)
        elif kind == "field":
            values = guarded.dataset_of(found, "values")
            yield Item(name, kind, tuple(values.shape), _dtype_of(values), _axes_of(found))
        else:
            yield from _stored(found, f"{name}.", depth + 1)


def _dtype_of(dataset: h5py.Dataset) -> str:
    if h5py.check_string_dtype(dataset.dtype):
        return "text"
    return guarded.attribute(dataset, "dtype", str, str(dataset.dtype))


def _axes_of(field: h5py.Group) -> str:
    return f"over {', '.join(guarded.attribute(field, 'coordinates', str).splitlines())}"


def _items(name: str, value: Any) -> Iterator[Item]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _items(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _items(f"{name}.{i:06d}", part)
    else:
        yield _item(name, value)


def _item(name: str, value: Any) -> Item:
    if isinstance(value, Field):
        shape = tuple(value.values.shape)
        return Item(
            name, "field", shape, _dtype(value.values), f"over {', '.join(value.coordinates)}"
        )
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return Item(name, kind, tuple(value.shape), _dtype(value))
    return Item(name, "value", note=printable(value))


def _dtype(value: Tensor | NDArray[Any]) -> str:
    return str(value.dtype).removeprefix("torch.")


def _of(item: Item) -> str:
    return f"<{item.kind} {item.shape} {item.dtype}>"


# --- damage -----------------------------------------------------------------------------------


def losses(run: Run) -> list[str]:
    """What a damaged file held, as far as that is known, and `run`, recovered from it, has not.

    Empty where everything could be read.
    """
    if run.path is None:
        return []
    try:
        with guarded.opened(run.path) as file:
            return list(_losses(file, run))
    except (RunFileError, OSError):
        return ["what else the file held cannot be told: it is cut short, or its index is broken"]


def _losses(file: h5py.File, run: Run) -> Iterator[str]:
    for table, found in (("history", run.history), ("certificates", run.certificates)):
        kept = _length(found)
        try:
            count = int(guarded.array(guarded.dataset_of(guarded.group_of(file, "records"), table)))
            columns.locate(file, table)
        except RunFileError:
            if not kept:
                yield f"all of {table}"
            continue
        if kept < count:
            yield f"{count - kept} of {count} records of {table}"
    for group, held in (("config", run.config), ("environment", run.environment)):
        if not held:
            yield f"all of {group}"
    try:
        steps = [step for step in checkpoint_steps(file) if step not in run.checkpoints]
    except RunFileError:
        steps = []
        yield "all of checkpoints"
    yield from (f"the checkpoint at step {step}" for step in steps)
    for group, values in (("attachments", run.attachments), ("result", run.result)):
        try:
            names = [unquote(n) for n in codec.stored_names(guarded.group_of(file, group))]
        except RunFileError:
            yield f"all of {group}"
            continue
        yield from (f"{name} of {group}" for name in names if name not in values)


def _length(table: Mapping[str, Sequence[Any] | NDArray[Any]]) -> int:
    return len(next(iter(table.values()), ()))
