"""Sweeps: what the grid holds, what is refused, and what is left when workers die."""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import hyperlearn as hl
from hyperlearn import cli
from hyperlearn.experiments.data_cleaning import METHODS
from hyperlearn.sweep import Outcome, Sweep, SweepError, run_sweep, summarise, write_summary

# With `mode` a run misbehaves at one of its records; a file `slow` makes each of them take a while.
SOURCE = """
import os
import signal
import time
from pathlib import Path

import torch

import hyperlearn as hl


def make(seed: int, size: int = 3, mode: str = "", shared: float | None = None):
    target = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here = Path(__file__).parent
    records = 0

    def distance(y, x):
        nonlocal records
        records += 1
        if (here / "slow").exists():
            time.sleep(0.05)
        if mode == "raises":
            raise RuntimeError("a bug in a metric")
        if mode == "dies" and torch.linalg.norm(x) > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "dies once" and records > 3 and not (here / "died").exists():
            (here / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float((x - target).norm())

    problem = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - target) ** 2).sum(),
        x0=torch.zeros(size, dtype=torch.float64),
        y0=torch.zeros(size, dtype=torch.float64),
        metrics={"distance": distance},
        name="synthetic",
    )
    methods = {
        "identity": hl.IdentityHessian(curvature=2.0, step_size=0.05, inner_step_size=0.25),
        "implicit": hl.ImplicitDifferentiation(step_size=0.05, inner_step_size=0.25),
    }
    return problem, methods


def wrong(seed: int):
    return make(seed)[0]


def needs(seed: int, size: int):
    return make(seed, size)


def untyped(seed: int, data):
    return make(seed)


def anything(seed: int, **settings):
    return make(seed, **settings)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def written(folder: Path, text: str = "", **changes: str) -> Path:
    """A TOML file: keys as given, and those that every sweep needs."""
    keys = {
        "experiment": '"mine.py:make"',
        "folder": '"out"',
        "methods": '["identity"]',
        "every": "5",
        "budget": "{ steps = 20 }",
        "checkpoints": "{ steps = 50 }",
    } | changes
    lines = [f"{key} = {value}" for key, value in keys.items() if value]
    path = folder / "sweep.toml"
    path.write_text("\n".join([*lines, text]))
    return path


def sweep_of(beside: Path, /, **changes: Any) -> Sweep:
    settings: dict[str, Any] = {
        "experiment": f"{beside / 'mine.py'}:make",
        "methods": ("identity",),
        "budget": hl.Budget(steps=20),
        "folder": beside / "out",
        "every": 5,
    }
    return Sweep(**settings | changes)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def by_name(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.planned.name: outcome for outcome in outcomes}


class TestPlan:
    def test_every_combination_once(self, folder):
        sweep = Sweep.read(
            written(
                folder,
                "[settings]\nmomentum = 0.5\n[grid]\nsize = [2, 5]\nstep_size = [1e-1, 1]",
                methods='["identity", "implicit"]',
                seeds="[3, 4]",
            )
        )
        runs = sweep.runs()
        expected = itertools.product(("identity", "implicit"), (2, 5), (0.1, 1.0), (3, 4))
        assert [(run.label, run.task.size, run.method.step_size, run.seed) for run in runs] == list(
            expected
        )
        assert {run.method.momentum for run in runs} == {0.5}
        assert len({run.path for run in runs}) == 16
        assert runs[0].path == folder / "out" / "identity-size=2-step_size=0.1-seed3.h5"
        assert sweep.budget == hl.Budget(steps=20)

    def test_data_cleaning(self, folder):
        text = "[settings]\ntrain_size = 50\n[grid]\nsolver.maxiter = [3, 4]\ncorruption = [0.1]"
        path = written(
            folder, text, experiment='"data-cleaning"', methods='["cg10"]', seeds="[1, 2]"
        )
        runs = Sweep.read(path).runs()
        assert [run.method.solver.maxiter for run in runs] == [3, 3, 4, 4]
        assert [run.task.data_seed for run in runs] == [1, 2, 1, 2]
        assert {(run.task.train_size, run.task.corruption) for run in runs} == {(50, 0.1)}
        assert runs[0].name == "cg10-solver.maxiter=3-corruption=0.1-seed1"

    def test_all_methods(self, folder):
        path = written(folder, experiment='"data-cleaning"', methods='["all"]')
        assert [run.label for run in Sweep.read(path).runs()] == list(METHODS)

    def test_settings_of_one_method(self, folder):
        """They replace what is for all, and the others do not multiply by them."""
        sweep = sweep_of(
            folder,
            methods=("identity", "implicit"),
            settings={"method.momentum": 0.25},
            grid={"step_size": (1.0, 2.0), "implicit.step_size": (3.0,), "task.size": (2, 3)},
        )
        found = [(run.label, run.method.step_size, run.task.size) for run in sweep.runs()]
        assert found == [
            *itertools.product(["identity"], [1.0, 2.0], [2, 3]),
            *itertools.product(["implicit"], [3.0], [2, 3]),
        ]
        assert {run.method.momentum for run in sweep.runs()} == {0.25}

    def test_names_are_safe(self, folder):
        (run,) = sweep_of(folder, grid={"mode": ("../a b",)}).runs()
        assert run.path.parent == folder / "out"
        assert run.path.name == "identity-mode=..%2Fa%20b-seed0.h5"

    def test_a_setting_without_default(self, folder):
        needs = f"{folder / 'mine.py'}:needs"
        (run,) = sweep_of(folder, experiment=needs, grid={"size": (4,)}).runs()
        assert run.task.size == 4
        with pytest.raises(ValueError, match="needs size: give it as a setting"):
            sweep_of(folder, experiment=needs).runs()


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "changes", "message"),
        [
            ("", {"seed": "[1]"}, "unknown key 'seed': did you mean 'seeds'"),
            ("", {"budget": "{ step = 3 }"}, "unknown key of budget 'step': did you mean 'steps'"),
            ("", {"budget": '{ steps = "3" }'}, "steps='3': expected a whole number or none"),
            ("", {"budget": "{}"}, "Budget needs a limit"),
            ("", {"budget": ""}, "budget is missing; expected experiment, methods, budget"),
            ("", {"seeds": "3"}, "seeds=3; expected a list of whole numbers"),
            ("", {"seeds": "[0, true]"}, "expected a list of whole numbers"),
            ("", {"seeds": "[]"}, "expected at least one, and each once"),
            ("", {"seeds": "[1, 1]"}, "expected at least one, and each once"),
            ("", {"seeds": "[-1]"}, "expected numbers >= 0"),
            ("", {"every": "0"}, "every=0; expected at least 1"),
            ("", {"every": "1.5"}, "every=1.5; expected a whole number"),
            ("", {"methods": '["idntity"]'}, "unknown method 'idntity': did you mean 'identity'"),
            ("", {"experiment": '"data-cleening"'}, "did you mean 'data-cleaning'"),
            ("", {"experiment": '"mine.py:mak"'}, "unknown object 'mak': did you mean 'make'"),
            ("", {"experiment": '"yours.py:make"'}, "there is no file"),
            ("", {"experiment": '"mine.py:wrong"'}, "expected make(seed, **settings) -> (Bilevel"),
            ("", {"experiment": '"mine.py:untyped"'}, "the setting data has no default, and no"),
            ("", {"experiment": '"mine.py:anything"'}, "takes *settings: name the settings one"),
            ("[settings]\nsizze = 3", {}, "'sizze': did you mean 'size'"),
            ("[settings]\nsize = 1.5", {}, "size=1.5: expected a whole number"),
            ("[settings]\nsize = '3'", {}, "size='3': expected a whole number"),
            ("[settings]\nmode = 3", {}, "mode=3: expected text"),
            ("[settings]\nsize = [3]", {}, "expected one number, text or truth value"),
            ("[settings]\nmomentum = 2", {}, "cannot set momentum=2"),
            ("[settings]\nidentity.dampin = 2", {}, "unknown setting of identity"),
            ("[settings]\nimplicit.damping = 2", {}, "implicit is not among the methods"),
            ("[grid]\nsize = 3", {}, "grid: size=3; expected a list"),
            ("[grid]\nsize = []", {}, "size has no values"),
            ("[grid]\nstep_size = [1, 1e0]", {}, "expected each value once"),
            ("[grid]\nstep_size = [1]\nmethod.step_size = [2]", {}, "is given twice"),
            ("[grid]\nsize = [1]\n[settings]\nsize = 1", {}, "size is in settings and in grid"),
            (f"[grid]\nmode = ['{'a' * 250}']", {}, "is too long for a file"),
            ("not TOML", {}, "sweep.toml: "),
        ],
    )
    def test_before_anything_runs(self, folder, text, changes, message):
        result = invoke("sweep", written(folder, text, **changes), "--workers", 0)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert not (folder / "out").exists()

    def test_ambiguous_setting(self, folder):
        text = SOURCE.replace("size: int = 3,", "size: int = 3, momentum: float = 0.0,")
        (folder / "mine.py").write_text(text)
        with pytest.raises(ValueError, match=r"expected task\.momentum or method\.momentum"):
            sweep_of(folder, settings={"momentum": 0.5}).runs()
        (run,) = sweep_of(folder, settings={"task.momentum": 0.5}).runs()
        assert (run.task.momentum, run.method.momentum) == (0.5, 0.0)

    def test_no_file(self, folder):
        assert invoke("sweep", folder / "none.toml").exit_code == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": -1}, "workers=-1"),
            ({"retry": -1}, "retry=-1"),
            ({"backend": "threads"}, "expected 'loky' or 'dask'"),
            ({"scheduler": "tcp://there"}, "expected backend='dask'"),
        ],
    )
    def test_arguments(self, folder, options, message):
        with pytest.raises(ValueError, match=message):
            run_sweep(sweep_of(folder), **options)

    def test_no_sweep_at_all(self, folder):
        with pytest.raises(SweepError, match="methods="):
            sweep_of(folder, methods=())

    def test_a_run_of_other_settings(self, folder):
        run_sweep(sweep_of(folder), workers=0)
        with pytest.raises(hl.RunFileError, match=r"task\.shared: None there, 1\.0 here"):
            run_sweep(sweep_of(folder, settings={"shared": 1.0}), workers=0)
        (outcome,) = run_sweep(sweep_of(folder, settings={"momentum": 0.5}), workers=0)
        assert outcome.failed  # only the run knows its method: it may depend on the seed
        assert "method.momentum: 0.0 there, 0.5 here" in outcome.message

    def test_a_file_that_is_no_run(self, folder):
        (folder / "out").mkdir()
        (folder / "out" / "identity-seed0.h5").write_text("ten years of work")
        with pytest.raises(hl.RunFileError, match="is not an HDF5 file"):
            run_sweep(sweep_of(folder), workers=0)


class TestInThisProcess:
    def test_finished_runs_are_left_alone(self, folder):
        sweep = sweep_of(folder, seeds=(0, 1))
        first = run_sweep(sweep, workers=0)
        times = [outcome.planned.path.stat().st_mtime_ns for outcome in first]
        again = run_sweep(sweep, workers=0)
        assert [outcome.planned.path.stat().st_mtime_ns for outcome in again] == times
        assert [outcome.status for outcome in again] == ["finished"] * 2
        assert [outcome.final for outcome in again] == [outcome.final for outcome in first]

    def test_a_larger_budget_goes_on(self, folder):
        run_sweep(sweep_of(folder), workers=0)
        (outcome,) = run_sweep(sweep_of(folder, budget=hl.Budget(steps=30)), workers=0)
        run = hl.load_run(outcome.planned.path)
        np.testing.assert_array_equal(run.history["step"], np.arange(0, 31, 5))

    def test_a_run_does_not_depend_on_those_before(self, folder):
        one, both = (
            run_sweep(sweep_of(folder, seeds=seeds, folder=folder / name), workers=0)
            for seeds, name in (((1,), "one"), ((0, 1), "both"))
        )
        history = hl.load_run(one[0].planned.path).history
        other = hl.load_run(both[1].planned.path).history
        np.testing.assert_array_equal(history["outer_loss"], other["outer_loss"])

    def test_no_litter(self, folder):
        run_sweep(sweep_of(folder), workers=0)
        assert [path.name for path in (folder / "out").iterdir()] == ["identity-seed0.h5"]

    def test_interrupt(self, folder):
        """The first run ends at its next record; the second does not begin."""
        (folder / "slow").touch()
        sweep = sweep_of(folder, seeds=(0, 1), budget=hl.Budget(steps=10_000))
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        outcomes = run_sweep(sweep, workers=0)
        assert [outcome.status for outcome in outcomes] == ["interrupted", "not started"]
        assert signal.getsignal(signal.SIGINT) is before
        assert hl.load_run(outcomes[0].planned.path).status == "interrupted"


class TestSummary:
    def test_numbers(self, folder):
        sweep = sweep_of(folder, seeds=(0, 1, 2), grid={"step_size": (0.05, 1e300)})
        outcomes = run_sweep(sweep, workers=0)
        rows = summarise(outcomes)
        assert [dict(row.point) for row in rows] == [{"step_size": 0.05}, {"step_size": 1e300}]
        for row in rows:
            runs = [hl.load_run(o.planned.path) for o in outcomes if o.planned.point == row.point]
            if row.point["step_size"] > 1:
                assert (row.statuses, row.values) == ({"diverged": 3}, {})
                continue
            assert row.statuses == {"finished": 3}
            assert list(row.values) == ["outer_loss", "distance", "seconds"]
            for name, spread in row.values.items():
                last = sorted(float(run.history[name][-1]) for run in runs)
                assert (spread.low, spread.median, spread.high) == tuple(last)
                assert spread.median == statistics.median(last)
        write_summary(rows, folder / "summary.csv")
        with (folder / "summary.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [line["finished"] for line in lines] == ["3", "0"]
        assert [line["diverged"] for line in lines] == ["0", "3"]
        assert float(lines[0]["distance_max"]) == rows[0].values["distance"].high
        assert lines[1]["distance_max"] == ""

    def test_command(self, folder):
        path = written(folder, "[grid]\nmode = ['', 'raises']", seeds="[0, 1]")
        plan = invoke("sweep", path, "--dry-run")
        assert plan.exit_code == 0, plan.output
        assert plan.stdout.count(" new") == 4
        assert f"4 runs in {folder / 'out'}" in plan.stdout
        assert not (folder / "out").exists()
        result = invoke("-v", "sweep", path, "--workers", 0)
        assert result.exit_code == 1, result.output
        assert "error: identity-mode=raises-seed1: failed: RuntimeError: a bug" in result.stderr
        assert "Traceback" not in result.output
        assert "2 finished" in result.stdout
        assert "2 failed" in result.stdout
        assert str(folder / "out" / "summary.csv") in result.stdout
        for text in ("sweep of 4 runs", "synthetic: identity from step 0", "20 outer steps in"):
            assert text in result.stderr  # logged
        assert logging.getLogger("hyperlearn").handlers in ([], [*_null_handlers()])
        assert "finished at step 20" in invoke("sweep", path, "--dry-run").stdout
        assert invoke("sweep", path, "--workers", 0, "--quiet").stdout == ""


def _null_handlers() -> Iterator[logging.Handler]:
    for handler in logging.getLogger("hyperlearn").handlers:
        assert isinstance(handler, logging.NullHandler)
        yield handler


class TestWorkers:
    """With processes of their own."""

    def test_what_happens_to_one_run_does_not_happen_to_others(self, folder, caplog):
        modes = ("", "dies once", "dies", "raises")
        sweep = sweep_of(folder, grid={"mode": modes}, checkpoints=hl.Checkpoints(steps=5))
        with caplog.at_level(logging.INFO, logger="hyperlearn"):
            outcomes = run_sweep(sweep, workers=2, retry=1)
        fine, once, always, raises = outcomes
        assert fine.status == once.status == "finished", outcomes
        assert always.status == "failed"
        assert "its worker process died (SIGKILL(-9)), 2 times in all" in always.message
        assert hl.load_run(always.planned.path).status == "killed"
        assert (raises.status, raises.message) == ("failed", "RuntimeError: a bug in a metric")
        # It went on from a checkpoint, and is the run that it would have been.
        assert f"{once.planned.path}: resumed at step" in caplog.text
        assert "a worker process died (SIGKILL(-9))" in caplog.text
        histories = [hl.load_run(outcome.planned.path).history for outcome in (fine, once)]
        for name in ("step", "outer_loss", "distance", "oracle_calls"):
            np.testing.assert_array_equal(histories[0][name], histories[1][name])
        assert hl.load_run(once.planned.path).environment["threads"] == 1
        assert {path.suffix for path in (folder / "out").iterdir()} <= {".h5", ".lock"}

    def test_dask(self, folder, caplog):
        distributed = pytest.importorskip("distributed")
        cluster = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        )
        with cluster, caplog.at_level(logging.INFO, logger="hyperlearn"):
            sweep = sweep_of(folder, seeds=(0, 1), grid={"mode": ("", "raises")})
            outcomes = run_sweep(sweep, backend="dask", scheduler=cluster.scheduler_address)
        assert [o.status for o in outcomes] == ["finished", "finished", "failed", "failed"]
        runs = [r for r in caplog.records if r.name == "hyperlearn.loop"]
        assert runs
        assert threading.main_thread().name not in {r.threadName for r in runs}
        alone = run_sweep(sweep_of(folder, seeds=(1,), folder=folder / "alone"), workers=0)
        assert {k: v for k, v in outcomes[1].final.items() if k != "seconds"} == {
            k: v for k, v in alone[0].final.items() if k != "seconds"
        }

    @pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL"])
    def test_stopped_from_outside(self, folder, how):
        """A parent that is killed leaves no worker behind that goes on; then the run goes on."""
        (folder / "slow").touch()
        path = written(folder, budget="{ steps = 200 }")
        errors = folder / "errors"
        with errors.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "hyperlearn.cli", "sweep", str(path), "--workers", "1"],
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
                # A background job of a shell passes on that it ignores Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        file = folder / "out" / "identity-seed0.h5"
        try:
            wait(lambda: records(file) >= 3, process)
            worker = int(file.with_name(file.name + ".lock").read_text())
            assert worker != process.pid
            if how == "Ctrl-C":  # reaches every process of the terminal
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.kill()
            code = process.wait(60)
            if how == "Ctrl-C":
                assert code == 130, errors.read_text()
                assert "Traceback" not in errors.read_text()
                assert "interrupted: 1 of 1 runs are not finished" in errors.read_text()
            wait(lambda: not Path(f"/proc/{worker}").exists())
        finally:
            # joblib lets a worker that waits outlive its parent for some minutes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert hl.load_run(file).status == "interrupted"
        (folder / "slow").unlink()
        assert [o.status for o in run_sweep(Sweep.read(path), workers=0)] == ["finished"]
        np.testing.assert_array_equal(hl.load_run(file).history["step"], np.arange(0, 201, 5))


def records(file: Path) -> int:
    return len(hl.load_run(file).history.get("step", ())) if file.exists() else 0


def wait(condition: Any, process: Any = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
