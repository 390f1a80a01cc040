"""Read LeRobot's processors of GR00T N1.7 as a codec.

One step packs state, actions and frames, one makes the chat turn, one undoes the normalisation. With
`raw_stats`, which raw NVIDIA checkpoints bring, LeRobot normalises groups of dimensions apart; see
`groot_grouped`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlafit.checkpoints.codecs import GIVE_TOKENIZER
from vlafit.checkpoints.formats.groot.processors import Frames
from vlafit.checkpoints.formats.lerobot import families, groot_gripper, groot_grouped, processor_steps
from vlafit.checkpoints.formats.lerobot import read_processors as lerobot_processors
from vlafit.checkpoints.formats.lerobot import stored_statistics as stored
from vlafit.checkpoints.formats.lerobot.processor_steps import (
    ENCODE,
    GROUPED,
    NEUTRAL,
    PACK,
    RENAME,
    UNPACK,
    Step,
    anything,
    only,
    read_steps,
)
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, read_config
from vlafit.checkpoints.formats.lerobot.stored_statistics import ACTION
from vlafit.checkpoints.tensor_files import open_tensors
from vlafit.codec import Codec, CodecConfig, Tokenizer
from vlafit.codec.images import groot_crop
from vlafit.codec.normaliser import Normalisation
from vlafit.codec.prompts import Prompt
from vlafit.errors import WeightsError
from vlafit.nn.policy import Needs
from vlafit.types import ColumnForm, Embodiment

PRE, POST = lerobot_processors.PRE, lerobot_processors.POST
EMBODIMENTS = {  # LeRobot 0.6.1's N1_7_EMBODIMENT_MAPPING: tag -> row of the embodiment tables
    "oxe_droid_relative_eef_relative_joint": 24,
    "xdof_relative_eef_relative_joint": 27,
    "xdof_relative_eef_relative_joint_subtask": 27,
    "real_g1_relative_eef_relative_joints": 25,
    "real_r1_pro_sharpa_relative_eef": 26,
    "real_r1_pro_sharpa_relative_eef_human": 26,
    "real_r1_pro_sharpa_relative_eef_maxinsights": 26,
    "real_r1_pro_sharpa_relative_eef_mecka": 26,
    "unitree_g1_full_body_with_waist_height_nav_cmd": 25,
    "simpler_env_google": 0,
    "simpler_env_widowx": 1,
    "libero_sim": 2,
    "new_embodiment": 10,
}
UNKNOWN_ROW = 0  # LeRobot's for a tag that its table does not have
WRIST = {"wrist_image": "image2"}  # a key of NVIDIA's LIBERO checkpoint -> LeRobot's name of that camera

REPEATED: dict[str, dict[str, Callable[[Any], bool]]] = {
    **{name: processor_steps.REPEATED[name] for name in (RENAME, *NEUTRAL)},
    PACK: {
        "state_horizon": only(1),
        "action_horizon": anything,  # compared with the policy below, as the two widths are
        "valid_action_horizon": anything,  # compared with action_horizon below
        "video_horizon": only(None, 1),
        "max_state_dim": anything,
        "max_action_dim": anything,
        "language_key": anything,  # where LeRobot finds the instruction; an observation has it
        "formalize_language": only(True, False),
        "embodiment_tag": anything,  # read
        "embodiment_mapping": anything,  # read
        "normalize_min_max": only(True, False),
        "state_dropout_prob": anything,  # only in training
        "clip_outliers": only(True),
        "use_percentiles": anything,  # only of grouped statistics, as the last two
        "video_modality_keys": anything,  # read
        "raw_stats": anything,
        "modality_config": anything,
    },
    ENCODE: {
        "model_name": anything,  # of the tokenizer; its tokens are compared with the policy's
        "image_crop_size": anything,  # read by `framing_of`, as the next three are
        "image_target_size": anything,
        "shortest_image_edge": anything,
        "crop_fraction": anything,
        "use_albumentations": only(True, False),
        "letter_box_transform": only(True, False),
        "device": anything,
    },
    GROUPED: {
        "env_action_dim": anything,  # compared with the groups
        "raw_stats": anything,  # compared with PACK's, as the next two are
        "modality_config": anything,
        "use_percentiles": only(True, False),
        "use_relative_action": only(True, False),
        "action_decode_transform": only(None, groot_gripper.LIBERO),
    },
    UNPACK: {
        "env_action_dim": anything,  # compared with config.json below
        "normalize_min_max": only(True, False),
        "clip_normalized_action": only(True),
        "libero_gripper_action": only(True, False),  # config.json decides; compared in `groot_gripper`
        "libero_gripper_binarize": anything,  # LeRobot makes it true with libero_gripper_action
    },
}
"""Settings of each step, and which of their values we repeat; a comment says why any will do."""


def steps_in(folder: Path) -> tuple[list[Step], list[Step]]:
    """Return the steps of both pipelines; empty where there is no file."""
    pre, post = (read_steps(folder / name) if (folder / name).is_file() else [] for name in (PRE, POST))
    return pre, post


def step_of(steps: Sequence[Step], name: str) -> Step | None:
    """Return the step called `name`, None without one. Raises WeightsError for several."""
    matching = [step for step in steps if step.name == name]
    if len(matching) > 1:
        raise WeightsError(f"{matching[1].where}: {name} is there {len(matching)} times")
    return matching[0] if matching else None


def read(
    folder: Path, needs: Needs, tokenizer: Tokenizer | None = None, asset: str | Path | None = None
) -> tuple[Codec | None, str]:
    """Return the codec of config.json and the processors in `folder`, or None and why there is none.

    Raises WeightsError naming a step, setting or feature that vlafit does not repeat.
    """
    lerobot = read_config(folder)
    absent = [name for name in (PRE, POST) if not (folder / name).is_file()]
    if lerobot is None or absent:
        return None, f"there is no {', nor '.join(['config.json of LeRobot'] * (lerobot is None) + absent)}"
    pre, post = steps_in(folder)
    require_repeated(lerobot, pre, post)
    pack, encode, undo = step_of(pre, PACK), step_of(pre, ENCODE), step_of(post, UNPACK)
    grouped = step_of(post, GROUPED)
    if pack is None or encode is None or (undo is None) == (grouped is None):
        lacking = PACK if pack is None else ENCODE if encode is None else UNPACK
        if undo is not None and grouped is not None:
            raise WeightsError(f"{undo.where}: {UNPACK} and {GROUPED} are both there; one undoes the other")
        raise WeightsError(
            f"{folder / (POST if lacking == UNPACK else PRE)}: no step is {lacking}; one is needed"
        )
    _require_sizes(pack, encode, needs)
    slots, robot = robot_of(lerobot, pre)
    if undo is None:
        assert grouped is not None
        transform = groot_gripper.transform_of(lerobot)
        return _read_grouped(pack, encode, grouped, needs, slots, robot, tokenizer, transform)
    if pack.config.get("raw_stats") or pack.config.get("modality_config"):
        raise WeightsError(f"{pack.where}: raw_stats are there, and {undo.where} does not undo them")
    _require_all_valid(pack, needs)
    normalises = bool(pack.config.get("normalize_min_max", True))
    kind: Normalisation = "groot_min_max" if normalises else "identity"
    dims = undo.config.get("env_action_dim", 0)
    if dims not in (0, robot.action.shape[0]):
        raise WeightsError(
            f"{undo.where}: env_action_dim is {dims}, and {lerobot.path} has {robot.action.shape[0]} action "
            "dimensions: two files of one checkpoint contradict each other; correct the one that is wrong"
        )
    before, after = sets_of(pack), sets_of(undo)
    name, reason = stored.choose({**after, **before}, asset, str(folder / PRE))
    if normalises and not before and not after:
        return None, lerobot_processors.NO_STATISTICS
    if name is None:
        return None, reason
    kinds: dict[str, Normalisation] = {"state": kind, "action": kind}
    chosen, undone = before.get(name, {}), after.get(name, {})
    if lacking := stored.lacking(chosen, kinds, name, asset, str(folder / PRE)):
        return None, lacking
    statistics = stored.read_both(chosen, kinds, robot, pack.where)
    _require_undone(undo, undone, kind, statistics["action"].array, robot.action.shape[0])
    turned = groot_gripper.transform_of(lerobot) == groot_gripper.LIBERO
    config = replace(
        _config(pack, encode, needs, slots),
        normalisation=kind,
        action_form=groot_gripper.libero_form(robot.action.shape[0]) if turned else ColumnForm(),
    )
    if tokenizer is None:
        return None, _no_tokenizer(encode)
    return Codec(config, robot, statistics, tokenizer), ""


def _read_grouped(
    pack: Step,
    encode: Step,
    decode: Step,
    needs: Needs,
    slots: tuple[str, ...],
    robot: Embodiment,
    tokenizer: Tokenizer | None,
    transform: str | None,
) -> tuple[Codec | None, str]:
    """Return the codec of statistics of groups, or None and why there is none."""
    made = groot_grouped.read(pack, decode, robot, needs.chunk, transform)
    groot_grouped.require_flat(made, sets_of(pack).get("", {}), pack.where)
    if tokenizer is None:
        return None, _no_tokenizer(encode)
    config = made.config(_config(pack, encode, needs, slots))
    return Codec(config, robot, made.statistics(), tokenizer), ""


def _config(pack: Step, encode: Step, needs: Needs, slots: tuple[str, ...]) -> CodecConfig:
    """Return what both kinds of statistics have in common, without a normalisation of their own."""
    framing = framing_of(encode, needs.image_size)
    return CodecConfig(
        cameras=slots,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        prompt=prompt_of(pack),
        max_tokens=needs.max_tokens,
        framing=framing.name,
        crop=framing.crop,
        letter_box=framing.letter_box,
    )


def prompt_of(pack: Step | None) -> Prompt:
    """Return how instructions are put."""
    formal = pack is None or pack.config.get("formalize_language", True)
    return "groot" if formal else "text"


def _no_tokenizer(encode: Step) -> str:
    wanted = encode.config.get("model_name")
    return f"its tokenizer {wanted!r} is not in the folder; give its folder: {GIVE_TOKENIZER}"


def lacks_tokenizer(folder: Path) -> bool:
    """Whether the processors are there with statistics, and only their tokenizer is not."""
    pre, post = steps_in(folder)
    pack = step_of(pre, PACK)
    return pack is not None and bool(post) and bool(sets_of(pack)) and not (folder / "tokenizer").is_dir()


def row_of(lerobot: LeRobotConfig, pre: Sequence[Step], rows: int) -> tuple[int, str]:
    """Return the row of the embodiment tables that LeRobot uses, and a note where it is the last resort.

    Raises WeightsError where the tables, which have `rows`, do not have it.
    """
    pack = step_of(pre, PACK)
    settings: Mapping[str, Any] = lerobot.values if pack is None else pack.config
    tag = settings.get("embodiment_tag", "new_embodiment")
    mapping = EMBODIMENTS if pack is None else pack.config.get("embodiment_mapping", EMBODIMENTS)
    where = lerobot.path if pack is None else pack.where
    row = mapping.get(tag, UNKNOWN_ROW) if isinstance(mapping, Mapping) else None
    if not isinstance(row, int) or isinstance(row, bool):
        raise WeightsError(
            f"{where}: embodiment_mapping is {mapping!r}, which is not what LeRobot writes there"
        )
    if not 0 <= row < rows:
        raise WeightsError(
            f"{where}: embodiment_mapping gives {tag!r} row {row}, and the tables of these weights have rows "
            f"0 to {rows - 1}; correct it, or give another one: config embodiment_rows=[N]"
        )
    stated = lerobot.get("embodiment_tag", str)
    if tag in mapping:
        if pack is None or stated in (None, tag):
            return row, ""
        return row, (
            f"{lerobot.path}: embodiment_tag is {stated!r}, and {tag!r} in {where}: LeRobot takes row {row} "
            "of the latter, and so does vlafit (another one: config embodiment_rows)"
        )
    return row, (
        f"{where}: embodiment_tag {tag!r} is not in embodiment_mapping; LeRobot then takes row {row}, and so "
        "does vlafit (another one: config embodiment_rows)"
    )


def robot_of(lerobot: LeRobotConfig, pre: Sequence[Step]) -> tuple[tuple[str, ...], Embodiment]:
    """Return the camera slots in LeRobot's order, and what config.json tells of the robot."""
    _, robot = lerobot_processors.robot_of(lerobot, pre)
    by_key = sorted(camera.name for camera in robot.cameras)  # LeRobot sorts the keys of its batch
    pack = step_of(pre, PACK)
    keys = None if pack is None else pack.config.get("video_modality_keys")
    if not keys:
        return tuple(by_key), robot
    slots = [next((n for n in (key, WRIST.get(key)) if n in by_key), "") for key in keys]
    if not all(slots) or len(slots) != len(by_key):
        assert pack is not None
        raise WeightsError(
            f"{pack.where}: video_modality_keys are {', '.join(map(str, keys))}, and {lerobot.path} has the "
            f"cameras {', '.join(by_key)}: LeRobot would leave some out; rename them, or correct the keys"
        )
    return tuple(slots), robot


