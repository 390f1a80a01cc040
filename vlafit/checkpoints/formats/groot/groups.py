"""The groups of dimensions in NVIDIA's settings: their order, normalisation and statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.normaliser import NEEDED, Normalisation
from vlafit.codec.statistics import ARRAYS, Statistics
from vlafit.errors import WeightsError
from vlafit.types import Angles, Pose, RotationForm

EEF: Mapping[str, tuple[RotationForm, int]] = {
    "XYZ_ROT6D": ("rot6d_rows", 9),
    "XYZ_ROTVEC": ("axis_angle", 6),
}
"""Forms of an end effector's pose -> how its rotation is written, and all dimensions."""
NO_STATISTICS = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
"""Of sines and cosines, which are not normalised."""


class Unrepeated(WeightsError):
    """A setting of NVIDIA's that vlafit does not repeat."""


SETTINGS = (
    "delta_indices", "modality_keys", "sin_cos_embedding_keys", "mean_std_embedding_keys", "action_configs"
)  # fmt: skip
"""Of a modality; NVIDIA's program takes no others."""


@dataclass(frozen=True)
class Modality:
    """What NVIDIA's settings say of cameras, state, action or language."""

    keys: tuple[str, ...]
    deltas: tuple[int, ...]
    sincos: tuple[str, ...]
    mean_std: tuple[str, ...]
    actions: tuple[Mapping[str, Any], ...]
    """Of an action: a table for each key; none: all are absolute."""


@dataclass(frozen=True)
class Columns:
    """The groups of a column, one after another."""

    starts: Mapping[str, tuple[int, int]]
    """Group -> its first dimension, and how many there are."""
    labels: tuple[str, ...]
    methods: tuple[Normalisation, ...]
    arrays: Mapping[str, NDArray[np.float64]]
    """Statistic -> numbers of each learned dimension, [d] or [steps, d]; those that every group has."""
    poses: tuple[Pose, ...] = ()
    references: tuple[Pose, ...] = ()
    """Of an action: the poses of the state that its own are relative to."""
    angles: tuple[Angles, ...] = ()
    relative: tuple[bool, ...] = ()
    relative_to: tuple[int, ...] = ()

    def statistics(self, where: str) -> Statistics:
        """Return the statistics. Raises CodecError or WeightsError for what no data has."""
        values = {name: array.tolist() for name, array in self.arrays.items()}
        made = Statistics.from_json({"count": 0, **dict.fromkeys(ARRAYS), **values}, where)
        for low, high in (("min", "max"), ("q01", "q99")):
            one, other = getattr(made, low), getattr(made, high)
            if one is not None and other is not None and (one > other).any():
                raise WeightsError(f"{where}: {low} is above {high}")
        return made


def modality(modalities: Any, name: str, where: str) -> Modality:
    """Return the settings of a modality. Raises WeightsError where they are not what NVIDIA writes."""
    values = modalities.get(name) if isinstance(modalities, Mapping) else None
    here = f"{where}: {name}"
    if not isinstance(values, Mapping):
        raise WeightsError(f"{here} is {values!r}; it must be a table")
    if unknown := [key for key in values if key not in SETTINGS]:
        one = unknown[0]
        raise Unrepeated(f"{here}.{one} is {values[one]!r}; it is not known here, so to ignore it is a guess")
    keys, deltas = _names(values, "modality_keys", here), values.get("delta_indices")
    if not keys or len(set(keys)) != len(keys):
        raise WeightsError(f"{here}.modality_keys are {list(keys)}; they must be names, each once")
    if not isinstance(deltas, list) or any(type(one) is not int for one in deltas):
        raise WeightsError(f"{here}.delta_indices are {deltas!r}; they must be whole numbers")
    actions = values.get("action_configs") or ()
    if not isinstance(actions, Sequence) or isinstance(actions, str):
        raise WeightsError(f"{here}.action_configs is {actions!r}; it must be a list of tables, or null")
    if actions and (len(actions) != len(keys) or not all(isinstance(one, Mapping) for one in actions)):
        raise WeightsError(f"{here}.action_configs must be a table for each of {', '.join(keys)}")
    sincos, mean_std = (_names(values, f"{one}_embedding_keys", here) for one in ("sin_cos", "mean_std"))
    return Modality(keys, tuple(deltas), sincos, mean_std, tuple(actions))


