"""LIBERO's gripper of LeRobot's GR00T: learned from 0 to 1, sent as -1 and 1.

The postprocessor records whether answers are turned, but LeRobot 0.6.1 replaces that at every load by
`action_decode_transform` of config.json (`_apply_groot_action_decode_transform`), and so does vlafit.
"""

from collections.abc import Sequence

from vlafit.checkpoints.formats.lerobot.processor_steps import Step
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.errors import WeightsError
from vlafit.types import ColumnForm, Gripper

KEY, FLAG = "action_decode_transform", "libero_gripper_action"
LIBERO, LIBERO_TAG = "libero", "libero_sim"
AUTO, NONE = "auto", ("", "none")  # LeRobot's words; auto, where nothing is said, goes by config.json's tag
CLOSED, OPEN = 1.0, -1.0  # of LIBERO; LeRobot sends -sign(2 g - 1)
LEAST_DIMENSIONS = 7  # of an action without groups, whose last one LeRobot then turns


def transform_of(lerobot: LeRobotConfig) -> str | None:
    """Return config.json's transform of answers, as LeRobot reads it. Raises WeightsError for another."""
    stated = lerobot.get(KEY, str) if KEY in lerobot.values else AUTO
    name = None if stated is None else stated.lower()
    if name == AUTO:
        return LIBERO if lerobot.values.get("embodiment_tag") == LIBERO_TAG else None
    if name is None or name in NONE:
        return None
    if name != LIBERO:
        raise WeightsError(f"{lerobot.path}: {KEY} is {stated!r}; LeRobot knows {LIBERO}, auto and none")
    return LIBERO


def gripper(dimension: int) -> Gripper:
    """Return the form of LIBERO's gripper at a dimension of the action."""
    return Gripper(dimension, zero=CLOSED, one=OPEN)


def libero_form(dimensions: int) -> ColumnForm:
    """Return the form of an action without groups: its gripper is the last of at least 7 dimensions."""
    return ColumnForm(grippers=(gripper(dimensions - 1),) if dimensions >= LEAST_DIMENSIONS else ())


def notes(lerobot: LeRobotConfig, post: Sequence[Step]) -> tuple[str, ...]:
    """Return a note for each step that records another gripper than config.json, which LeRobot follows."""
    used = transform_of(lerobot)
    lines = []
    for step in post:
        for key, wanted in ((KEY, used), (FLAG, used == LIBERO)):
            if key in step.config and step.config[key] != wanted:
                then = "turned into -1 and 1" if used else "answered as it was learned"
                lines.append(
                    f"{step.where}: {key} is {step.config[key]!r}, and {lerobot.path} says {KEY} "
                    f"{lerobot.values.get(KEY, AUTO)!r}: LeRobot follows config.json at every load, and so "
                    f"does vlafit: the gripper is {then}"
                )
    return tuple(lines)
