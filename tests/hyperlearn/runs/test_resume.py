"""Resuming: the history of a run that was stopped is that of one that never was, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperlearn as hl
from hyperlearn.experiments.data_cleaning import DataCleaning, clean
from hyperlearn.runs.state import as_stored
from solvers import CG, Neumann, RandomNeumann, ShermanMorrison

SAMPLES, WIDTH = 60, 4


def problem(seed: int = 0, **changes: Any) -> hl.BilevelProblem:
    """Weights of noisy samples of a regression; batches, metrics, a direct outer gradient."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    b = a.sum(1) + torch.randn(SAMPLES, generator=generator, dtype=torch.float64)

    def sample_loss(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (batch["a"] @ y - batch["b"]) ** 2 / 2

    def sample_weight(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return torch.sigmoid(x[batch["index"]])

    def inner(y: Tensor, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (sample_weight(x, batch) * sample_loss(y, batch)).mean()

    def outer(y: Tensor, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return sample_loss(y, batch).mean() + 1e-3 * (x**2).mean()

    data = {"a": a, "b": b, "index": torch.arange(SAMPLES)}
    values: dict[str, Any] = {
        "x0": torch.zeros(SAMPLES, dtype=torch.float64),
        "y0": torch.zeros(WIDTH, dtype=torch.float64),
        "inner_data": data,
        "outer_data": {name: part[: SAMPLES // 2] for name, part in data.items()},
        "regularizer": hl.L2(0.1),
        "likelihood": hl.WeightedLikelihood(sample_loss=sample_loss, sample_weight=sample_weight),
        "metrics": {"largest": lambda y, x: float(x.max())},
    }
    return hl.BilevelProblem(inner, outer, **values | changes)


COMMON: dict[str, Any] = {
    "step_size": 1.0, "momentum": 0.5, "inner_steps": 3, "inner_step_size": 0.2,
    "inner_batch_size": 7, "outer_batch_size": 11,
}  # fmt: skip
METHODS = {
    "cg": hl.ImplicitDifferentiation(solver=CG(), **COMMON),
    "neumann": hl.ImplicitDifferentiation(solver=Neumann(maxiter=5), **COMMON),
    "along the trajectory": hl.ImplicitDifferentiation(cross="trajectory", **COMMON),
    "identity": hl.IdentityHessian(**COMMON),
    "unrolled": hl.Unrolled(unroll_steps=2, **COMMON),
    "fixed": hl.FixedOuter(**COMMON),
    "nhgd": hl.NHGD(**COMMON),
    "nhgd, kept": hl.NHGD(reset="never", window=20, **COMMON),
    "nhgd, smoothed": hl.NHGD(rho=0.3, reset="never", window=9, initial=1.0, **COMMON),
    "nhgd, samples": hl.NHGD(rows="sample", weight_correction=True, **COMMON),
    "nhgd, sherman-morrison": hl.NHGD(solver=ShermanMorrison(), **COMMON),
    "random neumann": hl.ImplicitDifferentiation(
        solver=RandomNeumann(terms=9, seed=torch.Generator().manual_seed(5)), **COMMON
    ),
}
STEPS, EVERY = 23, 4


def fresh(name: str) -> hl.Method:
    """A method with generators of its own."""
    method = METHODS[name]
    seed = getattr(getattr(method, "solver", None), "seed", None)
    if isinstance(seed, torch.Generator):
        solver = replace(method.solver, seed=torch.Generator().manual_seed(5))
        return replace(method, solver=solver)
    return method


class Stopped(Exception):
    pass


def stop_after(records: int) -> Any:
    """A callback that ends the run as a crash would, after so many records."""
    seen = []

    def callback(row: Any) -> None:
        seen.append(row)
        if len(seen) > records:
            raise Stopped

    return callback


def assert_same(one: hl.Run, other: hl.Run) -> None:
    assert set(one.history) == set(other.history)
    for name, column in one.history.items():
        if name != "seconds":
            np.testing.assert_array_equal(column, other.history[name], err_msg=name)
    assert set(one.certificates) == set(other.certificates)
    for name, column in one.certificates.items():
        np.testing.assert_array_equal(column, other.certificates[name], err_msg=name)
    torch.testing.assert_close(one.x, other.x, rtol=0, atol=0)
    torch.testing.assert_close(one.y, other.y, rtol=0, atol=0)
    assert one.certificate == other.certificate


@pytest.mark.filterwarnings("ignore:the adjoint solve missed")
@pytest.mark.parametrize("records", [1, 3, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, name, records):
    settings: dict[str, Any] = {"budget": hl.Budget(steps=STEPS), "seed": 3, "every": EVERY}
    whole = hl.minimize(problem(), fresh(name), **settings)
    path = tmp_path / "run.h5"
    often = hl.Checkpoints(seconds=None, steps=3)
    with pytest.raises(Stopped):
        hl.minimize(
            problem(), fresh(name), record=path, checkpoints=often,
            callbacks=[stop_after(records)], **settings,
        )  # fmt: skip
    assert hl.load_run(path).status == "failed"
    torch.manual_seed(99)  # whatever else was drawn in between
    run = hl.minimize(
        problem(), fresh(name), record=path, resume=True, checkpoints=often, **settings
    )
    assert run.status == "finished"
    assert_same(run, whole)
    assert_same(hl.load_run(path), whole)


def test_from_the_file_alone(tmp_path):
    """Method, budget and seed come from the file."""
    path = tmp_path / "run.h5"
    whole = hl.minimize(problem(), METHODS["nhgd"], budget=hl.Budget(steps=20), seed=4, every=5)
    with pytest.raises(Stopped):
        hl.minimize(
            problem(), METHODS["nhgd"], budget=hl.Budget(steps=20), seed=4, every=5, record=path,
            checkpoints=hl.Checkpoints(steps=1), callbacks=[stop_after(2)],
            config={"label": "mine"}, attachments={"a": np.arange(3)},
        )  # fmt: skip
    run = hl.resume(path, problem())
    assert_same(run, whole)
    assert run.config["label"] == "mine"
    np.testing.assert_array_equal(run.attachments["a"], np.arange(3))


def test_an_experiment_needs_no_problem(tmp_path):
    task = DataCleaning(train_size=300, validation_size=100, selection_size=0)
    settings: dict[str, Any] = {"budget": hl.Budget(steps=6), "seed": 2, "every": 2}
    whole = clean(hl.NHGD(**COMMON), task, label="mine", **settings)
    path = tmp_path / "run.h5"
    clean(
        hl.NHGD(**COMMON),
        task,
        label="mine",
        record=path,
        **settings | {"budget": hl.Budget(steps=4)},
    )
    run = hl.resume(path, budget=hl.Budget(steps=6))
    assert_same(run, whole)


def test_another_problem_is_needed(tmp_path):
    path = tmp_path / "run.h5"
    hl.minimize(problem(), METHODS["cg"], budget=hl.Budget(steps=1), record=path)
    with pytest.raises(ValueError, match=r"no experiment of this library: hand its problem over"):
        hl.resume(path)


def test_more_steps_than_before(tmp_path):
    """The record that only the end of the first budget made is not one of the longer run's."""
    path, method = tmp_path / "run.h5", METHODS["cg"]
    whole = hl.minimize(problem(), method, budget=hl.Budget(steps=20), every=4)
    first = hl.minimize(problem(), method, budget=hl.Budget(steps=10), every=4, record=path)
    np.testing.assert_array_equal(first.history["step"], [0, 4, 8, 10])
    run = hl.resume(path, problem(), budget=hl.Budget(steps=20))
    assert_same(run, whole)
    assert run.setting("budget") == hl.Budget(steps=20)
    assert hl.load_run(path).setting("budget") == hl.Budget(steps=20)


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    path = tmp_path / "run.h5"
    settings: dict[str, Any] = {"budget": hl.Budget(steps=5), "record": path}
    hl.minimize(problem(), METHODS["cg"], **settings)
    before = path.read_bytes()
    run = hl.minimize(problem(), METHODS["cg"], resume=True, **settings)
    assert (run.status, run.history["step"][-1]) == ("finished", 5)
    assert path.read_bytes() == before


def test_resuming_what_is_not_there_starts_it(tmp_path):
    path = tmp_path / "run.h5"
    run = hl.minimize(problem(), METHODS["cg"], budget=hl.Budget(steps=2), record=path, resume=True)
    assert run.status == "finished"
    assert path.exists()


def test_a_run_that_was_killed_in_the_middle(tmp_path):
    """SIGKILL, and with draws from global generators inside the losses."""
    script = tmp_path / "script.py"
    path = tmp_path / "run.h5"
    script.write_text(
        """
import os, random, signal, sys
import numpy as np, torch, hyperlearn as hl

def noise():
    return float(torch.rand(())) + np.random.rand() + random.random()

problem = hl.BilevelProblem(
    lambda y, x: ((y - x) ** 2).sum(),
    lambda y, x: ((y - 1) ** 2).sum() + 0.1 * noise() * (x ** 2).sum(),
    x0=torch.zeros(2, dtype=torch.float64), y0=torch.zeros(2, dtype=torch.float64),
)
torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002

def kill(row):
    if row["step"] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

hl.minimize(
    problem, hl.IdentityHessian(curvature=2.0, step_size=0.1, momentum=0.5),
    budget=hl.Budget(steps=12), every=1, record=sys.argv[2], resume=True,
    checkpoints=hl.Checkpoints(steps=2), callbacks=[kill],
)
"""
    )
    root = Path(hl.__file__).parents[1]

    def run(kill_at: int, file: Path) -> int:
        command = [sys.executable, str(script), str(kill_at), str(file)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=root, env=env, timeout=120).returncode

    assert run(-1, tmp_path / "whole.h5") == 0
    assert run(5, path) == -signal.SIGKILL
    assert hl.load_run(path).status == "killed"
    assert hl.load_run(path).history["step"][-1] == 5
    assert run(9, path) == -signal.SIGKILL
    assert run(-1, path) == 0
    assert_same(hl.load_run(path), hl.load_run(tmp_path / "whole.h5"))


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "run.h5"
        hl.minimize(problem(), METHODS["cg"], budget=hl.Budget(steps=4), record=path, seed=1)
        return path

    def test_another_setting(self, path):
        before = path.read_bytes()
        other = replace(METHODS["cg"], step_size=7.0)
        with pytest.raises(hl.RunFileError, match=r"method\.step_size: 1\.0 there, 7\.0 here"):
            hl.minimize(
                problem(), other, budget=hl.Budget(steps=9), record=path, resume=True, seed=1
            )
        assert path.read_bytes() == before

    def test_another_solver(self, path):
        other = replace(METHODS["cg"], solver=Neumann(maxiter=5))
        with pytest.raises(hl.RunFileError, match=r"method\.solver\.class: CG there, Neumann"):
            hl.minimize(
                problem(), other, budget=hl.Budget(steps=9), record=path, resume=True, seed=1
            )

    def test_another_seed(self, path):
        with pytest.raises(hl.RunFileError, match=r"seed: 1 there, 2 here"):
            hl.minimize(
                problem(), METHODS["cg"], budget=hl.Budget(steps=9), record=path, resume=True,
                seed=2,
            )  # fmt: skip

    def test_other_data(self, path):
        with pytest.raises(hl.RunFileError, match=r"checksums\.inner_data: [0-9a-f]{32} there"):
            hl.resume(path, problem(seed=1), budget=hl.Budget(steps=9))

    def test_another_start(self, path):
        other = problem(x0=torch.full((SAMPLES,), 1e-9, dtype=torch.float64))
        with pytest.raises(hl.RunFileError, match=r"checksums\.x0"):
            hl.resume(path, other, budget=hl.Budget(steps=9))

    def test_what_has_no_file(self):
        with pytest.raises(ValueError, match="give record="):
            hl.minimize(problem(), METHODS["cg"], budget=hl.Budget(steps=1), resume=True)

    def test_resume_and_overwrite(self, path):
        with pytest.raises(ValueError, match="exclude each other"):
            hl.minimize(
                problem(), METHODS["cg"], budget=hl.Budget(steps=1), record=path, resume=True,
                overwrite=True,
            )  # fmt: skip

    def test_a_method_that_a_file_cannot_hold(self, tmp_path):
        def sampler(generator: torch.Generator) -> Any:
            raise AssertionError

        solver = RandomNeumann(terms=3, operators=sampler)
        method = hl.ImplicitDifferentiation(solver=solver, **COMMON)
        stored = as_stored({"method": method})["method"]
        assert stored["solver"]["operators"]["class"] == "function"
        path = tmp_path / "run.h5"
        with pytest.raises(AssertionError):
            hl.minimize(problem(), method, budget=hl.Budget(steps=1), record=path)
        with pytest.raises(ValueError, match=r"'function'.*hand it over"):
            hl.resume(path, problem())

    @pytest.mark.parametrize(
        "settings", [{"seconds": -1.0}, {"seconds": float("nan")}, {"steps": 0}, {"keep": 0}]
    )
    def test_checkpoints(self, settings):
        with pytest.raises(ValueError, match=f"Checkpoints: {next(iter(settings))}="):
            hl.Checkpoints(**settings)


def test_retention_and_cadence(tmp_path):
    path = tmp_path / "run.h5"
    found = []
    hl.minimize(
        problem(), METHODS["cg"], budget=hl.Budget(steps=12), record=path, every=1,
        checkpoints=hl.Checkpoints(seconds=None, steps=3, keep=2),
        callbacks=[lambda row: found.append(hl.load_run(path).checkpoints)],
    )  # fmt: skip
    assert found[0] == (0,)
    assert found[5] == (0, 3)
    assert found[8] == (3, 6)
    assert hl.load_run(path).checkpoints == (9, 12)


def test_by_seconds(tmp_path):
    path = tmp_path / "run.h5"
    hl.minimize(
        problem(), METHODS["cg"], budget=hl.Budget(steps=5), record=path,
        checkpoints=hl.Checkpoints(seconds=0.0, keep=99),
    )  # fmt: skip
    assert hl.load_run(path).checkpoints == (0, 1, 2, 3, 4, 5)


def test_global_generators_are_where_they_were(tmp_path):
    from hyperlearn.runs.state import random_state, restore_random_state

    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    np.random.randn()  # leaves a second normal number behind  # noqa: NPY002
    state = as_stored({"state": random_state(None)})["state"]
    expected = (torch.rand(3), np.random.randn(3), [random.random() for _ in range(700)])  # noqa: NPY002
    restore_random_state(None, state)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.randn(3), expected[1])  # noqa: NPY002
    assert [random.random() for _ in range(700)] == expected[2]
