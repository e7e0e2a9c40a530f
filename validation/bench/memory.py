"""The memory that a task takes at its peak, seen in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def can_measure() -> bool:
    """Whether the system counts peaks that can be set back: Linux."""
    return (PROCESS / "clear_refs").exists()


def peak(prepare: Callable[..., Callable[[], object]], *args: object) -> int:
    """Bytes, above what was held before, that the function which `prepare(*args)` returns takes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured, torch.get_num_threads(), prepare, args).result()


def _measured(
    threads: int, prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]
) -> int:
    torch.set_num_threads(threads)
    run = prepare(*args)
    (PROCESS / "clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{PROCESS}/status has no {field}")
