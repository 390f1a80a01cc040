"""Store the features of single samples by a hash of what they were computed from: in memory, or in files."""

import errno
import hashlib
import json
import logging
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vlafit import files
from vlafit.errors import StorageError, brief
from vlafit.nn.parameters import bytes_of

log = logging.getLogger(__name__)

CHECKSUM = "crc32"
FULL = (errno.ENOSPC, errno.EDQUOT)
STRAY_S = 3600.0  # a row is written in seconds

Row = tuple[Tensor, ...]
"""Features of one sample on the CPU, each [u, ...]."""


class FeatureStorage(ABC):
    """Keeps rows by the hexadecimal hash of their input."""

    @abstractmethod
    def get(self, digest: str) -> Row | None:
        """Return a row; None if it is not kept."""

    @abstractmethod
    def put(self, digest: str, row: Row) -> None:
        """Keep a row."""


@final
class MemoryStorage(FeatureStorage):
    """Keeps rows in the memory of this process."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def get(self, digest: str) -> Row | None:
        return self._rows.get(digest)

    def put(self, digest: str, row: Row) -> None:
        self._rows[digest] = row


@final
class FolderStorage(FeatureStorage):
    """Keeps each row in a file of its own, so that processes, runs and a resumed run share them.

    Files are written atomically, and hold a checksum. Processes that compute the same row at once write the
    same bytes. On a full disk rows are no longer kept, which costs time and changes no result.
    """

    def __init__(self, folder: Path, key: Mapping[str, object]) -> None:
        """Keep rows in the `folder_of` a key, and write the key there; remove what killed processes left."""
        self.folder = folder_of(folder, key)
        self._full = False
        about = self.folder / "key.json"
        if not about.is_file():
            files.write_atomic(about, json.dumps(key, indent=2) + "\n")
        _remove_strays(self.folder)

    def get(self, digest: str) -> Row | None:
        path = self._path(digest)
        try:
            with safe_open(path, "pt") as file:
                row = tuple(file.get_tensor(str(number)) for number in range(len(file.keys())))
                written = (file.metadata() or {}).get(CHECKSUM)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            return _damaged(path, brief(error))
        if written != checksum(digest, row):
            return _damaged(path, "its checksum is another")
        return row

    def put(self, digest: str, row: Row) -> None:
        if self._full:
            return
        tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(row)}
        path = self._path(digest)
        try:
            files.write_atomic(path, save(tensors, {CHECKSUM: checksum(digest, row)}))
        except StorageError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL):
                raise
            self._full = True
            log.warning(
                "%s: %s, so features are no longer kept there by this run, but computed in each epoch, which "
                "is slower and changes no result; free some space and start again with --resume to keep them",
                self.folder, error.__cause__.strerror,
            )  # fmt: skip

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"


def folder_of(folder: Path, key: Mapping[str, object]) -> Path:
    """Return the folder below `folder` that is named by a hash of `key`."""
    return folder / files.sha256_of_json(key)[:32]


def checksum(digest: str, row: Row) -> str:
    """Return the CRC-32 of a row's name, types, shapes and values."""
    value = zlib.crc32(digest.encode())
    for tensor in row:
        value = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"


def _damaged(path: Path, fault: str) -> None:
    log.warning("%s: is damaged (%s), so its features are computed again", path, fault)


def _remove_strays(folder: Path) -> None:
    """Remove half-written rows that are too old to be of a process that still writes them."""
    for path in folder.glob("*/.*.partial"):
        with suppress(OSError):  # another process may remove it at the same time
            if time.time() - path.stat().st_mtime > STRAY_S:
                path.unlink()


def stored_bytes(folder: Path) -> int:
    """Return the size of all rows in the `folder_of` a key."""
    total = 0
    for path in folder.glob("*/*.safetensors"):
        with suppress(FileNotFoundError):  # another process may remove it at the same time
            total += path.stat().st_size
    return total


def digest_of_row(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values of CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def digest_of_weights(modules: tuple[nn.Module, ...]) -> str:
    """Return the SHA-256 of everything that modules hold: parameters and buffers, with types and shapes."""
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()
