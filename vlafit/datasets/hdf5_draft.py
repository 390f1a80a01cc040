"""Draft the card of HDF5 files from the first demonstration; what the files do not tell is marked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py

from vlafit.datasets.card import (
    CameraCard,
    Card,
    ColumnCard,
    Draft,
    InstructionCard,
    RobotCard,
    RowsCard,
)
from vlafit.datasets.hdf5_demos import is_encoded
from vlafit.datasets.hdf5_files import all_files, first_file, reading, unreadable
from vlafit.datasets.hdf5_guess import (
    ACTION_WORDS,
    LISTED,
    alignment,
    chosen_by_name,
    columns_beside,
    datasets_in,
    file_names,
    is_clock,
    is_flag,
    is_picture,
    listed,
    rate,
    rows_of,
    sentence_key,
    success_key,
)
from vlafit.datasets.naming import name_of
from vlafit.datasets.pictures import decode_marked
from vlafit.errors import DataError


@dataclass(frozen=True)
class Known:
    """A layout's facts about its files, to draft a card."""

    layout: str
    group: str
    """The first demonstration."""
    state: tuple[tuple[str, ...], ...] = ()
    """Choices of state keys, the best first."""
    action: tuple[tuple[str, ...], ...] = (("actions",), ("action",))
    ignore: tuple[str, ...] = ()
    """Beginnings of keys that are no cameras."""
    instruction: InstructionCard = field(default_factory=InstructionCard)
    rows: RowsCard = field(default_factory=RowsCard)
    robot: str = ""
    hz: float = 0.0
    control: str = ""
    rotate: bool = False
    """Frames are usually upside-down."""
    upright: str = ""
    """Why they are not, where that is a guess."""
    section: object = None
    filmed: tuple[CameraCard, ...] = ()
    """Cameras of videos beside, for files that hold no frames."""
    guesses: Mapping[str, str] = field(default_factory=dict)
    recorded: bool = False
    """Whether a program of somebody's own wrote them, so that colours and orientation are not known."""
    shifts: bool = False
    """Whether the row of an action depends on who recorded it."""
    counts: bool = True
    """Whether observations have as many rows as actions unless a card says otherwise."""


def draft(path: Path, known: Known) -> Draft:
    """Return the card of the files at `path`, from their first demonstration.

    Raises DataError if it holds no frames that can be read.
    """
    source = first_file(path)
    assert source is not None  # the layout has recognised it
    guesses, missing = dict(known.guesses), dict[str, str]()
    with reading(source) as file:
        group = file[known.group]
        assert isinstance(group, h5py.Group)
        datasets = datasets_in(group)
        cameras = _cameras(datasets, known, guesses, missing, source)
        frames = max((rows_of(datasets[c.key]) for c in cameras if c.key in datasets), default=0)
        columns = columns_beside(datasets, frames) if frames else _columns(datasets)
        if not columns:
            raise DataError(
                f"{source}: {known.group} holds no columns of numbers [T] or [T, d] with a row for each "
                f"frame, of which a card could take state and action. It holds {listed(datasets)}"
            )
        offered = {k: d for k, d in columns.items() if not k.startswith(known.ignore or "\0")}
        named = {name: chosen_by_name(name, offered) for name in ("state", "action")}
        state = _column("state", datasets, offered, known.state, named, guesses, missing)
        action = _column("action", datasets, offered, known.action, named, guesses, missing)
        rows = _rows(group, known, state, action, frames, guesses)
        instruction = _instruction(group, known, guesses, missing)
        hz = _rate(file, group, columns, known, guesses, missing)
        if key := success_key(group):
            guesses.setdefault(
                "episodes.success",
                f'failed episodes are used, too; "{key}" uses those in which it is true at some step',
            )
    if not known.control:
        missing["robot.control"] = "what an action means, for example joint_position or delta_pose"
    else:
        guesses.setdefault("robot.control", "the usual meaning in this layout; the files do not tell it")
    guesses.setdefault("robot.name", "name of the robot; statistics are kept under it")
    every, place, unused = all_files(path), str(path.resolve()), ""
    if path.is_dir() and source.parent == path:
        others = [file for file in every if file.parent != path]
        unused = f"the files in folders below: {file_names(others)}" if others else ""
    elif path.is_dir():
        place = str(path.resolve() / "**" / f"*{source.suffix}")
        others = [file for file in every if file.suffix != source.suffix]
        unused = f"files of another ending: {file_names(others)}" if others else ""
    if unused:
        guesses["path"] = f"it leaves out {unused}"
    if closed := unreadable(every):
        missing["episodes.on_bad"] = (
            f"{len(closed)} of {len(every)} files cannot be opened: {'; '.join(closed[:LISTED])}. Fetch them "
            'again and write "stop", or leave them out by "skip"'
        )
    card = Card(
        name=name_of(path),
        layout=known.layout,
        path=place,
        robot=RobotCard(known.robot or "robot", hz, known.control, cameras, state, action),
        instruction=instruction,
        rows=rows,
        section=known.section,
    )
    return Draft(card, guesses, missing)


