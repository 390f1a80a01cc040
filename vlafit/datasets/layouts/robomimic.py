"""robomimic's HDF5 layout: filter keys in /mask, and no instruction.

`/data/demo_N/...` holds one row a step, `/mask/<key>` lists demonstrations by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from vlafit.datasets.card import Card
from vlafit.datasets.hdf5 import Demonstration, Hdf5Store, demonstrations_below
from vlafit.datasets.hdf5_files import first_file, natural, observations, open_file
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError, did_you_mean

INSTRUCTIONS = ()


@dataclass(frozen=True)
class Section:
    """The table [robomimic] of a card."""

    mask: str = ""
    """The filter key (/mask/<key>) whose demonstrations to use. Empty: all."""
    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` are robomimic's: its env_args or camera names, no problem_info."""
    file = first_file(path)
    if file is None:
        return False
    with open_file(file) as opened:
        data = opened.get("data")
        if not isinstance(data, h5py.Group) or "problem_info" in data.attrs:
            return False
        names = observations(data)
        return not any(n.endswith("_rgb") for n in names) and (
            "env_args" in data.attrs or any(n.endswith("_image") for n in names)
        )


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, _list, card.options(Section).linked)


def _list(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
    demos = demonstrations_below(file, path, card)
    mask = card.options(Section).mask
    if mask:
        demos = _masked(file, path, mask, demos)
    instruction = card.instruction.sentence(path.stem, str(path))
    for demo in demos:
        yield Demonstration(f"data/{demo}", f"{name}/{demo}", path.stem.removesuffix("_demo"), instruction)


def _masked(file: h5py.File, path: Path, key: str, demos: list[str]) -> list[str]:
    masks = file.get("mask")
    if not isinstance(masks, h5py.Group):
        raise DataError(f"{path}: has no filter keys (no group 'mask'); leave `mask` out of the card")
    if key not in masks:
        raise DataError(f"{path}: no filter key {key!r}{did_you_mean(key, masks.keys())}")
    rows: Any = masks[key]
    chosen = {row.decode() if isinstance(row, bytes) else str(row) for row in rows[()]}
    missing = sorted(chosen - set(demos), key=natural)
    if missing:
        raise DataError(
            f"{path}: filter key {key!r} names demonstrations that are missing: {', '.join(missing[:5])}"
        )
    return [demo for demo in demos if demo in chosen]
