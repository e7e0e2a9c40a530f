"""A file that HDF5 writes to through us, since HDF5 does not survive a full disk itself."""

from __future__ import annotations

import os
from pathlib import Path


class Sink:
    """A new binary file whose failed writes are told by `close`, and not before.

    After a failed write HDF5 can neither close its file nor forget it, and may crash the process
    when that ends. So the failure is kept, what follows is dropped, and HDF5 learns nothing.

    Parameters
    ----------
    path
        Replaced if it exists.

    Raises
    ------
    OSError
        It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._position = self._size = 0
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write at the present place; `data` counts as written whatever comes of it."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and self._error is None:
            try:
                written += os.pwrite(self._descriptor, view[written:], self._position + written)
            except OSError as error:
                self._error = error
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Read from the present place; zeros where nothing was written."""
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        read = 0
        while read < len(view):
            part = os.pread(self._descriptor, len(view) - read, self._position + read)
            if not part:
                break
            view[read : read + len(part)] = part
            read += len(part)
        self._position += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        """The same as `readinto`, as bytes."""
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The present place."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Make it as long as that."""
        self._size = self._position if size is None else size
        if self._error is None:
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError as error:
                self._error = error
        return self._size

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Have it on the disk.

        Raises
        ------
        OSError
            Any write has failed.
        """
        try:
            if self._error is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if self._error is not None:
            raise self._error
