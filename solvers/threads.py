"""One thread for BLAS, around what it does slower on several: `one_blas_thread`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController

_ONE = threading.Lock()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """A context in which BLAS runs on the calling thread.

    OpenBLAS spreads products over threads that then wait for one another, however small they are,
    and some of its kernels are slower for it. Entering and leaving takes a few microseconds.

    Examples
    --------
    >>> import torch
    >>> with one_blas_thread():
    ...     torch.ones(2) @ torch.ones(2)
    tensor(2.)
    """
    if not _ONE.acquire(blocking=False):
        # Another thread of Python has limited BLAS; it alone restores what was before.
        yield
        return
    try:
        with _controller().limit(limits=1, user_api="blas"):
            yield
    finally:
        _ONE.release()


@functools.cache
def _controller() -> ThreadpoolController:
    """Made late: it knows the libraries that are loaded by then."""
    return ThreadpoolController()
