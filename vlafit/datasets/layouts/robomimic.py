"""robomimic's HDF5 layout: filter keys in /mask, and no instruction.

`/data/demo_N/...` holds one row a step, `/mask/<key>` lists demonstrations by name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store, declared_length, demonstrations_below
from vlafit.datasets.hdf5_demos import SOURCES, Demonstration, Hdf5Layout, Tell, inside_json
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import first_demo, first_file, natural, observations, own_values, reading
from vlafit.datasets.hdf5_guess import filter_keys_below, listed_filter_keys
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError, did_you_mean
from vlafit.files import parse_json

INSTRUCTIONS = ("", *SOURCES)
"""The files hold none of their own."""
STATE = (
    ("eef_pos", "eef_quat", "gripper_qpos"),
    ("eef_pos", "gripper_qpos"),
    ("eef_pos", "eef_quat"),
    ("joint_pos", "gripper_qpos"),
    ("joint_pos",),
)
"""What an arm's state is, the usual first."""
ARM = re.compile(r"(robot\d+)_")


@dataclass(frozen=True)
class Section:
    """The table [robomimic] or [robocasa] of a card."""

    mask: str = ""
    """The filter key (/mask/<key>) whose demonstrations to use. Empty: all."""
    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` are robomimic's: its env_args or camera names, no problem_info."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        data = opened.get("data")
        if not isinstance(data, h5py.Group) or "problem_info" in data.attrs:
            return False
        names = observations(data)
        return (
            not any(n.endswith("_rgb") for n in names)
            and ("env_args" in data.attrs or any(n.endswith("_image") for n in names))
            and "ep_meta" not in data[first_demo(data)].attrs
        )


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, masked_layout(card))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    return draft(path, known("robomimic", path, InstructionCard("card")))


def known(layout: str, path: Path, instruction: InstructionCard) -> Known:
    """Return what env_args tells of the files at `path`."""
    file = first_file(path)
    assert file is not None
    with reading(file) as opened:
        data: Any = opened["data"]
        group = first_demo(data)
        names = observations(data)
        arms = sorted({match[1] for match in map(ARM.match, names) if match}, key=natural) or ["robot0"]
        try:
            arguments = inside_json(parse_json(data.attrs["env_args"]), "env_kwargs", str(file))
        except (KeyError, ValueError, TypeError, DataError):  # it is optional
            arguments = {}
        masks = filter_keys_below(opened)
    rate = arguments.get("control_freq") if isinstance(arguments, dict) else None
    robots = arguments.get("robots") if isinstance(arguments, dict) else None
    robots = [robots] if isinstance(robots, str) else robots if isinstance(robots, list) else []
    guesses = {"robot.hz": "control_freq of env_args"} if rate else {}
    if masks:
        listed = listed_filter_keys(masks)
        guesses[f"{layout}.mask"] = f"all demonstrations; a filter key uses only its own: {listed}"
    return Known(
        layout,
        f"data/{group}",
        state=tuple(tuple(f"obs/{arm}_{key}" for arm in arms for key in keys) for keys in STATE),
        ignore=("next_obs/",),
        instruction=instruction,
        robot="-".join(["robosuite", *map(str, robots)]).lower(),
        hz=float(rate) if isinstance(rate, int | float) else 20.0,
        control="delta_pose",
        upright="robomimic writes frames upright",
        section=Section() if masks else None,
        guesses=guesses,
    )


def masked_layout(card: Card, tell: Tell | None = None) -> Hdf5Layout:
    """Return the layout of files with filter keys; `tell` reads a sentence from them, if they have one."""
    section = card.options(Section)
    return Hdf5Layout(
        lambda card, file, path, name: _list(card, file, path, name, section.mask),
        tell,
        linked=section.linked,
    )


def _list(card: Card, file: h5py.File, path: Path, name: str, mask: str) -> Iterator[Demonstration]:
    """List the demonstrations of a file, those of the filter key `mask` if it is not empty."""
    demos = demonstrations_below(file, path, card)
    if mask:
        demos = _masked(file, path, mask, demos)
    for demo in demos:
        length = declared_length(file[f"data/{demo}"])
        yield Demonstration(f"data/{demo}", f"{name}/{demo}", path.stem.removesuffix("_demo"), None, length)


def _masked(file: h5py.File, path: Path, key: str, demos: list[str]) -> list[str]:
    masks = file.get("mask")
    if not isinstance(masks, h5py.Group):
        raise DataError(f"{path}: has no filter keys (no group 'mask'); leave `mask` out of the card")
    if key not in masks:
        raise DataError(f"{path}: no filter key {key!r}{did_you_mean(key, masks.keys())}")
    rows: Any = own_values(masks, key, f"{path}: filter keys")
    chosen = {row.decode() if isinstance(row, bytes) else str(row) for row in rows}
    missing = sorted(chosen - set(demos), key=natural)
    if missing:
        raise DataError(
            f"{path}: filter key {key!r} names demonstrations that are missing: {', '.join(missing[:5])}"
        )
    return [demo for demo in demos if demo in chosen]
