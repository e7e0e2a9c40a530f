"""One writer a run: a lock file beside it, held by the process that writes."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path


class RunInUseError(OSError):
    """Another process is writing the run."""


class Lock:
    """Held from creation to `release`, or to the end of the process, however it ends.

    The file itself says nothing: a lock on it does, which the system drops with the process. It
    holds the process number, for people.

    Parameters
    ----------
    path
        Of the run.

    Raises
    ------
    RunInUseError
        Another process, or another run in this one, has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = lock_path(path)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(descriptor, self.path):
                    break
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise RunInUseError(
                    f"{path} is being written by another run (process {holder or 'unknown'}); "
                    "wait for it, stop it, or choose another file"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # whoever had it has removed it meanwhile
        self._descriptor: int | None = descriptor
        # A writer that is dropped lets go as well.
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the number is a courtesy

    def release(self) -> None:
        """Let go, and remove the file."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            self._close()
            self._descriptor = None


def is_written(path: Path) -> bool:
    """Whether a process is writing the run now."""
    try:
        descriptor = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_path(path: Path) -> Path:
    """The lock file of a run."""
    return path.with_name(path.name + ".lock")


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
