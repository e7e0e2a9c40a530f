"""``hyperlearn run``, ``resume`` and ``plot`` of experiments with PDEs: files, tables, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hyperlearn as hl
from hyperlearn import cli
from hyperlearn.experiments import BUILT_IN
from hyperlearn.experiments.elliptic import EllipticTask
from hyperlearn.experiments.experiment import BuiltIn, built_in_experiment

SIZES = {"interior": 60, "boundary": 24, "validation": 40, "test_grid": 12}
SMALL = [f"--set={name}={value}" for name, value in SIZES.items()]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run(*arguments: object) -> Any:
    return invoke("run", "elliptic-a", *SMALL, *arguments)


def rows_of(result: Any) -> dict[str, str]:
    return dict(re.findall(r"^ (\S.*?)  +(\S+) *$", result.stdout, re.M))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, to look at."""
    file = tmp_path_factory.mktemp("runs") / "run.h5"
    result = run("--steps", 4, "--every", 2, "--seed", 3, "--out", file)
    assert result.exit_code == 0, result.output
    (file.parent / "stdout").write_text(result.stdout)
    return file


def test_the_file_holds_the_default_method_and_the_settings(file):
    stored = hl.load_run(file)
    assert stored.status == "finished"
    assert stored.label == "learn"
    assert stored.setting("task") == EllipticTask(points_seed=3, **SIZES)
    assert stored.environment["seed"] == 3
    np.testing.assert_array_equal(stored.history["step"], [0, 2, 4])
    assert stored.attachments["points/interior"].shape == (60, 2)


def test_errors_are_those_of_the_stored_solution(file):
    stored = hl.load_run(file)
    error = stored.result["u"].values - stored.result["u_reference"].values
    assert stored.history["l2_error"][-1] == pytest.approx(float(error.square().mean().sqrt()))
    assert stored.history["linf_error"][-1] == pytest.approx(float(error.abs().max()))


def test_the_table_says_what_there_is(file):
    stored = hl.load_run(file)
    text = (file.parent / "stdout").read_text()
    rows = dict(re.findall(r"^ (\S.*?)  +(\S+) *$", text, re.M))
    assert rows["method"] == "learn"
    for row, metric in (("l2 error", "l2_error"), ("linf error", "linf_error")):
        assert rows[row] == f"{stored.history[metric][-1]:.2e}"
    assert float(rows["lengthscale"]) == pytest.approx(stored.result["lengthscale"], rel=1e-3)
    assert float(rows["outer loss"]) == pytest.approx(stored.history["outer_loss"][-1], rel=1e-2)
    assert (rows["outer steps"], rows["status"]) == ("4", "finished")
    assert not {"test accuracy", "gradients", "adjoint residual (Hessian)"} & set(rows)
    assert f"hyperlearn plot {file}" in text


def test_the_path_of_the_length_scale_is_recorded(file):
    stored = hl.load_run(file)
    path = stored.history["lengthscale"]
    assert path[0] == pytest.approx(1.0)
    assert path[-1] == pytest.approx(float(stored.x["u"]["log_lengthscale"].exp()))
    assert path[-1] == pytest.approx(stored.result["lengthscale"])
    assert path[-1] != path[0]


@pytest.mark.parametrize("how", ["run --resume", "resume", "Python"])
def test_goes_on_as_if_it_had_not_stopped(tmp_path, file, how):
    again = tmp_path / "run.h5"
    # Stopped within a Gauss-Newton iteration, whose batch and moments have to be there again.
    assert run("--steps", 2, "--every", 2, "--seed", 3, "--out", again).exit_code == 0
    if how == "Python":
        hl.resume(again, budget=hl.Budget(steps=4))
    elif how == "resume":
        result = invoke("resume", again, "--steps", 4)
        assert result.exit_code == 0, result.output
        assert rows_of(result)["outer steps"] == "4"
    else:
        result = run("--steps", 4, "--every", 2, "--seed", 3, "--out", again, "--resume")
        assert result.exit_code == 0, result.output
    once, twice = hl.load_run(file), hl.load_run(again)
    for name in ("step", "outer_loss", "l2_error", "lengthscale"):
        np.testing.assert_array_equal(once.history[name], twice.history[name])
    assert torch.equal(once.x["u"]["log_lengthscale"], twice.x["u"]["log_lengthscale"])


def test_default_budget_is_of_steps(tmp_path, monkeypatch):
    budgets = []

    def run_method(*_: object, budget: hl.Budget, **__: object) -> hl.Run:
        budgets.append(budget)
        return hl.Run(config={"label": "learn"})

    made = type(built_in_experiment("elliptic-a"))
    monkeypatch.setattr(made, "run_method", run_method)
    assert run("--out", tmp_path).exit_code == 0
    assert run("--out", tmp_path, "--seconds", 2).exit_code == 0
    assert budgets == [hl.Budget(steps=250), hl.Budget(seconds=2)]
    text = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).stdout
    assert "250 steps" in " ".join(text.split())


