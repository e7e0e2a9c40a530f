"""The fixture `check_hypergradient`, as pytest finds it in somebody else's project."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

TESTS = """
import pytest
import torch

x = torch.tensor([1.0, 2.0], dtype=torch.float64)


def test_right(check_hypergradient):
    report = check_hypergradient(lambda x: (x**3).sum(), x, directions=2)
    assert report.passed
    assert max(row.direction for row in report.rows if row.direction is not None) == 1


def test_caught(check_hypergradient):
    with pytest.raises(AssertionError, match="reverse mode .*failed"):
        check_hypergradient(lambda x: (x * x.detach()).sum(), x)


def test_wrong(check_hypergradient):
    check_hypergradient(lambda x: (x * x.detach()).sum(), x)
"""


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_fixture(tmp_path):
    (tmp_path / "test_mine.py").write_text(TESTS)
    result = python("-m", "pytest", "-p", "no:cacheprovider", "test_mine.py", folder=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 2 passed" in result.stdout
    assert "FAILED test_mine.py::test_wrong" in result.stdout
    # the table, and no frame of the plugin's
    assert "forward = reverse" in result.stdout
    assert "raise_for_failure" not in result.stdout


def test_registered_and_cheap(tmp_path):
    """Pytest imports it in every run, whether or not anything there uses torch."""
    (plugin,) = entry_points(group="pytest11", name="hyperlearn")
    code = f"import sys, {plugin.value}; print('torch' in sys.modules, 'hyperlearn' in sys.modules)"
    assert python("-c", code, folder=tmp_path).stdout.split() == ["False", "False"]


def test_library_does_not_need_pytest(tmp_path):
    code = "import sys, hyperlearn, hyperlearn.cli; print('pytest' in sys.modules)"
    assert python("-c", code, folder=tmp_path).stdout.split() == ["False"]
