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
from vlafit.datasets.lerobot import Entry, LeRobotStore, Meta, read_meta
from vlafit.datasets.lerobot.clock import TOLERANCE_S
from vlafit.datasets.lerobot.features import is_depth, size_of, success_feature, width_of
from vlafit.datasets.lerobot.in_place import FilesInPlace
from vlafit.datasets.lerobot.meta import labels, require_totals
from vlafit.datasets.naming import name_of
from vlafit.datasets.selection import Selection
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError
from vlafit.files import irregular

INSTRUCTIONS = ("task",)
"""task: the text of the rows' task_index."""
PREFIX = "observation.images."
BOOKKEEPING = ("index", "episode_index", "frame_index", "task_index", "timestamp")
NO_COLUMNS = ("image", "video", "depth", "string")


@dataclass(frozen=True)
class Section:
    """The table [lerobot] of a card."""

    episodes: tuple[int, ...] = ()
    """Numbers of the episodes to use, as the whole dataset counts them. Empty: all."""
    skip: tuple[int, ...] = ()
    """Numbers of episodes to leave out."""
    tolerance_s: float = TOLERANCE_S
    """Seconds by which the time between two rows may differ from 1 / fps."""
    surplus_frames: bool = False
    """Whether an episode may have more frames than rows; those after its last row are not used."""


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
    return _store(card, section, root, None)


def open_in_place(card: Card, files: FilesInPlace) -> EpisodeStore:
    """Open the dataset of a card whose files are copied when they are read. Raises as `open` does."""
    section, meta = card.options(Section), read_meta(files.root)
    chosen, selection = set(_chosen(meta, section)), Selection(card)
    files.announce([_files_of(e, card) for e in meta.episodes if _is_wanted(e, chosen, selection)])
    return _store(card, section, files.root, files)


def describe(path: Path) -> Draft:
    """Draft the card of the dataset at `path` from its info.json."""
    meta = read_meta(path)
    guesses = {
        "robot.control": "info.json does not say what an action means; write for example joint_position",
    }
    missing: dict[str, str] = {}
    state = _column("state", meta, ("observation.state", "state"), missing)
    action = _column("action", meta, ("action", "actions"), missing)
    cameras = tuple(_cameras(meta))
    if not cameras:
        raise DataError(f"{path}: info.json has no RGB image or video; a policy needs at least one camera")
    if meta.info.get("robot_type") in (None, "", "unknown"):
        guesses["robot.name"] = "info.json names no robot_type"
    require_totals(meta)
    card = Card(
        name=name_of(path),
        layout="lerobot",
        path=str(path.resolve()),
        robot=RobotCard(
            name=str(meta.info.get("robot_type") or "unknown"),
            hz=meta.fps,
            control="",
            cameras=cameras,
            state=state,
            action=action,
        ),
        instruction=InstructionCard("task"),
        expect=ExpectCard(len(meta.episodes), sum(entry.length for entry in meta.episodes)),
    )
    if success := success_feature(meta.features):
        guesses["episodes.success"] = (
            f'failed episodes are used, too; "{success}" uses those in which it is true at some step'
        )
    return Draft(card, guesses, missing)


def _store(card: Card, section: Section, root: Path, files: FilesInPlace | None) -> LeRobotStore:
    return LeRobotStore(
        card,
        root,
        lambda meta: _chosen(meta, section),
        section.tolerance_s,
        files,
        section.skip,
        surplus=section.surplus_frames,
    )


def _is_wanted(entry: Entry, chosen: Collection[int], selection: Selection) -> bool:
    return entry.index in chosen and selection.wants(f"episode_{entry.index:06d}")


def _files_of(entry: Entry, card: Card) -> list[Path]:
    """Return the files of an episode that a card reads."""
    keys = [camera.key for camera in card.robot.cameras]
    return [entry.data, *(entry.videos[key].path for key in keys if key in entry.videos)]


def _chosen(meta: Meta, section: Section) -> list[int]:
    known = {entry.index for entry in meta.episodes}
    for name, numbers in (("episodes", section.episodes), ("skip", section.skip)):
        missing = sorted(set(numbers) - known)
        if missing:
            raise DataError(f"{meta.root}: [lerobot] {name} names episodes that are not there: {missing[:5]}")
    wanted = set(section.episodes) or known
    return sorted(wanted - set(section.skip))


def _cameras(meta: Meta) -> list[CameraCard]:
    cameras = []
    for key, feature in meta.features.items():
        if feature.get("dtype") in ("image", "video") and not is_depth(feature):
            height, width = size_of(feature, key, meta.root)
            name = key.removeprefix(PREFIX).removeprefix("observation.")
            cameras.append(CameraCard(name, key, height, width))
    return cameras


def _column(name: str, meta: Meta, keys: Sequence[str], missing: dict[str, str]) -> ColumnCard:
    """Return the state or the action by its usual name; if there is none, it is to be filled in."""
    key = next((key for key in keys if key in meta.features), "")
    if not key:
        features = {key: feature for key, feature in meta.features.items() if key not in BOOKKEEPING}
        columns = {key: f for key, f in features.items() if f.get("dtype") not in NO_COLUMNS}
        listed = ", ".join(f"{key} {f.get('dtype')} {f.get('shape')}" for key, f in columns.items())
        missing[f"robot.{name}.keys"] = f"which features are the {name}; there are {listed or 'none'}"
        missing[f"robot.{name}.dimensions"] = "how many dimensions they have together"
        return ColumnCard((), 0)
    feature = meta.features[key]
    width, names = width_of(feature, key, meta.root), labels(feature.get("names"))
    if names and len(names) != width:
        raise DataError(f"{meta.root}/meta/info.json: {key} has {len(names)} names for {width} dimensions")
    kind = str(feature.get("dtype"))
    if not kind.startswith("float"):
        missing[f"robot.{name}.scale"] = (
            f"{key} is {kind}, whole numbers: what one is worth, for each of the {width} dimensions "
            "(negative turns the sign)"
        )
    return ColumnCard((key,), width, names)
