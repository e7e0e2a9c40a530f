"""What a run needs to go on as if it had not stopped, and what says that it is the same run."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.runs import codec, guarded
from hyperlearn.runs.guarded import DamagedError, RunFileError
from hyperlearn.runs.writer import TABLES, checkpoint_steps

if TYPE_CHECKING:
    from hyperlearn.problem import BilevelProblem

Tree = Any


def checksums(problem: BilevelProblem) -> dict[str, str]:
    """Of starting points and data: 128 bits of BLAKE2 over structure, dtypes, shapes and values."""
    names = ("x0", "y0", "inner_data", "outer_data")
    return {name: _checksum(getattr(problem, name)) for name in names}


def _checksum(tree: Tree) -> str:
    digest = hashlib.blake2b(digest_size=16)
    leaves, layout = pytree.tree_flatten(tree)
    digest.update(f"{layout}".encode())
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            digest.update(repr(leaf).encode())
            continue
        digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        flat = leaf.detach().reshape(-1)
        for rows in guarded.slabs(tuple(flat.shape), flat.element_size()):
            part = flat[rows].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they read from a file: objects as dictionaries with their ``class``.

    Raises
    ------
    TypeError
        One of them cannot be stored.
    """
    # Through the codec itself, on a file in memory: one definition of what is stored.
    with guarded.LOCK, h5py.File.in_memory(libver=("v110", "v110")) as file:
        codec.write(file, "config", dict(config))
        found: dict[str, Any] = codec.read(file, "config")
    return found


def random_state(method: Any) -> dict[str, Any]:
    """Of the generators that losses may draw from, and of those among a method's settings."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
        "numpy": {
            "name": str(name), "keys": np.asarray(keys), "position": int(position),
            "has_gauss": int(has_gauss), "gauss": float(gauss),
        },
        "python": {
            "version": version, "internal": np.asarray(internal, np.int64), "next": following,
        },
        "settings": [generator.get_state() for generator in _generators(method)],
    }  # fmt: skip


def restore_random_state(method: Any, state: Mapping[str, Any]) -> None:
    """Set them to what they were."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    n = state["numpy"]
    numpy_state = (n["name"], n["keys"], n["position"], n["has_gauss"], n["gauss"])
    np.random.set_state(numpy_state)  # noqa: NPY002
    p = state["python"]
    random.setstate((p["version"], tuple(p["internal"].tolist()), p["next"]))
    for generator, then in zip(_generators(method), state["settings"], strict=True):
        generator.set_state(then)


def _generators(settings: Any) -> Iterator[torch.Generator]:
    if isinstance(settings, torch.Generator):
        yield settings
    elif is_dataclass(settings) and not isinstance(settings, type):
        for f in fields(settings):
            yield from _generators(getattr(settings, f.name))
    elif isinstance(settings, (list, tuple)):
        for part in settings:
            yield from _generators(part)


def checkpoints(path: str | Path) -> Iterator[tuple[int, dict[str, Any], dict[str, int]]]:
    """Step, state and number of records of each checkpoint that is whole, oldest first.

    One that is not is passed by; nothing is said where the file cannot be read.
    """
    try:
        with guarded.opened(Path(path)) as file:
            group = guarded.group_of(file, "checkpoints")
            for step in checkpoint_steps(file):
                with contextlib.suppress(RunFileError):
                    state, lengths = _checkpoint(group, step)
                    yield step, state, lengths
    except RunFileError:
        return


def last_checkpoint(path: str | Path) -> tuple[dict[str, Any], int, dict[str, int]]:
    """State, step and number of records of the newest checkpoint that is whole.

    Raises
    ------
    RunFileError
        There is none.
    """
    damaged: DamagedError | None = None
    with guarded.opened(Path(path)) as file:
        group = guarded.group_of(file, "checkpoints")
        for step in reversed(checkpoint_steps(file)):
            try:
                state, lengths = _checkpoint(group, step)
            except DamagedError as error:
                damaged = damaged or error
                continue
            return state, step, lengths
    reason = "" if damaged is None else f" that is whole ({damaged})"
    raise RunFileError(f"{path} has no checkpoint{reason}; it cannot be resumed")


def _checkpoint(group: h5py.Group, step: int) -> tuple[dict[str, Any], dict[str, int]]:
    node = guarded.group_of(group, str(step))
    lengths = {name: guarded.attribute(node, name, int) for name in TABLES}
    state = codec.read(group, str(step))
    return {name: value for name, value in state.items() if name not in lengths}, lengths