def test_the_kernel_stays_where_nothing_is_learnt(tmp_path):
    result = run("--steps", 2, "--method", "none", "--set", "lengthscale=0.3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    stored = hl.load_run(tmp_path / "elliptic-a-none-seed0.h5")
    np.testing.assert_allclose(stored.history["lengthscale"], 0.3)


def test_list_settings():
    result = invoke("run", "elliptic-a", "--list-settings", *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("methods: learn, implicit, none\n")
    for text in ("points_seed", "lengthscale", "learning_steps", "gauss_newton.maxiter"):
        assert text in result.stdout
    # What a method starts from may depend on the task: there are but 40 validation points.
    (size,) = re.findall(r"^ outer_batch_size +(\d+)", result.stdout, re.M)
    assert size == "40"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_experiment_has_settings_and_its_default_method(name):
    made = built_in_experiment(name)
    assert isinstance(made, BuiltIn)
    task = made.task(0)
    assert made.default_method in made.methods(task, 0)
    assert invoke("run", name, "--list-settings").exit_code == 0
    if name != "data-cleaning":  # its problem holds the data
        assert made.name == name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "eliptic-a"], "unknown experiment 'eliptic-a': did you mean 'elliptic-a'"),
        (["run", "elliptic-a", "--method", "nhgd"], "unknown method 'nhgd'"),
        (["run", "elliptic-a", "--set", "interor=9"], "did you mean 'interior'?"),
        (["run", "elliptic-a", "--set", "interior=0"], "interior=0; expected at least 1"),
        (["run", "elliptic-a", "--set", "interior=many"], "interior=many: expected a whole"),
        (["run", "elliptic-a", "--set", "train_size=9"], "unknown setting 'train_size'"),
        (["run", "elliptic-a", "--set", "learning_steps=0"], "learning_steps=0"),
    ],
)
def test_refused(tmp_path, arguments, told):
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_not_resumed(tmp_path, file):
    before = file.read_bytes()
    result = run("--steps", 6, "--seed", 3, "--out", file, "--resume", "--set", "nugget=1e-9")
    assert result.exit_code == 2
    assert "task.nugget: 1e-10 there, 1e-09 here" in result.stderr
    assert file.read_bytes() == before


def test_a_problem_that_has_only_the_name_is_not_resumed(tmp_path):
    problem = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
        name="elliptic-a",
    )
    file = tmp_path / "run.h5"
    hl.minimize(problem, hl.IdentityHessian(), budget=hl.Budget(steps=1), record=file)
    result = invoke("resume", file, "--steps", 3)
    assert result.exit_code == 2
    assert f"hyperlearn.resume('{file}', problem)" in result.stderr


def test_a_nugget_too_small_is_told_in_a_line(tmp_path):
    result = run("--steps", 2, "--set", "nugget=1e-30", "--out", tmp_path)
    assert result.exit_code in (2, 3), result.output
    assert "Traceback" not in result.output
    assert "not positive definite" in result.stderr


class TestPlot:
    @pytest.mark.parametrize("arguments", [(), ("--kind", "pde")])
    def test_the_picture_of_a_run(self, tmp_path, file, arguments):
        out = tmp_path / "picture.svg"
        result = invoke("plot", file, *arguments, "--out", out)
        assert result.exit_code == 0, result.output
        text = out.read_text()
        for part in ("|error|", "interior (60)", "boundary (24)", "lengthscale", "outer loss"):
            assert part in text

    def test_other_pictures_are_still_there(self, tmp_path, file):
        out = tmp_path / "picture.svg"
        assert invoke("plot", file, "--metric", "l2_error", "--out", out).exit_code == 0
        assert "|error|" not in out.read_text()
        assert invoke("plot", file, "--kind", "fields", "--out", out).exit_code == 0

    def test_several_runs_are_curves(self, tmp_path, file):
        result = invoke("plot", file, file, "--kind", "pde", "--out", tmp_path / "a.png")
        assert result.exit_code == 2
        assert "the kind pde draws one run; 2 were given" in result.stderr
        out = tmp_path / "picture.svg"
        assert invoke("plot", file, file, "--out", out).exit_code == 0
        assert "interior (60)" not in out.read_text()

    def test_show_says_how_to_resume(self, file):
        result = invoke("show", file)
        assert result.exit_code == 0, result.output
        assert "hyperlearn resume" in result.stdout
