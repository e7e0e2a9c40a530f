"""The README's example runs as shown and does what the README says."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def example(number):
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[number]


def test_the_pde_example_learns_a_length_scale_and_solves(capsys):
    names = {}
    exec(compile(example(1), str(README), "exec"), names)
    run, u, x, held = (names[name] for name in ("run", "u", "x", "held_out"))
    assert run.history["outer_loss"][-1] < 1e-3 * run.history["outer_loss"][0]
    assert 0.05 < float(run.x["u"]["log_lengthscale"].exp()) < 0.7
    assert u.converged
    (equation,) = held.validation
    y = equation.points
    residual = -u.laplacian(y) + u.value(y) ** 3 - torch.sin(9 * y[:, 0])
    assert float(residual.abs().max()) < 0.01
    slope = u.gradient(x)[:, 0]
    differences = (u.value(x + 1e-4) - u.value(x - 1e-4)) / 2e-4
    torch.testing.assert_close(slope, differences, rtol=1e-4, atol=1e-5)


def test_the_example_runs_and_finds_the_useless_features(capsys):
    code = example(0)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    names = {}
    exec(compile(code, str(README), "exec"), names)
    run = names["run"]
    # The numbers of the sentence below the example.
    assert run.history["outer_loss"][0] == pytest.approx(5.60, abs=0.005)
    assert run.history["outer_loss"][-1] == pytest.approx(0.76, abs=0.005)
    assert float(run.x[:5].sigmoid().mean()) == pytest.approx(0.13, abs=0.005)
    assert float(run.x[5:].sigmoid().mean()) == pytest.approx(0.68, abs=0.005)
    certificate = names["certificate"]
    assert certificate.exact
    assert certificate.inner_stationarity < 1e-10
    assert certificate.relative_error < 2e-8
    printed = capsys.readouterr().out
    assert "Hessian(20, 20)" in printed
    assert "passed" in printed
    assert "failed" not in printed
