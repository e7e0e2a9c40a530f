"""The picture of data-cleaning runs: what its panels hold, for whole, broken and foreign runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

import hyperlearn as hl
from hyperlearn import datasets
from hyperlearn.plots import plot_cleaning

SAMPLES, LAST = 60, (7, 11)
load_once = functools.cache(datasets.load)


@pytest.fixture(autouse=True)
def images_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", load_once)


def cleaning_run(label: str = "nhgd", seed: int = 0, loss: float = 0.5, **changes: Any) -> hl.Run:
    """A run in which the samples of `LAST` alone have wrong labels and the lowest weights."""
    steps = np.arange(4)
    index = np.arange(100, 100 + SAMPLES)
    true = load_once("mnist").train_labels[index]
    given = true.copy()
    given[list(LAST)] = (given[list(LAST)] + 1) % 10
    x = torch.linspace(0, 3, SAMPLES)
    x[list(LAST)] = torch.tensor([-5.0, -4.0])
    values: dict[str, Any] = {
        "result": {"x": x},
        "history": {
            "step": steps,
            "seconds": 0.5 * steps,
            "oracle_samples": 1000.0 * steps,
            "test_accuracy": np.array([0.1, 0.7, 0.8, 0.9]),
            "outer_loss": np.array([2.3, 1.0, 0.8, loss]),
        },
        "status": "finished",
        "config": {"label": label, "task": {"dataset": "mnist"}},
        "environment": {"seed": seed},
        "attachments": {"given_labels": given, "true_labels": true, "train_index": index},
    }
    return hl.Run(**(values | changes))


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """The figure itself, laid out but not written: rendering takes a second."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(*runs: hl.Run) -> Figure:
        plot_cleaning(runs, tmp_path / "picture.png")
        return figures.pop()

    return draw


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def curves(figure: Figure, x: str, y: str) -> list[Any]:
    (axes,) = [
        axes
        for axes in figure.axes
        if axes.get_xlabel().startswith(x) and axes.get_ylabel().startswith(y)
    ]
    return list(axes.lines)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_file(tmp_path, suffix, start):
    out = tmp_path / "new" / f"picture{suffix}"
    assert plot_cleaning([cleaning_run()], str(out)) == out
    assert out.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.jpg", ".jpg"), ("a", "no suffix"), ("a.h5", ".h5")]
)
def test_suffix(tmp_path, name, suffix):
    with pytest.raises(ValueError, match=rf"cannot write {suffix}; expected \.png or \.pdf"):
        plot_cleaning([cleaning_run()], tmp_path / name)


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="no runs given"):
        plot_cleaning([], tmp_path / "a.png")


class TestCurves:
    def test_values_and_units(self, draw):
        run = cleaning_run()
        figure = draw(run)
        for metric, label in (("test_accuracy", "test accuracy"), ("outer_loss", "outer loss")):
            (over_time,) = curves(figure, "training time in seconds", label)
            np.testing.assert_array_equal(over_time.get_xdata(), run.history["seconds"])
            np.testing.assert_array_equal(over_time.get_ydata(), run.history[metric])
            (over_calls,) = curves(figure, "oracle calls × batch size (log scale)", label)
            np.testing.assert_array_equal(over_calls.get_xdata(), [1000, 2000, 3000])
            assert over_calls.axes.get_xscale() == "log"

    def test_a_colour_and_a_legend_entry_for_each_method(self, draw):
        runs = [cleaning_run("nhgd", 0), cleaning_run("cg10", 0), cleaning_run("nhgd", 1)]
        figure = draw(*runs)
        first, other, second = curves(figure, "training", "test")
        assert first.get_color() == second.get_color() != other.get_color()
        assert [t.get_text() for t in figure.legends[0].get_texts()] == ["nhgd (2 runs)", "cg10"]

    def test_many_methods_stay_apart(self, draw):
        figure = draw(*(cleaning_run(f"method {i}") for i in range(12)))
        lines = curves(figure, "training", "test")
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12

    def test_killed_before_the_first_record(self, draw):
        found = texts(draw(cleaning_run(result={}, history={}, status="running")))
        assert "no test accuracy in this file" in found
        assert "no outer loss in this file" in found

    def test_infinite_losses(self, draw):
        assert draw(cleaning_run(loss=np.inf), cleaning_run(loss=np.nan))

    def test_one_record(self, draw):
        history = {name: column[:1] for name, column in cleaning_run().history.items()}
        assert draw(cleaning_run(history=history))


class TestWeights:
    def test_histograms(self, draw):
        found = texts(draw(cleaning_run(), cleaning_run("cg10", loss=0.3)))
        assert "weights of the training samples, cg10, seed 0" in found  # of the lower loss
        assert any(text.startswith(f"{SAMPLES - 2} clean, mean weight 0.") for text in found)
        assert "2 corrupted, mean weight 0.01" in found

    def test_least_trusted_images(self, draw):
        run = cleaning_run()
        figure = draw(run)
        titles = [axes.get_title() for axes in figure.axes if axes.images]
        assert len(titles) == 20
        given, true = run.attachments["given_labels"], run.attachments["true_labels"]
        order = [*LAST, *(i for i in range(SAMPLES) if i not in LAST)][:20]
        assert titles == [f"given {given[i]} / true {true[i]}" for i in order]
        shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
        images = load_once("mnist").train_images
        np.testing.assert_array_equal(shown[1], images[100 + LAST[1]])
        assert any("trusts least; 2 of these labels are wrong" in text for text in texts(figure))

    def test_fewer_samples_than_places(self, draw):
        run = cleaning_run()
        few = {name: array[:5] for name, array in run.attachments.items()}
        figure = draw(cleaning_run(result={"x": run.x[:5]}, attachments=few))
        assert sum(bool(axes.images) for axes in figure.axes) == 5

    def test_equal_weights_show_no_order(self, draw):
        figure = draw(cleaning_run("none", result={"x": torch.zeros(SAMPLES)}))
        assert not any(axes.images for axes in figure.axes)
        assert "none, seed 0 trusts all training images equally" in texts(figure)

    def test_without_a_result(self, draw):
        figure = draw(cleaning_run(result={}, status="running"))
        assert texts(figure).count("no result in this file") == 3
        assert len(curves(figure, "training", "test")) == 1

    def test_a_killed_run_does_not_hide_another(self, draw):
        found = texts(draw(cleaning_run(result={}, loss=0.1), cleaning_run("cg10")))
        assert "weights of the training samples, cg10, seed 0" in found

    def test_interrupted_run_with_a_result(self, draw):
        assert any("trusts least" in t for t in texts(draw(cleaning_run(status="interrupted"))))

    def test_run_of_another_experiment(self, draw):
        history = {"seconds": np.arange(3.0), "outer_loss": np.arange(3.0)}
        figure = draw(hl.Run(result={"x": {"a": torch.zeros(2)}}, history=history))
        found = texts(figure)
        assert "no test accuracy in this file" in found
        assert found.count("no result in this file") == 3
        assert len(curves(figure, "training", "outer loss")) == 1

    def test_missing_images(self, draw, monkeypatch):
        def load(name: str) -> None:
            raise datasets.DatasetNotFoundError(f"{name}.h5 is in none of\n  /here\n  /there")

        monkeypatch.setattr(datasets, "load", load)
        assert "no images: mnist.h5 is in none of" in texts(draw(cleaning_run()))
