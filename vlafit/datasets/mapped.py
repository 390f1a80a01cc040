"""A file in a memory map, which is not read once the file has changed."""

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.stamps import Stamp, changed
from vlafit.errors import DataError


class Mapped:
    """A memory map that asks its open file for size and time before each read.

    What is read of a memory map beyond the end of its file ends the process. Asking the open file takes half
    as long as asking a path.
    """

    _close = staticmethod(os.close)  # kept here for the end of the process, when modules are gone

    def __init__(self, name: str, known: Stamp | None) -> None:
        """Raises DataError if the file cannot be read, or is not as it was `known`."""
        self._name, self._file = name, -1
        try:
            self._file = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._known = known or self._stamp()
            self._require_unchanged()
            self._bytes = np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            self.close()
            raise DataError(f"{name}: cannot be read: {error}") from None

    def bytes(self) -> NDArray[np.uint8]:
        """Return all bytes, read-only. Raises DataError if the file was overwritten or cut."""
        self._require_unchanged()
        return self._bytes

    def close(self) -> None:
        """Close the file; what was returned stays."""
        if self._file >= 0:
            self._close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def _require_unchanged(self) -> None:
        if (now := self._stamp()) != self._known:
            raise changed(self._name, self._known, now)

    def _stamp(self) -> Stamp:
        stat = os.fstat(self._file)
        return stat.st_size, stat.st_mtime_ns
