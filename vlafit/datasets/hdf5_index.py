"""An index of opened HDF5 files on disk, so that thousands of episodes open without reading them again.

It holds columns and the places of frames, under a hash of the card and of size and time of every file. It is
only kept where it saves time, and can be deleted at any moment.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets import layouts
from vlafit.datasets.card import Card
from vlafit.datasets.hdf5_demos import Episode, Frames
from vlafit.datasets.hdf5_files import PREFIXES
from vlafit.datasets.selection import LeftOut
from vlafit.datasets.stamps import Stamp, stamp
from vlafit.datasets.store import EpisodeInfo
from vlafit.datasets.write import card_text
from vlafit.errors import DataError, VlafitError
from vlafit.files import expand_user, is_reachable_file, new_file, parse_json

log = logging.getLogger(__name__)

FORMAT = 7  # raise it if anything that is kept, or its meaning, changes
FEWEST = 200  # episodes that are worth it
SWITCH = "VLAFIT_CACHE"  # a folder, or "off"


@dataclass(frozen=True)
class Index:
    """The facts that a store collects when it opens its files."""

    paths: Mapping[str, Stamp]
    """Files with frames, those that virtual datasets take them from among them."""
    sources: Mapping[str, Stamp]
    """All files that anything was read from."""
    episodes: Sequence[EpisodeInfo]
    columns: Sequence[Episode]
    left_out: Sequence[LeftOut]


def folder() -> Path | None:
    """Return where indices are kept; None if they are switched off."""
    chosen = os.environ.get(SWITCH, "")
    if chosen == "off":
        return None
    if chosen:
        return expand_user(chosen) / "datasets"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_user(base) / "vlafit" / "datasets"


def key_of(card: Card, paths: Mapping[str, Stamp]) -> str:
    """Return the hash of everything that decides what a store reads; empty for a layout of somebody else's.

    Its code may change any time, and nothing would show that.
    """
    if card.layout not in layouts.names():
        return ""
    prefixes = [os.environ.get(name, "") for name in PREFIXES]
    parts = [FORMAT, version("vlafit"), card_text(card), sorted(paths.items()), prefixes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load(key: str) -> Index | None:
    """Return the index kept under `key`; None if there is none, or a file that it names has changed."""
    place = folder()
    path = place / f"{key}.npz" if place and key else None
    if path is None or not is_reachable_file(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = parse_json(bytes(arrays["facts"]))
            state, actions = arrays["state"], arrays["actions"]
        paths, sources = (
            {name: (int(size), int(time)) for name, (size, time) in facts[kind].items()}
            for kind in ("paths", "sources")
        )
        if any(not Path(name).is_file() or stamp(Path(name)) != known for name, known in sources.items()):
            return None
        episodes = [EpisodeInfo(*values) for values in facts["episodes"]]
        places = [
            tuple(
                Frames(file, dataset, offset, encoded, tuple(held))
                for file, dataset, offset, encoded, held in frames
            )
            for frames in facts["frames"]
        ]
        left_out = [LeftOut(*values) for values in facts["left_out"]]
    except (OSError, ValueError, KeyError, TypeError, DataError, BadZipFile) as error:
        log.warning("%s: the index is damaged (%s), so the files are read again", path, error)
        return None
    for rows in (state, actions):
        rows.flags.writeable = False
    ends = np.cumsum([info.length for info in episodes])
    columns = [
        Episode(state[end - info.length : end], actions[end - info.length : end], frames)
        for info, end, frames in zip(episodes, ends.tolist(), places, strict=True)
    ]
    return Index(paths, sources, episodes, columns, left_out)


def save(key: str, index: Index) -> None:
    """Keep an index if it is worth it. A folder that cannot be written to only costs time."""
    place = folder()
    if place is None or not key or len(index.episodes) < FEWEST:
        return
    facts = {
        "paths": dict(index.paths),
        "sources": dict(index.sources),
        "episodes": [list(asdict(info).values()) for info in index.episodes],
        "frames": [[list(asdict(one).values()) for one in e.frames] for e in index.columns],
        "left_out": [[left.id, left.reason] for left in index.left_out],
    }
    try:
        with new_file(place / f"{key}.npz") as partial, partial.open("wb") as file:
            np.savez(
                file,
                facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
                state=_joined([e.state for e in index.columns]),
                actions=_joined([e.actions for e in index.columns]),
            )
    except (OSError, VlafitError) as error:
        log.warning("the index of %d episodes cannot be kept (%s)", len(index.episodes), error)


def _joined(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(rows)
