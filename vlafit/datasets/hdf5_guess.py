"""Guess what a card of HDF5 files must say: demonstrations, columns, sentence, rate, alignment.

Each guess comes with its reason, for whoever reads the drafted card.
"""

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.hdf5_demos import is_encoded, plain
from vlafit.datasets.hdf5_files import HDF5_ERRORS, item_at, natural
from vlafit.files import parse_json

STATE_WORDS = ("state", "qpos", "joint_pos", "joint_states", "proprio", "eef", "ee_pos", "tcp")
LIKELY_STATES = ("joint", "encoder", "position", "pose", "gripper")
ACTION_WORDS = ("action", "command", "cmd", "ctrl", "control", "target", "desired")
FLAG_WORDS = ("done", "success", "terminat", "truncat", "reward", "discount")
SENTENCE_WORDS = ("instruction", "language", "sentence", "prompt", "lang", "task", "description", "goal")
RATE_WORDS = ("fps", "hz", "control_freq", "frequency", "freq", "rate")
SMALLEST_SIDE = 8  # pixels; below are matrices
CHILDREN = 50  # groups of a group that are looked into
DEEPEST = 12  # groups in groups
LISTED = 20  # datasets that a message names
SLOWEST_HZ, FASTEST_HZ = 0.5, 1000.0  # rates beyond are times in another unit than seconds


def rows_of(dataset: h5py.Dataset) -> int:
    """Return how many rows a dataset has; 0 if it is one value."""
    return dataset.shape[0] if dataset.shape else 0


def is_picture(dataset: h5py.Dataset) -> bool:
    """Whether a dataset may be frames, also in a form that is not read."""
    if dataset.ndim == 4 and dataset.dtype == np.uint8 and dataset.shape[-1] == 3:
        return True
    if dataset.ndim in (3, 4):
        return dataset.dtype.kind in "fiu" and sorted(dataset.shape[1:])[-2] >= SMALLEST_SIDE
    return _holds_pictures(dataset)


def columns_beside(datasets: Mapping[str, h5py.Dataset], rows: int) -> dict[str, h5py.Dataset]:
    """Return the datasets [T] and [T, d] of numbers with a row for each of `rows` frames, or one off."""
    return {
        key: dataset
        for key, dataset in datasets.items()
        if dataset.ndim in (1, 2)
        and dataset.dtype.kind in "fiub"
        and rows_of(dataset) > 1
        and abs(rows_of(dataset) - rows) <= 1
        and not _holds_pictures(dataset)
    }


def shown(key: str, dataset: h5py.Dataset) -> str:
    """Return a dataset in words: its key, type and shape."""
    kind = "a table of fields" if dataset.dtype.names else str(dataset.dtype)
    return f"{key} {kind} [{', '.join(map(str, dataset.shape))}]"


def listed(datasets: Mapping[str, h5py.Dataset]) -> str:
    """Return datasets in words."""
    names = [shown(key, dataset) for key, dataset in datasets.items()]
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more if names else "none"


def chosen_by_name(name: str, columns: Mapping[str, h5py.Dataset]) -> str:
    """Return the column whose name says best that it is the state, or the action; empty if none does."""
    if name == "action":
        choices, words = list(columns), ACTION_WORDS
    else:
        choices = [key for key in columns if not any(word in key.lower() for word in ACTION_WORDS)]
        words = (*STATE_WORDS, *LIKELY_STATES)
    choices = [key for key in choices if not is_flag(key)]
    bodies = [key for key in choices if "gripper" not in key.lower()]  # a state is more than its gripper
    return next((k for some in (bodies, choices) for word in words for k in some if word in k.lower()), "")


def is_flag(key: str) -> bool:
    """Whether a column's name says how an episode goes, not where a robot is: an end, success, a reward."""
    last = key.rsplit("/", 1)[-1].lower().removeprefix("is_")
    return last in ("first", "last") or last.startswith(FLAG_WORDS)


def is_clock(key: str) -> bool:
    """Whether a column's name says that it holds times."""
    last = key.rsplit("/", 1)[-1].lower()
    return last == "t" or "time" in last or "stamp" in last


