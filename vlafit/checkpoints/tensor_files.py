"""Find and map the safetensors files of a checkpoint, and read the JSON files beside them.

Pickles are refused, with the command that converts them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlafit import files
from vlafit.errors import WeightsError, brief, command_line
from vlafit.files import parse_object, plain_text, require_readable
from vlafit.links import is_inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Map safetensors files into memory; a tensor's bytes are read when they are first touched.

    Raises WeightsError for files that are missing, truncated or damaged, or hold one name twice.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        require_readable(path)  # safetensors says of a forbidden file that there is none
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                    if name in tensors:
                        raise WeightsError(
                            f"{path}: tensor {name!r} is also in another file of the checkpoint"
                        )
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _incomplete(path, error) from error
    return tensors


def tensor_names(path: Path) -> list[str]:
    """Return the names in the header of a safetensors file. Raises WeightsError where it is not whole."""
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, error) from error


def _incomplete(path: Path, error: Exception) -> WeightsError:
    if not path.exists():
        return WeightsError(
            f"{path}: is missing, and another file of the checkpoint names it; copy or download it again"
        )
    return WeightsError(f"{path}: not a whole safetensors file ({error}); copy or download it again")


def has_weight_files(path: Path) -> bool:
    """Whether `path` is a safetensors file, or a folder that holds the weights in such files."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / INDEX).is_file() or (path / SINGLE).is_file()


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
        raise WeightsError(_deleted(path) or f"{path}: neither a file nor a folder")
    index = path / INDEX
    _require_one_set(path)
    if index.is_file():
        shards = [beside(index, name) for name in _listed(index)]
        _require_listed(index, shards)
        return shards
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise WeightsError(
        _deleted(path)
        or f"{path}: no checkpoint: none of {SINGLE}, {INDEX} and manifest.json is there; if another "
        "program wrote this folder in a format of its own, name that with --format (inspect, export); to "
        "train from it, export it --to vlafit, or install its format with an entry point"
    )


def _deleted(path: Path) -> str:
    """Return the message for a run's checkpoint that is gone or being deleted; "" for any other path."""
    if path.parent.name != "checkpoints" or not path.name.startswith("step_"):
        return ""
    return (
        f"{path}: this checkpoint of a run is gone: a run that goes on deletes all but its last train.keep "
        "and its best ones; name the run's folder again for its last one, or copy a checkpoint first"
    )


def beside(path: Path, name: object) -> Path:
    """Return the file that the file `path` names, which must lie in the same folder.

    Raises WeightsError for any other place: a checkpoint reads no file outside its own folder.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        raise WeightsError(
            f"{path}: names {name!r}, which is not a file beside it; a checkpoint may only read files in its "
            "own folder: copy the file there and change the name"
        )
    file = path.parent / name
    if not is_inside(path.parent, file):
        raise WeightsError(
            f"{path}: names {name!r}, which is a link to {file.resolve()}; a checkpoint may only read files "
            "in its own folder: put the file itself there"
        )
    return file


def read_text(path: Path) -> str:
    """Read a checkpoint's text file. Raises WeightsError if it is missing or not UTF-8."""
    return files.read_text(path, WeightsError, "copy or download it again")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON file. Raises WeightsError if it is missing, damaged or not an object."""
    return files.read_json_object(path, WeightsError, "copy or download it again")


def read_json_if_present(path: Path) -> dict[str, Any] | None:
    """Return what `read_json_object` does; None where there is no file."""
    return read_json_object(path) if path.exists() else None


def write_json(path: Path, values: object) -> None:
    """Write `values`; raises WeightsError where that cannot be done."""
    try:
        path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error.strerror}") from error


def _listed(index: Path) -> list[str]:
    """Return the files that an index names. Raises WeightsError where it is none."""
    try:
        return sorted(set(_map(index).values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not an index of safetensors files ({brief(error)})") from error


def _map(index: Path) -> dict[str, str]:
    return dict(parse_object(plain_text(index))["weight_map"])


def _require_listed(index: Path, shards: Sequence[Path]) -> None:
    """Raise WeightsError naming the tensors that do not lie where the index says; only headers are read."""
    places: dict[str, list[str]] = {}
    for file in shards:
        for name in tensor_names(file):
            places.setdefault(name, []).append(file.name)
    listed = _map(index)
    others = sorted(p.name for p in index.parent.glob(SHARDS) if p not in shards)
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


def _require_one_set(folder: Path) -> None:
    """Raise WeightsError where weights lie in one file and in shards, too: which of them hold is a guess."""
    index, single = folder / INDEX, folder / SINGLE
    shards = sorted(folder.glob(SHARDS))
    if index.is_file():
        if single.is_file() and single.name not in _listed(index):
            raise WeightsError(
                f"{folder}: the weights are there twice, in {SINGLE} and in the shards that {INDEX} lists"
                f" ({_difference(single, shards)}). Move the ones that you do not mean out of the folder"
            )
    elif single.is_file() and shards:
        raise WeightsError(
            f"{folder}: beside {SINGLE} lie shards without an index, such as {shards[0].name}"
            f" ({_difference(single, shards)}). Move the ones that you do not mean out of the folder"
        )
    elif shards:
        raise WeightsError(
            f"{folder}: there are {len(shards)} shards, such as {shards[0].name}, and no {INDEX}, which lists"
            " them; copy or download it, too"
        )


def _difference(single: Path, shards: Sequence[Path]) -> str:
    """Return how the tensors of one file and of shards differ: by names and by numbers."""
    one, many = open_tensors([single]), open_tensors(shards)
    names = sorted(set(one) ^ set(many))
    if names:
        return f"{len(names)} tensors are only in one of the two, such as {names[0]}"
    unlike = [name for name, tensor in one.items() if not _same(tensor, many[name])]
    return f"they differ in {len(unlike)} tensors, such as {unlike[0]}" if unlike else "they are the same"


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and bool((first == second).all())


def _pickled(path: Path) -> WeightsError:
    return WeightsError(
        f"{path}: a pickle, which could run any program. Convert it safely, then load what that writes:"
        f" {command_line('convert-pickle', path, '--out', path.with_suffix('.safetensors'))}"
    )
