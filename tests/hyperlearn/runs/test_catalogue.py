"""Lists of runs: which files are found, what is read of them, which conditions they meet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

import hyperlearn as hl
from hyperlearn.runs import RunFile, frames, load_run
from hyperlearn.runs.catalogue import Condition, catalogue, read_entry, run_files


def write(path: Path, *, seed: int = 0, loss: float = 1.0, status: str = "", **config: Any) -> Path:
    settings = {"problem": "toy", "method": {"class": "NHGD", "step_size": 0.1}, **config}
    file = RunFile(path, config=settings, environment={"seed": seed, "torch": "2.6"})
    for step in range(3):
        file.append({"step": step, "seconds": step / 2, "outer_loss": loss - step})
    if status:
        file.finish(status, "", {})
    file.close()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "a.h5", loss=5.0, status="finished", label="nhgd")
    write(
        tmp_path / "deep" / "b.hdf5",
        seed=1,
        loss=float("nan"),
        status="diverged",
        method={"class": "StocBiO", "step_size": 1, "solver": {"class": "CG", "rtol": None}},
    )
    write(tmp_path / "deep" / "c.h5", seed=2, loss=4.0, problem="other", flag=True)
    with h5py.File(tmp_path / "images.h5", "w") as other:
        other["images"] = [1]
    (tmp_path / "notes.txt").write_text("no run")
    return tmp_path


def names(found: list[Any]) -> list[str]:
    return [entry.path.name for entry in found]


class TestEntries:
    def test_agrees_with_the_run(self, folder):
        for path in run_files(folder):
            if path.name == "images.h5":
                assert read_entry(path) is None
                continue
            run = load_run(path)
            flat = frames.flat(run.config)
            entry = read_entry(path, [*flat, *run.history, "environment.torch", "missing"])
            assert (entry.status, entry.label) == (run.status, run.label)
            assert entry.problem == run.config["problem"]
            assert entry.seed == run.environment["seed"]
            assert entry.values["environment.torch"] == "2.6"
            assert entry.values["missing"] is None
            assert entry.metrics == tuple(run.history)
            assert {name: entry.values[name] for name in flat} == flat
            for name, values in run.history.items():
                assert entry.values[name] == pytest.approx(values[-1].item(), nan_ok=True)
            assert entry.size == path.stat().st_size
            assert entry.created is not None

    def test_keys_with_dots_and_slashes(self, tmp_path):
        settings = {"a.b": {"c": 1}, "a": {"x": 2}, "list": [1, "two"], "numbers": list(range(9))}
        path = write(tmp_path / "a.h5", **settings)
        keys = ("a.b.c", "a.x", "a", "list", "numbers", "list.0", "method.class.x", ".", "")
        values = read_entry(path, keys).values
        assert (values["a.b.c"], values["a.x"]) == (1, 2)
        assert values["list"] == "[1, 'two']"
        assert values["numbers"] == str(list(range(9)))
        assert [values[key] for key in ("a", "list.0", "method.class.x", ".", "")] == [None] * 5

    def test_run_without_records(self, tmp_path):
        file = RunFile(tmp_path / "a.h5", config={}, environment={})
        entry = read_entry(file.path)
        assert (entry.status, entry.values, entry.label, entry.seed) == (
            "running",
            {"step": None, "seconds": None},
            "",
            None,
        )
        file.close()
        assert read_entry(file.path).status == "killed"

    def test_only_the_last_record_is_read(self, folder, monkeypatch):
        rows: list[Any] = []
        array = hl.runs.guarded.array

        def watched(dataset: Any, part: slice | None = None) -> Any:
            rows.append((dataset.name, part))
            return array(dataset, part)

        monkeypatch.setattr(hl.runs.guarded, "array", watched)
        catalogue(folder)
        history = [part for name, part in rows if name.startswith("/history")]
        assert len(history) == 9  # three files, of each step, seconds, outer_loss
        assert {part.stop - part.start for part in history} == {1}

    def test_damaged(self, folder):
        whole = (folder / "a.h5").read_bytes()
        (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
        (folder / "empty.h5").touch()
        found = {entry.path.name: entry for entry in catalogue(folder)}
        assert found["cut.h5"].status == found["empty.h5"].status == "damaged"
        assert "damaged" in found["cut.h5"].message
        assert names(catalogue(folder, statuses=["damaged"])) == ["cut.h5", "empty.h5"]

    def test_other_schema(self, folder):
        with h5py.File(folder / "a.h5", "r+") as file:
            file.attrs["schema"] = 1
        (entry,) = catalogue(folder, statuses=["refused"])
        assert "schema 1" in entry.message

    def test_harmful_files(self, folder, tmp_path):
        with h5py.File(folder / "a.h5", "r+") as file:
            del file["config"]
            file["config"] = h5py.ExternalLink(tmp_path / "b.h5", "/config")
        assert read_entry(folder / "a.h5").status == "refused"
        with h5py.File(folder / "deep" / "c.h5", "r+") as file:
            file["records/history"][()] = 10**6
        assert read_entry(folder / "deep" / "c.h5").status == "damaged"


class TestFiles:
    def test_below(self, folder):
        found = [str(path.relative_to(folder)) for path in run_files(folder)]
        assert found == ["a.h5", "images.h5", "deep/b.hdf5", "deep/c.h5"]
        assert names(catalogue(folder)) == ["a.h5", "b.hdf5", "c.h5"]

    def test_one_file(self, folder):
        assert names(catalogue(folder / "a.h5")) == ["a.h5"]

    def test_links_to_folders_are_not_followed(self, folder):
        os.symlink(folder, folder / "deep" / "again")
        assert len(catalogue(folder)) == 3

    def test_links_to_nowhere(self, folder):
        os.symlink(folder / "no.h5", folder / "link.h5")
        assert len(catalogue(folder)) == 3

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            catalogue(tmp_path / "no")

    def test_empty_folder(self, tmp_path):
        assert catalogue(tmp_path, where=["anything=1"], sort="anything") == []


class TestConditions:
    @pytest.mark.parametrize(
        ("text", "value", "met"),
        [
            ("a=0.1", 0.1, True),
            ("a=1e-1", 0.1, True),
            ("a==3", 3, True),
            ("a=3.0", 3, True),
            ("a!=3", 4, True),
            ("a!=3", None, False),
            ("a<3", 2, True),
            ("a<3", 3, False),
            ("a<=3", 3, True),
            ("a>3", 3, False),
            ("a>=3", 3, True),
            ("a > 3", 4, True),
            ("a<3", float("nan"), False),
            ("a=nan", float("nan"), True),
            ("a=cg", "CG", True),
            ("a=true", "True", True),
            ("a=none", "None", True),
            ("a<3", "None", False),
            ("a<2026-02", "2026-01-05", True),
            ("a=", "", True),
        ],
    )
    def test_met(self, text, value, met):
        assert Condition.parse(text).met(value) == met

    @pytest.mark.parametrize("text", ["", "a", "=1", "a b=1", "a~1"])
    def test_not_understood(self, text):
        with pytest.raises(ValueError, match="expected key=value"):
            Condition.parse(text)

    def test_order_of_a_number_and_text(self):
        with pytest.raises(ValueError, match="a<0,1: a is a number; expected one"):
            Condition.parse("a<0,1").met(0.5)

    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            (["method.step_size=0.1"], ["a.h5", "c.h5"]),
            (["method.step_size>0.1"], ["b.hdf5"]),
            (["method.solver.class=cg"], ["b.hdf5"]),
            (["method.solver.rtol=none"], ["b.hdf5"]),
            (["flag=true"], ["c.h5"]),
            (["outer_loss<2.5"], ["c.h5"]),
            (["outer_loss<=3"], ["a.h5", "c.h5"]),
            (["seed>=1", "seed<2"], ["b.hdf5"]),
            (["environment.torch=2.6"], ["a.h5", "b.hdf5", "c.h5"]),
            (["steps=2"], ["a.h5", "b.hdf5", "c.h5"]),
        ],
    )
    def test_where(self, folder, where, expected):
        assert names(catalogue(folder, where=where)) == expected

    def test_other_filters(self, folder):
        assert names(catalogue(folder, statuses=["finished", "killed"])) == ["a.h5", "c.h5"]
        assert names(catalogue(folder, methods=["nhgd"])) == ["a.h5", "c.h5"]  # label or class
        assert names(catalogue(folder, methods=["stocbio"])) == ["b.hdf5"]
        assert names(catalogue(folder, problems=["other"])) == ["c.h5"]
        assert catalogue(folder, methods=["nhgd"], problems=["none"]) == []

    def test_unknown_names(self, folder):
        for options, message in (
            ({"where": ["method.stepsize=1"]}, "did you mean 'method.step_size'"),
            ({"sort": "secnds"}, "did you mean 'seconds'"),
            ({"statuses": ["finish"]}, "did you mean 'finished'"),
            ({"metrics": ["outer_los"]}, "did you mean 'outer_loss'"),
        ):
            with pytest.raises(ValueError, match=message):
                catalogue(folder, **options)


class TestOrder:
    def test_by_value_with_the_missing_last(self, folder):
        assert names(catalogue(folder, sort="outer_loss")) == ["c.h5", "a.h5", "b.hdf5"]
        assert names(catalogue(folder, sort="outer_loss", reverse=True)) == [
            "a.h5",
            "c.h5",
            "b.hdf5",
        ]
        assert names(catalogue(folder, sort="method.solver.class"))[0] == "b.hdf5"
        assert names(catalogue(folder, sort="seed", reverse=True)) == ["c.h5", "b.hdf5", "a.h5"]

    def test_by_time(self, folder):
        os.utime(folder / "a.h5", (2e9, 2e9))
        assert names(catalogue(folder, sort="modified"))[-1] == "a.h5"


def test_real_run(tmp_path):
    problem = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
    )
    method = hl.IdentityHessian(curvature=2.0, step_size=0.1)
    run = hl.minimize(problem, method, budget=hl.Budget(steps=5), seed=7, record=tmp_path / "a.h5")
    (entry,) = catalogue(tmp_path)
    assert (entry.status, entry.label, entry.seed) == ("finished", "IdentityHessian", 7)
    assert entry.values["outer_loss"] == run.history["outer_loss"][-1]
    assert entry.values["step"] == 5
