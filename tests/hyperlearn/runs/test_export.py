"""What is exported reads back, with other libraries, as exactly the numbers of the run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
import xarray

import hyperlearn as hl
from hyperlearn.runs import Field, Run, RunFile, load_run
from hyperlearn.runs.export import export

# Numbers that only 17 digits, or a bit of the mantissa, tell from their neighbours.
HARD = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1 + 2**-52, math.nan, math.inf, -math.inf]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A stored run with every type of column, units, certificates, a field, odd settings."""
    config = {
        "problem": "naïve, \"quoted\"\n'twice'",
        "label": "a",
        "flag": True,
        "none": None,
        "empty": "",
        "long": "x" * 70_000,
        "a/b": 1,
        "list": [1, 2.5],
        "array": np.arange(3),
        "method": {"class": "M", "step_size": 0.1, "huge": 2**62},
    }
    file = RunFile(
        tmp_path / "run.h5",
        config=config,
        environment={"seed": 3, "dirty": None},
        units={"temperature": "K"},
    )
    certificate = hl.Certificate(
        0.25, 1e-9, None, True, False, 7, "Hessian(3, 3)", "CG", "because α ≤ 1/L"
    )
    for i, value in enumerate(HARD):
        record = {"step": i, "seconds": i / 3, "outer_loss": value, "temperature": value}
        record |= {"big": 2**53 + i, "flag": i % 2 == 0, "phase": f'α, "{i}"\n'}
        file.append(record, certificate)
    field = Field(
        np.random.default_rng(0).normal(size=(3, 2)),
        {"x": np.arange(3.0), "t": np.arange(2.0)},
        units="m/s",
        coordinate_units={"t": "s"},
    )
    file.finish("finished", "well", {"x": torch.zeros(2), "u": field})
    return load_run(file.path)


class TestCSV:
    def test_history(self, run, tmp_path):
        path = export(run, tmp_path / "deep" / "run.csv")
        frame = pandas.read_csv(path)
        assert list(frame) == list(run.history)
        for name, values in run.history.items():
            assert frame[name].to_numpy().dtype.kind == {"U": "O"}.get(
                values.dtype.kind, values.dtype.kind
            )
            np.testing.assert_array_equal(frame[name].to_numpy(), values, err_msg=name)
        assert math.copysign(1, frame["outer_loss"][4]) == -1

    def test_certificates(self, run, tmp_path):
        frame = pandas.read_csv(export(run, tmp_path / "run.csv", what="certificates"))
        assert list(frame) == list(run.certificates)
        np.testing.assert_array_equal(frame["iterations"], run.certificates["iterations"])
        assert set(frame["reason"]) == {"because α ≤ 1/L"}


class TestParquet:
    def test_history(self, run, tmp_path):
        path = export(run, tmp_path / "run.parquet")
        frame = pandas.read_parquet(path)
        assert list(frame) == list(run.history)
        for name, values in run.history.items():
            np.testing.assert_array_equal(frame[name].to_numpy(), values, err_msg=name)

    def test_metadata(self, run, tmp_path):
        schema = pyarrow.parquet.read_schema(export(run, tmp_path / "run.parquet"))
        assert schema.field("seconds").metadata == {b"units": b"s"}
        assert schema.field("temperature").metadata == {b"units": b"K"}
        assert not schema.field("outer_loss").metadata
        stored = json.loads(schema.metadata[b"hyperlearn"])
        assert stored["config"]["method"] == run.config["method"]
        assert stored["config"]["array"] == [0, 1, 2]
        assert stored["config"]["none"] is None
        assert stored["config"]["long"] == run.config["long"]
        assert (stored["environment"]["seed"], stored["status"]) == (3, "finished")

    def test_certificates(self, run, tmp_path):
        frame = pandas.read_parquet(export(run, tmp_path / "run.parquet", what="certificates"))
        for name, values in run.certificates.items():
            np.testing.assert_array_equal(frame[name].to_numpy(), values, err_msg=name)


