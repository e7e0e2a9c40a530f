"""Settings and nested tensors through HDF5: what comes back is what went in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import hyperlearn as hl
from hyperlearn.runs import codec
from hyperlearn.runs.state import as_stored
from solvers import (
    AMG,
    CG,
    GMRES,
    Auto,
    BlockJacobi,
    DenseCholesky,
    Jacobi,
    Neumann,
    Nystrom,
    Woodbury,
)

KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
NUMBERS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=40)
)
TREES = st.recursive(
    NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=12).map(tuple)
        | st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def through(value: Any) -> Any:
    return as_stored({"value": value})["value"]


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_nested_settings(tree):
    found = through(tree)
    assert found == tree
    assert repr_of_types(found) == repr_of_types(tree)


def repr_of_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: repr_of_types(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [repr_of_types(part) for part in value]
    return type(value)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
         torch.uint8, torch.bool, torch.complex128]
    ),
    st.lists(st.integers(0, 5), max_size=4),
    st.booleans(),
)  # fmt: skip
def test_tensors(dtype, shape, transposed):
    tensor = (10 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    tensor = tensor.mT if transposed and tensor.ndim > 1 else tensor
    found = through({"a/b": tensor, "kind": [tensor]})
    for other in (found["a/b"], found["kind"][0]):
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor)


def test_floats_that_are_not_finite():
    found = through([float("inf"), float("-inf"), float("nan"), -0.0])
    assert found[:2] == [float("inf"), float("-inf")]
    assert np.isnan(found[2])
    assert np.signbit(found[3])


@pytest.mark.parametrize(
    "value",
    [
        hl.NHGD(damping=0.3, solver=Woodbury()),
        hl.ImplicitDifferentiation(
            solver=CG(rtol=1e-7, preconditioner=Nystrom(rank=7, sketch="rpcholesky"))
        ),
        hl.ImplicitDifferentiation(solver=Neumann(maxiter=4, step_size=0.5)),
        hl.ImplicitDifferentiation(solver=GMRES(preconditioner=BlockJacobi(blocks=(3, 4)))),
        hl.ImplicitDifferentiation(solver=CG(preconditioner=AMG())),
        hl.ImplicitDifferentiation(solver=Auto()),
        hl.ImplicitDifferentiation(solver=CG(preconditioner=Jacobi())),
        hl.ImplicitDifferentiation(solver=DenseCholesky()),
        hl.Unrolled(unroll_steps=3),
        hl.FixedOuter(),
        hl.Budget(seconds=3.5),
        hl.Smoothness(1.0, 2.0),
        hl.Checkpoints(),
    ],
    ids=lambda value: str(value)[:60],
)
def test_settings_come_back_as_the_objects_that_they_were(value):
    run = hl.Run(config=as_stored({"it": value, "more": (value, {"a": [value]})}))
    assert run.setting("it") == value
    assert run.setting("more") == (value, {"a": [value]})


@dataclass(frozen=True)
class Mine:
    rate: float
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def test_classes_of_a_user():
    run = hl.Run(config=as_stored({"mine": Mine(0.5, torch.float64)}))
    with pytest.raises(ValueError, match=r"class 'Mine', which is not known here: import it"):
        run.setting("mine")
    assert run.setting("mine", (Mine,)) == Mine(0.5, torch.float64)
    with pytest.raises(KeyError, match="'other' is no setting of this run; it has"):
        run.setting("other")


def test_a_setting_that_this_version_does_not_have():
    run = hl.Run(config={"budget": {"class": "Budget", "steps": 3, "hours": 2}})
    with pytest.raises(ValueError, match="Budget has no setting 'hours' in this version"):
        run.setting("budget")


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


def test_named_tuples_come_back_as_dictionaries():
    found = through(Pair(torch.ones(2), torch.zeros(1)))
    assert list(found) == ["one", "other"]
    assert torch.equal(found["one"], torch.ones(2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "has the key 1, which cannot be stored; expected text"),
        ({"": 2}, "has the key ''"),
        (2**70, "expected a number of 64 bits"),
        (np.array([object()]), "an array of object; expected numbers or text"),
        ({"a": {"b": 1j}}, r"value.a.b=1j cannot be stored; expected numbers, text"),
        (torch.ones(1).to(torch.float8_e5m2), "a tensor of torch.float8_e5m2 cannot be stored"),
    ],
)
def test_what_cannot_be_stored(value, message):
    with pytest.raises(TypeError, match=message):
        through(value)


def test_long_text_and_lists_of_numbers():
    text, numbers = "α\0b" * 30_000, list(range(5000))
    found = through({"text": text, "numbers": numbers, "floats": tuple(0.5 * n for n in numbers)})
    assert found == {
        "text": text, "numbers": numbers, "floats": tuple(0.5 * n for n in numbers)
    }  # fmt: skip


class TestFields:
    def test_grid_and_scattered(self):
        grid = hl.Field(
            torch.rand(3, 4), {"x": torch.arange(3.0), "t": np.arange(4.0)}, "m/s", {"t": "s"}
        )
        points = hl.Field(np.ones(5), {"x": np.arange(5.0), "y": np.arange(5.0)})
        for value in (grid, points):
            found = through(value)
            assert type(found.values) is type(value.values)
            np.testing.assert_array_equal(np.asarray(found.values), np.asarray(value.values))
            assert list(found.coordinates) == list(value.coordinates)
            for name, c in value.coordinates.items():
                np.testing.assert_array_equal(np.asarray(found.coordinates[name]), np.asarray(c))
            assert found.units == value.units
            assert dict(found.coordinate_units) == dict(value.coordinate_units)
            assert found.is_grid == value.is_grid
        assert (grid.is_grid, points.is_grid) == (True, False)

    def test_coordinates_are_dimension_scales(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            codec.write(
                file, "u", hl.Field(np.ones((3, 2)), {"x": np.arange(3.0), "t": np.arange(2.0)})
            )
            assert [d[0].name for d in file["u/values"].dims] == ["/u/x", "/u/t"]

    def test_by_xarray(self):
        array = hl.Field(
            torch.rand(3, 4), {"x": torch.arange(3.0), "t": np.arange(4.0)}, "m/s", {"t": "s"}
        ).to_xarray()
        assert array.dims == ("x", "t")
        assert (array.attrs["units"], array.t.attrs["units"]) == ("m/s", "s")
        assert hl.Field(np.ones(2), {"x": np.ones(2), "y": np.ones(2)}).to_xarray().dims == (
            "point",
        )

    @pytest.mark.parametrize(
        ("values", "coordinates", "units", "message"),
        [
            (np.ones(3), {}, {}, "no coordinates"),
            (np.ones((3, 2)), {"x": np.ones(3)}, {}, r"values \(3, 2\) with coordinates x \(3,\)"),
            (np.ones(3), {"x": np.ones(4)}, {}, r"values \(3,\) with coordinates x \(4,\)"),
            (np.ones(3), {"x": np.ones(3)}, {"y": "m"}, r"units of \['y'\], which are no"),
        ],
    )
    def test_misuse(self, values, coordinates, units, message):
        with pytest.raises(ValueError, match=message):
            hl.Field(values, coordinates, coordinate_units=units)


def test_arrays_of_text():
    array = np.array([["α", "bc"], ["", "dé"]])
    np.testing.assert_array_equal(through(array), array)
