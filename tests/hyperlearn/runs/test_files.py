"""Run files: what is written comes back, nothing foreign is touched, a crash loses nothing."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import hyperlearn as hl
import hyperlearn.runs.environment
from hyperlearn.runs import RunFile
from hyperlearn.runs.environment import environment

ROOT = Path(hyperlearn.__file__).parents[1]


def certificate(**changes: Any) -> hl.Certificate:
    values = {
        "inner_stationarity": 0.25,
        "adjoint_residual": 1e-9,
        "hessian_residual": None,
        "converged": True,
        "exact": False,
        "iterations": 7,
        "operator": "Hessian(3, 3)",
        "solver": "CG(rtol=1e-08)",
        "reason": "because of α ≤ 1/L",
        "damping": 0.5,
    }
    return hl.Certificate(**values | changes)


def run_file(path: Path, **changes: Any) -> RunFile:
    values: dict[str, Any] = {"config": {}, "environment": {}, "attachments": {}}
    return RunFile(path, **values | changes)


class TestRoundTrip:
    def test_config(self, tmp_path):
        config = {
            "problem": "quadratic, naïve",
            "every": 10,
            "rate": 0.1,
            "huge": 1e300,
            "flag": True,
            "off": False,
            "nothing": None,
            "empty": "",
            "method": {"class": "NHGD", "rho": None, "inner": {"steps": 3}, "none": {}},
        }
        file = run_file(tmp_path / "run.h5", config=config, environment={"seed": 3})
        run = hl.load_run(tmp_path / "run.h5")
        assert run.config == config
        assert run.environment == {"seed": 3}
        kinds = {name: type(run.config[name]) for name in ("every", "rate", "flag", "problem")}
        assert kinds == {"every": int, "rate": float, "flag": bool, "problem": str}
        assert run.path == tmp_path / "run.h5"
        assert run.status == "running"
        file.close()
        assert hl.load_run(tmp_path / "run.h5").status == "killed"

    def test_history(self, tmp_path):
        file = run_file(tmp_path / "run.h5")
        rng = np.random.default_rng(0)
        losses = rng.normal(size=1500)  # more than one chunk
        losses[3] = np.nan
        for step, loss in enumerate(losses[:20]):
            file.append({"step": step, "outer_loss": loss}, None)
        run = hl.load_run(tmp_path / "run.h5")
        np.testing.assert_array_equal(run.history["outer_loss"], losses[:20])
        np.testing.assert_array_equal(run.history["step"], np.arange(20))
        assert run.history["step"].dtype.kind == "i"
        assert run.certificate is None
        assert run.certificates == {}

    def test_history_beyond_one_chunk(self, tmp_path):
        file = run_file(tmp_path / "run.h5")
        for i in range(1100):
            file.append({"step": i, "name": f"record {i}"})
        file.finish("finished", "", {})
        with h5py.File(file.path) as opened:
            np.testing.assert_array_equal(opened["history/step"], np.arange(1100))
            assert list(opened["history/name"].asstr()) == [f"record {i}" for i in range(1100)]

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"hessian_residual": 0.0, "effective_rank": 2.5, "error_bound": 1e-3},
            {"converged": False, "constraint_active": True, "adjoint_residual": math.inf},
        ],
    )
    def test_certificate(self, tmp_path, changes):
        """What was not measured is None in Python and NaN in the file."""
        file = run_file(tmp_path / "run.h5")
        file.append({"step": 0}, None)
        file.append({"step": 1}, certificate(iterations=1))
        file.append({"step": 2}, certificate(**changes))
        run = hl.load_run(file.path)
        assert run.certificate == certificate(**changes)
        assert type(run.certificate.converged) is bool
        assert type(run.certificate.iterations) is int
        assert len(run.history["step"]) == 3
        assert {len(column) for column in run.certificates.values()} == {2}
        np.testing.assert_array_equal(run.certificates["iterations"], [1, 7])
        assert run.certificates["reason"][0] == "because of α ≤ 1/L"
        unknown = "effective_rank" not in changes
        assert np.isnan(run.certificates["error_bound"][1]) == unknown
        with h5py.File(file.path) as opened:
            assert np.isnan(opened["certificates/hessian_residual"][0])
            assert opened["certificates/converged"].dtype == bool

    @pytest.mark.parametrize(
        "tree",
        [
            torch.arange(6.0).reshape(2, 3),
            torch.tensor(2.5, dtype=torch.float64),
            torch.zeros(0),
            {"half": torch.ones(2).bfloat16(), "other": torch.ones(2).half()},
            {"weight": torch.ones(2, 2), "bias": torch.zeros(2), "a": {"deep": torch.ones(1)}},
            [torch.ones(1) * i for i in range(12)],
            (torch.ones(1), [torch.zeros(2), {"x": torch.ones(3, dtype=torch.float64)}]),
            {"layers.0.weight": torch.ones(2), "β": torch.zeros(1)},
            {"layers/weight": torch.ones(2), "layers": torch.zeros(1), "100%25": torch.ones(1)},
        ],
    )
    def test_result(self, tmp_path, tree):
        file = run_file(tmp_path / "run.h5")
        file.finish("finished", "well", {"x": tree, "y": torch.ones(1)})
        run = hl.load_run(file.path)
        # The order of a dictionary too: it is the order of the flat vector.
        expected, layout = pytree.tree_flatten(tree)
        found, found_layout = pytree.tree_flatten(run.x)
        assert layout == found_layout
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        assert (run.status, run.message) == ("finished", "well")
        if isinstance(tree, dict):
            assert list(run.x) == list(tree)

    def test_attachments(self, tmp_path):
        arrays = {
            "labels": np.arange(5),
            "images": np.random.default_rng(0).random((3, 4, 4), dtype=np.float32),
            "mask": np.array([True, False]),
            "scalar": np.array(3.0),
            "empty": np.empty((0, 2)),
        }
        run_file(tmp_path / "run.h5", attachments=arrays)
        run = hl.load_run(tmp_path / "run.h5")
        assert set(run.attachments) == set(arrays)
        for name, array in arrays.items():
            assert run.attachments[name].dtype == array.dtype
            np.testing.assert_array_equal(run.attachments[name], array)

    def test_whole_run(self, tmp_path):
        """What minimize returns is what load_run reads."""
        problem = hl.BilevelProblem(
            lambda y, x: ((y["b"] - x) ** 2).sum() + (y["a"] ** 2).sum(),
            lambda y, x: ((y["b"] - 1) ** 2).sum(),
            x0=torch.zeros(2),
            y0={"b": torch.zeros(2), "a": torch.ones(1)},
            metrics={"mean": lambda y, x: float(x.mean())},
        )
        path = tmp_path / "deep" / "er" / "run.h5"
        run = hl.minimize(
            problem,
            hl.NHGD(),
            budget=hl.Budget(steps=5, seconds=100),
            seed=11,
            every=2,
            record=path,
            config={"label": "mine"},
            attachments={"data": np.eye(2)},
        )
        loaded = hl.load_run(path)
        assert torch.equal(loaded.x, run.x)
        assert list(loaded.y) == ["b", "a"]
        for name in ("status", "message", "config", "environment", "path", "certificate", "name"):
            assert getattr(loaded, name) == getattr(run, name), name
        for name in ("history", "certificates", "attachments"):
            assert set(getattr(loaded, name)) == set(getattr(run, name))
            for key, values in getattr(run, name).items():
                np.testing.assert_array_equal(getattr(loaded, name)[key], values)
        assert loaded.setting("budget") == hl.Budget(steps=5, seconds=100)
        assert loaded.setting("method") == hl.NHGD()
        assert loaded.config["method"]["class"] == "NHGD"
        assert loaded.config["method"]["damping"] == 0.1
        assert loaded.environment["seed"] == 11
        assert loaded.name == "mine, seed 11"


class TestFilesThatAreNoRuns:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist; expected a run file"):
            hl.load_run(tmp_path / "run.h5")

    def test_text(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("not a run")
        with pytest.raises(hl.RunFileError, match="is not an HDF5 file"):
            hl.load_run(path)

    def test_folder(self, tmp_path):
        with pytest.raises(hl.RunFileError, match="is not an HDF5 file"):
            hl.load_run(tmp_path)

    def test_other_hdf5(self, tmp_path):
        with h5py.File(tmp_path / "data.h5", "w") as file:
            file["images"] = np.ones(3)
        with pytest.raises(hl.RunFileError, match=r"not a hyperlearn run \(it holds images\)"):
            hl.load_run(tmp_path / "data.h5")

    def test_other_schema(self, tmp_path):
        path = run_file(tmp_path / "run.h5").path
        with h5py.File(path, "r+") as file:
            file.attrs["schema"] = 99
        with pytest.raises(hl.RunFileError, match="schema 99; this version reads schema 2"):
            hl.load_run(path)

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_cut_short(self, tmp_path, share):
        file = run_file(
            tmp_path / "run.h5", attachments={"a": np.random.default_rng(0).random(999)}
        )
        file.append({"step": 0}, certificate())
        size = file.path.stat().st_size
        with file.path.open("r+b") as opened:
            opened.truncate(int(share * size))
        with pytest.raises(hl.RunFileError, match=r"damaged|not an HDF5 file"):
            hl.load_run(file.path)

    def test_missing_group(self, tmp_path):
        path = run_file(tmp_path / "run.h5").path
        with h5py.File(path, "r+") as file:
            del file["history"]
        with pytest.raises(hl.RunFileError, match="damaged"):
            hl.load_run(path)


class TestOverwriting:
    def test_refused(self, tmp_path):
        file = run_file(tmp_path / "run.h5")
        file.append({"step": 0}, None)
        before = file.path.read_bytes()
        with pytest.raises(FileExistsError, match="exists; choose another file"):
            run_file(file.path)
        assert file.path.read_bytes() == before

    def test_asked_for(self, tmp_path):
        first = run_file(tmp_path / "run.h5")
        first.append({"step": 0}, None)
        first.close()
        run_file(tmp_path / "run.h5", overwrite=True, config={"new": 1})
        run = hl.load_run(tmp_path / "run.h5")
        assert run.config == {"new": 1}
        assert run.history == {}

    @pytest.mark.parametrize("kind", ["text", "hdf5", "schema"])
    def test_foreign_files_are_never_touched(self, tmp_path, kind):
        path = tmp_path / "data.h5"
        if kind == "text":
            path.write_text("years of work")
        else:
            with h5py.File(path, "w") as file:
                file["images"] = np.ones(3)
                if kind == "schema":
                    file.attrs.update(format="hyperlearn-run", schema=99)
        before = path.read_bytes()
        with pytest.raises(hl.RunFileError):
            run_file(path, overwrite=True)
        assert path.read_bytes() == before


def small_problem() -> hl.BilevelProblem:
    return hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
    )


class TestWhileItRuns:
    def test_readable_between_records(self, tmp_path):
        path, lengths = tmp_path / "run.h5", []

        def look(row: Any) -> None:
            with h5py.File(path) as file:
                lengths.append(file["records/history"][()])
                assert file["history/step"][lengths[-1] - 1] == row["step"]
            run = hl.load_run(path)
            assert run.status == "running"
            assert run.x is None
            assert run.history["outer_loss"][-1] == row["outer_loss"]

        hl.minimize(
            small_problem(),
            hl.IdentityHessian(),
            budget=hl.Budget(steps=4),
            every=2,
            record=path,
            callbacks=[look],
        )
        assert lengths == [1, 2, 3]

    def test_a_reader_that_holds_the_file_does_not_end_the_run(self, tmp_path):
        path, held = tmp_path / "run.h5", []
        reader = "import h5py, sys; f = h5py.File(sys.argv[1], 'r'); print(flush=True); input()"

        def hold(row: Any) -> None:
            if not held:
                held.append(
                    subprocess.Popen(
                        [sys.executable, "-c", reader, str(path)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                )
                assert held[0].stdout.readline() == b"\n"

        try:
            run = hl.minimize(
                small_problem(),
                hl.IdentityHessian(),
                budget=hl.Budget(steps=3),
                every=1,
                record=path,
                callbacks=[hold],
            )
            assert held[0].poll() is None  # it did hold the file all the time
        finally:
            held[0].communicate(b"\n", timeout=30)
        assert held[0].returncode == 0
        assert run.status == "finished"
        assert len(hl.load_run(path).history["step"]) == 4

    def test_killed_process(self, tmp_path):
        path = tmp_path / "run.h5"
        script = f"""
