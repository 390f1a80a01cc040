"""Find and check the statistics of a LeRobot checkpoint: of one robot, or of several datasets by name.

Processors keep them in a safetensors file, as ``observation.state.mean``. LeRobot up to 0.3 kept them among
the weights, as ``normalize_inputs.buffer_observation_state.mean``. A policy that was pretrained on several
datasets has a set for each: ``so100.buffer.action.mean``, or
``normalize_inputs.so100_buffer_observation_state.mean``. lerobot/smolvla_base has three, of the action only,
because LeRobot's migration to processors lost those of the state; LeRobot applies none of them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, isinf

from vlafit.checkpoints.codecs import GIVE_ASSETS
from vlafit.codec import Statistics
from vlafit.codec.normaliser import NEEDED, Normalisation
from vlafit.codec.statistics import ARRAYS
from vlafit.errors import WeightsError, did_you_mean
from vlafit.types import Embodiment

STATE, ACTION = "observation.state", "action"
BUFFER = "buffer"
Sets = Mapping[str, Mapping[str, Tensor]]
"""Name of a set ("" for statistics of one robot) -> "feature.statistic" -> numbers; state and action only."""


def in_processors(tensors: Mapping[str, Tensor]) -> Sets:
    """Return the sets in the file of a processor step."""
    sets: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, marker, name = key.rpartition(f".{BUFFER}.")
        if name.rpartition(".")[0] in (STATE, ACTION):
            sets.setdefault(owner if marker else "", {})[name] = tensor
    return sets


def in_weights(tensors: Mapping[str, Tensor], module: str) -> Sets:
    """Return the sets of a module such as ``normalize_inputs.``; infinite ones were never set: left out."""
    sets: dict[str, dict[str, Tensor]] = {}
    features = {feature.replace(".", "_"): feature for feature in (STATE, ACTION)}
    for key, tensor in tensors.items():
        if not key.startswith(module):
            continue
        owner, _, statistic = key.removeprefix(module).rpartition(".")
        name, marker, feature = owner.rpartition(f"{BUFFER}_")
        if marker and feature in features and not bool(isinf(tensor).any()):
            sets.setdefault(name.removesuffix("_"), {})[f"{features[feature]}.{statistic}"] = tensor
    return sets


def choose(sets: Sets, asset: str | Path | None, where: str) -> tuple[str | None, str]:
    """Return the set to use, or None and why there is none.

    Sets of datasets are never applied unasked: the user names one (`assets`). Raises WeightsError for a name
    that is not there.
    """
    named = sorted(name for name in sets if name)
    if asset is None:
        if "" in sets or not named:
            return "", ""
        held = ", ".join(f"{name} ({' and '.join(_features(sets[name]))})" for name in named)
        return None, (
            f"its statistics are those of the datasets that it was trained on: {held}; LeRobot applies none"
            f" of them. Choose one ({GIVE_ASSETS}), or let fine-tuning fit new ones to the data"
        )
    if str(asset) in named:
        return str(asset), ""
    if not named:
        raise WeightsError(f"{where}: its statistics have no names; it takes no assets")
    raise WeightsError(
        f"{where}: there are no statistics called {str(asset)!r}, but of {', '.join(named)}"
        f"{did_you_mean(str(asset), named)}"
    )


def lacking(
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, Normalisation],
    name: str,
    asset: str | Path | None,
    where: str,
) -> str:
    """Return why a set of statistics normalises nothing; empty where it has something of state and action.

    `kinds` says how "state" and "action" are normalised. A standard deviation of 0 divides nothing. Raises
    WeightsError if the user chose this set.
    """
    have = _features(tensors)
    features = {"state": STATE, "action": ACTION}
    absent = [features[key] for key, kind in kinds.items() if kind in NEEDED and features[key] not in have]
    still = [
        f"{key} is 0 in dimension {', '.join(map(str, zeros))}"
        for kind, feature in features.items()
        if kinds[kind] == "lerobot_mean_std" and (key := f"{feature}.std") in tensors
        if (zeros := (tensors[key].reshape(-1) == 0).nonzero().flatten().tolist())
    ]
    if not absent and not still:
        return ""
    which = f"{name!r} has" if name else "there are"
    reason = f"{which} no statistics of {' and '.join(absent)}, only of {' and '.join(have) or 'nothing'}"
    if not absent:
        reason = f"{f'{name!r}: ' if name else ''}{' and '.join(still)}: nothing can be divided by it"
    if asset is not None:
        raise WeightsError(
            f"{where}: {reason}; leave `assets` empty and fit statistics to the data: data.statistics ="
            ' "data"'
        )
    return f'{reason}; fine-tuning fits new ones to the data: data.statistics = "data"'


def read(
    tensors: Mapping[str, Tensor], feature: str, kind: Normalisation, dimensions: int, where: str
) -> Statistics:
    """Return the statistics of a feature.

    Raises WeightsError where what `kind` reads is missing or unusable.
    """
    arrays: dict[str, NDArray[np.float64]] = {}
    count = 0
    for name, tensor in tensors.items():
        owner, _, statistic = name.rpartition(".")
        if owner == feature and statistic == "count":
            count = int(tensor.reshape(-1)[0])
        elif owner == feature and statistic in ARRAYS:
            arrays[statistic] = tensor.double().numpy()
    needed = NEEDED.get(kind, ())
    missing = [name for name in needed if name not in arrays]
    if missing:
        # LeRobot would then pass the feature on as it is, without a word.
        raise WeightsError(
            f"{where}: {feature} is to be normalised by {kind}, and {', '.join(missing)} is not in its "
            "statistics; take them from the dataset it was trained on"
        )
    for name, array in arrays.items():
        if array.shape != (dimensions,) or not np.isfinite(array).all():
            raise WeightsError(
                f"{where}: {feature}.{name} has shape {array.shape}"
                f"{'' if np.isfinite(array).all() else ' and is not finite'}; the feature has "
                f"{dimensions} dimensions"
            )
    _require_usable(arrays, kind, f"{where}: {feature}")
    _fill(arrays, kind, dimensions)
    return Statistics(count, **arrays)


def read_both(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, Normalisation], robot: Embodiment, where: str
) -> dict[str, Statistics]:
    """Read the statistics of "state" and "action" as `read` does."""
    return {
        "state": read(tensors, STATE, kinds["state"], robot.state.shape[0], where),
        "action": read(tensors, ACTION, kinds["action"], robot.action.shape[0], where),
    }


def _features(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.rpartition(".")[0] for key in tensors})


def _fill(arrays: dict[str, NDArray[np.float64]], kind: Normalisation, dimensions: int) -> None:
    """Add a mean and a std where `kind` reads none, because every `Statistics` has them.

    A range has its centre and half its width; identity has 0 and 1.
    """
    if "mean" in arrays and "std" in arrays:
        return
    if kind in NEEDED:
        low, high = (arrays[name] for name in NEEDED[kind])
        arrays.setdefault("mean", (low + high) / 2)
        arrays.setdefault("std", (high - low) / 2)
    else:
        arrays.setdefault("mean", np.zeros(dimensions))
        arrays.setdefault("std", np.ones(dimensions))


def _require_usable(arrays: Mapping[str, NDArray[np.float64]], kind: Normalisation, where: str) -> None:
    """Raise WeightsError for statistics that no data has, or by which nothing can be normalised."""
    for low, high in (("min", "max"), ("q01", "q99")):
        if low in arrays and high in arrays and (arrays[low] > arrays[high]).any():
            raise WeightsError(f"{where}.{low} is above its {high}")
    std = arrays.get("std")
    if std is None:
        return
    bad = np.flatnonzero(std <= 0 if kind == "lerobot_mean_std" else std < 0)
    if bad.size:
        raise WeightsError(
            f"{where}.std is {std[bad[0]]:g} in dimension {bad[0]}: nothing can be divided by it; take"
            " statistics from data in which that dimension moves, or leave it out of the feature"
        )
