"""Curves and certificates: what the panels, axes and legends hold, and what is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

import hyperlearn as hl
from hyperlearn import plots
from hyperlearn.plots import plot_certificates, plot_curves

STEPS = 30


def made(label: str = "nhgd", seed: int = 0, scale: float = 1.0, **changes: Any) -> hl.Run:
    steps = np.arange(STEPS)
    values: dict[str, Any] = {
        "history": {
            "step": steps,
            "seconds": 0.5 * steps,
            "gradients": 10 * steps,
            "oracle_calls": 20 * steps,
            "oracle_samples": 400 * steps,
            "outer_loss": scale * np.exp(-steps / 3.0),
            "hypergradient_norm": np.where(steps, scale / (1 + steps), np.nan),
            "head_loss": 0.5 * scale + np.sin(steps),
        },
        "certificates": {
            "step": steps[1:],
            "inner_stationarity": scale * 0.5 ** steps[1:],
            "adjoint_residual": np.full(STEPS - 1, 1e-9),
            "hessian_residual": np.full(STEPS - 1, np.nan),
            "error_bound": np.where(steps[1:] > 9, 0.0, 1e-3),
            "reason": np.array(["as asked"] * (STEPS - 1)),
        },
        "status": "finished",
        "config": {"label": label, "method": {}},
        "environment": {"seed": seed},
        "units": {"head_loss": "m"},
    }
    return hl.Run(**(values | changes))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Laid out but not written: rendering takes a second."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


Draw = Callable[..., Figure]


@pytest.fixture
def draw(figures: list[Figure], tmp_path: Path) -> Draw:
    def draw(*runs: hl.Run, function: Any = plot_curves, **options: Any) -> Figure:
        function(runs, tmp_path / "picture.png", **options)
        return figures.pop()

    return draw


def panel(figure: Figure, label: str) -> Any:
    (axes,) = [axes for axes in figure.axes if axes.get_ylabel() == label]
    return axes


def texts(figure: Figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(Text)).replace("\n", " ")


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


class TestPanels:
    def test_metrics_that_are_no_costs(self, draw):
        figure = draw(made())
        labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
        assert labels == ["outer loss", "hypergradient norm", "head loss (m)"]

    @pytest.mark.parametrize(
        ("x", "label"),
        [
            ("step", "outer step"),
            ("seconds", "training time (s)"),
            ("oracle_calls", "oracle calls"),
            ("oracle_samples", "oracle calls × batch size"),
        ],
    )
    def test_values_over_each_cost(self, draw, x, label):
        run = made()
        axes = panel(draw(run, x=x), "head loss (m)")
        assert axes.get_xlabel() == label
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), run.history[x])
        np.testing.assert_array_equal(line.get_ydata(), run.history["head_loss"])

    def test_chosen_metrics_in_their_order(self, draw):
        figure = draw(made(), metrics=["head_loss", "outer_loss"])
        assert [axes.get_ylabel() for axes in figure.axes] == ["head loss (m)", "outer loss"]

    def test_logarithmic_where_values_span_decades(self, draw):
        figure = draw(made())
        assert panel(figure, "outer loss").get_yscale() == "log"
        assert panel(figure, "hypergradient norm").get_yscale() == "linear"  # 1 / 30
        assert panel(figure, "head loss (m)").get_yscale() == "linear"  # changes sign

    def test_logarithmic_as_asked(self, draw):
        assert panel(draw(made(), log=False), "outer loss").get_yscale() == "linear"
        figure = draw(made(), log=True)
        assert panel(figure, "hypergradient norm").get_yscale() == "log"
        negative = int((made().history["head_loss"] <= 0).sum())
        told = panel(figure, "head loss (m)").get_title("left")
        assert told == f"values not drawn: {negative} not positive (nhgd)"


class TestSeeds:
    def test_median_and_range(self, draw):
        runs = [made(seed=seed, scale=scale) for seed, scale in enumerate((1.0, 2.0, 5.0))]
        figure = draw(*runs, x="step")
        assert legend(figure) == ["nhgd, median and range of 3 seeds"]
        axes = panel(figure, "outer loss")
        (line,), (area,) = axes.lines, axes.collections
        np.testing.assert_allclose(line.get_ydata(), runs[1].history["outer_loss"])
        corners = area.get_paths()[0].vertices
        for step in (0, 7, STEPS - 1):
            at = corners[corners[:, 0] == step, 1]
            expected = [run.history["outer_loss"][step] for run in (runs[0], runs[2])]
            np.testing.assert_allclose([at.min(), at.max()], expected)

    def test_apart(self, draw):
        figure = draw(made(seed=0), made(seed=1), spread="none")
        assert legend(figure) == ["nhgd, seed 0", "nhgd, seed 1"]
        assert not panel(figure, "outer loss").collections

    def test_many_groups_look_different(self, draw):
        figure = draw(*(made(f"method {i}") for i in range(20)))
        looks = {(li.get_color(), li.get_linestyle()) for li in panel(figure, "outer loss").lines}
        assert len(looks) == 20

    def test_no_common_range_is_told(self, draw):
        late = made(seed=1)
        late.history = {name: column + 1000 for name, column in late.history.items()}
        axes = panel(draw(made(), late), "outer loss")
        assert len(axes.lines) == 2
        assert "drawn apart, with no range in common: nhgd (2 runs)" in axes.get_title(
            "left"
        ).replace("\n", " ")


class TestWhatIsMissing:
    def test_not_finite(self, draw):
        history = dict(made().history)
        history["outer_loss"] = history["outer_loss"].copy()
        history["outer_loss"][[3, 8, 29]] = np.nan, np.inf, np.nan
        axes = panel(draw(made(history=history)), "outer loss")
        assert axes.get_title("left") == "values not drawn: 3 not finite (nhgd)"
        (line,) = axes.lines
        assert list(np.flatnonzero(np.isnan(line.get_ydata()))) == [3, 8]

    def test_a_first_record_without_a_hypergradient_is_as_it_should_be(self, draw):
        assert panel(draw(made()), "hypergradient norm").get_title("left") == ""

    def test_one_record_is_a_point(self, draw):
        history = {name: column[:1] for name, column in made().history.items()}
        figure = draw(made(history=history))
        assert panel(figure, "outer loss").lines[-1].get_marker() == "o"
        assert "no hypergradient norm to draw not measured: nhgd (1 run)" in texts(figure)

    def test_no_records_at_all(self, draw):
        assert "no records in this file" in texts(draw(made(history={})))

    def test_a_run_without_records_among_others(self, draw):
        figure = draw(made(), made(seed=1, history={}, status="killed"))
        assert legend(figure) == ["nhgd, median and range of 2 seeds (1 killed)"]
        assert panel(figure, "outer loss").get_title("left") == "no values: nhgd (1 run)"

    def test_all_nan(self, draw):
        history = dict(made().history) | {"outer_loss": np.full(STEPS, np.nan)}
        assert "no outer loss to draw not measured: nhgd" in texts(draw(made(history=history)))


class Needed(Mapping[str, Any]):
    """A history of which only some columns may be read."""

    def __init__(self, columns: Mapping[str, Any], allowed: set[str]) -> None:
        self.columns, self.allowed = columns, allowed

    def __getitem__(self, name: str) -> Any:
        assert name in self.allowed, f"{name} was read"
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


class TestCost:
    def test_only_what_is_drawn_is_read(self, draw):
        run = made()
        run.history = Needed(run.history, {"seconds", "outer_loss"})
        assert draw(run, metrics=["outer_loss"])

    def test_of_default_metrics_no_costs_are_read(self, draw):
        run = made()
        needed = {"step", "outer_loss", "hypergradient_norm", "head_loss"}
        run.history = Needed(run.history, needed)
        assert draw(run, x="step")

    def test_a_million_records(self, tmp_path):
        n = 1_000_000
        noise = np.random.default_rng(0).random(n)
        run = hl.Run(history={"seconds": np.arange(n) / 1e3, "outer_loss": noise})
        start = time.perf_counter()
        plot_curves([run], tmp_path / "curves.png")
        assert time.perf_counter() - start < 5

    def test_a_spike_among_a_million_is_drawn(self, draw):
        y = np.zeros(1_000_000)
        y[654_321] = 1
        run = hl.Run(history={"seconds": np.arange(1e6), "outer_loss": y})
        (line,) = panel(draw(run), "outer loss").lines
        assert len(line.get_xdata()) < 10_000
        assert line.get_ydata().max() == 1


class TestErrors:
    def test_unknown_metric(self, tmp_path):
        with pytest.raises(
            ValueError, match="unknown metric 'outer_los': did you mean 'outer_loss'"
        ):
            plot_curves([made()], tmp_path / "a.png", metrics=["outer_los"])

    def test_unknown_cost(self, tmp_path):
        with pytest.raises(ValueError, match="unknown x 'second': did you mean 'seconds'"):
            plot_curves([made()], tmp_path / "a.png", x="second")  # type: ignore[arg-type]

    def test_units_that_differ(self, tmp_path):
        with pytest.raises(ValueError, match="head_loss is in m and in km"):
            plot_curves([made(), made(units={"head_loss": "km"})], tmp_path / "a.png")

    def test_lengths_that_differ(self, tmp_path):
        history = dict(made().history) | {"outer_loss": np.ones(3)}
        with pytest.raises(
            ValueError, match=r"outer_loss has shape \(3,\) and its abscissa \(30,\)"
        ):
            plot_curves([made(history=history)], tmp_path / "a.png")

    def test_suffix_and_no_runs(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected \.png or \.pdf or \.svg"):
            plot_curves([made()], tmp_path / "a.jpg")
        with pytest.raises(ValueError, match="no runs given"):
            plot_curves([], tmp_path / "a.png")


class TestCertificates:
    def test_over_the_cost_of_their_records(self, draw):
        run = made()
        figure = draw(run, function=plot_certificates, x="oracle_calls")
        axes = panel(figure, "inner stationarity")
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), run.history["oracle_calls"][1:])
        np.testing.assert_array_equal(line.get_ydata(), run.certificates["inner_stationarity"])
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "oracle calls"

    def test_records_without_a_certificate(self, draw):
        run = made()
        run.certificates = {name: column[::3] for name, column in run.certificates.items()}
        figure = draw(run, function=plot_certificates)
        (line,) = panel(figure, "inner stationarity").lines
        np.testing.assert_array_equal(line.get_xdata(), run.history["seconds"][1::3])

    def test_what_was_not_measured(self, draw):
        figure = draw(made(), function=plot_certificates)
        assert "no Hessian residual to draw not measured: nhgd (1 run)" in texts(figure)
        told = panel(figure, "error bound").get_title("left")
        assert told == "values not drawn: 20 not positive (nhgd)"

    def test_another_field(self, draw):
        figure = draw(made(), function=plot_certificates, metrics=["reason"])
        assert "no reason to draw not numbers: nhgd (1 run)" in texts(figure)

    def test_unknown_field(self, tmp_path):
        with pytest.raises(ValueError, match="unknown field of the certificates 'bound'"):
            plot_certificates([made()], tmp_path / "a.png", metrics=["bound"])

    def test_of_a_real_run(self, draw):
        problem = hl.BilevelProblem(
            lambda y, x: ((y - x) ** 2).sum(),
            lambda y, x: ((y - 1) ** 2).sum(),
            x0=torch.zeros(2),
            y0=torch.zeros(2),
        )
        method = hl.ImplicitDifferentiation(step_size=0.1)
        run = hl.minimize(problem, method, budget=hl.Budget(steps=20), every=5)
        (line,) = panel(draw(run, function=plot_certificates, x="step"), "inner stationarity").lines
        np.testing.assert_array_equal(line.get_xdata(), [5, 10, 15, 20])


class TestPlot:
    def test_auto(self, draw, monkeypatch):
        cleaning = made(attachments=dict.fromkeys(("given_labels", "true_labels", "train_index")))
        asked = []
        monkeypatch.setattr(plots, "plot_cleaning", lambda runs, out: asked.append(len(runs)))
        plots.plot([cleaning], "a.png")
        assert asked == [1]
        for runs, options in (
            ([made()], {}),
            ([cleaning, made()], {}),
            ([cleaning], {"x": "step"}),
        ):
            assert panel(draw(*runs, function=plots.plot, **options), "outer loss")
        assert asked == [1]

    def test_certificates(self, draw):
        figure = draw(made(), function=plots.plot, kind="certificates", log=False)
        assert panel(figure, "inner stationarity").get_yscale() == "linear"

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"kind": "curve"}, "unknown kind 'curve': did you mean 'curves'"),
            ({"kind": "fields", "x": "step"}, "x is for the kinds curves and certificates"),
            ({"names": ["u"]}, "names is for the kinds fields and kernel; the kind is curves"),
            ({"kind": "fields"}, "the kind fields draws one run; 2 were given"),
        ],
    )
    def test_refused(self, tmp_path, options, told):
        with pytest.raises(ValueError, match=told):
            plots.plot([made(), made(seed=1)], tmp_path / "a.png", **options)


class TestFile:
    @pytest.mark.parametrize(
        ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
    )
    def test_formats(self, tmp_path, suffix, start):
        out = plot_curves([made()], tmp_path / "new" / f"a{suffix}", metrics=["outer_loss"])
        assert out.read_bytes().startswith(start)

    def test_fonts_are_embedded_as_truetype(self, tmp_path):
        out = plot_curves([made()], tmp_path / "a.pdf", metrics=["outer_loss"])
        written = out.read_bytes()
        assert b"/FontFile2" in written
        assert b"/Type3" not in written

    def test_no_setting_outlives_a_picture(self, tmp_path):
        import matplotlib as mpl

        before = dict(mpl.rcParams)
        plot_curves([made()], tmp_path / "a.svg", metrics=["outer_loss"])
        assert dict(mpl.rcParams) == before
