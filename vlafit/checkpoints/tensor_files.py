"""Which files of a folder hold its weights; pickles are refused, with the command that converts them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlafit.checkpoints.assign import tensor_names
from vlafit.checkpoints.formats.native.read import MANIFEST
from vlafit.errors import WeightsError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of `path`, a folder or one file.

    Raises WeightsError where there are none, and says what there is instead.
    """
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickled(path)
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path}: not a safetensors file, and no other kind of file is opened")
        return [path]
    if not path.is_dir():
        raise WeightsError(f"{path}: neither a file nor a folder")
    index = path / INDEX
    if index.is_file():
        try:
            listed = sorted(set(_map(index).values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index}: not an index of safetensors files ({error!r})") from error
        odd = [name for name in listed if not isinstance(name, str) or Path(name).name != name]
        if odd:
            raise WeightsError(f"{index}: names files that do not lie beside it: {odd}")
        _require_listed(index, [path / name for name in listed])
        return [path / name for name in listed]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise WeightsError(f"{path}: no checkpoint: neither {MANIFEST} nor model.safetensors is there")


def read_object(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file beside the weights says, whatever program wrote it; None where there is none.

    Raises WeightsError where it is no whole JSON object.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: cannot be read as JSON ({error}), and what it says would be missed; copy or "
            "download it again"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: no JSON object; copy or download it again, or take it away")
    return values


def _map(index: Path) -> dict[str, str]:
    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])


def _require_listed(index: Path, files: Sequence[Path]) -> None:
    """Raise WeightsError naming the tensors that do not lie where the index says; headers are read alone."""
    places: dict[str, list[str]] = {}
    for file in files:
        for name in tensor_names(file):
            places.setdefault(name, []).append(file.name)
    listed = _map(index)
    others = sorted(p.name for p in index.parent.glob("model-*-of-*.safetensors") if p not in files)
    wrong = {
        "in no file": [f"{n} ({f})" for n, f in listed.items() if n not in places],
        "not in the index": [f"{n} ({', '.join(p)})" for n, p in places.items() if n not in listed],
        "in another file": [
            f"{n} ({', '.join(p)}, not {listed[n]})"
            for n, p in places.items()
            if n in listed and p != [listed[n]]
        ],
        "files that it does not name": others,
    }
    lines = [f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in wrong.items() if names]
    if lines:
        raise WeightsError(
            f"{index}: the index and the files beside it are not those of one checkpoint:\n"
            + "\n".join(lines)
            + "\nCopy or download the folder again."
        )


def _pickled(path: Path) -> WeightsError:
    return WeightsError(
        f"{path}: a pickle, which could run any program. Convert it safely, then load what that writes:"
        f" vlafit convert-pickle {path} --out {path.with_suffix('.safetensors')}"
    )
