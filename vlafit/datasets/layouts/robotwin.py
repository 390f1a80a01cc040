"""RoboTwin's HDF5 layout: a file an episode, rows of JPEG, and the next joint state as the action.

`/joint_action/{left_arm,left_gripper,right_arm,right_gripper}` and `/observation/<camera>/rgb` hold one row a
step. The sentences of data/episode0.hdf5 are in instructions/episode0.json.
"""

from pathlib import Path

import h5py

from vlafit.datasets.card import Card, Draft, InstructionCard, RowsCard
from vlafit.datasets.hdf5 import Hdf5Store, whole_file
from vlafit.datasets.hdf5_demos import SOURCES, Hdf5Layout, LinkedFolders
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import first_file, reading
from vlafit.datasets.store import EpisodeStore

INSTRUCTIONS = ("", *SOURCES)
"""The files hold none of their own."""
Section = LinkedFolders
JOINTS = tuple(f"joint_action/{part}" for part in ("left_arm", "left_gripper", "right_arm", "right_gripper"))
BESIDE = "../instructions/{stem}.json"


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` have the groups /joint_action and /observation."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        return all(isinstance(opened.get(name), h5py.Group) for name in ("joint_action", "observation"))


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, Hdf5Layout(whole_file, linked=card.options(Section).linked))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    file = first_file(path)
    assert file is not None
    beside = (file.parent / BESIDE.format(stem=file.stem)).is_file()
    instruction = InstructionCard("beside", key="seen", file=BESIDE) if beside else InstructionCard("card")
    return draft(
        path,
        Known(
            "robotwin",
            "/",
            state=(JOINTS, ("joint_action/vector",)),
            action=(JOINTS, ("joint_action/vector",)),
            instruction=instruction,
            rows=RowsCard(action_shift=1),
            robot="robotwin",
            control="joint_position",
            guesses={"rows.action_shift": "RoboTwin's own readers take the next joint state as the action"},
        ),
    )
