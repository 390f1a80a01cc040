"""ManiSkill's HDF5 layout: groups traj_N with one more row of observations than of actions, JSON beside.

`NAME.json` beside `NAME.h5` lists the episodes with seeds and lengths, which are compared with the rows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from vlafit.datasets.card import Card, Draft, InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store
from vlafit.datasets.hdf5_demos import SOURCES, Demonstration, Hdf5Layout, LinkedFolders, inside_json
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import first_file, natural, reading
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError, brief
from vlafit.files import parse_json, plain_text

INSTRUCTIONS = ("", *SOURCES)
"""The files hold none of their own."""
Section = LinkedFolders


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` have groups called traj_N."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        return bool(_groups(opened))


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    return Hdf5Store(card, Hdf5Layout(_list, observations="T+1", linked=card.options(Section).linked))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    file = first_file(path)
    assert file is not None
    with reading(file) as opened:
        group = _groups(opened)[0]
    beside = _beside(file)
    episodes = beside.get("episodes") or [{}]
    control = episodes[0].get("control_mode") if isinstance(episodes[0], dict) else None
    guesses = {"robot.hz": "ManiSkill's default control rate"}
    if control:
        guesses["robot.control"] = "control_mode of the first episode in the JSON file beside"
    return draft(
        path,
        Known(
            "maniskill",
            group,
            state=(("obs/agent/qpos", "obs/agent/qvel"), ("obs/agent/qpos",)),
            instruction=InstructionCard("card"),
            robot="maniskill",
            hz=20.0,
            control=str(control or ""),
            guesses=guesses,
            counts=False,
        ),
    )


def _list(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
    groups = _groups(file)
    if not groups:
        raise DataError(f"{path}: holds no group traj_N; leave the file out, or record it again")
    beside = _beside(path)
    about: dict[str, dict[str, Any]] = {}
    if beside:
        about = {f"traj_{row['episode_id']}": row for row in beside["episodes"]}
        missing = sorted({*about} - {*groups}, key=natural)
        if missing:
            raise DataError(f"{path}: its JSON file lists {missing[0]}, which is not there; fetch it again")
    task = str((beside.get("env_info") or {}).get("env_id") or path.stem)
    for group in groups:
        row = about.get(group, {})
        yield Demonstration(
            group,
            f"{name}/{group}",
            task,
            row.get("episode_seed"),
            row.get("elapsed_steps"),
            path.with_suffix(".json"),
        )


def _groups(file: h5py.File) -> list[str]:
    return sorted((name for name in map(str, file) if name.startswith("traj_")), key=natural)


def _beside(path: Path) -> dict[str, Any]:
    """Return the JSON file beside; empty if there is none."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return {}
    try:
        value = parse_json(plain_text(file))
        rows = inside_json(value, "episodes", str(file))
        if not all(isinstance(row["episode_id"], int) for row in rows):
            raise ValueError("an episode_id is no whole number")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: is no list of episodes as ManiSkill writes it ({brief(error)})") from error
    return value
