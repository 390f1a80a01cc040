"""One demonstration of an HDF5 file: where it is, its sentence, success, columns and frames."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import CameraCard, Card, ColumnCard
from vlafit.datasets.columns import join, parse_key, part
from vlafit.datasets.hdf5_files import HDF5_ERRORS, find, own_values
from vlafit.datasets.hdf5_storage import require_readable
from vlafit.datasets.pictures import decode_marked
from vlafit.datasets.selection import is_success
from vlafit.errors import DataError
from vlafit.files import parse_json, plain_text
from vlafit.observations import short


@dataclass(frozen=True)
class Demonstration:
    """One demonstration of a file, as a layout lists it; nothing of it is read yet."""

    group: str
    """The group that holds it: "/" if the whole file is one demonstration."""
    id: str
    task: str
    seed: int | None = None
    length: int | None = None
    """Steps that it has by its attribute num_samples, or by the file `beside`."""
    beside: Path | None = None
    """A JSON file that tells more of it."""


List = Callable[[Card, h5py.File, Path, str], Iterable[Demonstration]]
"""Lists the demonstrations of an open file, from the card, the file, its path and its name in the dataset."""
Tell = Callable[[Card, h5py.File, Path, Demonstration], str]
"""Returns the sentence of a demonstration for the layout's own values of instruction.source."""

SOURCES = ("filename", "demo", "beside")
"""Values of instruction.source that every HDF5 layout has."""


@dataclass(frozen=True)
class Hdf5Layout:
    """The properties in which HDF5 layouts differ."""

    list: List
    tell: Tell | None = None
    observations: Literal["T", "T+1"] = "T"
    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


@dataclass(frozen=True)
class Frames:
    """Where a camera's frames of one episode are."""

    file: str
    dataset: str
    offset: int  # in the file, -1 if they are not contiguous
    encoded: bool = False  # a row is a JPEG or PNG
    sources: tuple[str, ...] = ()  # other files that hold its bytes: of a virtual dataset, or raw ones


@dataclass(frozen=True)
class Episode:
    """The columns of an episode, and where its frames are."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    frames: tuple[Frames, ...]  # of each camera
    sources: frozenset[str] = frozenset()  # all files that it was read from


@dataclass(frozen=True)
class LinkedFolders:
    """The table of a card for a layout without options of its own."""

    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def name_in(path: Path, demo: Demonstration) -> str:
    """Name a demonstration for messages."""
    inside = demo.group.rsplit("/", 1)[-1]
    return f"{path}: {inside}" if inside else str(path)


# --------------------------------------------------------------------------------------- sentence and success


def sentence(card: Card, file: h5py.File, path: Path, demo: Demonstration, tell: Tell | None) -> str:
    """Return a demonstration's instruction from where the card says. Raises DataError if there is none."""
    instruction, where = card.instruction, name_in(path, demo)
    match instruction.source:
        case "card":
            return instruction.sentence(path.stem, where, path.parent.name)
        case "filename":
            text: Any = words_of(path.stem)
        case "demo":
            text = lookup(file[demo.group], instruction.key, where)
        case "beside":
            beside = beside_file(card, path)
            assert beside is not None
            if not beside.is_file():
                raise DataError(f"{where}: instruction.file is {beside}, which is missing")
            try:
                text = inside_json(parse_json(plain_text(beside)), instruction.key, str(beside))
            except ValueError as error:
                raise DataError(f"{beside}: is not JSON ({error})") from error
        case _:
            assert tell is not None, instruction.source  # prepare() has compared it with INSTRUCTIONS
            text = tell(card, file, path, demo)
    if isinstance(text, list) and text:
        text = text[crc32(demo.id.encode()) % len(text)]  # one of several, always the same
    if not isinstance(text, str) or not text.strip():
        given = "a list" if isinstance(text, list) else short(text)
        raise DataError(
            f"{where}: instruction.source {instruction.source!r} gives no sentence but {given}; write it in "
            'the card (instruction.source = "card")'
        )
    return text


def beside_file(card: Card, path: Path) -> Path | None:
    """Return the JSON file of the sentences of a data file, if the card names one."""
    name = card.instruction.file
    return path.parent / name.replace("{stem}", path.stem) if name else None