def _columns(datasets: Mapping[str, h5py.Dataset]) -> dict[str, h5py.Dataset]:
    """Return the columns of a demonstration whose frames are elsewhere."""
    longest = max(
        (rows_of(d) for d in datasets.values() if d.ndim in (1, 2) and d.dtype.kind in "fiub"), default=0
    )
    return columns_beside(datasets, longest)


def _rate(
    file: h5py.File,
    group: h5py.Group,
    columns: Mapping[str, h5py.Dataset],
    known: Known,
    guesses: dict[str, str],
    missing: dict[str, str],
) -> float:
    """Return the control rate: the layout's usual one, or what the files seem to tell."""
    if known.hz:
        guesses.setdefault("robot.hz", "the usual rate of this layout; the files do not tell it")
        return known.hz
    hz, origin = rate(file, group, columns)
    if hz:
        guesses["robot.hz"] = f"control rate, steps a second: {origin}"
    else:
        missing["robot.hz"] = "control rate, steps a second; the files do not tell it"
    return hz


def _instruction(
    group: h5py.Group, known: Known, guesses: dict[str, str], missing: dict[str, str]
) -> InstructionCard:
    """Return where sentences are: as the layout says, or where the demonstration seems to hold one."""
    if known.instruction.source != "card" or known.instruction.text:
        return known.instruction
    key, sentence = sentence_key(group)
    if key:
        guesses["instruction.key"] = f"where the first demonstration holds {sentence[:60]!r}"
        return InstructionCard("demo", key=key)
    missing["instruction.text"] = "the sentence; the files hold none (files.NAME = ... for one a file)"
    return known.instruction


def _rows(
    group: h5py.Group,
    known: Known,
    state: ColumnCard,
    action: ColumnCard,
    frames: int,
    guesses: dict[str, str],
) -> RowsCard:
    """Return how rows become steps, where the layout does not say it."""
    made = known.rows
    observed = {frames} if frames else {rows_of(group[key]) for key in state.keys}  # type: ignore[arg-type]
    acted = {rows_of(group[key]) for key in action.keys}  # type: ignore[arg-type]
    if not made.observations and known.counts and {rows + 1 for rows in acted} == observed:
        guesses["rows.observations"] = "the first demonstration has one action fewer than observations"
        made = replace(made, observations="T+1")
    if known.shifts:
        shift, reason = alignment(group, state.keys, action.keys)
        guesses["rows.action_shift"] = reason or (
            "row t holds the action of step t; -1 if the recorder writes actions one row late, as ACT's does "
            "on real robots; 1 with the state's keys as the action's: the action is the next state"
        )
        made = replace(made, action_shift=shift)
    return made


