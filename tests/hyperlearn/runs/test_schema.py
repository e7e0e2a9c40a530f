"""The description of a run file against real ones: nothing is left out, nothing made up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import hyperlearn as hl
from hyperlearn.runs import Field, RunFile, load_run, schema
from hyperlearn.runs.schema import PARTS, TREES, VALUE_ATTRIBUTES, VALUES, Part

SCALE_ATTRIBUTES = {"DIMENSION_LIST", "CLASS", "NAME", "REFERENCE_LIST"}
KINDS = {"float64": "f", "int64": "i", "uint32": "u", "text": "S", "references": "OV"}


def write(path: Path, ended: bool) -> Path:
    """With a value of every kind, checkpoints, certificates, and more than one chunk."""
    problem = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0={"a": torch.zeros(2)}["a"],
        metrics={"mean": lambda y, x: float(x.mean())},
        units={"mean": "m"},
    )
    field = Field(np.zeros((3, 2)), {"x": np.arange(3.0), "t": np.arange(2.0)}, "m/s", {"t": "s"})
    values = {
        "field": field,
        "scalar": torch.tensor(1.0),
        "array": np.arange(3),
        "text": "x" * 20_000,
        "list": [1, "two"],
        "tuple": (1.5,),
        "numbers": [0.5] * 9,
        "none": None,
        "kind": {"class": "key"},
    }

    class Killed(Exception):
        pass

    def callback(record: dict[str, float]) -> None:
        if not ended and record["step"] == 590:
            raise Killed

    with contextlib.suppress(Killed), pytest.MonkeyPatch.context() as patch:
        if not ended:  # as if it had never come to its end
            patch.setattr(RunFile, "finish", lambda self, *a, **k: self.close())
        hl.minimize(
            problem,
            hl.ImplicitDifferentiation(step_size=0.1, inner_step_size=0.1),
            budget=hl.Budget(steps=600),
            checkpoints=hl.Checkpoints(steps=580),
            every=1,
            record=path,
            attachments=values,
        )
    return path


@pytest.fixture(scope="module", params=["finished", "killed"])
def file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[h5py.File]:
    path = write(tmp_path_factory.mktemp("schema") / "run.h5", request.param == "finished")
    assert load_run(path).status == request.param
    with h5py.File(path, "r", locking=False) as opened:
        yield opened


def places(file: h5py.File) -> Iterator[tuple[str, object]]:
    """Every group, dataset and attribute, and what it is."""
    nodes: list[tuple[str, object]] = [("", file)]
    file.visititems(lambda name, node: nodes.append((name, node)))
    for name, node in nodes:
        if name:
            yield name, node
        for attribute in node.attrs:
            yield f"{name}@{attribute}", node.attrs.get_id(attribute).dtype


def of_value(name: str) -> bool:
    """Whether it is, or belongs to, a value, and not to what holds values."""
    return any(
        Part(tree, "", "", "").matches(name.split("@")[0] if "@" in name else "")
        or any(
            Part(f"{tree}/", "", "", "").matches(name[: i + 1])
            for i, c in enumerate(name)
            if c == "/"
        )
        for tree in TREES
    )


class TestParts:
    def test_everything_is_described(self, file):
        for name, found in places(file):
            part = schema.find(name)
            if part is None:
                assert of_value(name), name
                continue
            if isinstance(found, h5py.Group):
                assert part.dtype == "group", name
                continue
            assert part.dtype != "group", name
            dtype = found.dtype if isinstance(found, h5py.Dataset) else found
            if part.dtype in KINDS:
                assert dtype.kind in KINDS[part.dtype], name
            if part.dtype in ("float64", "int64", "uint32"):
                assert dtype == part.dtype, name
            assert isinstance(found, h5py.Dataset) == bool(part.shape), name
            if isinstance(found, h5py.Dataset):
                assert (found.shape == ()) == (part.shape == "()"), name

    def test_everything_described_is_there(self, file):
        names = [name for name, _ in places(file)]
        for part in PARTS:
            assert any(part.matches(name) for name in names), part.path

    def test_columns_are_as_long_as_is_said(self, file):
        ended = file.attrs["status"] == b"finished"
        for table in ("history", "certificates"):
            count = file[f"records/{table}"][()]
            for column in file[table].values():
                assert (len(column) == count) == ended
            first = file[f"integrity/{table}"].attrs["first"]
            assert len(file[f"integrity/{table}"]) == len(file[table]["step"]) - first

    def test_room_is_filled_as_is_said(self, file):
        count = file["records/history"][()]
        # One record may have been begun.
        assert set(file["history/step"][count + 1 :]) <= {-1}
        assert all(math.isnan(value) for value in file["history/outer_loss"][count + 1 :])


class TestValues:
    def test_kinds_and_attributes(self, file):
        kinds, attributes = set(), set()

        def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
            if not of_value(f"{name}@"):
                return
            kind = node.attrs["kind"].decode()
            kinds.add(kind)
            own = set(node.attrs) & (VALUE_ATTRIBUTES.keys() | SCALE_ATTRIBUTES)
            if kind not in ("dict", "list", "tuple", "object") or isinstance(node, h5py.Dataset):
                assert set(node.attrs) <= VALUE_ATTRIBUTES.keys() | SCALE_ATTRIBUTES, name
            attributes.update(own)

        file.visititems(visit)
        assert kinds == VALUES.keys() - {"(plain)"}
        assert VALUE_ATTRIBUTES.keys() <= attributes


class TestReading:
    def run(self, name: str, file: h5py.File, folder: Path) -> dict[str, object]:
        (folder / "run.h5").write_bytes(Path(file.filename).read_bytes())
        namespace: dict[str, object] = {}
        with contextlib.chdir(folder):
            exec(schema.READING[name], namespace)
        return namespace

    @pytest.mark.parametrize("name", ["Python, h5py", "Python, xarray"])
    def test_python(self, file, tmp_path, name):
        found = self.run(name, file, tmp_path)
        run = load_run(file.filename)
        np.testing.assert_array_equal(found["loss"], run.history["outer_loss"])
        if "h5py" in name:
            np.testing.assert_array_equal(found["step"], run.history["step"])
            assert found["step_size"] == 0.1
            assert found["status"] == ("finished" if run.status == "finished" else "running")

    def test_this_library(self, file, tmp_path):
        self.run("Python, this library", file, tmp_path)

    def test_other_languages_are_there(self):
        assert {"MATLAB", "Julia"} <= schema.READING.keys()


def test_markdown():
    text = schema.markdown()
    for part in PARTS:
        assert f"`{part.path}`" in text
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.count("|") in (3, 5) for line in lines)
    assert text.count("```") == 2 * len(schema.READING)