def words_of(stem: str) -> str:
    """Return the sentence in a LIBERO file's name: ``KITCHEN_SCENE3_turn_on_the_stove_demo`` and the like."""
    words = re.sub(r"^[A-Z_]+_SCENE\d+_", "", stem.removesuffix("_demo"))
    return words.replace("_", " ").strip()


def lookup(group: Any, key: str, where: str) -> Any:
    """Return an attribute or dataset of a group, or what a path leads to in JSON that one holds ("a.b").

    Raises DataError if there is none.
    """
    head, _, rest = key.partition(".")
    for name, inside in ((key, ""), (head, rest)):
        if name in group.attrs:
            value = plain(group.attrs[name])
        elif isinstance(group.get(name), h5py.Dataset):
            value = plain(own_values(group, name, where))
        else:
            continue
        if not inside:
            return value
        try:
            return inside_json(parse_json(value), inside, f"{where}: {name}")
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: {name} is not JSON ({error})") from error
    raise DataError(
        f"{where}: has no attribute and no dataset {head!r} (attributes: {', '.join(group.attrs) or 'none'})"
    )


def plain(value: Any) -> Any:
    """Return text as str and arrays as lists, as the values of JSON are."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.ravel()] if value.dtype.kind in "SO" else value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def inside_json(value: Any, path: str, where: str) -> Any:
    """Follow a path ("a.b") into tables of JSON. Raises DataError naming the first missing step."""
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            keys = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise DataError(f"{where}: there is no {step!r} of {path!r}; it holds {keys}")
        value = value[step]
    return value


def succeeds(file: h5py.File, path: Path, demo: Demonstration, key: str) -> bool:
    """Whether an attribute or dataset of a demonstration is true at some step."""
    where = f"{name_in(path, demo)}: episodes.success"
    return is_success(lookup(file[demo.group], key, where), f"{where}: {key}")


# ----------------------------------------------------------------------------------------- columns and frames


def read_episode(
    file: h5py.File, demo: Demonstration, card: Card, path: Path, roots: Sequence[Path], extra_row: bool
) -> Episode:
    """Read a demonstration's columns and find its frames. Raises DataError where they are not as declared.

    `extra_row`: observations have one row more than actions.
    """
    where = name_in(path, demo)
    group, robot = file[demo.group], card.robot
    assert isinstance(group, h5py.Group)
    lengths: dict[str, int] = {}
    sources: set[Path] = set()

    def parts(column: ColumnCard, name: str) -> list[NDArray]:
        made = []
        for key in column.keys:
            dataset = find(group, parse_key(key, where).path, where, lambda item: not is_frames(item))
            sources.update(require_readable(dataset, roots, f"{where}: {key}"))
            made.append(part(_read(dataset, key, where), key, column, name, where))
            lengths[key] = len(made[-1])
        return made

    states, actions = parts(robot.state, "state"), parts(robot.action, "action")
    frames = []
    for camera in robot.cameras:
        dataset = find(group, camera.key, where, is_frames)
        files = require_readable(dataset, roots, f"{where}: {camera.key}")
        sources.update(files)
        place = _frames(dataset, camera, where)
        frames.append(replace(place, sources=tuple(sorted({*map(str, files)} - {place.file}))))
        lengths[camera.key] = dataset.shape[0]
    steps = lengths[robot.action.keys[0]]
    rows = lengths[robot.state.keys[0]]
    observed = {*robot.state.keys, *(camera.key for camera in robot.cameras)}
    expected = {key: rows if key in observed else steps for key in lengths}
    if lengths != expected or rows != steps + extra_row:
        more = rows - steps if lengths == expected else None
        raise DataError(f"{where}: {_row_fault(lengths, more, extra_row)}")
    if steps == 0:
        raise DataError(f"{where}: the episode is empty; leave it out of the file")
    if demo.length is not None and demo.length != steps:
        source = "its JSON" if demo.beside else "its attribute num_samples"
        raise DataError(
            f"{where}: has {steps} actions, {source} says {demo.length}; fetch or record it again"
        )
    state = join(states, robot.state, "state", where)[:steps]
    beside = {file for file in (demo.beside, beside_file(card, path)) if file is not None and file.is_file()}
    return Episode(
        state,
        join(actions, robot.action, "action", where),
        tuple(frames),
        frozenset(str(file) for file in sources | beside),
    )


def _row_fault(lengths: Mapping[str, int], more: int | None, extra_row: bool) -> str:
    """Return how the rows of columns and cameras differ from what the card declares, and the remedy.

    `more`: how many rows more than actions all observations have; None if they differ among themselves.
    """
    listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
    what = "columns differ in length" if len({*lengths.values()}) > 1 else "columns are of one length"
    rule = f"observations must have {'one row more than' if extra_row else 'as many rows as'} actions"
    said = f"{rule} (rows.observations {'T+1' if extra_row else 'T'!r})"
    if more in (0, 1):
        other = "T" if extra_row else "T+1"
        return f'{what} ({listed}); {said}. If all files are so: rows.observations = "{other}" in the card'
    return f"{what} ({listed}); {said}. Record it again, or leave it out (episodes.skip)"


def _read(dataset: h5py.Dataset, key: str, where: str) -> NDArray:
    try:
        return np.asarray(dataset[()])
    except HDF5_ERRORS as error:
        raise DataError(
            f"{where}: {key} cannot be read ({error}); the file is damaged, fetch it again"
        ) from None


def _frames(dataset: h5py.Dataset, camera: CameraCard, where: str) -> Frames:
    """Return where frames are. Raises DataError unless they are of the card's size."""
    shape, key = (camera.height, camera.width, 3), camera.key
    file = str(Path(h5py.h5f.get_name(dataset.id).decode()).resolve())
    if is_encoded(dataset):
        frame = decoded(dataset, 0, camera, f"{where}: {key}, step 0") if len(dataset) else np.empty(shape)
        if frame.shape != shape:
            raise DataError(
                f"{where}: {key} has frames {frame.shape}, the card says {shape} for camera {camera.name!r}"
            )
        return Frames(file, str(dataset.name), -1, encoded=True)
    if dataset.dtype != np.uint8 or dataset.ndim != 4:
        raise DataError(
            f"{where}: {key} is {dataset.dtype} {dataset.shape}, a camera is uint8 [T, h, w, 3], or rows of "
            "JPEG or PNG bytes"
        )
    if dataset.shape[1:] != shape:
        raise DataError(
            f"{where}: {key} has frames {dataset.shape[1:]}, the card says {shape} for camera {camera.name!r}"
        )
    return Frames(file, str(dataset.name), contiguous_offset(dataset))


