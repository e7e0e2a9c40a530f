"""Sweeps: a grid over methods, seeds and settings, on worker processes or a cluster."""

from __future__ import annotations

from hyperlearn.sweep.execution import Outcome, run_sweep
from hyperlearn.sweep.plan import PlannedRun, Sweep, SweepError
from hyperlearn.sweep.summary import Spread, Summary, summarise, write_summary

__all__ = [
    "Outcome",
    "PlannedRun",
    "Spread",
    "Summary",
    "Sweep",
    "SweepError",
    "run_sweep",
    "summarise",
    "write_summary",
]
