"""What a run is said to hold: curves, settings, shapes, and what damage has cost."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import hyperlearn as hl
from hyperlearn.runs import Field, Run, RunFile, RunFileError, load_run, reader
from hyperlearn.runs.summary import (
    BLOCKS,
    contents,
    expression,
    is_logarithmic,
    losses,
    metrics,
    printable,
    sparkline,
)


def heights(line: str) -> list[int]:
    return [BLOCKS.index(block) for block in line]


class TestSparkline:
    def test_heights_are_rounded_shares_of_the_range(self):
        values = np.random.default_rng(0).uniform(-3, 5, size=20)
        shares = (values - values.min()) / (values.max() - values.min())
        assert heights(sparkline(values)) == [math.floor(7 * s + 0.5) for s in shares]

    def test_logarithmic_beyond_two_decades(self):
        assert not is_logarithmic([1, 100])
        assert is_logarithmic([1, 101])
        assert not is_logarithmic([0, 1, 1000])
        assert not is_logarithmic([-1, 1, 1000])
        assert is_logarithmic([1, 1000, math.nan, math.inf])
        assert not is_logarithmic([])
        assert heights(sparkline(10.0 ** np.arange(8))) == list(range(8))
        assert heights(sparkline(np.arange(8))) == list(range(8))

    def test_not_a_number_is_a_gap(self):
        assert sparkline([0, math.nan, 7]) == "▁ █"
        assert sparkline([math.nan] * 3) == "   "
        assert sparkline([]) == ""

    def test_infinity(self):
        assert sparkline([0, 1, math.inf, -math.inf]) == "▁██▁"
        assert sparkline([math.inf]) == "█"

    def test_neighbours_are_averaged(self):
        values = np.repeat(np.arange(8.0), 5)
        values[3] = math.nan
        assert heights(sparkline(values, width=8)) == list(range(8))
        assert len(sparkline(np.arange(1000), width=17)) == 17
        assert sparkline([math.nan, math.nan, 1, 2], width=2)[0] == " "

    def test_constant_and_huge(self):
        assert len(set(sparkline([3, 3, 3]))) == 1
        assert heights(sparkline([-1e308, 0, 1e308])) == [0, 4, 7]

    def test_width(self):
        with pytest.raises(ValueError, match="width=0"):
            sparkline([1], width=0)


def test_metrics():
    run = Run(
        history={
            "step": np.arange(4),
            "gradients": np.arange(4),
            "outer_loss": np.array([math.nan, 5.0, 1.0, 2.0]),
            "test_accuracy": np.array([0.1, 0.9, 0.5, math.nan]),
            "converged": np.array([False, True, True, False]),
            "phase": np.array(["warm", "warm", "cold", "cold"]),
            "never": np.full(4, math.nan),
        },
        units={"outer_loss": "nats"},
    )
    found = {m.name: m for m in metrics(run)}
    assert list(found) == ["outer_loss", "test_accuracy", "converged", "phase", "never"]
    loss, accuracy = found["outer_loss"], found["test_accuracy"]
    assert math.isnan(loss.first)
    assert (loss.best, loss.last, loss.maximize, loss.unit) == (1.0, 2.0, False, "nats")
    assert (accuracy.first, accuracy.best, accuracy.maximize) == (0.1, 0.9, True)
    assert math.isnan(accuracy.last)
    assert loss.curve == " █▁▃"
    assert (found["phase"].first, found["phase"].last, found["phase"].curve) == ("warm", "cold", "")
    assert math.isnan(found["never"].best)


def test_expression_is_what_python_writes():
    method = hl.NHGD(step_size=0.5)
    run = hl.minimize(problem(), method, budget=hl.Budget(steps=1))
    namespace = {name: getattr(hl, name) for name in ("NHGD",)} | vars(hl.solvers)
    assert eval(expression(run.config["method"]), namespace) == method


def test_printable():
    assert printable("a\x1b]0;b\x07\rc\nα") == "a\\x1b]0;b\\x07\\rc\nα"
    assert "\x1b" not in expression({"class": "A\x1b", "b": "\x1b"})


def problem() -> hl.BilevelProblem:
    return hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
    )


VALUES = {
    "weights": np.ones((3, 4), dtype=np.float32),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "scalar": torch.tensor(1.0),
    "rate": 0.5,
    "note": "short",
    "nothing": None,
    "long": "x" * 20_000,
    "u": Field(np.zeros((3, 2)), {"x": np.arange(3.0), "t": np.arange(2.0)}),
    "layers": {"a/b": {"w": torch.zeros(2, 1)}, "list": [torch.zeros(1), 3]},
    "numbers": list(range(9)),
}


class TestContents:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        file = RunFile(tmp_path / "run.h5", config={}, environment={}, attachments=VALUES)
        file.finish("finished", "", {"x": torch.zeros(5)})
        return file.path

    def test_shapes_and_types(self, path):
        found = {item.name: item for item in contents(load_run(path), "attachments")}
        assert (found["weights"].shape, found["weights"].dtype) == ((3, 4), "float32")
        assert (found["half"].kind, found["half"].dtype) == ("tensor", "bfloat16")
        assert found["scalar"].shape == ()
        assert (found["rate"].note, found["note"].note) == ("0.5", "short")
        assert found["nothing"].note == "None"
        assert (found["long"].kind, found["long"].dtype) == ("text", "UTF-8")
        assert (found["u"].shape, found["u"].note) == ((3, 2), "over x, t")
        assert found["layers.a/b.w"].shape == (2, 1)
        assert found["layers.list.000000"].shape == (1,)
        assert found["layers.list.000001"].note == "3"
        assert (found["numbers"].kind, found["numbers"].shape) == ("list", (9,))
        assert [item.shape for item in contents(load_run(path), "result")] == [(5,)]

    def test_no_array_is_read(self, path, monkeypatch):
        run = load_run(path)
        monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
        monkeypatch.setattr(reader.Values, "__getitem__", None)
        assert len(contents(run, "attachments")) == 12

    def test_in_memory(self, path):
        """The same of what is in memory, but for how text and lists are stored."""
        run = Run(attachments=VALUES)
        stored = {item.name: item for item in contents(load_run(path), "attachments")}
        for item in contents(run, "attachments"):
            if item.name in stored and item.name != "long":
                assert stored[item.name] == item

    def test_a_group_within_itself(self, path):
        with h5py.File(path, "r+") as file:
            file["attachments/layers/again"] = file["attachments/layers"]
        with pytest.raises(RunFileError, match="held under another name too"):
            contents(load_run(path), "attachments")

    def test_links_are_not_followed(self, path, tmp_path):
        with h5py.File(path, "r+") as file:
            file["attachments/away"] = h5py.ExternalLink(tmp_path / "other.h5", "/secret")
        with pytest.raises(RunFileError, match="external link"):
            contents(load_run(path), "attachments")


class TestLosses:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "run.h5"
        method = hl.IdentityHessian(curvature=2.0, step_size=0.1)
        hl.minimize(problem(), method, budget=hl.Budget(steps=600), every=1, record=path)
        return path

    def test_nothing(self, path):
        assert losses(load_run(path)) == []

    def test_records_and_result(self, path):
        with h5py.File(path) as file:
            column, x = file["history/outer_loss"], file["result/x"]
            places = [column.id.get_chunk_info_by_coord((512,)).byte_offset, x.id.get_offset()]
        spoilt = bytearray(path.read_bytes())
        for place in places:
            spoilt[place] ^= 255
        path.write_bytes(bytes(spoilt))
        # Sealed chunks are compared when they are read, which recovery does.
        run = hl.runs.recovery.recovered(path)
        assert len(run.history["step"]) == 512
        assert losses(run) == ["89 of 601 records of history", "x of result"]

    def test_cut_short(self, path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size - 100])
        run = hl.runs.recovery.recovered(path)
        assert "cannot be told" in losses(run)[0]
