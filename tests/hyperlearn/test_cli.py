"""The command line: what runs leave behind, and what is said about input that cannot be used."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hyperlearn as hl
from hyperlearn import cli, datasets
from hyperlearn.cli.run import EXPERIMENTS
from hyperlearn.experiments import data_cleaning
from hyperlearn.experiments.data_cleaning import METHODS

SMALL = [
    f"--set={setting}"
    for setting in (
        "train_size=500",
        "validation_size=200",
        "selection_size=0",
        "inner_batch_size=64",
        "inner_steps=3",
    )
]


def invoke(*arguments: object) -> object:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run(*arguments: object) -> object:
    return invoke("run", "data-cleaning", *SMALL, *arguments)


def assert_refused(result: object, *messages: str) -> None:
    """One line on stderr that holds the messages, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    for message in messages:
        assert message in result.stderr


@pytest.fixture(scope="module")
def data() -> data_cleaning.CleaningData:
    return data_cleaning.load_data(
        data_cleaning.DataCleaning(train_size=500, validation_size=200, selection_size=0)
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, data: data_cleaning.CleaningData) -> None:
    """Spare reading MNIST again where its content does not matter."""
    monkeypatch.setattr(data_cleaning, "load_data", lambda task: data)


class TestRun:
    def test_file_and_table(self, tmp_path):
        file = tmp_path / "new" / "run.h5"
        result = run("--steps", 3, "--every", 2, "--seed", 5, "--out", file)
        assert result.exit_code == 0, result.output
        stored = hl.load_run(file)
        assert stored.status == "finished"
        assert stored.config["label"] == "nhgd"
        assert stored.config["task"]["train_size"] == 500
        assert stored.config["method"]["inner_batch_size"] == 64
        assert stored.environment["seed"] == stored.config["task"]["data_seed"] == 5
        np.testing.assert_array_equal(stored.history["step"], [0, 2, 3])
        assert stored.x.shape == (500,)
        rows = dict(re.findall(r"^ (\S.*?)  +(\S+) *$", result.stdout, re.M))
        assert rows["method"] == "nhgd"
        assert rows["test accuracy"] == f"{stored.history['test_accuracy'][-1]:.4f}"
        assert rows["outer loss"] == f"{stored.history['outer_loss'][-1]:.4f}"
        assert rows["AUC of the weights"] == f"{stored.history['weight_auc'][-1]:.4f}"
        assert rows["outer steps"] == "3"
        assert rows["gradients"] == "12"  # 3 inner and 1 outer a step
        assert rows["Hessian products"] == "0"
        assert rows["cross products"] == "3"
        residual = stored.certificate.hessian_residual
        assert rows["adjoint residual (Hessian)"] == f"{residual:.2g}"
        assert rows["status"] == "finished"
        assert str(file) in result.stdout
        assert "\r" not in result.output  # no progress bar outside a terminal

    @pytest.mark.usefixtures("loaded")
    def test_data_seed_of_its_own(self, tmp_path):
        file = tmp_path / "run.h5"
        run("--steps", 1, "--seed", 5, "--set", "data_seed=2", "--out", file)
        stored = hl.load_run(file)
        assert (stored.environment["seed"], stored.config["task"]["data_seed"]) == (5, 2)

    @pytest.mark.usefixtures("loaded")
    def test_every_method_in_turn(self, tmp_path):
        result = run("--method", "all", "--steps", 1, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        for label in METHODS:
            stored = hl.load_run(tmp_path / f"data-cleaning-{label}-seed0.h5")
            assert stored.config["label"] == label
            assert label in result.stdout
        residuals = next(line for line in result.stdout.splitlines() if "residual" in line).split()
        measured = [value != "-" for value in residuals[-len(METHODS) :]]
        assert measured == [label not in ("unrolled", "none") for label in METHODS]

    @pytest.mark.usefixtures("loaded")
    def test_default_place_is_below_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        methods = ("--method", "none", "--method", "identity", "--method", "none")
        assert run("--steps", 1, *methods, "--seed", 3).exit_code == 0
        assert sorted(path.name for path in Path("runs").iterdir()) == [
            "data-cleaning-identity-seed3.h5",
            "data-cleaning-none-seed3.h5",
        ]

    @pytest.mark.usefixtures("loaded")
    def test_default_budget_is_a_minute(self, tmp_path, monkeypatch):
        budgets = []

        def clean(*_: object, budget: hl.Budget, **__: object) -> hl.Run:
            budgets.append(budget)
            return hl.Run(config={"label": "nhgd"})

        monkeypatch.setattr(data_cleaning, "clean", clean)
        run("--out", tmp_path)
        run("--out", tmp_path, "--seconds", 2.5)
        assert budgets == [hl.Budget(seconds=60), hl.Budget(seconds=2.5)]

    @pytest.mark.usefixtures("loaded")
    def test_quiet(self, tmp_path):
        assert run("--steps", 1, "--quiet", "--out", tmp_path).output == ""

    @pytest.mark.usefixtures("loaded")
    def test_threads(self, tmp_path):
        before = torch.get_num_threads()
        try:
            run("--steps", 1, "--threads", 1, "--out", tmp_path / "run.h5")
            assert hl.load_run(tmp_path / "run.h5").environment["threads"] == 1
        finally:
            torch.set_num_threads(before)

    @pytest.mark.usefixtures("loaded")
    def test_force_overwrites_a_run(self, tmp_path):
        file = tmp_path / "run.h5"
        run("--steps", 1, "--out", file)
        refused = run("--steps", 2, "--out", file)
        assert_refused(refused, f"{file} exists", "--force overwrites it")
        assert hl.load_run(file).history["step"][-1] == 1
        assert run("--steps", 2, "--out", file, "--force").exit_code == 0
        assert hl.load_run(file).history["step"][-1] == 2

    @pytest.mark.usefixtures("loaded")
    def test_warnings_are_one_line_each(self, tmp_path):
        result = run(
            *("--steps", 1, "--method", "cg10", "--out", tmp_path),
            *("--set", "solver.stop_at_maxiter=false", "--set", "solver.maxiter=1"),
        )
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("warning: the adjoint solve missed its tolerance in 1 of 1")
        assert result.stderr.count("\n") == 1

    def test_list_settings(self):
        result = invoke(
            *("run", "data-cleaning", "--method", "nhgd", "--method", "cg10"),
            *("--list-settings", "--set", "damping=0.375"),
        )
        assert result.exit_code == 0, result.output
        for text in ("train_size", "50000", "solver.maxiter", "0.375"):
            assert text in result.stdout
        assert "Weight of the inner penalty" in result.stdout
        assert "`" not in result.stdout


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "messages"),
        [
            (
                ["--method", "ngd"],
                ["unknown method 'ngd': did you mean 'nhgd'?", "Known: nhgd, cg10", "none, all"],
            ),
            (["--seconds", 3, "--steps", 2], ["--seconds and --steps exclude each other"]),
            (["--seconds", -1], ["seconds=-1", "expected a positive number"]),
            (["--seconds", "nan"], ["seconds=nan"]),
            (["--steps", 0], ["steps=0"]),
            (["--every", 0], ["--every 0: expected at least 1"]),
            (["--set", "dampin=1"], ["unknown setting 'dampin'", "did you mean 'damping'"]),
            (["--set", "damping"], ["'damping': expected key=value"]),
            (["--set", "damping=much"], ["damping=much: expected a number"]),
            (["--set", "corruption=2"], ["cannot set", "corruption=2", "a share from 0 to 1"]),
            (["--method", "all", "--set", "unroll_steps=2"], ["unknown setting 'unroll_steps'"]),
            (["--set", "dataset=mnits"], ["unknown data set 'mnits': did you mean 'mnist'?"]),
            (["--set", "data_seed=1", "--set", "data_seed=2"], ["'data_seed' is given twice"]),
            (["--set", "outer_batch_size=500"], ["batch size 500 for outer_data of 200 samples"]),
        ],
    )
    def test_input(self, tmp_path, arguments, messages):
        assert_refused(run("--out", tmp_path, *arguments), *messages)
        assert list(tmp_path.iterdir()) == []

    def test_more_than_the_data_set_holds(self, tmp_path):
        arguments = ("--set", "train_size=70000", "--out", tmp_path)
        result = invoke("run", "data-cleaning", *arguments)
        assert_refused(result, "= 80000; the data set has 60000 training images")

    def test_experiment(self):
        result = invoke("run", "data-cleening")
        assert_refused(result, "unknown experiment 'data-cleening': did you mean 'data-cleaning'?")

    def test_one_file_for_several_methods(self, tmp_path):
        result = run("--method", "nhgd", "--method", "none", "--out", tmp_path / "run.h5")
        assert_refused(result, "several methods need a folder")

    def test_later_files_are_looked_at_before_the_first_run(self, tmp_path):
        (tmp_path / "data-cleaning-none-seed0.h5").touch()
        result = run("--method", "nhgd", "--method", "none", "--out", tmp_path)
        assert_refused(result, "data-cleaning-none-seed0.h5 exists")
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_file_that_is_no_run_is_never_overwritten(self, tmp_path):
        file = tmp_path / "thesis.h5"
        file.write_text("ten years of work")
        assert_refused(run("--out", file, "--force"), f"{file} is not an HDF5 file")
        assert file.read_text() == "ten years of work"

    @pytest.mark.usefixtures("loaded")
    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        result = run("--steps", 1, "--out", tmp_path / "file" / "run.h5")
        assert_refused(result, str(tmp_path / "file"))

    def test_missing_data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets, "search_path", lambda: [tmp_path])
        monkeypatch.delenv("HYPERLEARN_DATA_URL", raising=False)
        assert_refused(run("--out", tmp_path), "mnist.h5", "set HYPERLEARN_DATA")

    def test_unexpected_exceptions_keep_their_traceback(self, tmp_path, monkeypatch):
        def load_data(task: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(data_cleaning, "load_data", load_data)
        result = run("--out", tmp_path)
        assert isinstance(result.exception, RuntimeError)
        assert "error: " not in result.output


@pytest.mark.usefixtures("loaded")
class TestEnds:
    def test_divergence(self, tmp_path):
        result = run(
            *("--steps", 3, "--every", 1, "--set", "inner_step_size=1e38", "--out", tmp_path),
            *("--method", "none", "--method", "identity"),
        )
        assert result.exit_code == 3
        for label in ("none", "identity"):  # the one does not keep the other from running
            file = tmp_path / f"data-cleaning-{label}-seed0.h5"
            stored = hl.load_run(file)
            assert stored.status == "diverged"
            assert stored.history["step"][0] == 0
            assert f"error: {label} diverged: " in result.stderr
            assert f"what was recorded is in {file}" in result.stderr
        assert "no longer finite" in result.stderr
        assert "diverged" in result.stdout

    def test_interruption_while_loading(self, tmp_path, monkeypatch):
        def load_data(task: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(data_cleaning, "load_data", load_data)
        result = run("--out", tmp_path)
        assert result.exit_code == 130
        assert result.stderr == "interrupted\n"

    def test_interruption_ends_the_series(self, tmp_path, monkeypatch):
        def clean(method: object, task: object, *, record: Path, **_: object) -> hl.Run:
            record.touch()
            text = "stopped by Ctrl-C after 0 outer steps"
            return hl.Run(config={"label": "none"}, status="interrupted", message=text, path=record)

        monkeypatch.setattr(data_cleaning, "clean", clean)
        result = run("--out", tmp_path, "--method", "none", "--method", "identity")
        assert result.exit_code == 130
        assert "none: stopped by Ctrl-C after 0 outer steps" in result.stdout
        assert len(list(tmp_path.iterdir())) == 1


class TestSignals:
    """With processes of their own: what a run leaves behind when it is stopped from outside."""

    @pytest.fixture
    def start(self, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
        started = []

        def start() -> subprocess.Popen[str]:
            arguments = ["run", "data-cleaning", *SMALL, "--method", "identity"]
            options = ["--seconds", "60", "--every", "1", "--out", str(tmp_path / "run.h5")]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "hyperlearn.cli", *arguments, *options],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    # A background job of a shell passes on that it ignores Ctrl-C.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            )
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def wait(self, process: subprocess.Popen[str], file: Path, records: int) -> int:
        """Read, as anybody may while a run goes on, until there are so many records."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            if file.exists():
                count = len(hl.load_run(file).history.get("step", ()))
                if count >= records:
                    return count
            time.sleep(0.05)
        raise AssertionError(f"fewer than {records} records in a minute")

    def test_interrupt(self, start, tmp_path):
        file, process = tmp_path / "run.h5", start()
        count = self.wait(process, file, 3)
        with h5py.File(file, "r"):  # a reader's lock must not stop the run
            time.sleep(0.3)
        self.wait(process, file, count + 3)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert "stopped by Ctrl-C" in output
        assert str(file) in output
        run = hl.load_run(file)
        assert run.status == "interrupted"
        assert len(run.history["outer_loss"]) >= count + 3
        assert run.x.shape == (500,)

    def test_kill(self, start, tmp_path):
        file, process = tmp_path / "run.h5", start()
        count = self.wait(process, file, 3)
        process.kill()
        process.communicate()
        run = hl.load_run(file)
        assert run.status == "killed"
        assert len(run.history["outer_loss"]) == len(run.history["step"]) >= count
        assert run.x is None


class TestCheck:
    SOURCE = """
import torch
import hyperlearn as hl

x = torch.tensor([1.0, 2.0], dtype=torch.float64)
whole = torch.arange(2)


def right(x):
    return (x**3).sum()


def wrong(x):
    return (x * x.detach()).sum()


def point():
    return x


def pair():
    return right, x


def wrong_pair():
    return wrong, x


problem = hl.BilevelProblem(
    inner_loss=lambda y, x: ((y - x) ** 2).sum() + (y**4).sum(),
    outer_loss=lambda y, x: (y.sin() + x * y).sum(),
    x0=x,
    y0=torch.zeros(2, dtype=torch.float64),
)


def make_problem():
    return problem


class Holder:
    function = staticmethod(right)
"""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        return file

    @staticmethod
    def verdicts(result: object) -> dict[str, str]:
        """Of each check, in the last direction."""
        rows = re.findall(r"^ (\S.*?)  +\S+ +\S+ +\S+ +(\w+) *$", result.stdout, re.M)
        return {name: verdict for name, verdict in rows if name != "check"}

    def test_right(self, file):
        result = invoke("check", f"{file}:right", "--x", f"{file}:x")
        assert result.exit_code == 0, result.output
        assert set(self.verdicts(result).values()) == {"passed"}
        assert {"reverse mode", "backward()", "forward mode"} <= set(self.verdicts(result))

    def test_wrong(self, file):
        result = invoke("check", f"{file}:wrong", "--x", f"{file}:x")
        assert result.exit_code == 1, result.output
        assert self.verdicts(result)["reverse mode"] == "failed"
        assert self.verdicts(result)["forward = reverse"] == "passed"
        assert "detached tensor" in result.stdout

    @pytest.mark.parametrize(
        ("name", "x", "code"),
        [
            ("pair", None, 0),
            ("wrong_pair", None, 1),
            ("right", "point", 0),
            ("Holder.function", "x", 0),
        ],
    )
    def test_ways_to_name_the_point(self, file, name, x, code):
        options = [] if x is None else ["--x", f"{file}:{x}"]
        result = invoke("check", f"{file}:{name}", *options, "--directions", 1)
        assert result.exit_code == code, result.output

    @pytest.mark.parametrize("name", ["problem", "make_problem"])
    def test_problem(self, file, name):
        result = invoke("check", f"{file}:{name}", "--directions", 1)
        assert result.exit_code == 0, result.output
        found = self.verdicts(result)
        assert found["implicit"] == found["unrolled"] == found["implicit = unrolled"] == "passed"

    def test_module(self, file, monkeypatch):
        monkeypatch.chdir(file.parent)
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            assert invoke("check", "mine:right", "--x", "mine:x").exit_code == 0
        finally:
            sys.modules.pop("mine", None)

    def test_options(self, file):
        def rows(*options: object) -> str:
            result = invoke("check", f"{file}:right", "--x", f"{file}:x", *options)
            assert result.exit_code == 0, result.output
            return result.stdout

        assert rows("--directions", 5).count("reverse mode") == 5
        assert rows("--seed", 1) == rows("--seed", 1) != rows("--seed", 2)
        assert "2.0e-03" in rows("--rtol", 2e-3)

    @pytest.mark.parametrize(
        ("name", "x", "message"),
        [
            ("right", None, "no x is given"),
            ("missing", "x", "unknown object 'missing'"),
            ("rigt", "x", "did you mean 'right'?"),
            ("right", "whole", "x has a leaf of dtype torch.int64"),
            ("pair", "x", "has an x of its own"),
            ("x", "x", "target is a Tensor; expected a function"),
        ],
    )
    def test_refused(self, file, name, x, message):
        options = [] if x is None else ["--x", f"{file}:{x}"]
        assert_refused(invoke("check", f"{file}:{name}", *options), message)

    def test_no_such_place(self, tmp_path):
        assert_refused(invoke("check", f"{tmp_path / 'no.py'}:f"), "there is no file")
        assert_refused(invoke("check", "no_such_module:f"), "cannot import no_such_module")
        assert_refused(invoke("check", "right"), "expected MODULE:OBJECT or FILE.py:OBJECT")

    def test_rtol(self, file):
        result = invoke("check", f"{file}:pair", "--rtol", -1)
        assert_refused(result, "rtol=-1.0")


class TestPlot:
    def test_picture(self, tmp_path, monkeypatch):
        pictures = []

        def plot_cleaning(runs: list[hl.Run], out: Path) -> Path:
            pictures.append([run.config["label"] for run in runs])
            return out

        monkeypatch.setattr("hyperlearn.plots.plot_cleaning", plot_cleaning)
        run("--steps", 1, "--method", "none", "--method", "identity", "--out", tmp_path)
        result = invoke("plot", *sorted(tmp_path.iterdir()), "--out", tmp_path / "a.png")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{tmp_path / 'a.png'}\n"
        assert pictures == [["identity", "none"]]

    def test_no_such_file(self, tmp_path):
        assert_refused(invoke("plot", tmp_path / "no.h5"), "no.h5 does not exist")

    def test_not_hdf5(self, tmp_path):
        file = tmp_path / "text.h5"
        file.write_text("text")
        assert_refused(invoke("plot", file), "text.h5 is not an HDF5 file")

    def test_hdf5_of_another_kind(self, tmp_path):
        file = tmp_path / "other.h5"
        with h5py.File(file, "w") as other:
            other["images"] = [1]
        assert_refused(invoke("plot", file), "not a hyperlearn run (it holds images)")

    def test_damaged_file(self, tmp_path):
        whole, damaged = tmp_path / "run.h5", tmp_path / "damaged.h5"
        run("--steps", 1, "--method", "none", "--out", whole)
        damaged.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert_refused(invoke("plot", damaged), "damaged.h5 is damaged")

    def test_suffix(self, tmp_path):
        file = tmp_path / "run.h5"
        run("--steps", 1, "--method", "none", "--out", file)
        result = invoke("plot", file, "--out", file)
        assert_refused(result, "cannot write .h5; expected .png or .pdf")
        assert hl.load_run(file).status == "finished"


class TestData:
    def test_table(self):
        result = invoke("data")
        assert result.exit_code == 0, result.output
        for text in ("mnist", "fashion-mnist", "11.3 MB", "CC BY-SA 3.0", "MIT", "LeCun"):
            assert text in result.stdout
        assert "checksum" not in result.stdout

    def test_verify(self):
        result = invoke("data", "--verify")
        assert result.exit_code == 0, result.output
        assert "checksum" in result.stdout
        assert "ok" in result.stdout

    def test_wrong_file(self, tmp_path, monkeypatch):
        (tmp_path / "mnist.h5").write_text("wrong")
        monkeypatch.setattr(datasets, "search_path", lambda: [tmp_path])
        result = invoke("data", "--verify")
        assert "not found" in result.stdout
        assert_refused(result, "wrong checksum: mnist")


class TestHelp:
    def test_version(self):
        assert invoke("--version").stdout == f"hyperlearn {hl.__version__}\n"

    def test_every_method_and_experiment_is_named(self):
        text = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).stdout
        for name in [*METHODS, *EXPERIMENTS, "all", "--list-settings"]:
            assert name in text

    def test_commands(self):
        text = invoke("--help").stdout
        for name in ("run", "plot", "data", "--version"):
            assert name in text