def states(one: Modality, numbers: Any, percentiles: bool, sincos: bool, where: str) -> Columns:
    """Return the groups of the state."""
    starts: dict[str, tuple[int, int]] = {}
    labels: list[str] = []
    methods: list[Normalisation] = []
    angles, parts = [], []
    for key in one.keys:
        values = _values(numbers, "state", key, where)
        width = _width(values, f"{where}: state.{key}")
        starts[key] = len(labels), width
        if sincos and key in one.sincos:
            angles.append(Angles(len(labels), width))
            methods.extend("identity" for _ in range(2 * width))
            parts.append({name: np.full(2 * width, value) for name, value in NO_STATISTICS.items()})
        else:
            method: Normalisation = "nvidia_mean_std" if key in one.mean_std else usual_range(percentiles)
            methods.extend(method for _ in range(width))
            parts.append(_arrays(values, method, width, 0, f"{where}: state.{key}"))
        labels += _labels(key, width)
    return Columns(starts, tuple(labels), tuple(methods), _joined(parts, 0), angles=tuple(angles))


def actions(
    one: Modality,
    state: Columns,
    numbers: Any,
    percentiles: bool,
    relative: bool,
    steps: int,
    where: str,
) -> Columns:
    """Return the groups of an action of so many steps; `relative` says whether relative ones are made."""
    labels: list[str] = []
    methods: list[Normalisation] = []
    mask: list[bool] = []
    places: list[int] = []
    starts: dict[str, tuple[int, int]] = {}
    parts: list[dict[str, NDArray[np.float64]]] = []
    poses: list[Pose] = []
    references: list[Pose] = []
    for number, key in enumerate(one.keys):
        settings = one.actions[number] if one.actions else {}
        width = _width(_values(numbers, "action", key, where), f"{where}: action.{key}")
        first, is_relative = len(labels), relative and _word(settings, "rep") == "RELATIVE"
        starts[key] = first, width
        column = "relative_action" if is_relative else "action"
        place = f"{where}: {column}.{key}"
        method = usual_range(percentiles and not is_relative)
        if key in one.mean_std:
            method = "nvidia_mean_std_clipped"
        parts.append(_arrays(_values(numbers, column, key, where), method, width, steps, place))
        methods.extend(method for _ in range(width))
        labels += _labels(key, width)
        reference = _reference(settings, key, width, state, place) if is_relative else 0
        is_pose = is_relative and _word(settings, "type") == "EEF"
        mask += [is_relative and not is_pose] * width
        places += list(range(reference, reference + width)) if is_relative else [0] * width
        if is_pose:
            form = _eef(settings, width, place)
            seen = Pose(reference, reference + 3, form)
            if any(angles.first < reference + width and reference < angles.first + angles.count
                   for angles in state.angles):  # fmt: skip
                raise Unrepeated(f"{place}: is relative to a pose of the state that is learned as sines")
            references += [seen] * (seen not in references)
            poses.append(Pose(first, first + 3, form, relative=True, reference=references.index(seen)))
    joined = _joined(parts, steps)
    own = places != list(range(len(places))) and any(mask)
    return Columns(
        starts,
        tuple(labels),
        tuple(methods),
        joined,
        poses=tuple(poses),
        references=tuple(references),
        relative=tuple(mask) if any(mask) else (),
        relative_to=tuple(places) if own else (),
    )


def _word(settings: Mapping[str, Any], key: str) -> str:
    """Return a setting's name, which NVIDIA writes in capitals, and its value means in small letters."""
    return str(settings.get(key)).upper().replace("+", "_")


