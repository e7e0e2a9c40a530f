"""Fields and matrices: what is drawn against what was given, their axes, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.tri import TriContourSet

import hyperlearn as hl
from hyperlearn.plots import plot, plot_fields, plot_kernel
from hyperlearn.plots.colours import DIVERGING, SEQUENTIAL, Colours

X, T = torch.linspace(0, 1, 7), torch.linspace(0, 3, 4)
UNITS: dict[str, Any] = {"units": "K", "coordinate_units": {"x": "m", "t": "s"}}


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """The figure itself, laid out but not written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(
        result: Mapping[str, Any],
        *,
        function: Any = plot_fields,
        attachments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Figure:
        run = hl.Run(result=result, attachments=attachments or {})
        function(run, tmp_path / "picture.png", **options)
        return figures.pop()

    return draw


def panels(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def bars(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"]


def texts(figure: Figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(Text)).replace("\n", " ")


class TestFields:
    def test_one_coordinate(self, draw):
        field = hl.Field(X**2, {"x": X}, units="K", coordinate_units={"x": "m"})
        (axes,) = panels(draw({"u": field}))
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_xdata(), X)
        np.testing.assert_allclose(line.get_ydata(), X**2)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (m)", "u (K)")

    def test_one_coordinate_in_disorder(self, draw):
        place = np.array([3.0, 1, 2.5])
        (axes,) = panels(draw({"u": hl.Field(10 * place, {"x": place})}))
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), [1, 2.5, 3])
        np.testing.assert_array_equal(line.get_ydata(), [10, 25, 30])
        assert line.get_marker() == "."

    def test_grid(self, draw):
        values = torch.outer(X, T)
        figure = draw({"u": hl.Field(values, {"x": X, "t": T}, **UNITS)})
        (axes,) = panels(figure)
        (mesh,) = axes.findobj(QuadMesh)
        np.testing.assert_allclose(mesh.get_array().reshape(4, 7), values.T)
        assert (axes.get_xlabel(), axes.get_ylabel(), bars(figure)) == ("x (m)", "t (s)", ["u (K)"])
        assert mesh.get_cmap().name == SEQUENTIAL

    def test_grid_with_descending_axis(self, draw):
        values = torch.outer(X, T)
        (axes,) = panels(draw({"u": hl.Field(values.flip(1), {"x": X, "t": T.flip(0)})}))
        (mesh,) = axes.findobj(QuadMesh)
        np.testing.assert_allclose(mesh.get_array().reshape(4, 7), values.T)

    def test_an_axis_of_length_one_does_not_count(self, draw):
        field = hl.Field(X[:, None] ** 2, {"x": X, "t": T[:1]})
        (axes,) = panels(draw({"u": field}))
        np.testing.assert_allclose(axes.lines[0].get_ydata(), X**2)

    def test_a_change_of_sign_is_centred(self, draw):
        (axes,) = panels(draw({"u": hl.Field(torch.outer(X - 0.2, T), {"x": X, "t": T})}))
        (mesh,) = axes.findobj(QuadMesh)
        assert mesh.get_cmap().name == DIVERGING
        assert mesh.get_clim() == pytest.approx((-2.4, 2.4))

    def test_scattered(self, draw):
        a, b = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
        figure = draw({"u": hl.Field(a + b, {"a": a, "b": b})})
        (axes,) = panels(figure)
        assert axes.findobj(TriContourSet)
        (points,) = axes.findobj(lambda artist: type(artist) is PathCollection)
        np.testing.assert_allclose(points.get_offsets(), torch.stack([a, b], 1))
        assert bars(figure) == ["u"]

    def test_scattered_on_a_line_has_no_triangles(self, draw):
        (axes,) = panels(draw({"u": hl.Field(T, {"a": T, "b": T})}))
        assert not axes.findobj(QuadContourSet)
        (points,) = axes.findobj(lambda artist: type(artist) is PathCollection)
        np.testing.assert_allclose(points.get_array(), T)

    def test_three_coordinates(self, draw):
        field = hl.Field(torch.zeros(4, 4, 4), {"x": T, "y": T, "z": T})
        assert "u: not drawn, a function of x, y, z (4 × 4 × 4)" in texts(draw({"u": field}))

    def test_not_finite(self, draw):
        values = torch.outer(X, T)
        values[2, 2] = float("nan")
        figure = draw({"u": hl.Field(values, {"x": X, "t": T})})
        assert panels(figure)[0].get_title("left") == "u; 1 not finite"
        figure = draw({"u": hl.Field(values * float("nan"), {"x": X, "t": T})})
        assert "u: no finite values" in texts(figure)

    def test_large_grids_are_thinned_and_it_is_said(self, draw):
        place = np.linspace(0, 1, 2500)
        field = hl.Field(np.ones((2500, 4)), {"x": place, "t": T})
        (axes,) = panels(draw({"u": field}))
        assert axes.findobj(QuadMesh)[0].get_array().size == 834 * 4
        assert axes.get_title("left") == "u; one value in 3 × 1 is shown"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.bool, torch.complex64])
    def test_other_numbers(self, draw, dtype):
        (axes,) = panels(draw({"u": hl.Field(T.to(dtype), {"t": T})}))
        np.testing.assert_allclose(axes.lines[0].get_ydata(), T.to(dtype).abs().float()
                                   if dtype != torch.bool else T.bool())  # fmt: skip


