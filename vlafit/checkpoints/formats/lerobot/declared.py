"""Read what LeRobot's config.json and processors say of the robot, also where they make no codec."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlafit.checkpoints.declaration import Declaration, Overruled
from vlafit.checkpoints.formats.lerobot import (
    action_tokens,
    families,
    features,
    prompt_state,
    read_buffers,
    read_processors,
    relative_actions,
)
from vlafit.checkpoints.formats.lerobot.processor_steps import NEVER, Step, read_steps, require_known
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, executed_steps, read_config
from vlafit.checkpoints.formats.lerobot.stored_statistics import Sets
from vlafit.errors import WeightsError
from vlafit.types import Embodiment


def read(folder: Path, buffers: Mapping[str, Tensor]) -> Declaration:
    """Return the declaration of the LeRobot checkpoint in `folder`; nothing without its config.json.

    `buffers` are statistics that lie among its weights.

    Raises WeightsError for a config.json or a pipeline that cannot be read.
    """
    lerobot = read_config(folder)
    if lerobot is None:
        return Declaration()
    pre, post = (
        read_steps(folder / name) if (folder / name).is_file() else []
        for name in (read_processors.PRE, read_processors.POST)
    )
    families.require_steps(lerobot, [*pre, *post])
    require_known(pre, post)
    features.require_inputs(lerobot)
    relative_actions.action_names(lerobot, pre)  # a contradiction is not a lack of features
    try:
        slots, robot = read_processors.robot_of(lerobot, pre)
    except WeightsError:  # without features it says nothing of the robot; `load` needs none
        slots, robot = (), None
    sets = read_processors.statistics_in(folder) if pre and post else read_buffers.sets_of(buffers)
    if robot is not None and "" in sets:  # else nothing of the processors is used
        features.require_same(lerobot, [*pre, *post])
    relative = _relative(lerobot, pre, post, robot)
    conversions = tuple(f"{key} is true: {why}" for key, why in NEVER.items() if lerobot.get(key, bool))
    own, name = _tokenizer(folder, pre) if pre else (None, read_buffers.tokenizer_name(lerobot))
    there = own is not None and own.is_dir()
    return Declaration(
        embodiment=robot,
        relative=relative,
        slots=slots,
        conversions=conversions,
        relative_inside=relative_actions.inside(lerobot),
        tokenizer="" if there else name,
        own_tokenizer=own if there else None,
        lost_tokenizer=None if there else own,
        named_statistics=_named(sets),
        action_tokenizer=str(lerobot.values.get(action_tokens.NAME) or ""),
        form=read_processors.form_of(lerobot, pre),
        executed=executed_steps(lerobot),
        unsaid={"prompt": prompt_state.HOW} if lerobot.values["type"] == "pi05" else {},
        overruled=(
            *features.unread(lerobot),
            *(read_processors.overruled(lerobot, pre) if pre and post else ()),
            *relative_actions.without_effect(lerobot, pre),
            *(
                Overruled("features", other, mine, "fitted statistics replace the processors'")
                for mine, other in (() if "" in sets else features.differences(lerobot, [*pre, *post]))
            ),
        ),
    )


def _named(sets: Sets) -> tuple[str, ...]:
    return () if "" in sets else tuple(sorted(sets))


def _relative(
    lerobot: LeRobotConfig, pre: list[Step], post: list[Step], robot: Embodiment | None
) -> tuple[bool, ...] | None:
    """Return the mask of the processors, else of config.json; LeRobot's actions are absolute otherwise."""
    if robot is None:
        return None
    dimensions = robot.action.shape[0]
    if pre and post:
        return relative_actions.relative_of(lerobot, pre, post, dimensions)
    return relative_actions.relative_in_config(lerobot, pre, dimensions) or ()


def _tokenizer(folder: Path, pre: list[Step]) -> tuple[Path | None, str]:
    """Return the tokenizer's folder inside the checkpoint, and its name where the processors name another."""
    for step in pre:
        if step.name == "tokenizer_processor":
            own = read_processors.own_tokenizer(folder, step)
            return own, str(step.config.get("tokenizer_name", ""))
    return None, ""
