"""Turn the statistics of an OpenVLA folder into a codec: one set for each dataset, chosen by its name.

The files tell neither the cameras nor the robot's rate and control mode.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlafit import config as configuration
from vlafit.checkpoints.codecs import GIVE_ASSETS
from vlafit.checkpoints.formats.openvla.files import STATISTICS, read_config
from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.checkpoints.voting import Stated
from vlafit.codec import Codec, CodecConfig
from vlafit.codec.action_bins import ActionBinConfig
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.config import at
from vlafit.errors import CodecError, WeightsError, did_you_mean
from vlafit.nn.policy import Needs
from vlafit.types import ColumnForm, Embodiment, Feature, Gripper

FILE = STATISTICS
ARRAYS = ("mean", "std", "q01", "q99", "min", "max")


@dataclass(frozen=True)
class CodecOptions:
    """Settings that the files do not record: the table `openvla` of `load`'s config."""

    cameras: tuple[str, ...] = ()
    """Names of the cameras in order, the third person's first."""
    normalisation: Literal["openvla_quantile", "openvla_min_max"] = "openvla_quantile"
    """openvla_min_max is OFT's for ALOHA."""
    gripper: tuple[float, ...] = ()
    """What the robot takes for a closed and an open gripper, the last dimension, which OpenVLA's data have as
    0 and 1: [1, -1] of LIBERO. Sent is one of the two. Empty: what the policy answers."""
    state_dims: int = 0
    """Dimensions of the robot's state, where the statistics have none and the head reads no state."""


def sets(folder: Path) -> Mapping[str, Any]:
    """Return the sets of statistics by dataset: of dataset_statistics.json, else of config.json."""
    values = read_json_if_present(folder / FILE)
    found = read_config(folder).get("norm_stats", {}) if values is None else values
    if not isinstance(found, Mapping):
        raise WeightsError(f"{folder}: norm_stats is no table of datasets but {type(found).__name__}")
    return found


def choose(available: Mapping[str, Any], name: str | Path | None, where: str) -> str:
    """Return the dataset that `name` means, without one the only one. Raises WeightsError otherwise."""
    if name is None and len(available) == 1:
        return next(iter(available))
    if name is None:
        raise WeightsError(
            f"{where}: statistics of several datasets ({', '.join(available)}); say which, such as "
            f"{min(available)!r}: {GIVE_ASSETS}"
        )
    if str(name) not in available:
        raise WeightsError(
            f"{where}: there are no statistics of {str(name)!r}{did_you_mean(str(name), available)}"
        )
    return str(name)


def widths(folder: Path, name: str | Path | None) -> list[Stated]:
    """Return the dimensions of states and actions: of the chosen statistics, else of all if they agree."""
    found = sets(folder)
    chosen = found if name is None or str(name) not in found else {str(name): found[str(name)]}
    stated = []
    for key, column in (("state_dim", "proprio"), ("action_dim", "action")):
        sizes = {
            len(mean)
            for values in chosen.values()
            if isinstance(mean := at(values, f"{column}.mean") if isinstance(values, Mapping) else None, list)
        }
        if len(sizes) == 1:
            stated.append(Stated(key, sizes.pop(), f"the statistics ({column})"))
    return stated


def lacks_states(values: Any) -> bool:
    """Whether a set of statistics has actions, and no states."""
    return isinstance(values, Mapping) and "proprio" not in values


