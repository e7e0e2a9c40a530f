"""The picture of PDE runs: what its panels hold against what was given, and their arrangement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text

import hyperlearn as hl
from hyperlearn.plots import plot, plot_pde
from hyperlearn.plots.colours import DIVERGING, SEQUENTIAL

T, X = torch.linspace(0, 1, 5), torch.linspace(-1, 1, 9)
INSIDE = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
STEPS = np.arange(4)
HISTORY = {
    "step": STEPS,
    "seconds": 0.5 * STEPS,
    "outer_loss": np.array([1e3, 1e2, 1.0, 0.5]),
    "l2_error": np.array([1.0, 0.1, 0.01, 0.001]),
    "linf_error": np.array([5.0, 0.6, 0.04, 0.01]),
}


def field(values: torch.Tensor) -> hl.Field:
    return hl.Field(values, {"t": T, "x": X})


def result(name: str = "u", **more: Any) -> dict[str, Any]:
    """A solution that changes sign, with an error that does too."""
    exact = torch.outer(1 + T, X)
    error = 1e-3 * torch.outer(T - 0.3, X + 0.1)
    parts = {"": exact + error, "_reference": exact, "_error": error}
    return {f"{name}{end}": field(values) for end, values in parts.items()} | more


def pde_run(**changes: Any) -> hl.Run:
    values: dict[str, Any] = {
        "result": result(),
        "history": HISTORY,
        "attachments": {"points/interior": INSIDE, "points/initial": INSIDE[:5] * 0.0},
        "status": "finished",
    }
    return hl.Run(**(values | changes))


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """The figure itself, laid out but not written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(run: hl.Run) -> Figure:
        plot_pde(run, tmp_path / "picture.png")
        return figures.pop()

    return draw