def require_repeated(lerobot: LeRobotConfig, pre: Sequence[Step], post: Sequence[Step]) -> None:
    """Raise WeightsError naming the first step or setting that vlafit does not repeat."""
    families.require_steps(lerobot, [*pre, *post])
    if lerobot.get("use_relative_actions", bool) and step_of(post, GROUPED) is None:
        raise WeightsError(
            f"{lerobot.path}: use_relative_actions is true: LeRobot normalises them by statistics of each "
            "step, which is not supported here"
        )
    for steps, known in ((pre, (RENAME, *NEUTRAL, PACK, ENCODE)), (post, (UNPACK, GROUPED, *NEUTRAL))):
        for step in steps:
            if step.name not in known:
                raise WeightsError(
                    f"{step.where}: this step is not known here, and leaving it out would be a guess"
                )
            for key, value in step.config.items():
                allowed = REPEATED[step.name].get(key)
                if allowed is None:
                    raise WeightsError(
                        f"{step.where}: {key} is {value!r}; it is not known here, so that to ignore it is a "
                        "guess"
                    )
                if not allowed(value):
                    shown = repr(value)
                    shown = f"{shown[:80]}..." if len(shown) > 80 else shown
                    raise WeightsError(f"{step.where}: {key} is {shown}, which is not supported here")


