"""Convert pickles of tensors to safetensors files. No checkpoint is loaded from a pickle."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlafit import files
from vlafit.errors import WeightsError, did_you_mean


def convert(source: Path, target: Path, key: str = "") -> int:
    """Write the tensors of the pickle `source` as the safetensors file `target`; return how many there are.

    `key` names the mapping inside that holds them, where they are one level down. The pickle is opened with
    ``weights_only``: it can make tensors and plain containers, and nothing else. Tensors that share memory
    are written apart.

    Raises WeightsError where `source` holds anything but named tensors, or `target` is there already.
    """
    if target.exists():
        raise WeightsError(f"{target}: exists already; name another file")
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: the name must end in .safetensors")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=_is_zip(source))
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).split("\n")[0]
        raise WeightsError(
            f"{source}: not a pickle that holds only tensors, so it is not opened: {first}"
        ) from error
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
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        own = value.untyped_storage().data_ptr()
        tensors[str(name)] = value.detach().clone() if own in seen else value.detach().contiguous()
        seen.add(own)
    files.require_writable(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(target)
    return len(tensors)


def _is_zip(path: Path) -> bool:
    """Whether torch wrote the file in its newer form, of which parts can be mapped into memory."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False
