"""Parquet files by pyarrow: whole columns, or the images of some rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlafit.datasets.lru import LruCache
from vlafit.errors import DataError, did_you_mean
from vlafit.files import irregular

LFS_POINTER = b"version https://git-lfs"
OPEN_PARQUET = 32  # parquet files kept open by a process


class DamagedError(DataError):
    """A file that is there and cannot be read."""


def require_file(path: Path) -> None:
    """Raise DataError unless a file is there, is not empty and is no Git LFS pointer."""
    if kind := irregular(path):
        raise DataError(f"{path}: not a regular file but {kind}; fetch the dataset again")
    if not path.is_file():
        raise DataError(f"{path}: is missing; fetch the dataset again")
    with open(path, "rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        raise DataError(f"{path}: is empty; fetch it again")
    if head == LFS_POINTER:
        raise DataError(f"{path}: was not downloaded, it is a Git LFS pointer; run: git lfs pull")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file by memory map. Raises DataError if it is missing or damaged."""
    require_file(path)
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path}: is no whole parquet file ({error}); fetch it again") from error


def read_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read columns of a parquet file. Raises DataError naming one that is missing, or the damage."""
    file = open_parquet(path)
    try:
        return read_columns(file, path, columns)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path}: is damaged ({error}); fetch it again") from error


def read_columns(file: pq.ParquetFile, name: Path | str, columns: Sequence[str] | None) -> pa.Table:
    """Read columns of an open parquet file called `name`. Raises DataError naming one that is missing."""
    present = file.schema_arrow.names
    for column in columns or ():
        if column not in present:
            raise DataError(f"{name}: no column {column!r}{did_you_mean(column, present)}")
    return file.read(columns=list(columns) if columns is not None else None, use_threads=False)


def as_rows(column: pa.ChunkedArray, width: int, where: str) -> NDArray:
    """Return a column of numbers, or of lists of `width` numbers, as an array [n, width]."""
    array = column.combine_chunks()
    if array.null_count:
        raise DataError(f"{where}: {array.null_count} rows hold no value")
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = (
            {kind.list_size}
            if pa.types.is_fixed_size_list(kind)
            else set(np.diff(array.offsets.to_numpy()).tolist())
        )
        if lengths - {width}:
            raise DataError(f"{where}: rows hold {sorted(lengths)} values, info.json says {width}")
        array = array.flatten()
        if array.null_count:
            raise DataError(f"{where}: {array.null_count} values are missing")
    elif width != 1:
        raise DataError(f"{where}: rows hold one {kind}, info.json says {width} values")
    if not (
        pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)
    ):
        raise DataError(f"{where}: holds {array.type}, not numbers")
    return array.to_numpy(zero_copy_only=False).reshape(-1, width)


def _bytes_of(column: pa.ChunkedArray) -> int:
    return column.nbytes


class ImageColumns:
    """Encoded images of parquet files, a row group at a time, the last few kept up to `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self._files: LruCache[Path, pq.ParquetFile] = LruCache(OPEN_PARQUET)
        self._groups: LruCache[tuple[Path, str, int], pa.ChunkedArray] = LruCache(most_bytes, size=_bytes_of)

    def row(self, path: Path, column: str, row: int) -> tuple[bytes | None, str]:
        """Return the encoded bytes (None if only a path is stored) and the path of the image in a row."""
        group, inside = self._locate(path, row)
        try:
            values = self._groups.get((path, column, group), lambda: self._read(path, column, group))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: {column}, row {row} is damaged ({error})") from error
        value: Any = values[inside].as_py()
        if isinstance(value, bytes):
            return value, ""
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise DataError(f"{path}: {column}, row {row} holds no image")
        return value.get("bytes"), value.get("path") or ""

    def close_files(self) -> None:
        """Close all files; what was read of them is kept."""
        self._files.clear()

    def close(self) -> None:
        """Let go of everything."""
        self._files.clear()
        self._groups.clear()

    def _read(self, path: Path, column: str, group: int) -> pa.ChunkedArray:
        file = self._open(path)
        if column not in file.schema_arrow.names:
            near = did_you_mean(column, file.schema_arrow.names)
            raise DataError(f"{path}: no column {column!r}{near}; fetch it again")
        return file.read_row_group(group, [column], use_threads=False).column(0)

    def _locate(self, path: Path, row: int) -> tuple[int, int]:
        metadata = self._open(path).metadata
        first = 0
        for group in range(metadata.num_row_groups):
            count = metadata.row_group(group).num_rows
            if row < first + count:
                return group, row - first
            first += count
        raise DataError(f"{path}: has {first} rows, no row {row}")

    def _open(self, path: Path) -> pq.ParquetFile:
        return self._files.get(path, lambda: open_parquet(path))