def _reference(settings: Mapping[str, Any], key: str, width: int, state: Columns, where: str) -> int:
    """Return the first dimension of the state's group that a group of actions is relative to."""
    name = settings.get("state_key") or key
    if name not in state.starts:
        raise WeightsError(
            f"{where}: is relative to the state {name!r}, which has the groups {', '.join(state.starts)}"
        )
    first, have = state.starts[name]
    if have != width:
        raise WeightsError(f"{where}: has {width} dimensions, and the state {name!r} has {have}")
    return first


def _eef(settings: Mapping[str, Any], width: int, where: str) -> RotationForm:
    """Return how an end effector's rotation is written."""
    form = _word(settings, "format")
    if form not in EEF or EEF[form][1] != width:
        known = ", ".join(f"{name} of {count}" for name, (_, count) in EEF.items())
        raise Unrepeated(
            f"{where}: a pose of the format {form} has {width} dimensions; known are {known} dimensions"
        )
    return EEF[form][0]


def _names(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = values.get(key) or ()
    if (
        not isinstance(names, Sequence)
        or isinstance(names, str)
        or not all(isinstance(n, str) for n in names)
    ):
        raise WeightsError(f"{where}.{key} is {names!r}; it must be a list of names")
    return tuple(names)


def _labels(key: str, width: int) -> list[str]:
    return [key] if width == 1 else [f"{key}.{number}" for number in range(width)]


def usual_range(percentiles: bool) -> Normalisation:
    """Return how groups are normalised that are not named otherwise."""
    return "nvidia_quantile" if percentiles else "nvidia_min_max"


def _values(numbers: Any, column: str, key: str, where: str) -> Mapping[str, Any]:
    table = numbers.get(column) if isinstance(numbers, Mapping) else None
    values = table.get(key) if isinstance(table, Mapping) else None
    if not isinstance(values, Mapping):
        raise WeightsError(f"{where}: there are no statistics of {column}.{key}")
    return values


def _width(values: Mapping[str, Any], where: str) -> int:
    for name in ARRAYS:
        if isinstance(row := values.get(name), list) and row:
            return len(row[0]) if isinstance(row[0], list) else len(row)
    raise WeightsError(f"{where}: there is no list of numbers called {' or '.join(ARRAYS)}")


def _arrays(
    values: Mapping[str, Any], method: Normalisation, width: int, steps: int, where: str
) -> dict[str, NDArray[np.float64]]:
    """Return a group's numbers, [width] or [steps, width]. Raises WeightsError for others, or none."""
    arrays = {}
    for name in ARRAYS:
        if values.get(name) is None:
            continue
        try:
            array = np.asarray(values[name], np.float64)
        except (TypeError, ValueError):
            raise WeightsError(f"{where}.{name} is no list of numbers") from None
        if array.shape not in ((width,), (steps, width)):
            shape = f"{width} numbers" + (f", or {steps} times as many" if steps else "")
            raise WeightsError(f"{where}.{name} has the shape {list(array.shape)}; it must be {shape}")
        arrays[name] = array
    if missing := [name for name in NEEDED[method] if name not in arrays]:
        raise WeightsError(f"{where} is normalised by {method}, and has no {' and '.join(missing)}")
    low, high = (arrays[name] for name in NEEDED[method])
    arrays.setdefault("mean", (low + high) / 2)
    arrays.setdefault("std", np.abs(high - low) / 2)
    return arrays


def _joined(parts: Sequence[Mapping[str, NDArray[np.float64]]], steps: int) -> dict[str, NDArray[np.float64]]:
    """Return the numbers of all groups in order, of those statistics that every group has."""
    names = [name for name in ARRAYS if all(name in part for part in parts)]
    several = any(part["mean"].ndim == 2 for part in parts)
    joined = {}
    for name in names:
        arrays = [
            np.broadcast_to(part[name], (steps, part[name].shape[-1])) if several else part[name]
            for part in parts
        ]
        joined[name] = np.concatenate(arrays, axis=-1)
    return joined
