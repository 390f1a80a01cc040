"""Convert pickles of tensors to safetensors files. No checkpoint is loaded from a pickle."""

import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlafit import files, locks
from vlafit.errors import StorageError, WeightsError, did_you_mean

SMALL = 2**26  # bytes that any file may unfold to
METADATA = "__metadata__"  # the key of a safetensors header that is not a tensor
GROWTH = 16  # a larger file may unfold to this many times its size: tied weights are written apart


def convert(source: Path, target: Path, key: str = "") -> int:
    """Write the tensors of the pickle `source` as the safetensors file `target`; return how many there are.

    `key` names the mapping inside that holds them, where they are one level down. The pickle is opened with
    ``weights_only``: it can make tensors and plain containers, and nothing else. Tensors that share memory
    are written apart.

    Raises WeightsError where `source` holds anything but named tensors, or far more bytes than its own size,
    or is damaged, or `target` is there already.
    """
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: the name must end in .safetensors")
    _require_free(target)
    _require_file(source)
    with locks.creating(target, "vlafit convert-pickle"):
        _require_free(target)  # another process may just have created it
        return _convert(source, target, key)


def _require_free(target: Path) -> None:
    if target.exists():
        raise WeightsError(f"{target}: exists already; name another file")


def _require_file(source: Path) -> None:
    """Raise WeightsError unless `source` is a file with content. A pipe would be waited for without end."""
    if not source.exists():
        raise WeightsError(f"{source}: no such file; check the path")
    if source.is_dir():
        raise WeightsError(f"{source}: a folder, not a file; name a pickle inside it")
    if not source.is_file():
        raise WeightsError(
            f"{source}: neither a file nor a link to one (a pipe or a device); copy its content to a file"
        )
    if not source.stat().st_size:
        raise WeightsError(f"{source}: empty; fetch or save the file again")
    files.require_readable(source)


def _convert(source: Path, target: Path, key: str) -> int:
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
    _require_names(source, content)
    for name, value in content.items():
        _require_plain(source, name, value)
    _require_size(source, (value.numel() * value.element_size() for value in content.values()))
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        own = value.untyped_storage().data_ptr()
        resolved = value.detach().resolve_conj().resolve_neg()  # bits of a view, which its bytes do not show
        shared = own in seen or resolved.data_ptr() != value.data_ptr()
        whole = resolved.contiguous()
        tensors[str(name)] = whole.clone() if shared else whole
        seen.add(own)
    with files.new_file(target) as partial:
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        except (KeyError, ValueError) as error:
            raise WeightsError(f"{source}: safetensors cannot hold these tensors: {error}") from error
        except SafetensorError as error:  # such as a full disk
            raise StorageError(
                f"cannot write {target}: {_reason(error)}; choose another path, or free space"
            ) from error
    return len(tensors)


def _open(source: Path) -> object:
    """Open the pickle. Raises WeightsError with the reason, without torch's advice to trust the file."""
    try:
        records = _records(source)
        mapped = records is not None and all(r.compress_type == zipfile.ZIP_STORED for r in records)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on weights_only
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        if records is not None:
            _require_whole(source, content, records)
        return content
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
            f"{source}: not a pickle that holds only tensors, so it is not opened: {_reason(error)}; fetch "
            "it again, or save only its tensors (torch.save of a state_dict)"
        ) from error


def _reason(error: Exception) -> str:
    """Return what is wrong with a pickle. torch's own text goes on to tell how to run its code."""
    text = str(error)
    name = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text)
    if name:
        return f"it would run {name[1]}"
    if "weights_only" in text or isinstance(
        error, pickle.UnpicklingError | KeyError | IndexError | AttributeError | TypeError | EOFError
    ):
        return "it holds more than tensors and plain containers, or is damaged"
    return text.split("\n")[0] or type(error).__name__


def _records(source: Path) -> list[zipfile.ZipInfo] | None:
    """Return the records of a file in torch's newer form; None for the older one.

    Raises WeightsError for damage, and where the records unfold to far more than the file's size.
    """
    with source.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    with zipfile.ZipFile(source) as archive:
        records = archive.infolist()
        _require_size(source, (record.file_size for record in records))
        packed = [
            r.filename for r in records if r.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        ]
        if packed:
            raise WeightsError(
                f"{source}: {packed[0]} is compressed in a way that torch cannot read; write its "
                "records again without compression (unzip, zip -0)"
            )
        twice = [name for name, count in Counter(r.filename for r in records).items() if count > 1]
        if twice:
            raise WeightsError(f"{source}: holds {twice[0]} twice, so which numbers are meant is not known")
        if not any(f"/{record.filename}".endswith("/data.pkl") for record in records):
            raise WeightsError(
                f"{source}: a zip archive without data.pkl, so not one that torch.save wrote; fetch the file "
                "again, or name the file of weights inside it"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise WeightsError(
            f"{source}: {damaged} does not agree with its checksum: the file is damaged, fetch it again (or "
            "it was saved with torch's set_crc32_options(False): save it again without)"
        )
    return records


def _require_whole(source: Path, content: object, records: Iterable[zipfile.ZipInfo]) -> None:
    """Raise WeightsError unless each tensor's memory is a record of exactly its size.

    torch itself reads on past the end of a record that is too short.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(content)}
    needed = Counter(size for size in storages.values() if size)
    stored = Counter(r.file_size for r in records if r.file_size and "/data/" in f"/{r.filename}")
    short = needed - stored
    if short:
        raise WeightsError(
            f"{source}: a tensor of {min(short)} bytes has no record of that size: the file is "
            "damaged, fetch it again"
        )


def _storages(content: object) -> Iterator[torch.UntypedStorage]:
    """Yield the memory of every tensor in nested containers, once for each container."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided and value.device.type == "cpu":
                yield value.untyped_storage()
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.values(), *value] if isinstance(value, Mapping) else [*value]


def _require_size(source: Path, sizes: Iterable[int]) -> None:
    total, stored = sum(sizes), os.path.getsize(source)
    if total > max(SMALL, GROWTH * stored):
        raise WeightsError(
            f"{source}: {stored} bytes that would unfold to {total}; more than {GROWTH} times the file's "
            "size is refused. Write the tensors out in full (`.contiguous()`), without compression, first"
        )


def _require_names(source: Path, content: Mapping[object, object]) -> None:
    """Raise WeightsError for keys that are no names, or that would be one name."""
    keys: dict[str, object] = {}
    for key in content:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise WeightsError(f"{source}: the key {key!r} is not a tensor's name; give every tensor a text")
        if key == METADATA:
            raise WeightsError(
                f"{source}: a tensor is named {METADATA!r}, which safetensors keeps for itself; rename it"
            )
        if str(key) in keys:
            raise WeightsError(
                f"{source}: the keys {keys[str(key)]!r} and {key!r} would be one name; rename one"
            )
        keys[str(key)] = key


def _require_plain(source: Path, name: object, value: Tensor) -> None:
    """Raise WeightsError for a tensor whose numbers do not lie one after the other in memory."""
    kind = ""
    if value.device.type == "meta":
        kind = "has no numbers (it is on the meta device)"
    elif value.is_quantized:
        kind = "is quantised; save its dequantize()"
    elif value.layout is not torch.strided or value.is_nested:
        kind = f"is {'nested' if value.is_nested else 'sparse'}; save its to_dense() or its parts"
    if kind:
        raise WeightsError(f"{source}: tensor {name!r} {kind}")
