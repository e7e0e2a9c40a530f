"""The memory that a task takes at its peak, seen in a fresh process.

The C library keeps freed blocks of some hundred kilobytes on its heap, in pieces that the next
block of the same size may not fit: after a thousand steps that is most of what the process holds,
and none of it is in use. So blocks from 64 KiB on are mapped, and given back when they are freed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
PROCESS = Path("/proc/self")


def can_measure() -> bool:
    """Whether the system counts peaks that can be set back: Linux."""
    return (PROCESS / "clear_refs").exists()


def peak(prepare: Callable[..., Callable[[], object]], *args: object) -> int:
    """Bytes, above what was held before, that the function which `prepare(*args)` returns takes."""
    before = os.environ.get(THRESHOLD)
    os.environ[THRESHOLD] = str(2**16)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_measured, torch.get_num_threads(), prepare, args).result()
    finally:
        if before is None:
            del os.environ[THRESHOLD]
        else:
            os.environ[THRESHOLD] = before


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
