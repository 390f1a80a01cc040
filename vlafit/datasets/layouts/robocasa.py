"""RoboCasa's HDF5 layout: robomimic's, with a sentence for each demonstration in its attribute ep_meta."""

from dataclasses import dataclass
from pathlib import Path

import h5py

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store
from vlafit.datasets.hdf5_demos import SOURCES, Demonstration, Hdf5Layout, lookup, name_in
from vlafit.datasets.hdf5_draft import draft
from vlafit.datasets.hdf5_files import first_demo, first_file, open_file
from vlafit.datasets.layouts.robomimic import known, masked
from vlafit.datasets.store import EpisodeStore

INSTRUCTIONS = ("ep_meta", *SOURCES)
"""ep_meta: "lang" in the JSON attribute ep_meta of the demonstration."""


@dataclass(frozen=True)
class Section:
    """The table [robocasa] of a card."""

    mask: str = ""
    """The filter key (/mask/<key>) whose demonstrations to use. Empty: all."""
    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def recognise(path: Path) -> bool:
    """Whether the demonstrations of the HDF5 files at `path` have the attribute ep_meta."""
    file = first_file(path)
    if file is None:
        return False
    with open_file(file) as opened:
        data = opened.get("data")
        if not isinstance(data, h5py.Group) or "problem_info" in data.attrs:
            return False
        demo = first_demo(data)
        return bool(demo) and "ep_meta" in data[demo].attrs


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    section = card.options(Section)
    return Hdf5Store(
        card,
        Hdf5Layout(
            lambda card, file, path, name: masked(card, file, path, name, section.mask),
            _tell,
            linked=section.linked,
        ),
    )


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    return draft(path, known("robocasa", path, InstructionCard("ep_meta")))


def _tell(card: Card, file: h5py.File, path: Path, demo: Demonstration) -> str:
    return lookup(file[demo.group], "ep_meta.lang", name_in(path, demo))
