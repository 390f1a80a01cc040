"""Read LeRobot's processors of GR00T N1.7 that have statistics of groups of dimensions, as a codec.

LeRobot saves them where it began from NVIDIA's own folder, or learned relative actions. The groups are
NVIDIA's, the formulas LeRobot's: every group by its range, a constant dimension where its ends are equal,
states by flat statistics of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from vlafit.checkpoints.formats.groot import groups
from vlafit.checkpoints.formats.groot.groups import Columns, Modality
from vlafit.checkpoints.formats.lerobot import groot_gripper
from vlafit.checkpoints.formats.lerobot.processor_steps import Step
from vlafit.checkpoints.formats.lerobot.stored_statistics import STATE
from vlafit.codec import CodecConfig, Statistics
from vlafit.codec.normaliser import NEEDED, Normalisation
from vlafit.errors import WeightsError
from vlafit.types import ColumnForm, Embodiment

SHARED = ("raw_stats", "modality_config", "use_percentiles")  # what both steps say
GRIPPER = "gripper"
VLAFIT_METHODS: Mapping[Normalisation, Normalisation] = {
    "nvidia_min_max": "groot_min_max",
    "nvidia_quantile": "groot_quantile",
}
"""NVIDIA's way of normalising a group -> LeRobot's, which differs in nearly constant dimensions."""


@dataclass(frozen=True)
class Grouped:
    """What the two steps say of states and actions."""

    states: Columns
    actions: Columns
    usual: Normalisation
    steps: int
    """Of a chunk, the first ones, that were trained."""
    gripper: int | None
    """Dimension of LIBERO's gripper, where LeRobot turns its answers into -1 and 1."""
    where: str

    def config(self, plain: CodecConfig) -> CodecConfig:
        """Return `plain` with everything that the groups say."""
        states, actions = self.states, self.actions
        common = {self.usual}
        grippers = () if self.gripper is None else (groot_gripper.gripper(self.gripper),)
        return replace(
            plain,
            normalisation=self.usual,
            relative=actions.relative,
            relative_to=actions.relative_to,
            state_form=ColumnForm(actions.references),
            action_form=ColumnForm(actions.poses, grippers),
            state_methods=() if set(states.methods) == common else states.methods,
            action_methods=() if set(actions.methods) == common else actions.methods,
            valid_steps=0 if self.steps == plain.chunk else self.steps,
        )

    def statistics(self) -> dict[str, Statistics]:
        """Return the statistics of what is learned."""
        return {"state": self.states.statistics(self.where), "action": self.actions.statistics(self.where)}


def read(pack: Step, decode: Step, robot: Embodiment, chunk: int, transform: str | None) -> Grouped:
    """Return what the steps say; `transform` is config.json's of the answers.

    Raises WeightsError where they contradict each other or the robot, or say what vlafit does not repeat.
    """
    for key in SHARED:
        if pack.config.get(key) != decode.config.get(key):
            raise WeightsError(
                f"{decode.where}: {key} is not that of {pack.where}; one of the two was exchanged"
            )
    if not pack.config.get("normalize_min_max", True):
        raise WeightsError(f"{pack.where}: normalize_min_max is false, and {decode.where} undoes it")
    numbers, modalities = pack.config.get("raw_stats"), pack.config.get("modality_config")
    percentiles = bool(pack.config.get("use_percentiles", False))
    relative = bool(decode.config.get("use_relative_action", False))
    state, action = (_modality(modalities, name, pack.where) for name in ("state", "action"))
    where = f"{pack.where}: raw_stats"
    _require_undone(action, relative, decode.where)
    steps = len(action.deltas)
    valid = pack.config.get("valid_action_horizon", chunk)
    if action.deltas != tuple(range(steps)) or not 0 < steps <= chunk or valid != steps:
        raise WeightsError(
            f"{pack.where}: action.delta_indices are {list(action.deltas)} and valid_action_horizon is "
            f"{valid}; only the first steps of {chunk}, one after another and all valid, are supported here"
        )
    states = _by_range(groups.states(state, numbers, percentiles, False, where))
    actions = _by_range(groups.actions(action, states, numbers, percentiles, relative, steps, where))
    for name, columns, have in (
        ("observation.state", states, robot.state.shape[0]),
        ("action", actions, robot.action.shape[0]),
    ):
        if len(columns.labels) != have:
            raise WeightsError(
                f"{where} has {len(columns.labels)} dimensions of {name}, and config.json {have}: two files "
                "of one checkpoint contradict each other; correct the one that is wrong"
            )
    dims = decode.config.get("env_action_dim", 0)
    if dims not in (0, len(actions.labels)):
        raise WeightsError(
            f"{decode.where}: env_action_dim is {dims}, which cuts off some of {len(actions.labels)} action "
            "dimensions; that is not supported here"
        )
    usual = VLAFIT_METHODS[groups.usual_range(percentiles)]
    gripper = _gripper(decode, actions, transform)
    return Grouped(states, actions, usual, steps, gripper, where)