class TestNetCDF:
    def test_everything(self, run, tmp_path):
        with xarray.open_dataset(export(run, tmp_path / "run.nc"), engine="h5netcdf") as stored:
            for name, values in run.history.items():
                np.testing.assert_array_equal(stored[name], values, err_msg=name)
                assert stored[name].dims == ("record",)
            for name, values in run.certificates.items():
                np.testing.assert_array_equal(stored[f"certificate_{name}"], values)
            assert {"step", "seconds"} <= set(stored.coords)
            np.testing.assert_array_equal(stored["u"], run.result["u"].values)
            np.testing.assert_array_equal(stored["u_x"], [0, 1, 2])

    def test_units_and_settings(self, run, tmp_path):
        with xarray.open_dataset(export(run, tmp_path / "run.nc"), engine="h5netcdf") as stored:
            assert stored["seconds"].attrs["units"] == "s"
            assert stored["temperature"].attrs["units"] == "K"
            assert (stored["u"].attrs["units"], stored["u_t"].attrs["units"]) == ("m/s", "s")
            attributes = stored.attrs
            for name in ("problem", "label", "empty", "long", "a/b"):
                assert attributes[name] == run.config[name]
            assert attributes["method.step_size"] == 0.1
            assert attributes["method.huge"] == 2**62
            assert (attributes["flag"], attributes["none"]) == ("True", "None")
            assert (attributes["status"], attributes["environment.seed"]) == ("finished", 3)

    def test_netcdf_alone(self, run, tmp_path):
        """Nothing in it is beyond NetCDF: h5netcdf refuses that by default."""
        h5netcdf = pytest.importorskip("h5netcdf")
        with h5netcdf.File(export(run, tmp_path / "run.nc"), "r") as file:
            assert set(run.history) <= set(file.variables)
            assert set(file.dimensions) >= {"record", "certificate"}

    @pytest.mark.parametrize(("what", "there"), [("history", True), ("certificates", False)])
    def test_one_table(self, run, tmp_path, what, there):
        with xarray.open_dataset(export(run, tmp_path / "run.nc", what=what)) as stored:
            assert ("outer_loss" in stored) == there
            assert ("certificate_reason" in stored) == (not there)

    def test_complex(self, tmp_path):
        field = Field(np.ones(2, dtype=complex), {"x": np.arange(2.0)})
        run = Run(history={"step": np.arange(1)}, result={"u": field})
        with pytest.raises(ValueError, match="u is complex"):
            export(run, tmp_path / "run.nc")
        assert list(tmp_path.iterdir()) == []


def test_run_that_goes_on(tmp_path):
    """The room for further records is not exported."""
    file = RunFile(tmp_path / "run.h5", config={}, environment={})
    for step in range(3):
        file.append({"step": step, "outer_loss": 0.5})
    for suffix, read in ((".csv", pandas.read_csv), (".parquet", pandas.read_parquet)):
        assert len(read(export(load_run(file.path), tmp_path / f"a{suffix}"))) == 3
    file.close()


class TestRefusals:
    @pytest.mark.parametrize("suffix", [".h5", ".xlsx", ""])
    def test_suffix(self, run, tmp_path, suffix):
        with pytest.raises(ValueError, match=r"expected .csv, .parquet, .nc"):
            export(run, tmp_path / f"out{suffix}")

    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".nc"])
    def test_existing_file(self, run, tmp_path, suffix):
        out = tmp_path / f"out{suffix}"
        out.write_text("mine")
        with pytest.raises(FileExistsError, match="exists"):
            export(run, out)
        assert out.read_text() == "mine"
        assert export(run, out, overwrite=True).read_bytes() != b"mine"

    @pytest.mark.parametrize(
        ("suffix", "package"),
        [(".csv", "pandas"), (".parquet", "pyarrow"), (".nc", "xarray"), (".nc", "h5netcdf")],
    )
    def test_missing_package(self, run, tmp_path, monkeypatch, suffix, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=package):
            export(run, tmp_path / f"out{suffix}")
        assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]

    def test_what(self, run, tmp_path):
        with pytest.raises(ValueError, match="what='metrics'; expected history or certificates"):
            export(run, tmp_path / "out.csv", what="metrics")

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(ValueError, match="has no records of certificates"):
            export(Run(history={"step": np.arange(1)}), tmp_path / "out.csv", what="certificates")