def sets_of(step: Step) -> stored.Sets:
    """Return the statistics of state and action that a step holds."""
    return stored.in_processors(open_tensors([step.state_file])) if step.state_file is not None else {}


def image_size(pre: Sequence[Step]) -> int | None:
    """Return the side of the images that the steps make; None where they do not say."""
    encode = step_of(pre, ENCODE)
    sides = None if encode is None else encode.config.get("image_target_size")
    if encode is None or sides is None:
        return None
    if not isinstance(sides, list) or len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int:
        raise WeightsError(f"{encode.where}: image_target_size is {sides}; only squares are supported here")
    return sides[0]


def _require_sizes(pack: Step, encode: Step, needs: Needs) -> None:
    wanted = {
        "action_horizon": needs.chunk,
        "max_state_dim": needs.state_dim,
        "max_action_dim": needs.action_dim,
    }
    for key, size in wanted.items():
        if pack.config.get(key, size) != size:
            raise WeightsError(
                f"{pack.where}: {key} is {pack.config[key]}, and {size} by the weights' config"
            )
    target = needs.image_size
    allowed = {"image_target_size": ([target, target],), "shortest_image_edge": (None, target)}
    for key, values in allowed.items():
        value = encode.config.get(key, values[0])
        if value not in values:
            raise WeightsError(
                f"{encode.where}: {key} is {value}; only {values[0]} is supported for {target} pixels"
            )


