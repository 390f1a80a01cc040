"""Read LeRobot's processor pipelines as a codec.

`policy_preprocessor.json` and `policy_postprocessor.json` list steps; statistics lie in safetensors files
beside them, and newer checkpoints also hold the tokenizer. A step that we do not know is an error: leaving it
out would feed the policy something it was not trained on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.checkpoints.formats.lerobot.processor_steps import (
    Step,
    read_steps,
    require_kinds,
    require_repeated,
)
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, read_config
from vlafit.checkpoints.tensor_files import beside, open_tensors
from vlafit.codec import Codec, CodecConfig, Statistics, Tokenizer
from vlafit.codec import tokenizer as tokenizers
from vlafit.codec.images import Framing
from vlafit.codec.prompts import Prompt
from vlafit.codec.statistics import ARRAYS, LEROBOT_EPSILON, NEEDED, Normalisation
from vlafit.errors import WeightsError
from vlafit.nn.policy import Needs
from vlafit.types import Embodiment, Feature

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
EMPTY = f"{IMAGES}empty_camera_"
MODES: dict[str, Normalisation] = {
    "MEAN_STD": "lerobot_mean_std",
    "QUANTILES": "lerobot_quantile",
    "MIN_MAX": "lerobot_min_max",
    "IDENTITY": "identity",
}
NEWLINES = ("pi0_new_line_processor", "smolvla_new_line_processor")
STATE_PROMPT = "pi05_prepare_state_tokenizer_processor_step"
NEUTRAL = ("to_batch_processor", "device_processor")  # they change no value
# lerobot/smolvla_base holds those of its datasets (so100.buffer.action.mean), which LeRobot does not apply.
NO_STATISTICS = (
    f"its processors hold no statistics of {STATE} and {ACTION}, like those of base models: fine-tuning"
    " fits them to the data"
)
FRAMINGS: dict[str, Framing] = {"pi0": "lerobot", "pi05": "lerobot", "smolvla": "smolvla"}


def read(folder: Path, needs: Needs, tokenizer: Tokenizer | None = None) -> tuple[Codec | None, str]:
    """Return the codec that config.json and the processors in `folder` amount to, or None and why there is
    none.

    `needs` is what the policy takes; `tokenizer` is used where the checkpoint does not hold its own. Raises
    WeightsError naming the step or feature that we cannot repeat.
    """
    lerobot = read_config(folder)
    lacking = [name for name in (PRE, POST) if not (folder / name).is_file()]
    if lerobot is None or lacking:
        return None, f"there is no {', nor '.join(['config.json of LeRobot'] * (lerobot is None) + lacking)}"
    pre, post = read_steps(folder / PRE), read_steps(folder / POST)
    _require_known(pre, {"rename_observations_processor", "tokenizer_processor", "normalizer_processor",
                         "relative_actions_processor", STATE_PROMPT, *NEWLINES, *NEUTRAL})  # fmt: skip
    _require_known(post, {"unnormalizer_processor", "absolute_actions_processor", *NEUTRAL})
    require_repeated([*pre, *post], lerobot)
    inner, outer = _only_step(pre, "normalizer_processor"), _only_step(post, "unnormalizer_processor")
    asking = _only_step(pre, "tokenizer_processor")
    prompt = _prompt(pre, asking)
    if (prompt == "pi05") != (needs.prompt == "pi05"):
        raise WeightsError(
            f"{folder / PRE}: its steps make a {prompt} prompt, the weights want {needs.prompt}"
        )
    cameras, embodiment = robot_of(lerobot, pre)
    kinds: dict[str, Normalisation] = {"state": _mode(inner, "STATE"), "action": _mode(inner, "ACTION")}
    if not _has_statistics(inner, outer) and all(kind in NEEDED for kind in kinds.values()):
        return None, NO_STATISTICS
    statistics = {
        "state": _statistics(inner, STATE, kinds["state"], embodiment.state.shape[0]),
        "action": _statistics(inner, ACTION, kinds["action"], embodiment.action.shape[0]),
    }
    _require_same_output(outer, kinds["action"], statistics["action"], embodiment.action.shape[0])
    config = CodecConfig(
        cameras=cameras,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=kinds["state"],
        action_normalisation=kinds["action"],
        relative=relative_of(pre, post, embodiment),
        prompt=prompt,
        max_tokens=needs.max_tokens,
        framing=FRAMINGS[lerobot.values["type"]],
        special_tokens="tokenizer",
    )
    words = _tokenizer(folder, asking, tokenizer)
    if words is None:
        name = asking.config.get("tokenizer_name")
        return None, f"its tokenizer {name!r} is not in the folder; give its folder as `tokenizer`"
    return Codec(config, embodiment, statistics, words), ""


def lacks_tokenizer(folder: Path) -> bool:
    """Whether the processors in `folder` are there with statistics, and their tokenizer is not."""
    if not all((folder / name).is_file() for name in (PRE, POST)):
        return False
    pre, post = read_steps(folder / PRE), read_steps(folder / POST)
    normalizer = _only_step(pre, "normalizer_processor")
    if not _has_statistics(normalizer, _only_step(post, "unnormalizer_processor")):
        return False
    return _tokenizer(folder, _only_step(pre, "tokenizer_processor"), None) is None


def _has_statistics(*steps: Step) -> bool:
    """Whether any step holds a statistic of the state or the action, as `_statistics` looks for them."""
    names = [name for step in steps if step.state_file for name in open_tensors([step.state_file])]
    return any(name.rpartition(".")[0] in (STATE, ACTION) for name in names)


def mask_of(names: Sequence[str] | None, exclude: Sequence[str], dimensions: int) -> tuple[bool, ...]:
    """Return which action dimensions LeRobot makes relative: those whose name contains none of `exclude`."""
    tokens = [token.lower() for token in exclude if token]
    if not tokens or names is None:
        return (True,) * dimensions
    mask = [not any(token in name.lower() for token in tokens) for name in names[:dimensions]]
    return tuple(mask + [True] * (dimensions - len(mask)))


def _require_known(steps: Sequence[Step], known: set[str]) -> None:
    for step in steps:
        if step.name not in known:
            raise WeightsError(
                f"{step.where}: this step is not known here, and leaving it out would be a guess"
            )


def _only_step(steps: Sequence[Step], name: str) -> Step:
    matching = [step for step in steps if step.name == name]
    if len(matching) != 1:
        where = steps[0].where.partition(": step")[0] if steps else "the pipeline"
        raise WeightsError(f"{where}: {len(matching)} steps are {name}; one is needed")
    return matching[0]


def _prompt(steps: Sequence[Step], asking: Step) -> Prompt:
    names = [step.name for step in steps]
    if STATE_PROMPT in names:
        if names.index(STATE_PROMPT) < names.index("normalizer_processor"):
            raise WeightsError(f"{asking.where}: the state enters the prompt before it is normalised")
        return "pi05"
    return "line" if set(names) & set(NEWLINES) else "text"


def robot_of(lerobot: LeRobotConfig, steps: Sequence[Step]) -> tuple[tuple[str, ...], Embodiment]:
    """Return the camera slots, and what config.json tells of the robot; no rate and no control mode."""
    renamed = {
        new: old
        for step in steps
        if step.name == "rename_observations_processor"
        for old, new in dict(step.config.get("rename_map", {})).items()
    }
    slots: list[str] = []
    cameras: list[Feature] = []
    require_kinds(lerobot.values.get("input_features"), f"{lerobot.path}: input_features")
    for key, (kind, shape) in _features(lerobot, "input_features").items():
        if kind != "VISUAL":
            continue
        if key.startswith(EMPTY):
            slots.append("")
            continue
        if len(shape) != 3:
            raise WeightsError(
                f"{lerobot.path}: input_features: {key} has shape {shape}, not (3, height, width)"
            )
        name = renamed.get(key, key).removeprefix(IMAGES)
        slots.append(name)
        height, width = (shape[0], shape[1]) if shape[2] == 3 and shape[0] != 3 else (shape[1], shape[2])
        cameras.append(Feature(name, (height, width, 3)))
    state = _features(lerobot, "input_features").get(STATE)
    action = _features(lerobot, "output_features").get(ACTION)
    for key, feature in ((STATE, state), (ACTION, action)):
        if feature is None or len(feature[1]) != 1:
            raise WeightsError(
                f"{lerobot.path}: there is no feature {key!r} of one dimension; it says the robot's width"
            )
    assert state is not None and action is not None
    labels = tuple(lerobot.get("action_feature_names", list) or ())
    labels = labels if len(labels) == action[1][0] else ()
    return tuple(slots), Embodiment(
        name="lerobot",
        cameras=tuple(cameras),
        state=Feature("state", state[1]),
        action=Feature("action", action[1], labels=labels),
        hz=0.0,
        control="",
    )


def _features(lerobot: LeRobotConfig, key: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        listed = lerobot.values[key] or {}
        return {
            name: (str(one["type"]), tuple(int(side) for side in one["shape"]))
            for name, one in listed.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{lerobot.path}: {key} is not what LeRobot writes there ({error!r})") from error


def _mode(step: Step, kind: str) -> Normalisation:
    modes = dict(step.config.get("norm_map", {}))
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise WeightsError(
            f"{step.where}: images are normalised ({modes['VISUAL']}); no policy here expects that"
        )
    if step.config.get("eps", LEROBOT_EPSILON) != LEROBOT_EPSILON:
        raise WeightsError(
            f"{step.where}: eps is {step.config['eps']}; only {LEROBOT_EPSILON} is supported here"
        )
    mode = modes.get(kind, "IDENTITY")
    if mode not in MODES:
        raise WeightsError(f"{step.where}: {kind} is normalised by {mode}; supported are {', '.join(MODES)}")
    return MODES[mode]


def _statistics(step: Step, feature: str, kind: Normalisation, dimensions: int) -> Statistics:
    """Read what there is of a feature. Raises WeightsError where what `kind` reads is missing or unusable."""
    arrays: dict[str, NDArray[np.float64]] = {}
    count = 0
    if step.state_file is not None:
        for name, tensor in open_tensors([step.state_file]).items():
            owner, _, statistic = name.rpartition(".")
            if owner == feature and statistic == "count":
                count = int(tensor.reshape(-1)[0])
            elif owner == feature and statistic in ARRAYS:
                arrays[statistic] = tensor.double().numpy()
    missing = (
        [name for name in {"mean", "std", *NEEDED[kind]} if name not in arrays] if kind in NEEDED else []
    )
    if missing:
        # LeRobot would then pass the feature on as it is, without a word.
        raise WeightsError(
            f"{step.where}: {feature} is to be normalised by {kind}, and {', '.join(missing)} is not in its "
            "statistics; take them from the dataset it was trained on"
        )
    for name, array in arrays.items():
        if array.shape != (dimensions,) or not np.isfinite(array).all():
            raise WeightsError(
                f"{step.where}: {feature}.{name} has shape {array.shape}"
                f"{'' if np.isfinite(array).all() else ' and is not finite'}; the feature has "
                f"{dimensions} dimensions"
            )
    _require_usable(arrays, kind, f"{step.where}: {feature}")
    if kind == "identity":  # which reads none, whatever there is
        arrays.setdefault("mean", np.zeros(dimensions))
        arrays.setdefault("std", np.ones(dimensions))
    return Statistics(count, **arrays)


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


def _require_same_output(outer: Step, kind: Normalisation, pre: Statistics, dimensions: int) -> None:
    post = _mode(outer, "ACTION")
    if post == kind:
        there = _statistics(outer, ACTION, post, dimensions)
        if all(np.array_equal(pre.array(n), there.array(n)) for n in NEEDED.get(kind, ())):
            return
    raise WeightsError(
        f"{outer.where}: it does not undo how {PRE} normalises actions; one of the two was exchanged"
    )


def relative_of(pre: Sequence[Step], post: Sequence[Step], robot: Embodiment) -> tuple[bool, ...]:
    """Return which action dimensions the pipelines make relative; empty where they make none."""
    on = [step for step in pre if step.name == "relative_actions_processor" and step.config.get("enabled")]
    off = [step for step in post if step.name == "absolute_actions_processor" and step.config.get("enabled")]
    if len(on) != len(off) or len(on) > 1:
        where = [*on, *off][0].where
        raise WeightsError(f"{where}: relative actions are made and not undone, or undone and not made")
    if not on:
        return ()
    config = on[0].config
    return mask_of(config.get("action_names"), config.get("exclude_joints") or (), robot.action.shape[0])


def _tokenizer(folder: Path, asking: Step, given: Tokenizer | None) -> Tokenizer | None:
    inside = asking.artifacts.get("tokenizer_name", "")
    if inside and beside(folder / PRE, inside).is_dir():
        if given is not None:
            raise WeightsError(f"{folder}: has a tokenizer of its own ({inside}/); it takes no tokenizer")
        return tokenizers.load(folder / inside)
    return given
