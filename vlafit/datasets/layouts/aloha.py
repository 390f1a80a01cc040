"""The HDF5 layout of ALOHA and ACT: a file an episode, frames raw or as rows of JPEG, no instruction.

`/observations/qpos`, `/observations/images/<camera>` and `/action` hold one row a step. RDT's fine-tuning
data has it, too, with the sentence in a JSON file beside (instruction.source = "beside").
"""

from pathlib import Path

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store, whole_file
from vlafit.datasets.hdf5_demos import SOURCES, Hdf5Layout, LinkedFolders
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import first_file, reading
from vlafit.datasets.store import EpisodeStore

INSTRUCTIONS = ("", *SOURCES)
"""The files hold none of their own."""
Section = LinkedFolders
RDT = "expanded_instruction_gpt-4-turbo.json"


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` have /observations/qpos and /action."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        return "observations/qpos" in opened and "action" in opened


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, Hdf5Layout(whole_file, linked=card.options(Section).linked))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    file = first_file(path)
    assert file is not None
    beside = (file.parent / RDT).is_file()
    instruction = (
        InstructionCard("beside", key="instruction", file=RDT) if beside else InstructionCard("card")
    )
    return draft(
        path,
        Known(
            "aloha",
            "/",
            state=(("observations/qpos",),),
            action=(("action",),),
            instruction=instruction,
            robot="aloha",
            hz=50.0,
            control="joint_position",
            recorded=True,
            shifts=True,
        ),
    )
