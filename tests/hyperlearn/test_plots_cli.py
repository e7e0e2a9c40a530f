"""``hyperlearn plot``: kinds, folders, and what is wrong told in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import hyperlearn as hl
from hyperlearn.cli import app


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    problem = hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
        metrics={"length": lambda y, x: float(y.norm())},
        units={"length": "m"},
    )
    for seed in range(2):
        hl.minimize(
            problem,
            hl.IdentityHessian(curvature=2.0, step_size=0.1),
            budget=hl.Budget(steps=4),
            seed=seed,
            every=1,
            record=tmp_path / f"run{seed}.h5",
            attachments={
                "gram": torch.eye(3),
                "u": hl.Field(torch.arange(3.0), {"s": torch.arange(3.0)}),
            },
        )
    (tmp_path / ".hidden.h5").write_text("no run")
    return tmp_path


def plotted(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


def labels(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


def test_a_folder_stands_for_its_runs(folder, figures):
    out = folder / "a.svg"
    result = plotted(folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    (figure,) = figures
    assert labels(figure) == ["outer loss", "hypergradient norm", "length (m)"]
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == "IdentityHessian, median and range of 2 seeds"


def test_options_of_curves(folder, figures):
    arguments = ("--x", "step", "--metric", "length", "--metric", "outer_loss", "--log")
    result = plotted(folder / "run0.h5", *arguments, "--out", folder / "a.pdf")
    assert result.exit_code == 0, result.output
    (figure,) = figures
    assert labels(figure) == ["length (m)", "outer loss"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"outer step"}
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        (("--kind", "certificates"), "inner stationarity"),
        (("--kind", "kernel"), "row"),
        (("--kind", "kernel", "--name", "gram"), "row"),
        (("--kind", "fields", "--name", "u"), "u"),
    ],
)
def test_kinds(folder, figures, arguments, label):
    result = plotted(folder / "run0.h5", *arguments, "--out", folder / "a.png")
    assert result.exit_code == 0, result.output
    assert label in labels(figures[0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--metric", "lenght"), "unknown metric 'lenght': did you mean 'length'?"),
        (("--kind", "curve"), "unknown kind 'curve': did you mean 'curves'?"),
        (("--x", "steps"), "unknown x 'steps': did you mean 'step'?"),
        (("--kind", "kernel"), "the kind kernel draws one run; 2 were given"),
        (("--kind", "fields", "--log"), "log is for the kinds curves and certificates"),
        (("--out", "a.jpg"), "cannot write .jpg; expected .png or .pdf or .svg"),
    ],
)
def test_refused(folder, arguments, told):
    result = plotted(folder, *arguments)
    assert result.exit_code == 2
    assert told in result.stderr.replace("\n", " ")


def test_an_empty_folder(tmp_path):
    result = plotted(tmp_path)
    assert result.exit_code == 2
    assert "has no run files (*.h5) in it" in result.stderr