import os, signal, torch
import hyperlearn as hl

def kill(row):
    if row["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

problem = hl.BilevelProblem(
    lambda y, x: ((y - x) ** 2).sum(), lambda y, x: ((y - 1) ** 2).sum(),
    x0=torch.zeros(2), y0=torch.zeros(2),
)
hl.minimize(
    problem, hl.IdentityHessian(step_size=0.1), budget=hl.Budget(steps=100), every=1,
    record={str(path)!r}, callbacks=[kill],
)
"""
        process = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.returncode == -signal.SIGKILL
        run = hl.load_run(path)
        assert run.status == "killed"
        assert run.x is None
        np.testing.assert_array_equal(run.history["step"], [0, 1, 2, 3])
        same = hl.minimize(
            small_problem(),
            hl.IdentityHessian(step_size=0.1),
            budget=hl.Budget(steps=3),
            every=1,
        )
        np.testing.assert_array_equal(run.history["outer_loss"], same.history["outer_loss"])
        assert run.certificate == same.certificate


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
class TestGitState:
    @pytest.fixture(autouse=True)
    def forgotten(self):
        """The state is read once a process: it is that of the code that was imported."""
        hyperlearn.runs.environment._git_state.cache_clear()
        yield
        hyperlearn.runs.environment._git_state.cache_clear()

    def repository(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A repository that tracks a copy of the module, which then thinks that it lives there."""
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
            monkeypatch.delenv(name, raising=False)

        def git(*arguments: str) -> str:
            identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
            return subprocess.run(
                ["git", "-C", str(folder), *identity, *arguments],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()

        git("init", "-q")
        (folder / "environment.py").write_text("")
        monkeypatch.setattr(hyperlearn.runs.environment, "__file__", str(folder / "environment.py"))
        return git

    def test_clean_and_dirty(self, tmp_path, monkeypatch):
        git = self.repository(tmp_path, monkeypatch)
        git("add", "environment.py")
        git("commit", "-q", "-m", "first")
        found = environment(seed=5)
        assert found["git_revision"] == git("rev-parse", "HEAD")
        assert found["git_dirty"] is False
        (tmp_path / "environment.py").write_text("changed = True")
        assert environment(seed=5)["git_dirty"] is False  # imported before the change
        hyperlearn.runs.environment._git_state.cache_clear()
        assert environment(seed=5)["git_dirty"] is True

    def test_untracked_inside_of_another_repository(self, tmp_path, monkeypatch):
        """An installed package below somebody's checkout is not of that revision."""
        git = self.repository(tmp_path, monkeypatch)
        git("commit", "-q", "--allow-empty", "-m", "theirs")
        found = environment(seed=5)
        assert (found["git_revision"], found["git_dirty"]) == ("unknown", None)

    def test_no_repository(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        monkeypatch.setattr(
            hyperlearn.runs.environment, "__file__", str(tmp_path / "environment.py")
        )
        found = environment(seed=5)
        assert (found["git_revision"], found["git_dirty"]) == ("unknown", None)


def test_environment():
    found = environment(seed=5)
    assert found["seed"] == 5
    assert found["torch"] == str(torch.__version__)
    assert found["threads"] == torch.get_num_threads()
    assert type(found["torch"]) is str
