"""Demonstrations in HDF5: LIBERO's layout (and what this package records), and robomimic's.

Both keep `/data/<demo>/...`, one group a demonstration, one row a step. What differs: LIBERO has a file for
each task and an instruction in the attributes of `/data` (the regenerated `*_no_noops` files have no
attributes and gaps in the demo numbers); robomimic has filter keys in `/mask` and no instruction.

Columns are read and checked once, when a store is opened. Frames are read on demand: through a memory map
where a dataset lies contiguously in its file (20 to 50 times as fast as h5py), else through cached handles.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import Card, ColumnCard
from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.errors import DataError, did_you_mean

Stamp = tuple[int, int]  # size and modification time of a file


@dataclass(frozen=True)
class _Episode:
    file: int
    group: str
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    offsets: tuple[int, ...]  # of each camera's frames in the file, -1 where they are not contiguous


class Hdf5Store(EpisodeStore):
    """Episodes of LIBERO or robomimic files."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.embodiment = card.embodiment
        self._slots = {camera.name: slot for slot, camera in enumerate(card.robot.cameras)}
        self._paths = [path.resolve() for path in card.files()]
        self._stamps = [_stamp(path) for path in self._paths]
        self._handles: dict[int, h5py.File] = {}
        self._datasets: dict[tuple[int, int], h5py.Dataset] = {}
        self._maps: dict[int, NDArray[np.uint8]] = {}
        infos: list[EpisodeInfo] = []
        self._episodes: list[_Episode] = []
        for number, (path, name) in enumerate(zip(self._paths, _names(self._paths), strict=True)):
            with _open(path) as file:
                try:
                    found = list(_scan(card, file, path, name, number))
                except (OSError, RuntimeError) as error:  # what HDF5 raises for damage inside a file
                    raise DataError(f"{path}: is damaged ({error}); fetch or record it again") from error
            infos.extend(info for info, _ in found)
            self._episodes.extend(episode for _, episode in found)
        self.episodes = tuple(infos)
        self._indices = {info.id: position for position, info in enumerate(infos)}
        self._check_expectations()

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._episodes[episode].state

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._episodes[episode].actions

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        slot = self._slots.get(camera)
        if slot is None:
            raise DataError(
                f"dataset {self.card.name!r} has no camera {camera!r}{did_you_mean(camera, self._slots)}"
            )
        length = self.episodes[episode].length
        if not 0 <= step < length:
            raise DataError(
                f"episode {self.episodes[episode].id!r} has steps 0 to {length - 1}, no step {step}"
            )
        info, declared = self._episodes[episode], self.card.robot.cameras[slot]
        offset = info.offsets[slot]
        if offset >= 0:
            size = declared.height * declared.width * 3
            start = offset + step * size
            frame = self._map(info.file)[start : start + size].reshape(declared.height, declared.width, 3)
        else:
            try:
                frame = self._dataset(episode, slot)[step]
            except (OSError, RuntimeError) as error:
                where = f"{self._paths[info.file]}: {self.episodes[episode].id}, step {step}"
                raise DataError(f"{where}: the picture of {camera!r} is damaged ({error})") from error
        return frame[::-1, ::-1] if declared.rotate == 180 else frame

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        self._datasets.clear()
        self._maps.clear()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handles": {}, "_datasets": {}, "_maps": {}}

    def _map(self, number: int) -> NDArray[np.uint8]:
        found = self._maps.get(number)
        if found is None:
            self._unchanged(number)
            found = self._maps[number] = np.asarray(np.memmap(self._paths[number], mode="r", dtype=np.uint8))
        return found

    def _dataset(self, episode: int, slot: int) -> h5py.Dataset:
        found = self._datasets.get((episode, slot))
        if found is None:
            info = self._episodes[episode]
            if info.file not in self._handles:
                self._unchanged(info.file)
                self._handles[info.file] = _open(self._paths[info.file])
            key = f"{info.group}/{self.card.robot.cameras[slot].key}"
            dataset = self._handles[info.file][key]
            assert isinstance(dataset, h5py.Dataset)  # checked when the store was opened
            found = self._datasets[episode, slot] = dataset
        return found

    def _unchanged(self, number: int) -> None:
        if _stamp(self._paths[number]) != self._stamps[number]:
            raise DataError(f"{self._paths[number]}: changed since the dataset was opened; start again")

    def _check_expectations(self) -> None:
        name, episodes = self.card.name, len(self.episodes)
        expected = self.card.expected_episodes
        if expected and episodes != expected:
            mend = "complete the files, or mend the card"
            if self.card.record is not None:
                mend = (
                    f"finish recording with: vlafit record {self.card.file or name}; or set expect.episodes"
                )
            raise DataError(
                f"dataset {name!r} has {episodes} episodes in {len(self._paths)} files, its card expects "
                f"{expected}; {mend}"
            )
        frames = sum(info.length for info in self.episodes)
        if self.card.expect.frames and frames != self.card.expect.frames:
            raise DataError(
                f"dataset {name!r} has {frames} frames, its card expects {self.card.expect.frames}"
            )


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which demo_2 comes before demo_10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]


