"""Large runs: memory that is a slab's, reads that are of what was asked for, records in bulk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import hyperlearn as hl
from hyperlearn.runs import RunFile, columns

ROOT = Path(hl.__file__).parents[1]
MEGABYTES = 400

SCRIPT = f"""
import resource, sys, torch
import hyperlearn as hl
from hyperlearn.runs import RunFile
from hyperlearn.runs.state import last_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

path = sys.argv[1]
x = torch.rand({MEGABYTES} << 18)  # float32
with RunFile(path, config={{}}, environment={{}}) as file:
    file.append({{"step": 0}})
    before = peak()
    file.checkpoint(1, {{"x": x, "half": x[: 1 << 20].reshape(1 << 10, -1).T}})
    written = peak() - before
    file.append({{"step": 1}})
    file.finish("finished", "", {{}})
del x
run = hl.load_run(path)
before_io = int(open("/proc/self/io").read().split()[1])
assert list(run.history["step"]) == [0, 1]
read = (int(open("/proc/self/io").read().split()[1]) - before_io) / 2**20
before = peak()
state, step, _ = last_checkpoint(path)
loaded = peak() - before
print(written, read, loaded)
assert state["x"].shape == ({MEGABYTES} << 18,)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
def test_a_large_checkpoint_is_streamed(tmp_path):
    """Writing takes a slab and no copy; a metric is read without the rest."""
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run.h5")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=True, timeout=280,
    ).stdout  # fmt: skip
    written, read, loaded = map(float, out.split())
    assert written < 100, f"writing {MEGABYTES} MiB took {written} MiB more"
    assert read < 2, f"reading a metric read {read} MiB"
    assert loaded < 100, f"reading it into the memory that it had took {loaded} MiB more"


def test_records_of_many_shapes(tmp_path):
    """New metrics, longer texts and other types, at every place of a chunk."""
    path = tmp_path / "run.h5"
    expected = []
    with RunFile(path, config={}, environment={}) as file:
        for step in range(3 * columns.CHUNK + 7):
            record = {"step": step, "loss": 1.0 / (step + 1), "text": "α" * (step // 9)}
            if step > 600:
                record["late"] = step
            if step % 100 == 0:
                record["rare"] = None if step % 200 else float(step)
            if step > 1000:
                record["step"] = float(step)  # a whole number that is one no longer
            file.append(record)
            expected.append(record)
        for seal in (False, True):
            if seal:
                file.finish("finished", "", {})
            run = hl.load_run(path)
            for name in ("step", "loss", "late", "rare"):
                values = [np.nan if r.get(name) is None else float(r[name]) for r in expected]
                np.testing.assert_array_equal(run.history[name].astype(float), values)
            assert run.history["text"].tolist() == [r["text"] for r in expected]
    with h5py.File(path) as opened:
        assert {len(column) for column in opened["history"].values()} == {len(expected)}
        assert opened["history/loss"].compression == "gzip"


def test_a_text_is_no_number(tmp_path):
    with RunFile(tmp_path / "run.h5", config={}, environment={}) as file:
        file.append({"step": 0})
        with pytest.raises(TypeError, match="step is text in one record and a number in another"):
            file.append({"step": "one"})
        with pytest.raises(TypeError, match=r"loss=\[1\] cannot be recorded; expected a number"):
            file.append({"step": 1, "loss": [1]})
        file.append({"step": 1})
    np.testing.assert_array_equal(hl.load_run(tmp_path / "run.h5").history["step"], [0, 1])


def test_many_records_at_once_are_as_one_by_one(tmp_path):
    count = 2 * columns.CHUNK + 30
    table = {
        "step": np.arange(count), "loss": np.random.default_rng(0).normal(size=count),
        "good": np.arange(count) % 2 == 0, "name": np.array([f"é{i}" for i in range(count)]),
    }  # fmt: skip
    runs = []
    for name in ("one", "many"):
        with RunFile(tmp_path / f"{name}.h5", config={}, environment={}) as file:
            if name == "one":
                for i in range(count):
                    file.append({key: column[i].item() for key, column in table.items()})
            else:
                for part in (slice(0, 3), slice(3, 600), slice(600, count)):
                    file.extend({key: column[part] for key, column in table.items()})
            runs.append(hl.load_run(file.path))
            file.finish("finished", "", {})
            runs.append(hl.load_run(file.path))
    for run in runs:
        for key, column in table.items():
            np.testing.assert_array_equal(run.history[key], column)
            assert run.history[key].dtype.kind == column.dtype.kind
    with (
        RunFile(tmp_path / "bad.h5", config={}, environment={}) as file,
        pytest.raises(ValueError, match=r"columns of lengths \{'a': 2, 'b': 3\}"),
    ):
        file.extend({"a": np.ones(2), "b": np.ones(3)})


def test_checkpoints_are_dropped_without_leaving_a_hole(tmp_path):
    path, sizes = tmp_path / "run.h5", []
    with RunFile(path, config={}, environment={}) as file:
        for step in range(8):
            file.checkpoint(step, {"x": torch.rand(100_000)}, keep=1)
            sizes.append(path.stat().st_size)
    assert max(sizes) < 1.05 * min(sizes)


def test_names_of_metrics_are_free(tmp_path):
    record = {"acc/test": 1.0, "100%": 2.0, ".": 3.0, "α β": 4.0, "step": 0}
    with RunFile(tmp_path / "run.h5", config={}, environment={}, units={"acc/test": "m"}) as file:
        file.append(record)
        file.append(record)
        file.finish("finished", "", {})
    run = hl.load_run(tmp_path / "run.h5")
    assert {name: column[-1] for name, column in run.history.items()} == record
    assert list(run.to_pandas().columns) == list(record)
