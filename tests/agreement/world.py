"""Parties of a two-armed toy robot, each with what a test changes."""

from dataclasses import replace
from typing import Any

from vlafit.agreement import Party
from vlafit.types import Embodiment, Feature

ROBOT = Embodiment(
    name="arm",
    cameras=(Feature("front", (48, 64, 3)), Feature("wrist", (48, 64, 3))),
    state=Feature("state", (3,), "rad", ("shoulder", "elbow", "gripper")),
    action=Feature("action", (3,), "rad", ("shoulder", "elbow", "gripper")),
    hz=30.0,
    control="joint_position",
    renderer="camera",
)


def dataset(relative: tuple[bool, ...] = (), **changes: Any) -> Party:
    return Party("dataset", "mine", replace(ROBOT, **changes), relative)


def checkpoint(
    relative: tuple[bool, ...] | None = (), slots: tuple[str, ...] = ("front", "wrist"), **changes: Any
) -> Party:
    return Party("checkpoint", "theirs", replace(ROBOT, **changes), relative, slots)


def cameras(*names: str, size: tuple[int, int] = (48, 64)) -> tuple[Feature, ...]:
    return tuple(Feature(name, (*size, 3)) for name in names)
