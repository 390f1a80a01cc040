"""Read which action dimensions a LeRobot checkpoint makes relative, from config.json and the processors."""

import re
from collections.abc import Iterator, Sequence

from vlafit.checkpoints.declaration import Overruled
from vlafit.checkpoints.formats.lerobot.processor_steps import ABSOLUTE_STEP, RELATIVE_STEP, Step
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.errors import WeightsError

RELATIVE_KEYS = ("use_relative_actions", "use_delta_actions", "use_delta_joint_actions")
"""Keys of config.json that make actions relative to the state, in the versions of LeRobot."""
INSIDE = {"use_delta_joint_actions_aloha": "joints relative, grippers absolute, inside the policy"}
"""Keys of config.json that make actions relative where no processor shows it, and which they make so."""
EXCLUDE = "relative_exclude_joints"
MADE_UP = re.compile(r"(relative|absolute)_\d+")
"""Names that an export gives dimensions whose own names cannot say which are relative; the robot has none."""


def mask_of(names: Sequence[str] | None, exclude: Sequence[str], dimensions: int) -> tuple[bool, ...]:
    """Return which action dimensions LeRobot makes relative: those whose name contains none of `exclude`."""
    tokens = [token.lower() for token in exclude if token]
    if not tokens or names is None:
        return (True,) * dimensions
    mask = [not any(token in name.lower() for token in tokens) for name in names[:dimensions]]
    return tuple(mask + [True] * (dimensions - len(mask)))


def without_effect(lerobot: LeRobotConfig, steps: Sequence[Step]) -> Iterator[Overruled]:
    """Yield the joints that are to stay absolute and that LeRobot makes relative: no action has the name."""
    names = action_names(lerobot, steps)
    asked = {f"{lerobot.path.name}: {EXCLUDE}": lerobot.get(EXCLUDE, list)}
    on = any(lerobot.get(key, bool) for key in RELATIVE_KEYS)
    for step in steps:
        if step.name == RELATIVE_STEP:
            asked[f"{step.where}: exclude_joints"] = step.config.get("exclude_joints")
            on |= bool(step.config.get("enabled"))
    lost = {
        where: [token for token in map(str, tokens) if not any(token.lower() in n.lower() for n in names)]
        for where, tokens in asked.items()
        if on and tokens
    }
    why = f"the actions are {', '.join(names)}" if names else "its actions have no names"
    for where, tokens in lost.items():
        if tokens:
            stated = f"{where} {', '.join(tokens)}"
            yield Overruled(
                "joints that stay absolute", stated, "no effect", f"LeRobot finds them by name, and {why}"
            )


def relative_of(
    lerobot: LeRobotConfig, pre: Sequence[Step], post: Sequence[Step], dimensions: int
) -> tuple[bool, ...]:
    """Return which action dimensions the pipelines make relative; empty where they make none.

    Raises WeightsError where config.json says otherwise: the weights learned one of the two.
    """
    on = [step for step in pre if step.name == RELATIVE_STEP and step.config.get("enabled")]
    off = [step for step in post if step.name == ABSOLUTE_STEP and step.config.get("enabled")]
    if len(on) != len(off) or len(on) > 1:
        where = [*on, *off][0].where
        raise WeightsError(f"{where}: relative actions are made and not undone, or undone and not made")
    config = on[0].config if on else {}
    excluded = config.get("exclude_joints") or ()
    mask = mask_of(action_names(lerobot, pre) or None, excluded, dimensions) if on else ()
    stated = relative_in_config(lerobot, pre, dimensions)
    if stated is not None and any(stated) | any(mask) and stated != mask:
        keys = ", ".join(
            f"{key} is {lerobot.values[key]!r}" for key in (*RELATIVE_KEYS, EXCLUDE) if key in lerobot.values
        )
        step = on[0].where if on else f"{lerobot.path.with_name('policy_preprocessor.json')}: no step"
        made = f"makes dimensions {', '.join(str(d) for d, yes in enumerate(mask) if yes)} relative"
        raise WeightsError(
            f"{lerobot.path}: {keys}; {step} {made if on else 'makes actions relative'}: two files of one "
            "checkpoint contradict each other. LeRobot ran the processors; if the weights were trained with "
            "them, correct config.json, else the processors"
        )
    return mask


def relative_in_config(
    lerobot: LeRobotConfig, steps: Sequence[Step], dimensions: int
) -> tuple[bool, ...] | None:
    """Return the mask that config.json states, empty for absolute actions; None where it does not say."""
    stated = [value for key in RELATIVE_KEYS if (value := lerobot.get(key, bool)) is not None]
    if not stated:
        return None
    if not any(stated):
        return ()
    exclude = lerobot.get(EXCLUDE, list)
    if exclude is None:  # as the step says, which LeRobot makes from it
        named = [step.config.get("exclude_joints") for step in steps if step.name == RELATIVE_STEP]
        exclude = next(filter(None, named), ())
    return mask_of(action_names(lerobot, steps) or None, exclude, dimensions)


def inside(lerobot: LeRobotConfig) -> str:
    """Return which key of config.json makes actions relative inside the policy, and which; "" for none."""
    return "; ".join(f"{key}: {what}" for key, what in INSIDE.items() if lerobot.get(key, bool))


def labels(lerobot: LeRobotConfig, steps: Sequence[Step], dimensions: int) -> tuple[str, ...]:
    """Return the robot's names of the action's dimensions; none where they were made up for an export."""
    names = action_names(lerobot, steps)
    own = len(names) == dimensions and not all(MADE_UP.fullmatch(name) for name in names)
    return names if own else ()


def action_names(lerobot: LeRobotConfig, steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the names of the action's dimensions, from config.json or the step that uses them.

    Raises WeightsError where the two differ: masks and statistics would belong to other columns.
    """
    stated = {f"{lerobot.path}: action_feature_names": lerobot.get("action_feature_names", list)}
    for step in steps:
        if step.name == RELATIVE_STEP:
            stated[f"{step.where}: action_names"] = step.config.get("action_names")
    listed = {where: tuple(map(str, names)) for where, names in stated.items() if names}
    if len(set(listed.values())) > 1:
        (here, mine), (there, other) = list(listed.items())[:2]
        raise WeightsError(
            f"{here} is {', '.join(mine)}; {there} is {', '.join(other)}: two files of one checkpoint "
            "contradict each other; correct the one that is wrong"
        )
    return next(iter(listed.values()), ())
