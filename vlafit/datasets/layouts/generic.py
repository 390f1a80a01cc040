"""Any HDF5 files, if a card spells out where everything is.

[generic] says which groups are demonstrations, keys of cameras and columns are below them, [rows] says how
rows become steps, and [instruction] where the sentence is. `vlafit data card` drafts it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import h5py

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store, whole_file, with_keys
from vlafit.datasets.hdf5_demos import SOURCES, Demonstration, Hdf5Layout
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import first_file, natural, reading
from vlafit.datasets.hdf5_guess import demonstrations
from vlafit.datasets.layouts import aloha, libero, maniskill, robocasa, robomimic, robotwin
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

INSTRUCTIONS = ("", *SOURCES)
"""The card says where it is."""
KNOWN = (aloha, libero, maniskill, robocasa, robomimic, robotwin)


@dataclass(frozen=True)
class Section:
    """The table [generic] of a card."""

    demonstrations: str = "/"
    """The groups that are demonstrations: "/" if each file is one, else a pattern like "data/demo_*"; of one
    that ends in "/*", groups with none of the card's keys are left out, with a warning."""
    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` are of none of the other layouts."""
    file = first_file(path)
    if file is None or any(layout.recognise(path) for layout in KNOWN):
        return False
    with reading(file) as opened:
        return len(opened) > 0


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    section = card.options(Section)

    def listed(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
        if section.demonstrations.strip("/") == "":
            yield from whole_file(card, file, path, name)
            return
        groups = matching(file, section.demonstrations)
        if not groups:
            raise DataError(
                f"{path}: no group matches generic.demonstrations = {section.demonstrations!r}; there are "
                f"{', '.join(list(file)[:10])}"
            )
        if section.demonstrations.rstrip("/").rsplit("/", 1)[-1] == "*":  # it matches what is none, too
            groups = with_keys(file, path, card, groups)
        for group in groups:
            yield Demonstration(group, f"{name}/{group}", path.stem)

    return Hdf5Store(card, Hdf5Layout(listed, linked=section.linked))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    file = first_file(path)
    assert file is not None
    with reading(file) as opened:
        pattern, group, some = demonstrations(opened)
    whose = f", such as {', '.join(some[:3])}" if some else ""
    known = Known(
        "generic",
        group,
        instruction=InstructionCard("card"),
        section=Section(pattern),
        guesses={"generic.demonstrations": f'the groups with frames and columns{whose}; "/": the whole file'},
        recorded=True,
        shifts=True,
    )
    return draft(path, known)


def matching(file: h5py.File, pattern: str) -> list[str]:
    """Return the groups that match a pattern, step by step, in natural order."""
    groups = [""]
    for step in pattern.strip("/").split("/"):
        groups = [
            f"{group}/{name}".lstrip("/")
            for group in groups
            for name in sorted(_groups(file, group), key=natural)
            if fnmatchcase(name, step)
        ]
    return groups


def _groups(file: h5py.File, inside: str) -> list[str]:
    """Return the names of the groups in a group."""
    parent = file[inside or "/"]
    assert isinstance(parent, h5py.Group)
    return [str(name) for name in parent if parent.get(name, getclass=True) is h5py.Group]
