"""What it costs to record: of a run of the main job, of a million points, of a large checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperlearn.budget import Budget
from hyperlearn.experiments.data_cleaning import METHODS, DataCleaning, clean, load_data
from hyperlearn.runs import RunFile, load_run
from hyperlearn.runs.state import checksums, last_checkpoint
from validation.bench.timing import Bench

POINTS = 1_000_000
SECONDS = 70.0  # of training: more than one checkpoint at the default cadence of a minute


def share(bench: Bench) -> None:
    """Wall-clock share that writing takes of data cleaning at its defaults; bound 2 %."""
    task = DataCleaning()
    data = load_data(task)
    spent = {"append": 0.0, "checkpoint": 0.0, "finish": 0.0, "__init__": 0.0, "checksums": 0.0}
    with tempfile.TemporaryDirectory() as folder, _timed(spent):
        started = time.perf_counter()
        run = clean(
            METHODS["nhgd"], task, budget=Budget(seconds=SECONDS), seed=0, data=data, label="nhgd",
            record=Path(folder) / "run.h5",
        )  # fmt: skip
        whole = time.perf_counter() - started
        size = (Path(folder) / "run.h5").stat().st_size
    total = sum(spent.values())
    parts = ", ".join(f"{name.strip('_')} {1000 * t:.0f} ms" for name, t in spent.items())
    bench.console.print(
        f"data cleaning, nhgd: {len(run.history['step'])} records in {whole:.1f} s; writing takes "
        f"{100 * total / whole:.2f} % ({parts}); file {size / 1e6:.1f} MB\n"
    )


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    from hyperlearn import outer

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    methods = [name for name in spent if name != "checksums"]
    before = {name: getattr(RunFile, name) for name in methods}
    for name, function in before.items():
        setattr(RunFile, name, timed(name, function))
    outer.saved.checksums = timed("checksums", checksums)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(RunFile, name, function)
        outer.saved.checksums = checksums


def points(bench: Bench) -> None:
    """A million points: appended one by one and at once, sealed, loaded, drawn; bound 5 s each."""
    from hyperlearn.plots import plot_curves

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[str, float] = {}

        def record(label: str, run: Callable[[], object]) -> None:
            started = time.perf_counter()
            run()
            seconds[label] = time.perf_counter() - started

        names = ["outer_loss", *(f"m{i}" for i in range(7))]
        wide = {key: rng.normal(size=POINTS // 10) for key in names}
        with RunFile(folder / "wide.h5", config={}, environment={}) as file:
            rows = [
                {"step": i, "seconds": 0.1 * i, **dict(zip(names, values, strict=True))}
                for i, values in enumerate(zip(*(c.tolist() for c in wide.values()), strict=True))
            ]
            record("1e5 records of 10 metrics", lambda: [file.append(row) for row in rows])
        with RunFile(folder / "long.h5", config={}, environment={}) as file:
            losses = rng.normal(size=POINTS).tolist()
            record(
                "1e6 records of 1 metric",
                lambda: [file.append({"outer_loss": loss}) for loss in losses],
            )
        noise = np.abs(rng.normal(size=POINTS)) / np.arange(1, POINTS + 1)
        block = {"step": np.arange(POINTS), "seconds": 0.1 * np.arange(POINTS), "outer_loss": noise}
        with RunFile(folder / "block.h5", config={}, environment={}) as file:
            record("1e6 records of 3 metrics at once", lambda: file.extend(block))
            record("sealing them", lambda: file.finish("finished", "", {}))
        run = load_run(folder / "block.h5")
        record("loading one metric", lambda: run.history["outer_loss"])
        record(
            "drawing 1e6 points",
            lambda: plot_curves([load_run(folder / "block.h5")], folder / "a.png", x="step"),
        )
    text = "\n".join(f"  {label}: {value:.2f} s" for label, value in seconds.items())
    bench.console.print(f"a million points\n{text}\n")


def checkpoint(bench: Bench) -> None:
    """A checkpoint of half a gibibyte against `torch.save` with ``fsync``, and reading it."""
    import os

    x = torch.rand(1 << 27)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def pickled() -> None:
            with (folder / "x.pt").open("wb") as raw:
                torch.save({"x": x}, raw)
                os.fsync(raw.fileno())

        with RunFile(folder / "run.h5", config={}, environment={}) as file:
            step = iter(range(1, 100))
            bench.compare(
                "write a checkpoint of 512 MiB",
                {
                    "hyperlearn": lambda: file.checkpoint(next(step), {"x": x}),
                    "torch.save, fsync": pickled,
                },
                tolerance=None,
            )
            bench.compare(
                "read it",
                {
                    "hyperlearn": lambda: last_checkpoint(folder / "run.h5")[0]["x"],
                    "torch.load": lambda: torch.load(folder / "x.pt", weights_only=True)["x"],
                },
                tolerance=0.0,
            )
