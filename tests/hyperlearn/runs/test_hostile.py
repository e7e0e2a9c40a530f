"""Files that are made to do harm, or are merely strange: refused, and nothing in them is run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import hyperlearn as hl
from hyperlearn.runs import RunFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.h5"
    with RunFile(
        path, config={"a": 1, "b": {"c": 2}}, environment={"seed": 0}, attachments={"k": np.eye(2)}
    ) as file:
        for step in range(20):
            file.append({"step": step, "loss": 0.5 * step})
        file.checkpoint(20, {"x": torch.ones(3)})
        file.finish("finished", "", {"x": torch.ones(3)})
    return path


def read_all(path: Path) -> None:
    run = hl.load_run(path)
    for part in (run.history, run.certificates, run.result, run.attachments):
        dict(part)
    hl.runs.state.last_checkpoint(path)


def replaced(name: str, make: Callable[[h5py.Group, str], Any]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        parent, _, key = name.rpartition("/")
        group = file[parent or "/"]
        del group[key]
        make(group, key)

    return change


def chunked(shape: tuple[int, ...]) -> Callable[[h5py.Group, str], Any]:
    return lambda g, k: g.create_dataset(k, shape=shape, chunks=(64,), dtype="f8").attrs.update(
        kind="array"
    )


def with_filter(group: h5py.Group, key: str) -> None:
    """A filter that HDF5 would look for in a folder of plug-ins."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((20,))
    plist.set_filter(307, h5py.h5z.FLAG_OPTIONAL, (1,))  # bzip2
    space = h5py.h5s.create_simple((20,))
    h5py.h5d.create(group.id, key.encode(), h5py.h5t.IEEE_F64LE, space, plist)


def virtual(group: h5py.Group, key: str) -> None:
    layout = h5py.VirtualLayout(shape=(20,), dtype="f8")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "data", shape=(20,))
    group.create_virtual_dataset(key, layout)


def external_numbers(group: h5py.Group, key: str) -> None:
    group.create_dataset(key, shape=(20,), dtype="u1", external=[("/etc/passwd", 0, 20)])


def cycle(file: h5py.File) -> None:
    file["config/b/again"] = file["config/b"]


def deep(file: h5py.File) -> None:
    group = file["config"]
    for _ in range(200):
        group = group.create_group("d")
        group.attrs["kind"] = "dict"


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("/tmp/this-was-run").touch, ())


