"""``hyperlearn run --resume`` and ``hyperlearn resume``: what they go on with, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hyperlearn as hl
from hyperlearn import cli
from hyperlearn.experiments import data_cleaning
from hyperlearn.experiments.data_cleaning import CleaningData, DataCleaning, split_and_corrupt

SMALL = [
    f"--set={setting}"
    for setting in (
        "train_size=60",
        "validation_size=20",
        "selection_size=0",
        "inner_batch_size=16",
        "inner_steps=3",
    )
]


@pytest.fixture(autouse=True)
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_data(task: DataCleaning) -> CleaningData:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(100, 4, 4, generator=generator)
        labels = torch.randint(10, (100,), generator=generator)
        return split_and_corrupt(task, pixels, labels, pixels[:10], labels[:10])

    monkeypatch.setattr(data_cleaning, "load_data", load_data)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run(*arguments: object) -> Any:
    return invoke("run", "data-cleaning", *SMALL, "--every", 2, *arguments)


@pytest.mark.parametrize("how", ["run --resume", "resume"])
def test_goes_on_as_if_it_had_not_stopped(tmp_path: Path, how: str) -> None:
    file, whole = tmp_path / "run.h5", tmp_path / "whole.h5"
    assert run("--steps", 4, "--seed", 3, "--out", file).exit_code == 0
    assert run("--steps", 8, "--seed", 3, "--out", whole).exit_code == 0
    if how == "resume":
        result = invoke("resume", file, "--steps", 8)
    else:
        result = run("--steps", 8, "--seed", 3, "--out", file, "--resume")
    assert result.exit_code == 0, result.output
    assert "outer steps" in result.stdout
    once, twice = hl.load_run(whole), hl.load_run(file)
    for name in ("step", "outer_loss", "weight_auc", "oracle_calls"):
        np.testing.assert_array_equal(once.history[name], twice.history[name])
    assert torch.equal(once.x, twice.x)
    assert twice.config["task"] == once.config["task"]
    assert twice.setting("task") == DataCleaning(
        train_size=60, validation_size=20, selection_size=0, data_seed=3
    )


def test_nothing_to_resume_is_a_new_run(tmp_path: Path) -> None:
    assert run("--steps", 2, "--out", tmp_path / "run.h5", "--resume").exit_code == 0
    assert hl.load_run(tmp_path / "run.h5").status == "finished"


def test_other_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.h5"
    run("--steps", 2, "--out", file)
    result = run("--steps", 4, "--out", file, "--resume", "--set", "damping=0.5")
    assert result.exit_code == 2
    assert "method.damping: 0.03 there, 0.5 here" in result.stderr
    assert hl.load_run(file).history["step"][-1] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "data-cleaning", "--resume", "--force"], "--force and --resume exclude"),
        (["resume", "none.h5"], "none.h5 does not exist"),
    ],
)
def test_arguments(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_another_problem_is_for_python(tmp_path: Path) -> None:
    problem = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
        name="mine",
    )
    file = tmp_path / "run.h5"
    hl.minimize(problem, hl.IdentityHessian(), budget=hl.Budget(steps=1), record=file)
    result = invoke("resume", file, "--steps", 3)
    assert result.exit_code == 2
    assert f"hyperlearn.resume('{file}', problem)" in result.stderr
    assert "'mine'" in result.stderr
    assert invoke("resume", file, "--steps", 3, "--seconds", 3).exit_code == 2