class TestReference:
    def test_difference_on_a_grid(self, draw):
        exact = torch.outer(X, T)
        places = {"x": X, "t": T}
        result = {
            "u": hl.Field(exact + 0.1, places, **UNITS),
            "u_reference": hl.Field(exact, places, **UNITS),
        }
        figure = draw(result)
        meshes = [axes.findobj(QuadMesh)[0] for axes in panels(figure)]
        np.testing.assert_allclose(meshes[2].get_array(), 0.1, rtol=1e-5)
        assert meshes[0].get_clim() == meshes[1].get_clim()
        assert bars(figure) == ["u (K)", "u (K)", "difference (K)"]
        assert panels(figure)[2].get_title("left").startswith("difference ≤ 1.0e-01, ")

    def test_difference_of_lines(self, draw):
        result = {
            "u": hl.Field(2 * X, {"x": X}),
            "u_reference": hl.Field(X, {"x": X}),
        }
        both, difference = panels(draw(result))
        assert [line.get_label() for line in both.lines] == ["u", "reference"]
        np.testing.assert_allclose(both.lines[1].get_ydata(), X)
        np.testing.assert_allclose(difference.lines[0].get_ydata(), X)

    def test_at_other_points(self, draw):
        result = {"u": hl.Field(X, {"x": X}), "u_reference": hl.Field(T, {"x": T})}
        assert "no difference: the reference is given at other points" in texts(draw(result))


class TestNames:
    RESULT = {  # noqa: RUF012
        "x": torch.zeros(3),
        "u": hl.Field(X, {"x": X}),
        "inner": {"v": hl.Field(T, {"t": T})},
    }

    def test_all_fields_of_the_result(self, draw):
        figure = draw(self.RESULT, attachments={"w": hl.Field(T, {"t": T})})
        assert [axes.get_ylabel() for axes in panels(figure)] == ["u", "inner.v"]

    def test_named(self, draw):
        figure = draw(self.RESULT, attachments={"w": hl.Field(T, {"t": T})}, names=["w", "inner.v"])
        assert [axes.get_ylabel() for axes in panels(figure)] == ["w", "inner.v"]

    @pytest.mark.parametrize(
        ("names", "told"),
        [
            (["uu"], "unknown field 'uu': did you mean 'u'"),
            (["x"], "'x' is a Tensor; expected a hyperlearn.Field, such as u, inner.v"),
        ],
    )
    def test_unknown(self, tmp_path, names, told):
        with pytest.raises(ValueError, match=told):
            plot_fields(hl.Run(result=self.RESULT), tmp_path / "a.png", names=names)

    def test_none(self, tmp_path):
        with pytest.raises(ValueError, match="has no fields in its result, which holds x"):
            plot_fields(hl.Run(result={"x": X}), tmp_path / "a.png")

    def test_from_a_file(self, draw, tmp_path):
        problem = hl.BilevelProblem(
            lambda y, x: ((y - x) ** 2).sum(), lambda y, x: (y**2).sum(), x0=X, y0=X
        )
        hl.minimize(
            problem,
            hl.IdentityHessian(curvature=2.0),
            budget=hl.Budget(steps=1),
            record=tmp_path / "run.h5",
            attachments={"u": hl.Field(X**2, {"x": X}, units="K")},
        )
        run = hl.load_run(tmp_path / "run.h5")
        (axes,) = panels(draw({}, attachments=run.attachments, names=["u"]))
        assert axes.get_ylabel() == "u (K)"
        np.testing.assert_allclose(axes.lines[0].get_ydata(), X**2)


