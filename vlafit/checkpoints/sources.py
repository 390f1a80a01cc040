"""Which files of a folder hold its weights; pickles are refused, with the command that converts them."""

import json
from pathlib import Path

from vlafit.checkpoints.native import MANIFEST
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
    index = path / INDEX
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index}: not an index of safetensors files ({error!r})") from error
        odd = [name for name in listed if not isinstance(name, str) or Path(name).name != name]
        if odd:
            raise WeightsError(f"{index}: names files that do not lie beside it: {odd}")
        return [path / name for name in listed]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise WeightsError(f"{path}: no checkpoint: neither {MANIFEST} nor model.safetensors is there")


def _pickled(path: Path) -> WeightsError:
    return WeightsError(
        f"{path}: a pickle, which could run any program. Convert it safely, then load what that writes:"
        f" vlafit convert-pickle {path} --out {path.with_suffix('.safetensors')}"
    )
