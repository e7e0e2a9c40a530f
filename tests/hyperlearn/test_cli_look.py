"""Commands that look at runs: what they print, and what they say of files they cannot use."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
import torch
from typer.testing import CliRunner

import hyperlearn as hl
from hyperlearn import cli
from hyperlearn.cli import show
from hyperlearn.runs import RunFile, load_run


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_refused(result: Any, *messages: str) -> None:
    """Exit code 2, an error on stderr that holds the messages, no traceback."""
    assert result.exit_code == 2, result.output
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    for message in messages:
        assert message in result.stderr


def record(path: Path, step_size: float = 0.1, seed: int = 0, steps: int = 40) -> hl.Run:
    problem = hl.BilevelProblem(
        lambda y, x: ((y["w"] - x) ** 2).sum(),
        lambda y, x: ((y["w"] - 1) ** 2).sum() * 1000,
        x0=torch.zeros(2),
        y0={"w": torch.zeros(2)},
        metrics={"distance": lambda y, x: float((x - 1).norm())},
        units={"distance": "m"},
        name="toy",
    )
    return hl.minimize(
        problem,
        hl.ImplicitDifferentiation(step_size=step_size / 1000, inner_step_size=0.25),
        budget=hl.Budget(steps=steps),
        seed=seed,
        record=path,
        every=2,
        config={"label": "exact"},
        attachments={"image": np.zeros((3, 4), dtype=np.float32), "note": "red \x1b[31m"},
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    record(folder / "slow.h5", 0.05)
    record(folder / "slow1.h5", 0.05, seed=1)
    record(folder / "fast.h5", 0.2)
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    return tmp_path


def cut(path: Path) -> Path:
    """The file without its end."""
    damaged = path.with_name("cut.h5")
    damaged.write_bytes(path.read_bytes()[:-200])
    return damaged


def spoil(path: Path, dataset: str, row: int = 0) -> None:
    """Change a byte of a dataset's chunk."""
    with h5py.File(path) as file:
        found = file[dataset]
        if found.chunks is None:
            place = found.id.get_offset()
        else:
            place = found.id.get_chunk_info_by_coord((row,)).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(bytes(content))


class TestShow:
    def test_all_of_it(self, folder):
        file = folder / "slow.h5"
        result = invoke("show", file)
        assert result.exit_code == 0, result.output
        run, text = load_run(file), result.stdout
        assert re.search(r"status +finished", text)
        assert run.message in text
        assert re.search(r"problem +toy", text)
        assert "ImplicitDifferentiation(step_size=5e-05" in text
        assert "solver=CG(" in re.sub(r"\s+", " ", text)
        assert f"torch {run.environment['torch']}" in text
        assert re.search(r"seed +0", text)
        assert "40 outer steps" in text
        assert "21 records, 20 certificates" in text
        assert "from step 40" in text
        assert "hyperlearn.resume(" in text
        row = next(line for line in text.splitlines() if "distance" in line)
        first, last = run.history["distance"][[0, -1]]
        assert f"{first:.5g}" in row
        assert row.count(f"{last:.5g}") == 2  # the best is the last
        assert " m " in row
        assert set("▁█") <= set(row)
        assert re.search(r"image +array +3 × 4 +float32", text)
        assert re.search(r"y\.w +tensor +2 +float32", text)
        assert "last certificate: " in text
        assert re.search(r"inner_stationarity +", text)

    def test_nothing_of_a_file_reaches_the_terminal_raw(self, folder):
        assert "\x1b" not in invoke("show", folder / "slow.h5").stdout

    def test_several(self, folder):
        text = invoke("show", folder / "slow.h5", folder / "fast.h5").stdout
        assert len(re.findall(r"^status", text, re.M)) == 2

    def test_config(self, folder):
        text = invoke("show", "--config", folder / "slow.h5").stdout
        lines = dict(line.split(" = ", 1) for line in text.splitlines())
        assert lines["method.step_size"] == "5e-05"
        assert lines["method.solver.class"] == "CG"
        assert lines["problem"] == "toy"
        assert "status" not in lines

    def test_run_without_records(self, tmp_path):
        RunFile(tmp_path / "run.h5", config={"problem": "toy"}, environment={}).close()
        result = invoke("show", tmp_path / "run.h5")
        assert result.exit_code == 0, result.output
        assert "killed" in result.stdout

    def test_killed_run_tells_how_to_go_on(self, folder):
        source = folder / "slow.h5"
        with h5py.File(source, "r+") as file:
            hl.runs.guarded.set_text(file, "status", "running")
        text = invoke("show", source).stdout
        assert re.search(r"status +killed", text)
        assert "from step 40" in text

    def test_long_results_are_cut(self, tmp_path):
        file = RunFile(tmp_path / "run.h5", config={}, environment={})
        file.finish("finished", "", {"x": {f"w{i}": torch.zeros(i) for i in range(50)}})
        text = invoke("show", file.path).stdout
        assert "x.w19" in text
        assert "x.w20" not in text
        assert "and 30 more" in text

    def test_damaged(self, folder):
        spoil(folder / "slow.h5", "result/x")
        spoil(folder / "slow.h5", "history/outer_loss")
        result = invoke("show", folder / "slow.h5", folder / "fast.h5")
        # A sealed chunk is compared when it is read.
        assert_refused(result, "slow.h5", "hyperlearn recover")
        assert re.search(r"status +finished", result.stdout)  # the other one is shown

    def test_cut_short(self, folder):
        damaged = cut(folder / "slow.h5")
        result = invoke("show", damaged)
        assert_refused(result, "cut.h5 is damaged", "hyperlearn recover FILE --out")
        assert re.search(r"status +damaged", result.stdout)
        assert "lost: " in result.stdout

    def test_beyond_recovery(self, folder):
        file = folder / "slow.h5"
        file.write_bytes(file.read_bytes()[:100])
        result = invoke("show", file)
        assert_refused(result, "is damaged")
        assert result.stdout == ""

    def test_others_files(self, tmp_path):
        with h5py.File(tmp_path / "other.h5", "w") as other:
            other["images"] = [1]
        assert_refused(invoke("show", tmp_path / "other.h5"), "not a hyperlearn run")
        assert_refused(invoke("show", tmp_path / "no.h5"), "does not exist")


