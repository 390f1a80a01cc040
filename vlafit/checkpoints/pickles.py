"""Convert pickles of tensors to safetensors files. No checkpoint is loaded from a pickle."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlafit import files
from vlafit.errors import WeightsError, did_you_mean

SMALL = 2**26  # bytes that any file may unfold to
GROWTH = 16  # a larger file may unfold to this many times its size: tied weights are written apart


def convert(source: Path, target: Path, key: str = "") -> int:
    """Write the tensors of the pickle `source` as the safetensors file `target`; return how many there are.

    `key` names the mapping inside that holds them, where they are one level down. The pickle is opened with
    ``weights_only``: it can make tensors and plain containers, and nothing else. Tensors that share memory
    are written apart.

    Raises WeightsError where `source` holds anything but named tensors, or far more bytes than its own size,
    or `target` is there already.
    """
    if target.exists():
        raise WeightsError(f"{target}: exists already; name another file")
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: the name must end in .safetensors")
    content = _open(source)
    if key:
        if not isinstance(content, Mapping) or key not in content:
            have = [str(k) for k in content] if isinstance(content, Mapping) else []
            raise WeightsError(f"{source}: there is nothing called {key!r}{did_you_mean(key, have)}")
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source}: holds no mapping of names to tensors, but {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        nested = [n for n in others if isinstance(content[n], Mapping)] if set(others) <= set(content) else []
        hint = f"; if the tensors are below one of these, name it: --key {nested[0]}" if nested else ""
        raise WeightsError(f"{source}: these are not tensors: {others[:8]}{hint}")
    _require_distinct(source, content)
    _require_size(source, (value.numel() * value.element_size() for value in content.values()))
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        own = value.untyped_storage().data_ptr()
        tensors[str(name)] = value.detach().clone() if own in seen else value.detach().contiguous()
        seen.add(own)
    with files.new_file(target) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    return len(tensors)


def _open(source: Path) -> object:
    """Open the pickle. Raises WeightsError with the reason, without torch's advice to trust the file."""
    files.require_readable(source)
    try:
        mapped = _can_be_mapped(source)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
        MemoryError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise WeightsError(
            f"{source}: not a pickle that holds only tensors, so it is not opened: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Return what is wrong with a pickle. torch's own text goes on to tell how to run its code."""
    text = str(error)
    name = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text)
    if name:
        return f"it would run {name[1]}"
    if "weights_only" in text or isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain containers, or is damaged"
    return text.split("\n")[0] or type(error).__name__


def _can_be_mapped(source: Path) -> bool:
    """Whether torch wrote the file in its newer form, with records that lie in it as they are in memory.

    Raises WeightsError where its records unfold to far more than the file's size.
    """
    with source.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(source) as archive:
        records = archive.infolist()
    _require_size(source, (record.file_size for record in records))
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _require_size(source: Path, sizes: Iterable[int]) -> None:
    total, stored = sum(sizes), os.path.getsize(source)
    if total > max(SMALL, GROWTH * stored):
        raise WeightsError(
            f"{source}: {stored} bytes that would unfold to {total}; more than {GROWTH} times the file's "
            "size is refused. Write the tensors out in full (`.contiguous()`), without compression, first"
        )


def _require_distinct(source: Path, content: Mapping[object, object]) -> None:
    keys: dict[str, object] = {}
    for key in content:
        if str(key) in keys:
            raise WeightsError(
                f"{source}: the keys {keys[str(key)]!r} and {key!r} would be one name; rename one"
            )
        keys[str(key)] = key
