"""LIBERO's HDF5 layout: a file a task, the instruction in the attributes of /data.

Also what `vlafit record` writes, and OpenVLA's regenerated `*_no_noops` files, which have no attributes and
gaps in the demo numbers. `/data/demo_N/...` holds one row a step.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vlafit.datasets.card import Card
from vlafit.datasets.hdf5 import Demonstration, Hdf5Store, demonstrations_below
from vlafit.datasets.hdf5_files import first_file, observations, open_file
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError
from vlafit.files import parse_json

INSTRUCTIONS = ("attrs", "filename")
"""attrs: `problem_info` of /data; filename: the words of the file's name."""


@dataclass(frozen=True)
class Section:
    """The table [libero] of a card."""

    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` are LIBERO's: problem_info, or cameras called *_rgb."""
    file = first_file(path)
    if file is None:
        return False
    with open_file(file) as opened:
        data = opened.get("data")
        if not isinstance(data, h5py.Group):
            return False
        return "problem_info" in data.attrs or any(name.endswith("_rgb") for name in observations(data))


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, _list, card.options(Section).linked)


def instruction_from_filename(stem: str) -> str:
    """Return the sentence in a LIBERO file's name: ``KITCHEN_SCENE3_turn_on_the_stove_demo`` and the like."""
    words = re.sub(r"^[A-Z_]+_SCENE\d+_", "", stem.removesuffix("_demo"))
    return words.replace("_", " ").strip()


def _list(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
    demos = demonstrations_below(file, path, card)
    data: Any = file["data"]
    instruction = _instruction(card, data, path)
    task = path.stem.removesuffix("_demo")
    for demo in demos:
        seed = data[demo].attrs.get("seed")  # kept by `vlafit record`
        known = int(seed) if isinstance(seed, int | np.integer) else None
        yield Demonstration(f"data/{demo}", f"{name}/{demo}", task, instruction, known)


def _instruction(card: Card, data: h5py.Group, path: Path) -> str:
    match card.instruction.source:
        case "card":
            return card.instruction.sentence(path.stem, str(path))
        case "filename":
            text = instruction_from_filename(path.stem)
            if not text:
                raise DataError(f"{path}: the file's name holds no instruction; write it in the card")
            return text
    if "problem_info" not in data.attrs:
        raise DataError(
            f"{path}: /data has no attribute problem_info, so no instruction; regenerated "
            'files have none: use instruction.source = "filename" or "card"'
        )
    raw: Any = data.attrs["problem_info"]
    try:
        value = parse_json(raw)["language_instruction"]
        text = value if isinstance(value, str) else "".join(value)  # LIBERO joins lists so, too
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: problem_info of /data is not JSON with a language_instruction ({error!r})"
        ) from None
    if not text.strip():
        raise DataError(f'{path}: language_instruction is empty; use instruction.source = "card"')
    return text