def instruction_from_filename(stem: str) -> str:
    """Return the sentence in a LIBERO file's name: ``KITCHEN_SCENE3_turn_on_the_stove_demo`` and the like."""
    words = re.sub(r"^[A-Z_]+_SCENE\d+_", "", stem.removesuffix("_demo"))
    return words.replace("_", " ").strip()


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _names(paths: list[Path]) -> list[str]:
    """Name each file by its path below the folder that all share, without suffix."""
    parts = [path.with_suffix("").parts for path in paths]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[: shared + 1] for p in parts}) == 1:
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = str(error).split("(", 1)[-1].rstrip(")")
        raise DataError(
            f"{path}: cannot be read as HDF5 ({reason}); a download or recording that "
            "was cut short? Fetch or record it again"
        ) from None


def _scan(card: Card, file: h5py.File, path: Path, name: str, number: int):
    """Yield (EpisodeInfo, _Episode) of every demonstration of a file, in natural order."""
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        raise DataError(
            f"{path}: no group 'data', which layout {card.layout!r} has{did_you_mean('data', file.keys())}"
        )
    demos = sorted((str(key) for key in data if isinstance(data[key], h5py.Group)), key=natural)
    if card.mask:
        demos = _masked(file, path, card.mask, demos)
    if not demos:
        raise DataError(f"{path}: holds no demonstrations; leave the file out, or record it again")
    task = path.stem.removesuffix("_demo")
    instruction = _instruction(card, data, path)
    for demo in demos:
        where = f"{path}: {demo}"
        group = data[demo]
        assert isinstance(group, h5py.Group)
        lengths: dict[str, int] = {}
        state = _column(group, card.robot.state, "state", where, lengths)
        actions = _column(group, card.robot.action, "action", where, lengths)
        offsets = tuple(
            _frames(group, camera.key, (camera.height, camera.width, 3), camera.name, where, lengths)
            for camera in card.robot.cameras
        )
        if len(set(lengths.values())) != 1:
            listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise DataError(f"{where}: columns differ in length ({listed}); every row must be one step")
        length = len(actions)
        if length == 0:
            raise DataError(f"{where}: the episode is empty; leave it out of the file")
        info = EpisodeInfo(f"{name}/{demo}", task, instruction, length, _seed(group))
        yield info, _Episode(number, f"data/{demo}", state, actions, offsets)


def _seed(group: h5py.Group) -> int | None:
    """Return the simulation seed that `vlafit record` keeps with an episode; other writers have none."""
    seed = group.attrs.get("seed")
    return int(seed) if isinstance(seed, int | np.integer) else None


def _masked(file: h5py.File, path: Path, key: str, demos: list[str]) -> list[str]:
    masks = file.get("mask")
    if not isinstance(masks, h5py.Group):
        raise DataError(f"{path}: has no filter keys (no group 'mask'); leave `mask` out of the card")
    if key not in masks:
        raise DataError(f"{path}: no filter key {key!r}{did_you_mean(key, masks.keys())}")
    rows: Any = masks[key]
    chosen = {row.decode() if isinstance(row, bytes) else str(row) for row in rows[()]}
    missing = sorted(chosen - set(demos), key=natural)
    if missing:
        raise DataError(
            f"{path}: filter key {key!r} names demonstrations that are missing: {', '.join(missing[:5])}"
        )
    return [demo for demo in demos if demo in chosen]


