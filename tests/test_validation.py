"""The validation suite finds nothing wrong with what is right, and a gradient that is wrong."""

import math

import h5py
import numpy as np
import pytest
import torch

from hyperlearn.implicit_function import Problem as ImplicitProblem
from validation import suite
from validation.__main__ import main
from validation.bilevel import extended
from validation.bilevel.problems import zoo
from validation.bilevel.run import Meeting, met
from validation.drawn import st
from validation.report import Case


def test_the_suite_writes_a_report_and_a_picture(tmp_path):
    path = tmp_path / "report.h5"
    assert main(["suite", "--only", "algorithms", "--examples", "2", "--out", str(path)])
    with h5py.File(path) as file:
        rows = {len(column) for column in file["cases"].values()}
        assert rows == {len(file["certificates/relative_error"])}
        assert rows.pop() >= 8
        assert not np.any(file["cases/failed"][()])
        assert {"error", "claimed", "tolerance", "verdict", "seconds"} <= set(file["cases"])
        assert {"torch", "device", "dtype", "seed"} <= set(file.attrs)
    assert path.with_suffix(".png").stat().st_size > 0
    assert path.with_suffix(".pdf").stat().st_size > 0


def test_one_seed_draws_one_set_of_cases():
    first, second = (suite.run(2, seed=3, only="operators") for _ in range(2))
    assert [case.parameters for case in first] == [case.parameters for case in second]
    assert [case.error for case in first] == [case.error for case in second]
    assert [c.parameters for c in suite.run(2, seed=4, only="operators")] != [
        c.parameters for c in first
    ]


def test_a_wrong_gradient_makes_the_suite_fail(tmp_path, monkeypatch):
    right = ImplicitProblem.pull_back

    def wrong(self, y, tensors, y_bar, needed):
        return [None if bar is None else -bar for bar in right(self, y, tensors, y_bar, needed)]

    check, strategies = suite.GROUPS["engine"]
    small = strategies | {"kind": st.just("argmin"), "n": st.just(2)}
    monkeypatch.setitem(suite.GROUPS, "engine", (check, small))
    arguments = ["suite", "--only", "engine", "--examples", "1", "--out", str(tmp_path / "r.h5")]
    assert main(arguments)
    monkeypatch.setattr(ImplicitProblem, "pull_back", wrong)
    assert not main(arguments)


@pytest.mark.parametrize(
    ("error", "claimed", "flagged", "verdict"),
    [
        (1e-9, 1e-10, "", "ok"),
        (1e-9, 0.9e-10, "", "claim violated"),
        (2e-2, math.nan, "", "wrong, not flagged"),
        (math.inf, math.nan, "", "wrong, not flagged"),
        (2e-2, 1.0, "doubt", "flagged"),
        (1e-6, 1.0, "doubt", "false alarm"),
        (1e-5, math.nan, "", "disagrees"),
        (math.nan, math.nan, "raised", "flagged"),
        (math.nan, math.nan, "", "no answer"),
    ],
)
def test_verdicts(error, claimed, flagged, verdict):
    case = Case("group", "name", "", error, claimed, tolerance=1e-6, flagged=flagged)
    assert case.verdict == verdict


def test_the_losses_of_the_zoo_have_the_gradients_that_were_written_by_hand():
    problems = [p for p in zoo() if p.smooth]
    assert len(problems) > 60
    for problem in problems:
        meeting = Meeting(problem)
        y = meeting.y0 + 0.1
        found = torch.func.grad(meeting.loss)(y, meeting.x)
        by_hand = problem.F(torch, y, meeting.x, meeting.data)
        torch.testing.assert_close(found, by_hand, rtol=1e2 * meeting.eps, atol=1e2 * meeting.eps)


def test_the_reference_of_a_ridge_is_its_closed_form():
    problem = next(p for p in zoo() if p.family == "ridge" and not p.label.startswith("scalar"))
    A, B, t, s = (problem.data[name] for name in "ABts")
    x, m = problem.x, len(t)
    H = A.T @ A / m + np.diag(np.exp(x))
    y = np.linalg.solve(H, A.T @ t / m)
    q = np.linalg.solve(H, B.T @ (B @ y - s) / len(s))
    exact = np.cos(x) / 10 - np.exp(x) * y * q
    np.testing.assert_allclose(problem.reference.gradient.astype(float), exact, rtol=1e-12)


def test_elimination_is_exact_beyond_doubles():
    A = 1 / (np.arange(8)[:, None] + np.arange(8) + np.longdouble(1))  # condition 1e10
    x = np.arange(8).astype(np.longdouble)
    assert np.abs(extended.solve(A, A @ x) - x).max() < 1e-7


def test_a_saddle_is_flagged():
    problem = next(p for p in zoo() if p.family == "saddle")
    modes = list(Meeting(problem).certified())
    cases = [met("saddle", mode.name, problem, mode) for mode in modes]
    assert cases
    assert all(case.flagged for case in cases)
