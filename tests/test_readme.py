"""The README's example runs as shown and does what the README says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_finds_the_useless_features(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
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