def _instruction(card: Card, data: h5py.Group, path: Path) -> str:
    source = card.instruction
    match source.source:
        case "card":
            text = source.files.get(path.stem, source.text)
            near = did_you_mean(path.stem, source.files)
            if not text:
                raise DataError(
                    f"{path}: the card gives no sentence for {path.stem!r} (instruction.files){near}"
                )
        case "filename":
            text = instruction_from_filename(path.stem)
            if not text:
                raise DataError(f"{path}: the file's name holds no instruction; give it in the card")
        case "attrs":
            if "problem_info" not in data.attrs:
                raise DataError(
                    f"{path}: /data has no attribute problem_info, so no instruction; regenerated "
                    'files have none: use instruction.source = "filename" or "card"'
                )
            raw: Any = data.attrs["problem_info"]
            try:
                said = json.loads(raw)["language_instruction"]
                text = said if isinstance(said, str) else "".join(said)  # LIBERO joins lists so, too
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: problem_info of /data is not JSON with a language_instruction ({error!r})"
                ) from None
            if not text.strip():
                raise DataError(f'{path}: language_instruction is empty; use instruction.source = "card"')
    return text


def _find(group: h5py.Group, key: str, where: str) -> h5py.Dataset:
    found = group.get(key)
    if isinstance(found, h5py.Dataset):
        return found
    present: list[str] = []
    visit: Callable[[str, object], None] = lambda name, item: (  # noqa: E731
        present.append(name) if isinstance(item, h5py.Dataset) else None
    )
    group.visititems(visit)
    raise DataError(f"{where}: no dataset {key!r}{did_you_mean(key, present)}")


def _column(
    group: h5py.Group, column: ColumnCard, name: str, where: str, lengths: dict[str, int]
) -> NDArray[np.float32]:
    parts = []
    for key in column.keys:
        dataset = _find(group, key, where)
        if dataset.ndim != 2 or dataset.dtype.kind != "f":
            raise DataError(
                f"{where}: {key} is {dataset.dtype} {dataset.shape}, a {name} column is float [T, d]"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            values: NDArray[np.float32] = _read(dataset, where, key).astype(np.float32)
        bad = ~np.isfinite(values)
        if bad.any():
            step, dimension = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{where}: {key} holds {values[step, dimension]} at step {step}, dimension {dimension}; "
                "mend the file or leave the demonstration out"
            )
        lengths[key] = len(values)
        parts.append(values)
    width = sum(part.shape[1] for part in parts)
    if width != column.dimensions:
        widths = ", ".join(f"{key} {part.shape[1]}" for key, part in zip(column.keys, parts, strict=True))
        raise DataError(
            f"{where}: {name} has {width} dimensions ({widths}), the card says {column.dimensions}"
        )
    if len({len(part) for part in parts}) != 1:
        return parts[0]  # the lengths are compared, and refused, by the caller
    joined = np.concatenate(parts, axis=1)
    joined.flags.writeable = False
    return joined


def _read(dataset: h5py.Dataset, where: str, key: str) -> NDArray:
    try:
        return dataset[()]
    except OSError as error:
        raise DataError(
            f"{where}: {key} cannot be read ({error}); the file is damaged, fetch it again"
        ) from None


def _frames(
    group: h5py.Group, key: str, shape: tuple[int, ...], camera: str, where: str, lengths: dict[str, int]
) -> int:
    """Check a camera's frames and return their offset in the file, or -1 where they must go through h5py."""
    dataset = _find(group, key, where)
    if dataset.dtype != np.uint8 or dataset.ndim != 4:
        raise DataError(f"{where}: {key} is {dataset.dtype} {dataset.shape}, a camera is uint8 [T, h, w, 3]")
    if dataset.shape[1:] != shape:
        raise DataError(
            f"{where}: {key} has frames {dataset.shape[1:]}, the card says {shape} for camera {camera!r}"
        )
    lengths[key] = dataset.shape[0]
    plain = dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS and not dataset.external
    offset = dataset.id.get_offset() if plain else None
    return -1 if offset is None else int(offset)