class TestKernel:
    def test_matrix_and_spectrum(self, draw):
        root = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
        gram = root @ root.T
        figure = draw({"gram": gram, "y": torch.eye(3)}, function=plot_kernel)
        left, right = panels(figure)
        np.testing.assert_array_equal(left.images[0].get_array(), gram)
        assert left.get_title("left") == "gram, 9 × 9"
        expected = np.sort(np.linalg.eigvalsh(gram))[::-1]
        np.testing.assert_allclose(right.lines[0].get_ydata(), expected)
        assert right.get_yscale() == "log"
        condition = f"{expected[0] / expected[-1]:.1e}"
        assert right.get_title("left") == f"eigenvalues; rank 9 of 9, condition {condition}"

    def test_negative_eigenvalues(self, draw):
        _, right = panels(draw({"h": np.diag([3.0, -2, 1])}, function=plot_kernel))
        positive, negative = right.lines
        np.testing.assert_array_equal(positive.get_xdata(), [1, 3])
        np.testing.assert_array_equal(negative.get_xdata(), [2])
        np.testing.assert_array_equal(negative.get_ydata(), [2])
        assert [t.get_text() for t in right.get_legend().get_texts()] == ["positive", "negative"]

    def test_rank(self, draw):
        figure = draw({"h": np.ones((6, 6))}, function=plot_kernel)
        assert panels(figure)[1].get_title("left") == "eigenvalues; rank 1 of 6"

    @pytest.mark.parametrize(
        ("matrix", "told"),
        [
            (np.triu(np.ones((4, 4))), "no spectrum: h is not symmetric"),
            (np.ones((4, 2)), "no spectrum: h is not square"),
            (np.full((2, 2), np.nan), "no spectrum: h has entries that are not finite"),
            (np.zeros((2, 2)), "h is zero"),
            (np.broadcast_to(1.0, (2001, 2001)), "no spectrum: h has 2001 rows"),
        ],
    )
    def test_no_spectrum(self, draw, matrix, told):
        assert told in texts(draw({"h": matrix}, function=plot_kernel, names=["h"]))

    def test_a_field_has_units(self, draw):
        figure = draw(
            {"k": hl.Field(np.eye(4), {"s": T, "t": T}, units="m²")}, function=plot_kernel
        )
        assert bars(figure) == ["k (m²)"]

    @pytest.mark.parametrize(
        ("names", "told"),
        [
            (None, "has no square matrix; of other shapes there are wide"),
            (["wid"], "unknown matrix 'wid': did you mean 'wide'"),
            (["vector"], r"'vector' is of shape \(7,\); expected a matrix"),
            (["text"], "'text' is str; expected a matrix"),
        ],
    )
    def test_errors(self, tmp_path, names, told):
        run = hl.Run(result={"wide": torch.ones(2, 3), "vector": X, "text": "k"})
        with pytest.raises(ValueError, match=told):
            plot_kernel(run, tmp_path / "a.png", names=names)


def test_colours_of_a_constant():
    scale = Colours.of(np.full(3, 4.0))
    assert (scale.low, scale.high, scale.map) == (2, 6, SEQUENTIAL)


@pytest.mark.parametrize(("kind", "name"), [("fields", "u"), ("kernel", "gram")])
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_written(tmp_path, kind, name, suffix):
    result = {"u": hl.Field(torch.outer(X, T), {"x": X, "t": T}), "gram": torch.eye(5)}
    out = tmp_path / f"a{suffix}"
    assert plot([hl.Run(result=result)], out, kind, names=[name]) == out
    assert out.stat().st_size > 1000