# ------------------------------------------------------------------------------------------- demonstrations


def demonstrations(file: h5py.File) -> tuple[str, str, list[str]]:
    """Return the pattern of the groups that are demonstrations ("/": the file is one), the first, and a few.

    A demonstration holds frames and at least two columns with a row for each. Its parents hold no such column
    beside it.
    """
    _, groups = _look(file, "", ())
    if groups in ([], [""]):
        return "/", "/", []
    depth = groups[0].count("/")
    alike = [group for group in groups if group.count("/") == depth]
    steps = zip(*(group.split("/") for group in alike), strict=True)
    return "/".join(_pattern(list(dict.fromkeys(step))) for step in steps), groups[0], alike


def datasets_in(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Return the datasets [T, ...] of a group and of its groups by path; links are followed."""
    return _look(group, "", ())[0]


def _look(
    group: h5py.Group, path: str, above: tuple[h5py.Group, ...]
) -> tuple[dict[str, h5py.Dataset], list[str]]:
    """Return the datasets of a group, and the paths of the demonstrations in it ("": itself)."""
    if group in above or len(above) >= DEEPEST:  # a link to a group that it is in
        return {}, []
    above = (*above, group)
    everything: dict[str, h5py.Dataset] = {}
    found: dict[str, list[str]] = {}
    stems: set[str] = set()
    for name in sorted(map(str, group), key=natural):
        stem = name.rstrip("0123456789")
        if len(found) >= CHILDREN and stem in stems:
            continue
        item = _item(group, name)
        if isinstance(item, h5py.Dataset) and item.shape:
            everything[name] = item
        elif isinstance(item, h5py.Group):
            below, demos = _look(item, f"{path}/{name}".lstrip("/"), above)
            everything |= {f"{name}/{key}": dataset for key, dataset in below.items()}
            found[name] = demos
            stems.add(stem)
    frames = {key: rows_of(dataset) for key, dataset in everything.items() if is_picture(dataset)}
    if not frames:
        return everything, []
    most, inside = max(frames.values()), {name for name, demos in found.items() if demos}
    beside = {key: dataset for key, dataset in everything.items() if key.split("/", 1)[0] not in inside}
    several = len({rows for key, rows in frames.items() if key.split("/", 1)[0] in inside}) > 1
    if inside and (several or not columns_beside(beside, most)):
        return everything, [demo for name in found for demo in found[name]]
    return everything, [path] if len(columns_beside(everything, most)) > 1 else []


def _item(group: h5py.Group, name: object) -> object:
    try:
        return item_at(group, str(name))
    except HDF5_ERRORS:
        if isinstance(group.get(str(name), getlink=True), h5py.HardLink):
            raise  # damage
        return None  # a link that leads nowhere


def _pattern(names: Sequence[str]) -> str:
    stems = {name.rstrip("0123456789") for name in names}
    if len(stems) == 1 and (len(names) > 1 or stems != {*names}):
        return f"{glob.escape(stems.pop())}*"
    return glob.escape(names[0]) if len(names) == 1 else "*"


# ------------------------------------------------------------------------------- sentence, success and rate


def sentence_key(group: h5py.Group) -> tuple[str, str]:
    """Return where a demonstration's sentence seems to be (instruction.key), and it; else empty texts."""
    texts = dict(_texts(group))
    for word in SENTENCE_WORDS:
        for key, text in texts.items():
            if word in key.lower() and " " in text.strip():
                return key, text
    return "", ""


def _texts(group: h5py.Group) -> Iterator[tuple[str, str]]:
    """Yield each text of a group by its key: attributes, datasets, and what is in JSON of either."""
    values: dict[str, Any] = {str(name): plain(group.attrs[name]) for name in group.attrs}
    for name in group:
        dataset = _item(group, name)
        if isinstance(dataset, h5py.Dataset) and h5py.check_string_dtype(dataset.dtype) and dataset.size == 1:
            values[str(name)] = plain(dataset[()])
    for name, value in values.items():
        text = value[0] if isinstance(value, list) and value else value
        if isinstance(text, str) and "\ufffd" not in text:
            yield from _inside(name, text)


def _inside(name: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        yield name, text
        return
    yield from ((f"{name}.{key}", one) for key, one in found.items() if isinstance(one, str))


def success_key(group: h5py.Group) -> str:
    """Return the attribute or dataset that seems to say whether a demonstration succeeded; empty if none."""
    names = [*group.attrs, *(name for name in group if isinstance(_item(group, name), h5py.Dataset))]
    return next((str(name) for name in names if "success" in str(name).lower()), "")


def success_key_below(group: h5py.Group, depth: int = 4) -> str:
    """Return the success key of the first demonstration that has one, at most `depth` groups below."""
    if key := success_key(group):
        return key
    if depth:
        for name in sorted(map(str, group), key=natural)[:CHILDREN]:
            item = _item(group, name)
            if isinstance(item, h5py.Group) and (key := success_key_below(item, depth - 1)):
                return key
    return ""


def rate(file: h5py.File, group: h5py.Group, columns: Mapping[str, h5py.Dataset]) -> tuple[float, str]:
    """Return the control rate that an attribute or a column of times tells, and which; 0 if none does."""
    for place in (group, file):
        for name in place.attrs:
            value = plain(place.attrs[name])
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if str(name).lower() in RATE_WORDS and isinstance(value, int | float) and 0 < value < np.inf:
                return float(value), f"attribute {name}"
    for key, dataset in columns.items():
        if dataset.ndim == 1 and dataset.dtype.kind == "f" and is_clock(key):
            between = np.diff(np.asarray(dataset[()], np.float64))
            middle = float(np.median(between))
            if (between > 0).all() and 1 / FASTEST_HZ <= middle <= 1 / SLOWEST_HZ:
                return float(f"{1 / middle:.3g}"), f"the times in {key}, if they are in seconds"
    return 0.0, ""


# ------------------------------------------------------------------------------------------------- alignment


def alignment(group: h5py.Group, state: Sequence[str], action: Sequence[str]) -> tuple[int, str]:
    """Return the rows by which actions seem to be shifted, and why: where they are copies of states."""
    if not state or not action:
        return 0, ""
    one, two = (np.concatenate([_rows(group[key]) for key in keys], axis=1) for keys in (state, action))
    if one.shape[1] != two.shape[1] or len(two) < 3 or not np.ptp(two, axis=0).any():
        return 0, ""
    rows = min(len(one), len(two))
    if np.array_equal(one[:rows], two[:rows]):
        return 1, "each action is the state of its own row, so that of the next row is taken"
    if np.array_equal(one[1:rows], two[: rows - 1]):
        return 0, "each action is the state of the next row already"
    return 0, ""


def _rows(dataset: Any) -> NDArray:
    values = np.asarray(dataset)
    return values.reshape(len(values), -1)


def file_names(paths: Sequence[Path]) -> str:
    """Return the names of a few files."""
    names = [path.name for path in paths[:LISTED]]
    return ", ".join(names) + (f" and {len(paths) - LISTED} more" if len(paths) > LISTED else "")


def _holds_pictures(dataset: h5py.Dataset) -> bool:
    if not is_encoded(dataset) or not rows_of(dataset):
        return False
    row: Any = dataset[0]
    data = row if isinstance(row, bytes) else np.asarray(row).tobytes()
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG"))


def filter_keys_below(file: h5py.File) -> dict[str, int]:
    """Return robomimic's filter keys (/mask) of a file and how many demonstrations each names."""
    masks = file.get("mask")
    if not isinstance(masks, h5py.Group):
        return {}
    found = {str(key): masks.get(key) for key in masks}
    listed = {key: rows for key, rows in found.items() if isinstance(rows, h5py.Dataset)}
    return {key: rows.shape[0] for key, rows in listed.items() if rows.ndim == 1}


def listed_filter_keys(keys: Mapping[str, int]) -> str:
    """Return filter keys as a sentence has them."""
    return ", ".join(f"{key} ({count})" for key, count in keys.items())
