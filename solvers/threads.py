"""One thread for BLAS, around what it does slower on several: `one_blas_thread`."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController


def one_blas_thread() -> AbstractContextManager[object]:
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
    return _Limit()


class _Limit:
    """Entered by several threads of Python at once, it is lifted when the last one leaves."""

    inside = 0
    lock = threading.Lock()
    held: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        with self.lock:
            if _Limit.inside == 0:
                _Limit.held = _controller().limit(limits=1, user_api="blas")
                _Limit.held.__enter__()
            _Limit.inside += 1

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            _Limit.inside -= 1
            if _Limit.inside == 0 and _Limit.held is not None:
                _Limit.held.__exit__(None, None, None)
                _Limit.held = None


@functools.cache
def _controller() -> ThreadpoolController:
    """Made late: it knows the libraries that are loaded by then."""
    return ThreadpoolController()