class TestFollow:
    def test_to_the_end(self, tmp_path, monkeypatch):
        file = RunFile(tmp_path / "run.h5", config={}, environment={})
        moves = [
            lambda: file.append({"step": 0, "outer_loss": 2.0}),
            lambda: [file.append({"step": i, "outer_loss": 1.0}) for i in (1, 2)],
            lambda: file.finish("finished", "well", {}),
        ]
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            moves.pop(0)()

        monkeypatch.setattr(show.time, "sleep", sleep)
        result = invoke("show", "--follow", file.path)
        assert result.exit_code == 0, result.output
        assert waits == [1, 1, 1]
        told = re.findall(r"^step (\d), outer_loss (\S+)$", result.stdout, re.M)
        assert told == [("0", "2"), ("1", "1"), ("2", "1")]
        assert re.search(r"status +finished", result.stdout)

    def test_interrupt_stops_the_following_only(self, tmp_path, monkeypatch):
        file = RunFile(tmp_path / "run.h5", config={}, environment={})

        def sleep(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(show.time, "sleep", sleep)
        result = invoke("show", "--follow", file.path)
        assert result.exit_code == 0
        assert "the run itself goes on" in result.stderr
        file.close()

    def test_killed_run_ends_it(self, folder):
        RunFile(folder / "run.h5", config={}, environment={}).close()
        assert invoke("show", "--follow", folder / "run.h5").exit_code == 0

    def test_one_file(self, folder):
        result = invoke("show", "--follow", folder / "slow.h5", folder / "fast.h5")
        assert_refused(result, "--follow is for one file")


class TestList:
    def rows(self, *arguments: object) -> list[list[str]]:
        result = invoke("list", *arguments)
        assert result.exit_code == 0, result.output
        lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
        return [line for line in lines if line[0].endswith((".h5", ".hdf5"))]

    def test_table(self, folder):
        (folder / "deep").mkdir()
        shutil.move(folder / "fast.h5", folder / "deep" / "fast.hdf5")
        with h5py.File(folder / "other.h5", "w") as other:
            other["images"] = [1]
        cut(folder / "slow.h5")
        rows = {row[0]: row for row in self.rows(folder)}
        assert sorted(rows) == ["cut.h5", "deep/fast.hdf5", "slow.h5", "slow1.h5"]
        run = load_run(folder / "slow.h5")
        expected = ["slow.h5", "finished", "toy", "exact", "0", "40"]
        assert rows["slow.h5"][:6] == expected
        assert rows["slow.h5"][7] == f"{run.history['outer_loss'][-1]:.5g}"
        assert rows["slow1.h5"][4] == "1"
        assert rows["cut.h5"][1] == "damaged"

    def test_filters_and_order(self, folder):
        def names(*options: object) -> list[str]:
            return [row[0] for row in self.rows(folder, *options)]

        assert names("--where", "method.step_size=2e-4") == ["fast.h5"]
        assert names("--where", "seed=0", "--where", "method.step_size<1e-4") == ["slow.h5"]
        assert names("--sort", "outer_loss")[0] == "fast.h5"
        assert names("--sort", "outer_loss", "--reverse")[-1] == "fast.h5"
        assert names("--method", "exact", "--problem", "toy", "--status", "finished") == [
            "fast.h5",
            "slow.h5",
            "slow1.h5",
        ]
        assert names("--status", "killed") == []

    def test_metric(self, folder):
        (row,) = self.rows(folder / "slow.h5", "--metric", "distance")
        assert f"{load_run(folder / 'slow.h5').history['distance'][-1]:.5g}" in row

    def test_alias(self, folder):
        assert invoke("ls", folder).stdout == invoke("list", folder).stdout
        assert "ls" not in re.findall(r"\w+", invoke("--help").stdout)

    def test_here(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        assert len(self.rows()) == 3

    def test_none(self, tmp_path):
        assert invoke("list", tmp_path).stdout == f"no runs in {tmp_path}\n"
        assert_refused(invoke("list", tmp_path / "no"), "there is no folder")

    def test_refused(self, folder):
        assert_refused(invoke("list", folder, "--metric", "outer_los"), "did you mean 'outer_loss'")
        assert_refused(invoke("list", folder, "--where", "x"), "expected key=value")
        assert_refused(invoke("list", folder, "--sort", "outerloss"), "did you mean 'outer_loss'")


class TestCompare:
    def test_tables(self, folder):
        slow, fast = folder / "slow.h5", folder / "fast.h5"
        result = invoke("compare", slow, fast, "--metric", "distance", "--target", 1.0)
        assert result.exit_code == 0, result.output
        text = result.stdout
        assert re.search(r"method\.step_size +5e-05 +0\.0002", text)
        assert "method.inner_step_size" not in text
        runs = [load_run(slow), load_run(fast)]
        firsts = [
            next(s for s, d in zip(r.history["step"], r.history["distance"], strict=True) if d <= 1)
            for r in runs
        ]
        assert "cost of distance ≤ 1" in text
        costs = [line for line in text.splitlines() if "step_size=" in line and " m" not in line]
        for line, first in zip(costs[-2:], firsts, strict=True):
            assert re.search(rf" {first} ", line), text
        assert f"{firsts[1] / firsts[0]:.3g}" in costs[-1]

    def test_baseline(self, folder):
        slow, fast = folder / "slow.h5", folder / "fast.h5"
        one = invoke("compare", slow, fast, "--baseline", fast).stdout
        other = invoke("compare", fast, slow).stdout
        ratios = [
            [line.split()[4] for line in text.splitlines()[-4:] if "exact" in line]
            for text in (one, other)
        ]
        assert sorted(ratios[0]) == sorted(ratios[1])
        added = invoke("compare", slow, "--baseline", fast)
        assert added.exit_code == 0, added.output

    def test_not_reached(self, folder):
        result = invoke("compare", folder / "slow.h5", folder / "fast.h5", "--target", -1)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("not reached") == 6

    def test_groups(self, folder):
        result = invoke("compare", *sorted(folder.glob("*.h5")), "--group")
        assert result.exit_code == 0, result.output
        assert "median [min, max]" in result.stdout
        seconds = [
            load_run(folder / name).history["seconds"][-1] for name in ("slow.h5", "slow1.h5")
        ]
        assert f"[{min(seconds):.4g}, {max(seconds):.4g}]" in result.stdout
        assert "2 runs" in result.stdout

    def test_some_of_a_group_do_not_reach_it(self, tmp_path):
        for seed, losses in enumerate(([2.0, 1.0], [2.0, 1.5], [2.0, 0.5])):
            file = RunFile(
                tmp_path / f"{seed}.h5", config={"label": "a"}, environment={"seed": seed}
            )
            for step, loss in enumerate(losses):
                file.append({"step": step, "outer_loss": loss})
            file.finish("finished", "", {})
        files = sorted(tmp_path.glob("*.h5"))
        result = invoke("compare", *files, "--group", "--target", 1)
        assert result.exit_code == 0, result.output
        assert "a, 3 runs, 2 reach it" in result.stdout
        assert "1 [1, not reached]" in result.stdout

    def test_refused(self, folder):
        assert_refused(invoke("compare", folder / "slow.h5"), "1 runs; expected at least two")
        damaged = cut(folder / "slow.h5")
        refused = invoke("compare", damaged, folder / "fast.h5")
        assert_refused(refused, "is damaged", "hyperlearn recover")


class TestExport:
    def test_csv(self, folder):
        out = folder / "slow.csv"
        result = invoke("export", folder / "slow.h5", "--out", out)
        assert (result.exit_code, result.stdout) == (0, f"{out}\n")
        values = pandas.read_csv(out)["outer_loss"]
        np.testing.assert_array_equal(values, load_run(folder / "slow.h5").history["outer_loss"])

    def test_certificates(self, folder):
        out = folder / "slow.parquet"
        invoke("export", folder / "slow.h5", "--out", out, "--what", "certificates")
        assert "adjoint_residual" in pandas.read_parquet(out)

    def test_existing_file(self, folder):
        out = folder / "slow.csv"
        out.write_text("mine")
        refused = invoke("export", folder / "slow.h5", "--out", out)
        assert_refused(refused, "slow.csv exists; --force overwrites it")
        assert out.read_text() == "mine"
        assert invoke("export", folder / "slow.h5", "--out", out, "--force").exit_code == 0

    def test_refused(self, folder):
        file = folder / "slow.h5"
        assert_refused(invoke("export", file, "--out", file, "--force"), "expected .csv")
        assert_refused(invoke("export", file, "--out", "a.csv", "--what", "x"), "what='x'")
        assert load_run(file).status == "finished"


class TestRecover:
    def test_records(self, folder):
        file = RunFile(folder / "long.h5", config={"problem": "toy"}, environment={})
        for step in range(551):
            file.append({"step": step, "outer_loss": 1.0})
        file.checkpoint(551, {"x": torch.zeros(1)})
        file.finish("finished", "", {})
        spoil(folder / "long.h5", "history/outer_loss", 512)
        result = invoke("recover", folder / "long.h5", "--out", folder / "new.h5")
        assert result.exit_code == 0, result.output
        saved = load_run(folder / "new.h5")
        assert len(saved.history["step"]) == 512
        assert "512 records" in result.stdout
        assert "lost: 39 of 551 records of history" in result.stdout
        assert ("lost: the checkpoint" in result.stdout) == (not saved.checkpoints)

    def test_cut_short(self, folder):
        result = invoke("recover", cut(folder / "slow.h5"), "--out", folder / "new.h5")
        assert result.exit_code == 0, result.output
        saved = load_run(folder / "new.h5")
        count = len(saved.history.get("step", ()))
        assert f"new.h5: {count} " in result.stdout
        assert "checkpoints" in result.stdout

    def test_refused(self, folder):
        damaged = cut(folder / "slow.h5")
        assert_refused(invoke("recover", damaged, "--out", folder / "fast.h5"), "exists")
        assert_refused(invoke("recover", folder / "no.h5", "--out", folder / "new.h5"), "not exist")
        damaged.write_bytes(b"nothing")
        assert_refused(invoke("recover", damaged, "--out", folder / "new.h5"), "nothing of a run")
        assert not (folder / "new.h5").exists()


class TestSchema:
    def test_tables_and_code(self):
        text = invoke("schema").stdout
        for part in ("/history/<metric>", "records/history", "h5read", "HDF5", "hl.load_run"):
            assert part in text

    def test_markdown(self):
        assert invoke("schema", "--markdown").stdout == hl.runs.schema.markdown() + "\n"


def test_help_names_the_commands():
    text = CliRunner().invoke(cli.app, ["--help"], env=os.environ | {"COLUMNS": "100"}).stdout
    for name in ("show", "list", "compare", "export", "recover", "schema"):
        assert re.search(rf"\b{name}\b", text)
