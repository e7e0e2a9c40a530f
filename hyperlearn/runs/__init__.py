"""Runs: one HDF5 file each, that survives what happens to its process, and resumes exactly."""

from __future__ import annotations

from hyperlearn.runs.codec import Field
from hyperlearn.runs.guarded import DamagedError, RunFileError
from hyperlearn.runs.lock import RunInUseError
from hyperlearn.runs.reader import load_run
from hyperlearn.runs.recovery import recover
from hyperlearn.runs.run import Run
from hyperlearn.runs.writer import RecordError, RunFile

__all__ = [
    "DamagedError",
    "Field",
    "RecordError",
    "Run",
    "RunFile",
    "RunFileError",
    "RunInUseError",
    "load_run",
    "recover",
]
