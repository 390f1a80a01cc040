"""LIBERO's HDF5 layout: a file a task, the instruction in the attributes of /data.

Also what `vlafit record` writes, and OpenVLA's regenerated `*_no_noops` files, which have no attributes and
gaps in the demo numbers. `/data/demo_N/...` holds one row a step.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store, declared_length, demonstrations_below
from vlafit.datasets.hdf5_demos import SOURCES, Demonstration, Hdf5Layout, LinkedFolders, plain
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import first_demo, first_file, observations, reading
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError, brief
from vlafit.files import parse_object

log = logging.getLogger(__name__)

INSTRUCTIONS = ("attrs", *SOURCES)
"""attrs: `problem_info` of /data; filename: the words of the file's name."""
Section = LinkedFolders


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` are LIBERO's: problem_info, or cameras called *_rgb."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        data = opened.get("data")
        if not isinstance(data, h5py.Group):
            return False
        return "problem_info" in data.attrs or any(name.endswith("_rgb") for name in observations(data))


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, Hdf5Layout(_list, _tell, linked=card.options(Section).linked))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    file = first_file(path)
    assert file is not None
    with reading(file) as opened:
        data: Any = opened["data"]
        group = first_demo(data)
        known = "problem_info" in data.attrs
        upright = "seed" in data[group].attrs or _upright(opened)  # `vlafit record` keeps seeds
    return draft(
        path,
        Known(
            "libero",
            f"data/{group}",
            state=(
                ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states"),
                ("obs/ee_pos", "obs/gripper_states"),
                ("obs/joint_states", "obs/gripper_states"),
            ),
            instruction=InstructionCard("attrs" if known else "filename"),
            robot="libero-panda",
            hz=20.0,
            control="delta_pose",
            rotate=not upright,
            guesses={} if known else {"instruction.source": "the files have no attributes; check `inspect`"},
        ),
    )


def _list(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
    demos = demonstrations_below(file, path, card)  # first: it names what a damaged file lacks
    task = _task(file, path)
    turned = [c.name for c in card.robot.cameras if (c.rotate == 180) != (c.flip == "vertical")]
    if turned and _upright(file):
        log.warning(
            "%s: macros_image_convention is opencv, so frames are upright, and the card turns camera %s "
            "upside-down; look at a frame",
            path,
            turned[0],
        )
    for demo in demos:
        seed = file[f"data/{demo}"].attrs.get("seed")  # kept by `vlafit record`
        known = int(seed) if isinstance(seed, int | np.integer) else None
        length = declared_length(file[f"data/{demo}"])
        yield Demonstration(f"data/{demo}", f"{name}/{demo}", task, known, length)


def _task(file: h5py.File, path: Path) -> str:
    """Return the task of the file's seeds: as `vlafit record` named it, whatever the file is called."""
    attrs = file["data"].attrs
    named = plain(attrs.get("env_name")) if "recording" in attrs else None
    return named if isinstance(named, str) and named else path.stem.removesuffix("_demo")


def _upright(file: h5py.File) -> bool:
    """Whether the file says that its frames are upright."""
    convention = file["data"].attrs.get("macros_image_convention")
    return plain(convention) == "opencv"


def _tell(card: Card, file: h5py.File, path: Path, demo: Demonstration) -> str:
    data: Any = file["data"]
    if "problem_info" not in data.attrs:
        raise DataError(
            f"{path}: /data has no attribute problem_info, so no instruction; regenerated "
            'files have none: use instruction.source = "filename" or "card"'
        )
    try:
        value = parse_object(data.attrs["problem_info"])["language_instruction"]
        text = value if isinstance(value, str) else "".join(value)  # LIBERO joins lists so, too
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: problem_info of /data is not JSON with a language_instruction ({brief(error)})"
        ) from None
    if not text.strip():
        raise DataError(f'{path}: language_instruction is empty; use instruction.source = "card"')
    return text