REFUSED: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "external link": (
        replaced("history/loss", lambda g, k: g.__setitem__(k, h5py.ExternalLink("x.h5", "/a"))),
        "is an external link; a run holds none, and it is not followed",
    ),
    "external group": (
        replaced("config", lambda g, k: g.__setitem__(k, h5py.ExternalLink("x.h5", "/a"))),
        "is an external link",
    ),
    "soft link": (
        replaced("result", lambda g, k: g.__setitem__(k, h5py.SoftLink("/config"))),
        "is a soft link",
    ),
    "numbers in another file": (
        replaced("attachments/k", external_numbers), "keeps its numbers in other files",
    ),
    "virtual dataset": (replaced("attachments/k", virtual), "keeps its numbers in other files"),
    "huge history": (
        replaced("history/loss", lambda g, k: g.create_dataset(k, (10**12,), "f8", chunks=(64,))),
        "declares .1000000000000,., 8000000000000 bytes, of which 0 are stored; refused",
    ),
    "huge array": (replaced("attachments/k", chunked((10**13,))), "are stored; refused"),
    "filter as code": (
        replaced("history/loss", with_filter), r"needs HDF5 filters \[307\], which would be loaded",
    ),
    "pickle": (
        replaced(
            "attachments/k",
            lambda g, k: g.create_dataset(k, data=np.void(pickle.dumps(Bomb()))).attrs.update(
                kind="array"
            ),
        ),
        "is of type .*; expected numbers, truth values or text",
    ),
    "text of any length": (
        replaced("attachments/k", lambda g, k: g.create_dataset(k, data="text")),
        "is of type object; expected numbers",
    ),
    "records of fields": (
        replaced(
            "history/loss", lambda g, k: g.create_dataset(k, (20,), np.dtype([("a", "f8")]))
        ),
        "expected numbers",
    ),
    "references": (
        replaced("history/loss", lambda g, k: g.create_dataset(k, (20,), h5py.ref_dtype)),
        "expected numbers",
    ),
    "a group for an array": (
        replaced("history/loss", lambda g, k: g.create_group(k)), "is a group; expected an array",
    ),
    "an array for a group": (
        replaced("config", lambda g, k: g.create_dataset(k, data=np.ones(3))),
        "expected|no attribute kind",
    ),
    "a type for a group": (
        replaced("result", lambda g, k: g.__setitem__(k, np.dtype("f8"))), "is a Datatype",
    ),
    "no history": (lambda file: file.__delitem__("history"), "/ has no history"),
    "no records": (lambda file: file.__delitem__("records/history"), "/records has no history"),
    "no config": (lambda file: file.__delitem__("config"), "/ has no config"),
    "columns of two lengths": (
        replaced("history/loss", lambda g, k: g.create_dataset(k, data=np.ones(7))),
        "20 records, in columns of",
    ),
    "more records than there are": (
        lambda file: file["records/history"].__setitem__((), 10**9), "1000000000 records",
    ),
    "fewer than none": (lambda file: file["records/history"].__setitem__((), -1), "-1 records"),
    "a number for the status": (
        lambda file: file.attrs.__setitem__("status", 3), "attribute status is 3; expected str",
    ),
    "an array for a setting": (
        lambda file: file["config"].attrs.__setitem__("a", np.ones(3)), "expected a number, text",
    ),
    "an unknown kind": (
        lambda file: file["config/b"].attrs.__setitem__("kind", "module"),
        "of kind 'module', which this version does not know",
    ),
    "an unknown dtype": (
        lambda file: file["result/x"].attrs.__setitem__("dtype", "os"), "a tensor of 'os'",
    ),
    "a cycle": (cycle, "is held under another name too; refused"),
    "a deep nest": (deep, "nested deeper than 64; refused"),
    "checkpoints that are no steps": (
        lambda file: file["checkpoints"].create_group("../x"), "expected steps|holds",
    ),
    "another schema": (
        lambda file: file.attrs.__setitem__("schema", 99), "run schema 99; this version reads",
    ),
    "a schema of text": (
        lambda file: file.attrs.__setitem__("schema", "2; rm"), "run schema 2; rm; this version",
    ),
    "another format": (
        lambda file: file.attrs.__setitem__("format", "other"), "not a hyperlearn run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(path, name):
    change, message = REFUSED[name]
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(hl.RunFileError, match=message) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert not Path("/tmp/this-was-run").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_recovered_is_harmless(path, tmp_path, name):
    """The same files through `recover`: a run, or an error of ours."""
    with h5py.File(path, "r+") as file:
        REFUSED[name][0](file)
    try:
        run = hl.recover(path, tmp_path / "saved.h5")
    except hl.RunFileError:
        return
    assert len(run.history.get("step", ())) <= 20
    assert not Path("/tmp/this-was-run").exists()


def test_a_class_named_by_a_file_is_not_imported(path):
    with h5py.File(path, "r+") as file:
        file["config/b"].attrs["kind"] = "object"
        file["config/b"].attrs["class"] = "antigravity.Thing"
    run = hl.load_run(path)
    with pytest.raises(ValueError, match=r"'antigravity\.Thing', which is not known here"):
        run.setting("b")


def test_a_file_of_another_kind_is_never_overwritten(tmp_path):
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.ones(3)
    before = path.read_bytes()
    with pytest.raises(hl.RunFileError, match=r"it holds images"):
        RunFile(path, config={}, environment={}, overwrite=True)
    assert path.read_bytes() == before