def _require_all_valid(pack: Step, needs: Needs) -> None:
    valid = pack.config.get("valid_action_horizon", needs.chunk)
    if valid != needs.chunk:
        raise WeightsError(
            f"{pack.where}: valid_action_horizon is {valid} of {needs.chunk} actions; only all of them are "
            "supported without statistics of groups"
        )


def framing_of(encode: Step | None, size: int) -> Frames:
    """Return how LeRobot makes images of `size` pixels: by OpenCV's areas, or bicubically."""
    if encode is None:
        return Frames("groot", 0.0, False)
    settings = encode.config
    crop, share = settings.get("image_crop_size"), settings.get("crop_fraction")
    if crop is not None and (not isinstance(crop, list) or len(set(crop)) != 1 or type(crop[0]) is not int):
        raise WeightsError(f"{encode.where}: image_crop_size is {crop!r}; only squares are supported here")
    if share is None:
        share = (crop[0] if crop else size) / max(size, 1)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise WeightsError(f"{encode.where}: crop_fraction is {share!r}; it is a share of a side, up to 1")
    usual = share == groot_crop(size) / max(size, 1)
    boxed = bool(settings.get("letter_box_transform"))
    if settings.get("use_albumentations"):
        return Frames("nvidia_area", float(share), boxed)
    return Frames("groot", 0.0 if usual else float(share), boxed)


def _require_undone(
    undo: Step,
    undone: Mapping[str, Tensor],
    kind: Normalisation,
    array: Callable[[str], Any],
    dimensions: int,
) -> None:
    same = bool(undo.config.get("normalize_min_max", True)) == (kind != "identity")
    if same and kind != "identity":
        there = stored.read(undone, ACTION, kind, dimensions, undo.where)
        same = all(np.array_equal(array(name), there.array(name)) for name in ("min", "max"))
    if not same:
        raise WeightsError(
            f"{undo.where}: it does not undo how {PRE} normalises actions; one of the two was exchanged"
        )
