"""RoboCasa's HDF5 layout: robomimic's, with a sentence for each demonstration in its attribute ep_meta."""

from pathlib import Path

import h5py

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store
from vlafit.datasets.hdf5_demos import SOURCES, Demonstration, lookup, name_in
from vlafit.datasets.hdf5_draft import draft
from vlafit.datasets.hdf5_files import first_demo, first_file, reading
from vlafit.datasets.layouts import robomimic
from vlafit.datasets.store import EpisodeStore

INSTRUCTIONS = ("ep_meta", *SOURCES)
"""ep_meta: "lang" in the JSON attribute ep_meta of the demonstration."""
Section = robomimic.Section


def recognise(path: Path) -> bool:
    """Whether the demonstrations of the HDF5 files at `path` have the attribute ep_meta."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        data = opened.get("data")
        if not isinstance(data, h5py.Group) or "problem_info" in data.attrs:
            return False
        demo = first_demo(data)
        return bool(demo) and "ep_meta" in data[demo].attrs


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, robomimic.masked_layout(card, _tell))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    return draft(path, robomimic.known("robocasa", path, InstructionCard("ep_meta")))


def _tell(card: Card, file: h5py.File, path: Path, demo: Demonstration) -> str:
    return lookup(file[demo.group], "ep_meta.lang", name_in(path, demo))