def _cameras(
    datasets: Mapping[str, h5py.Dataset],
    known: Known,
    guesses: dict[str, str],
    missing: dict[str, str],
    source: Path,
) -> tuple[CameraCard, ...]:
    cameras: list[CameraCard] = []
    for key, dataset in datasets.items():
        if "depth" in key or "segmentation" in key or key.startswith(known.ignore or "\0"):
            continue
        encoded = is_encoded(dataset)
        if encoded:
            row = dataset[0] if len(dataset) else b""
            try:
                frame, marked = decode_marked(bytes(row) if isinstance(row, bytes) else row.tobytes(), key)
            except (DataError, AttributeError):  # bytes of something else
                continue
            shape = frame.shape
        elif str(dataset.dtype) == "uint8" and dataset.ndim == 4 and dataset.shape[-1] == 3:
            shape, marked = dataset.shape[1:], True
        else:
            continue
        place = f"robot.cameras.{len(cameras)}"
        channels = ""
        if encoded and not marked:
            missing[f"{place}.channels"] = (
                '"rgb" if a viewer shows the frames right, "bgr" if red and blue differ'
            )
        elif known.recorded and not encoded:
            channels = "rgb"
            guesses[f"{place}.channels"] = (
                'look at a frame (vlafit data view): "bgr" if red and blue are exchanged; and if it is not '
                'upright: rotate = 180, or flip = "vertical" or "horizontal"'
            )
        if known.rotate:
            guesses[f"{place}.rotate"] = (
                "usually stored upside-down; look at a frame, and set 0 if it is upright"
            )
        elif known.upright:
            guesses[f"{place}.rotate"] = f"{known.upright}; look at a frame, and set 180 if it is not upright"
        turned = 180 if known.rotate else 0
        cameras.append(CameraCard(_name(key), key, shape[0], shape[1], turned, channels=channels))
    if not cameras and known.filmed:
        return known.filmed
    if not cameras:
        raise DataError(_no_frames(source, known.group, datasets))
    names = [camera.name for camera in cameras]
    if len(set(names)) < len(names):  # then the whole key is the name
        cameras = [replace(camera, name=camera.key.replace("/", "_")) for camera in cameras]
    return tuple(cameras)


def _no_frames(source: Path, group: str, datasets: Mapping[str, h5py.Dataset]) -> str:
    """Return what a demonstration without a camera holds, and what is done about frames in another form."""
    pictures = {key: d for key, d in datasets.items() if is_picture(d) and "depth" not in key}
    if not pictures:  # a group for each step
        pictures = {key: d for key, d in datasets.items() if d.ndim == 3 and d.shape[-1] == 3}
    near = (
        f" These may be frames, and have to be written so first: {listed(pictures)}; a row for each "
        "step, channels last, three of them, uint8 from 0 to 255."
        if pictures
        else ""
    )
    return (
        f"{source}: {group} holds no frames (uint8 [T, h, w, 3] or rows of JPEG or PNG); a policy needs at "
        f"least one camera.{near} It holds {listed(datasets)}"
    )


def _name(key: str) -> str:
    parts = [part for part in key.split("/") if part not in ("rgb", "color", "colors", "image", "images")]
    return (parts[-1] if parts else key).removesuffix("_rgb").removesuffix("_image")


def _column(
    name: str,
    datasets: Mapping[str, h5py.Dataset],
    columns: Mapping[str, h5py.Dataset],
    choices: Sequence[tuple[str, ...]],
    named: Mapping[str, str],
    guesses: dict[str, str],
    missing: dict[str, str],
) -> ColumnCard:
    """Return the state or the action: the layout's, what its name says, or none, which is to be filled in."""
    place = f"robot.{name}"
    keys = next((choice for choice in choices if all(key in datasets for key in choice)), None)
    if keys is None:
        likely, reason = named[name], "chosen by its name"
        rest = [k for k in columns if k not in named.values() and not is_clock(k) and not is_flag(k)]
        if not likely and len(rest) == 1 and len(set(named.values())) == 2:
            likely, reason = rest[0], "what is left"
        if not likely:
            missing[f"{place}.keys"] = f"which columns are the {name}; there are {listed(columns)}"
            missing[f"{place}.dimensions"] = "how many dimensions they have together"
            return ColumnCard((), 0)
        keys = (likely,)
        guesses[f"{place}.keys"] = f"{reason}; there are {listed(columns)}"
    elif name == "state" and len(choices) > 1:
        acted = [key for key in columns if any(word in key.lower() for word in ACTION_WORDS)]
        others = {
            key: dataset
            for key, dataset in columns.items()
            if key not in (*keys, *acted) and not is_clock(key) and not is_flag(key)
        }
        if others:
            guesses[f"{place}.keys"] = f"a choice; there are also {listed(others)}"
    widths = [datasets[key].shape[1] if datasets[key].ndim == 2 else 1 for key in keys]
    whole = [key for key in keys if datasets[key].dtype.kind != "f"]
    if whole:
        missing[f"{place}.scale"] = (
            f"{', '.join(whole)} holds whole numbers: what one is worth, for each of the {sum(widths)} "
            "dimensions (negative turns the sign)"
        )
    return ColumnCard(keys, sum(widths))