def make_codec(
    name: str,
    values: Any,
    needs: Needs,
    words: Tokenizer,
    options: CodecOptions,
    where: str,
    *,
    reads_state: bool = True,
) -> Codec:
    """Return the codec of the set of statistics called `name`. Raises CodecError where it is malformed.

    For a policy that reads no state, states without statistics stay as they are.
    """
    made, masks = {}, {}
    if not reads_state and lacks_states(values):
        if options.state_dims > needs.state_dim:
            raise CodecError(
                f"{where}: config: openvla.state_dims is {options.state_dims}, the policy's state_dim "
                f"{needs.state_dim}; set state_dim, too"
            )
        values = {**values, "proprio": _unknown(options.state_dims)}
    elif options.state_dims:
        raise CodecError(
            f"{where}: config: openvla.state_dims would have no effect: "
            f"{'this head reads the state' if reads_state else f'the statistics of {name} have states'}"
        )
    for column, key in (("state", "proprio"), ("action", "action")):
        here = f"{where}: statistics of {name}: {key}"
        numbers = values.get(key) if isinstance(values, Mapping) else None
        if not isinstance(numbers, Mapping):
            raise CodecError(f"{here}: not there")
        arrays = {n: numbers.get(n) for n in ARRAYS}
        if missing := [n for n, array in arrays.items() if array is None]:
            raise CodecError(f"{here}: {', '.join(missing)} not there; copy or download the file again")
        made[column] = Statistics.from_json({"count": 0, **arrays}, here)
        mask = numbers.get("mask", [True] * made[column].dimensions)
        if not isinstance(mask, list) or [type(one) for one in mask] != [bool] * made[column].dimensions:
            raise CodecError(f"{here}: mask is {mask!r}; it must say true or false of each dimension")
        masks[column] = tuple(not one for one in mask)
    if any(masks["state"]):
        raise CodecError(f"{where}: statistics of {name}: proprio: OpenVLA-OFT ignores its mask; remove it")
    size, bins = needs.image_size, needs.action_bins
    robot = Embodiment(
        name=name,
        cameras=tuple(Feature(camera, (size, size, 3)) for camera in options.cameras),
        state=Feature("state", (made["state"].dimensions,)),
        action=Feature("actions", (made["action"].dimensions,)),
        hz=0.0,
        control="",
    )
    config = CodecConfig(
        cameras=options.cameras,
        image_size=size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=options.normalisation,
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        framing=needs.framing,
        unchanged=masks["action"] if any(masks["action"]) else (),
        action_form=_gripper(options.gripper, masks["action"], f"{where}: config: openvla.gripper"),
        action_bins=None if bins is None else ActionBinConfig(bins.end, bins.longest, bins.eos, bins.ends),
    )
    return Codec(config, robot, made, words)


def _gripper(values: tuple[float, ...], unchanged: tuple[bool, ...], where: str) -> ColumnForm:
    """Return the form of an action whose last dimension is a gripper with the robot's two `values`."""
    if not values:
        return ColumnForm()
    if len(values) != 2 or values[0] == values[1]:
        raise CodecError(f"{where} is {list(values)}; give what the robot takes for closed and for open")
    if not unchanged or not unchanged[-1]:
        raise CodecError(f"{where} would have no effect: the statistics normalise the last dimension")
    return ColumnForm(grippers=(Gripper(len(unchanged) - 1, zero=values[0], one=values[1]),))


def _unknown(dimensions: int) -> dict[str, list[float]]:
    """Return statistics by which states from -1 to 1 stay as they are."""
    by_name = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0, "min": -1.0, "max": 1.0}
    return {name: [value] * dimensions for name, value in by_name.items()}


def parse_options(values: Mapping[str, Any], where: str) -> CodecOptions:
    """Return the caller's options. Raises ConfigError for an unknown one."""
    return configuration.build(CodecOptions, values, f"{where}: config: openvla")


def written(codec: Codec) -> str:
    """Return dataset_statistics.json with the codec's statistics, under its robot's name."""
    columns: dict[str, Any] = {}
    for key, column in (("action", "action"), ("proprio", "state")):
        arrays = {n: codec.statistics[column].array(n) for n in ARRAYS}
        columns[key] = {n: array.tolist() for n, array in arrays.items()}
    dimensions = codec.statistics["action"].dimensions
    mask = ~np.asarray(codec.config.unchanged or (False,) * dimensions)
    columns["action"]["mask"] = mask.tolist()
    columns |= {"num_transitions": codec.statistics["action"].count, "num_trajectories": 0}
    return json.dumps({codec.embodiment.name: columns}, indent=2) + "\n"