def panels(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def meshes(figure: Figure) -> dict[str, QuadMesh]:
    """By the first word of their panel's title."""
    return {
        axes.get_title("left").split(":")[0]: axes.findobj(QuadMesh)[0]
        for axes in panels(figure)
        if axes.findobj(QuadMesh)
    }


def line(figure: Figure, label: str) -> Any:
    return next(
        found
        for axes in panels(figure)
        for found in axes.lines
        if label in (found.get_label(), axes.get_ylabel())
    )


def texts(figure: Figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(Text)).replace("\n", " ")


class TestFields:
    def test_solution_and_error(self, draw):
        run = pde_run()
        found = meshes(draw(run))
        assert list(found) == ["u", "|error|"]
        np.testing.assert_allclose(
            found["u"].get_array().reshape(9, 5), run.result["u"].values.T, rtol=1e-6
        )
        error = run.result["u_error"].values.abs()
        np.testing.assert_allclose(found["|error|"].get_array().reshape(9, 5), error.T, rtol=1e-6)
        norm = found["|error|"].norm
        assert isinstance(norm, LogNorm)
        assert norm.vmax == pytest.approx(float(error.max()))
        assert found["u"].get_cmap().name == DIVERGING

    def test_error_norms_are_told(self, draw):
        run = pde_run()
        error = run.result["u_error"].values
        told = f"|error|: {error.square().mean().sqrt():.1e} r.m.s., ≤ {error.abs().max():.1e}"
        assert told in texts(draw(run))

    def test_error_from_the_reference_alone(self, draw):
        parts = result()
        error = parts.pop("u_error").values.abs()
        found = meshes(draw(pde_run(result=parts)))["|error|"].get_array().reshape(9, 5)
        np.testing.assert_allclose(found, error.T, atol=1e-6)

    def test_axes_are_the_coordinates(self, draw):
        first = panels(draw(pde_run()))[0]
        assert (first.get_xlabel(), first.get_ylabel()) == ("t", "x")

    def test_a_trace_of_another_sign_does_not_halve_the_scale(self, draw):
        parts = result()
        parts["u"] = field(torch.outer(1 + T, X.abs()) - 0.01)
        found = meshes(draw(pde_run(result=parts)))["u"]
        assert found.get_cmap().name == SEQUENTIAL
        assert found.get_clim() == pytest.approx((-0.01, 1.99))

    def test_no_error_at_all(self, draw):
        parts = result() | {"u_error": field(torch.zeros(5, 9))}
        assert "|error|: exactly zero" in texts(draw(pde_run(result=parts)))

    def test_several_fields_have_a_row_each(self, draw):
        run = pde_run(result=result("u") | result("v"))
        figure = draw(run)
        rows = {
            axes.get_title("left").split(":")[0]: axes.get_subplotspec().rowspan.start
            for axes in panels(figure)
        }
        assert rows["u"] == rows["|error| of u"] == 0
        assert rows["v"] == rows["|error| of v"] == 1

    def test_one_coordinate(self, draw):
        parts = {
            "u": hl.Field(X**2 + 0.1, {"x": X}),
            "u_reference": hl.Field(X**2, {"x": X}),
        }
        points = {"points/interior": X[1:-1, None], "points/ends": X[[0, -1], None]}
        figure = draw(pde_run(result=parts, attachments=points))
        np.testing.assert_allclose(line(figure, "u").get_ydata(), X**2 + 0.1, rtol=1e-6)
        np.testing.assert_allclose(line(figure, "reference").get_ydata(), X**2, rtol=1e-6)
        np.testing.assert_allclose(line(figure, "|error|").get_ydata(), 0.1, rtol=1e-5)
        assert "interior (7)" in texts(figure)

    def test_more_coordinates_are_told(self, draw):
        values = hl.Field(torch.ones(5, 5, 5), {"t": T, "x": T, "y": T})
        parts = {"u": values, "u_error": values}
        assert "u: not drawn, a function of t, x, y" in texts(draw(pde_run(result=parts)))


class TestPoints:
    def test_each_equation_in_a_colour(self, draw):
        figure = draw(pde_run())
        interior, initial = figure.findobj(lambda artist: type(artist) is PathCollection)[:2]
        np.testing.assert_allclose(interior.get_offsets(), INSIDE)
        assert not np.array_equal(interior.get_facecolor()[0], initial.get_facecolor()[0])
        assert "interior (20)" in texts(figure)
        assert "initial (5)" in texts(figure)

    def test_the_frame_is_the_domain(self, draw):
        (axes,) = [axes for axes in panels(draw(pde_run())) if axes.get_legend() and not axes.lines]
        assert axes.get_xlim() == pytest.approx((0, 1))
        assert axes.get_ylim() == pytest.approx((-1, 1))


class TestKernel:
    def test_length_scales_that_are_functions(self, draw):
        lengths = {"lengthscale_t": field(torch.outer(1 + T, 2 + X))}
        found = meshes(draw(pde_run(result=result(**lengths))))["lengthscale t"]
        np.testing.assert_allclose(
            found.get_array().reshape(9, 5), torch.outer(1 + T, 2 + X).T, rtol=1e-6
        )

    def test_path_of_parameters(self, draw):
        history = HISTORY | {"lengthscale": np.array([1.0, 0.5, 0.4, 0.3])}
        figure = draw(pde_run(result=result(lengthscale=0.3, l2_error=0.001), history=history))
        path = line(figure, "lengthscale")
        np.testing.assert_array_equal(path.get_xdata(), STEPS)
        np.testing.assert_array_equal(path.get_ydata(), history["lengthscale"])

    def test_without_a_path_there_is_no_panel(self, draw):
        figure = draw(pde_run(result=result(lengthscale=0.3)))
        assert "outer step" not in texts(figure)


class TestConvergence:
    def test_errors_and_loss_over_time(self, draw):
        figure = draw(pde_run())
        for label, name in (
            ("root mean square error", "l2_error"),
            ("largest error", "linf_error"),
            ("outer loss", "outer_loss"),
        ):
            found = line(figure, label)
            np.testing.assert_array_equal(found.get_xdata(), HISTORY["seconds"])
            np.testing.assert_array_equal(found.get_ydata(), HISTORY[name])
            assert found.axes.get_yscale() == "log"

    def test_a_likelihood_may_be_negative(self, draw):
        history = HISTORY | {"outer_loss": np.array([10.0, -1.0, -200.0, -300.0])}
        found = line(draw(pde_run(history=history)), "outer loss")
        assert found.axes.get_yscale() == "linear"

    def test_one_panel_for_both_where_one_would_be_alone(self, draw):
        lengths = {f"lengthscale_{axis}": field(torch.outer(1 + T, 2 + X)) for axis in "tx"}
        figure = draw(pde_run(result=result(**lengths)))
        assert len({axes.get_subplotspec() for axes in panels(figure)}) == 6
        loss = line(figure, "outer loss (right)")
        np.testing.assert_array_equal(loss.get_ydata(), HISTORY["outer_loss"])
        assert loss.axes.get_ylabel() == "outer loss"

    def test_not_finite(self, draw):
        history = HISTORY | {"l2_error": np.array([1.0, np.nan, np.inf, 0.1])}
        assert draw(pde_run(history=history))


def test_a_killed_run_shows_what_it_has(draw):
    figure = draw(pde_run(result={}, history={}, status="killed"))
    found = texts(figure)
    for text in ("no result in this file", "no errors in this file", "interior (20)"):
        assert text in found


def test_runs_of_other_problems_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither points of equations nor fields"):
        plot_pde(hl.Run(result={"x": X}), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"cannot write \.jpg"):
        plot_pde(pde_run(), tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_written(tmp_path, suffix):
    out = tmp_path / "new" / f"a{suffix}"
    assert plot([pde_run()], out) == out
    assert out.stat().st_size > 1000