def is_frames(dataset: h5py.Dataset) -> bool:
    """Whether a dataset has the form of a camera's frames."""
    return (dataset.ndim == 4 and dataset.dtype == np.uint8) or is_encoded(dataset)


def is_encoded(dataset: h5py.Dataset) -> bool:
    """Whether each row is an encoded image: bytes, or a row of bytes that zeros fill up."""
    return (dataset.ndim == 1 and dataset.dtype.kind in "SOV") or (
        dataset.ndim == 2 and dataset.dtype == np.uint8
    )


def decoded(dataset: h5py.Dataset, step: int, camera: CameraCard, where: str) -> NDArray[np.uint8]:
    """Return an encoded frame in the channel order in which the card expects the files' frames."""
    row: Any = dataset[step]
    data = row if isinstance(row, bytes) else np.asarray(row).tobytes()
    frame, marked = decode_marked(data, where)
    if marked:  # it is RGB whatever the card says of the others
        return frame[..., ::-1] if camera.channels == "bgr" else frame
    if not camera.channels:
        raise DataError(
            f"{where}: frames are encoded, and their channel order is not in the file; set channels of "
            f'camera {camera.name!r} in the card: "rgb" if a viewer shows them right, "bgr" if it exchanges '
            "red and blue"
        )
    return frame


def contiguous_offset(dataset: h5py.Dataset) -> int:
    """Return the offset of a dataset's bytes in its file, or -1 if they must be read by h5py."""
    plain = dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS and not dataset.external
    offset = dataset.id.get_offset() if plain else None
    return -1 if offset is None else int(offset)
