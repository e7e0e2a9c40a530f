"""One thread for BLAS, around what it does slower on several: `one_blas_thread`."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController

_ONE = threading.Lock()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """A context in which BLAS runs on the calling thread.

    OpenBLAS spreads products over threads that then wait for one another, however small they are,
    and some of its kernels are slower for it. Entering and leaving takes
    40 microseconds.

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


# Modules that bring a BLAS of their own.
_BRINGERS = ("numpy", "scipy.linalg", "scipy.sparse.linalg", "sksparse.cholmod", "sparseqr")


@functools.cache
def _controller_of(loaded: tuple[bool, ...]) -> ThreadpoolController:
    """It knows the libraries that are loaded when it is made: another one when there are more."""
    return ThreadpoolController()


def _controller() -> ThreadpoolController:
    return _controller_of(tuple(name in sys.modules for name in _BRINGERS))
