"""Store the features of single samples by a hash of what they were computed from: in memory, or in files."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlafit import files
from vlafit.nn.parameters import bytes_of

log = logging.getLogger(__name__)

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

    Files are written atomically. Processes that compute the same row at once write the same bytes.
    """

    def __init__(self, folder: Path, key: Mapping[str, object]) -> None:
        """Keep rows in a folder below `folder` that is named by a hash of `key`, and write the key there."""
        self.folder = folder / files.sha256_of_json(key)[:32]
        about = self.folder / "key.json"
        if not about.is_file():
            files.write_atomic(about, json.dumps(key, indent=2) + "\n")

    def get(self, digest: str) -> Row | None:
        path = self._path(digest)
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
            return tuple(tensors[str(number)] for number in range(len(tensors)))
        except (SafetensorError, KeyError, OSError) as error:
            log.warning("%s: is damaged (%s), so its features are computed again", path, error)
            return None

    def put(self, digest: str, row: Row) -> None:
        with files.new_file(self._path(digest)) as partial:
            save_file({str(number): tensor.contiguous() for number, tensor in enumerate(row)}, partial)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"


def stored_bytes(folder: Path) -> int:
    """Return the size of all rows that a folder storage keeps."""
    return sum(path.stat().st_size for path in folder.glob("*/*/*.safetensors"))


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