def require_flat(grouped: Grouped, flat: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError where the flat statistics, by which LeRobot normalises states, are others."""
    low, high = (grouped.states.arrays[name] for name in NEEDED[grouped.usual])
    for name, wanted in (("min", low), ("max", high)):
        tensor = flat.get(f"{STATE}.{name}")
        have = None if tensor is None else tensor.flatten().numpy().astype(np.float32)
        if have is None or not np.array_equal(have, wanted.astype(np.float32)):
            found = "missing" if have is None else "another one"
            raise WeightsError(
                f"{where}: {STATE}.{name} is {found}, and LeRobot normalises states by it, not by raw_stats; "
                "one of the two was exchanged"
            )


def relative_mask(pack: Step, decode: Step) -> tuple[bool, ...]:
    """Return which action dimensions are learned relative to a dimension of the state; empty: none."""
    if not decode.config.get("use_relative_action", False):
        return ()
    numbers, where = pack.config.get("raw_stats"), pack.where
    percentiles = bool(pack.config.get("use_percentiles", False))
    state, action = (_modality(pack.config.get("modality_config"), n, where) for n in ("state", "action"))
    columns = groups.states(state, numbers, percentiles, False, where)
    return groups.actions(action, columns, numbers, percentiles, True, len(action.deltas), where).relative


def _modality(modalities: Any, name: str, where: str) -> Modality:
    """Return the groups of a column, without what LeRobot does not read: sines, cosines and z-scores."""
    values = modalities.get(name) if isinstance(modalities, Mapping) else None
    if isinstance(values, Mapping) and name == "state":
        values = {"delta_indices": [0], **values}
    one = groups.modality({name: values}, name, f"{where}: modality_config")
    if name == "action" and isinstance(values, Mapping) and values.get("action_configs", ()) is None:
        raise WeightsError(
            f"{where}: modality_config.action.action_configs is null: LeRobot 0.6.1 then returns answers "
            "from -1 to 1, not actions; make it [] where all groups are absolute, or read NVIDIA's own folder"
        )
    return replace(one, sincos=(), mean_std=())


def _by_range(columns: Columns) -> Columns:
    return replace(columns, methods=tuple(VLAFIT_METHODS[method] for method in columns.methods))


def _require_undone(action: Modality, relative: bool, where: str) -> None:
    pairs = zip(action.keys, action.actions, strict=True) if action.actions else ()
    made = [key for key, one in pairs if str(one.get("rep")).upper() == "RELATIVE"]
    if made and not relative:
        raise WeightsError(
            f"{where}: use_relative_action is false, and LeRobot trains {', '.join(made)} relative to the "
            "state: its answers are then not actions"
        )


def _gripper(decode: Step, actions: Columns, transform: str | None) -> int | None:
    if transform is None:
        return None
    first, width = actions.starts.get(GRIPPER, (0, 0))
    if width != 1:
        raise WeightsError(
            f"{decode.where}: action_decode_transform of config.json is {transform!r}, with {width} "
            f"dimensions of the group {GRIPPER!r}; LeRobot takes one"
        )
    return first
