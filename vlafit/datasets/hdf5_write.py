"""Write a new HDF5 file; a full disk is one error that names it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from vlafit.errors import StorageError


class _Kept(io.FileIO):
    """A file whose first failure to write is kept: HDF5 itself may crash when a write or its close fails."""

    failure: OSError | None = None

    def write(self, data: "bytes | bytearray | memoryview", /) -> int:  # type: ignore[override]
        size = memoryview(data).nbytes
        try:
            rest = memoryview(data).cast("B")
            while self.failure is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size) if self.failure is None else size or 0
        except OSError as error:
            self.failure = error
            return size or 0


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """Yield a new file, which is closed at the end. Raises StorageError if it cannot be written."""
    with _Kept(path, "w+") as kept:
        try:
            with h5py.File(kept, "w") as file:
                yield file
        except (OSError, RuntimeError):  # HDF5 read what could not be written
            if kept.failure is None:
                raise
        if kept.failure is not None:
            reason = kept.failure.strerror or kept.failure
            raise StorageError(
                f"cannot write {path}: {reason}; free space, choose another path, or fix its permissions"
            ) from kept.failure
