"""LeRobot datasets of format v2.0, v2.1 and v3.0, with images in parquet or as video. They need no card.

Keys of cameras and columns are features of meta/info.json.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlafit.datasets.card import (
    CameraCard,
    Card,
    ColumnCard,
    Draft,
    ExpectCard,
    InstructionCard,
    RobotCard,
)
from vlafit.datasets.lerobot import LeRobotStore, Meta, read_meta
from vlafit.datasets.lerobot.clock import TOLERANCE_S
from vlafit.datasets.lerobot.features import is_depth, size_of, width_of
from vlafit.datasets.lerobot.meta import labels
from vlafit.datasets.selection import Selection
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError
from vlafit.files import irregular

INSTRUCTIONS = ("task",)
"""task: the text of the rows' task_index."""
PREFIX = "observation.images."
NEEDED_FIRST = "meta/"


@dataclass(frozen=True)
class Section:
    """The table [lerobot] of a card."""

    episodes: tuple[int, ...] = ()
    """Numbers of the episodes to use, as the whole dataset counts them. Empty: all."""
    skip: tuple[int, ...] = ()
    """Numbers of episodes to leave out."""
    tolerance_s: float = TOLERANCE_S
    """Seconds by which the time between two rows may differ from 1 / fps."""


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with LeRobot's meta/info.json."""
    info = path / "meta" / "info.json"
    return info.is_file() or bool(irregular(info))  # what is no file is named when it is read


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    root = card.location()
    if not recognise(root):
        hint = f"; {card.source}" if card.source else ""
        raise DataError(f"{root}: no meta/info.json there, so no LeRobot dataset{hint}")
    section = card.options(Section)
    return LeRobotStore(card, root, lambda meta: _chosen(meta, section), section.tolerance_s)


def needed(card: Card, root: Path, names: Collection[str]) -> set[str]:
    """Return the names of the files that a card reads of a remote dataset, of whose files `root` has meta/.

    Raises DataError for episodes whose files are not among `names`.
    """
    meta = read_meta(root)
    chosen, selection = set(_chosen(meta, card.options(Section))), Selection(card)
    keys = [camera.key for camera in card.robot.cameras]
    files = {name for name in names if name.startswith(NEEDED_FIRST)}
    lacking: list[str] = []
    for entry in meta.episodes:
        if entry.index not in chosen or not selection.wants(f"episode_{entry.index:06d}"):
            continue
        paths = [entry.data, *(entry.videos[key].path for key in keys if key in entry.videos)]
        for name in (path.relative_to(root).as_posix() for path in paths):
            if name in names:
                files.add(name)
            else:
                lacking.append(f"{name} (episode {entry.index})")
    if lacking and card.episodes.on_bad == "stop":
        raise DataError(
            f"{card.path}: {len(lacking)} files that its metadata names do not exist there: "
            f"{', '.join(lacking[:5])}; complete the dataset, or leave these episodes out (skip in the card)"
        )
    if any(meta.features.get(key, {}).get("dtype") == "image" for key in keys):
        files |= {name for name in names if name.startswith("images/")}  # those that parquet only names
    return files


def describe(path: Path) -> Draft:
    """Draft the card of the dataset at `path` from its info.json."""
    meta = read_meta(path)
    guesses = {
        "robot.control": "info.json does not say what an action means; write for example joint_position",
    }
    state, action = _pick(meta, ("observation.state", "state")), _pick(meta, ("action", "actions"))
    cameras = tuple(_cameras(meta))
    if not cameras:
        raise DataError(f"{path}: info.json has no RGB image or video; a policy needs at least one camera")
    if meta.info.get("robot_type") in (None, "", "unknown"):
        guesses["robot.name"] = "info.json names no robot_type"
    total = len(meta.episodes)
    card = Card(
        name=path.resolve().name,
        layout="lerobot",
        path=str(path.resolve()),
        robot=RobotCard(
            name=str(meta.info.get("robot_type") or "unknown"),
            hz=meta.fps,
            control="",
            cameras=cameras,
            state=_column(meta, state),
            action=_column(meta, action),
        ),
        instruction=InstructionCard("task"),
        expect=ExpectCard(
            int(meta.info.get("total_episodes") or total), int(meta.info.get("total_frames") or 0)
        ),
    )
    return Draft(card, guesses)


def _chosen(meta: Meta, section: Section) -> list[int]:
    known = {entry.index for entry in meta.episodes}
    for name, numbers in (("episodes", section.episodes), ("skip", section.skip)):
        missing = sorted(set(numbers) - known)
        if missing:
            raise DataError(f"{meta.root}: [lerobot] {name} names episodes that are not there: {missing[:5]}")
    wanted = set(section.episodes) or known
    return sorted(wanted - set(section.skip))


def _pick(meta: Meta, keys: Sequence[str]) -> str:
    for key in keys:
        if key in meta.features:
            return key
    listed = ", ".join(meta.features)
    raise DataError(
        f"{meta.root}: info.json has no feature {keys[0]!r} ({listed}); write a card that names it"
    )


def _cameras(meta: Meta) -> list[CameraCard]:
    cameras = []
    for key, feature in meta.features.items():
        if feature.get("dtype") in ("image", "video") and not is_depth(feature):
            height, width = size_of(feature, key, meta.root)
            name = key.removeprefix(PREFIX).removeprefix("observation.")
            cameras.append(CameraCard(name, key, height, width))
    return cameras


def _column(meta: Meta, key: str) -> ColumnCard:
    feature = meta.features[key]
    width, names = width_of(feature, key, meta.root), labels(feature.get("names"))
    if names and len(names) != width:
        raise DataError(f"{meta.root}/meta/info.json: {key} has {len(names)} names for {width} dimensions")
    return ColumnCard((key,), width, names)
