"""Read LeRobot's processor pipelines as a codec.

`policy_preprocessor.json` and `policy_postprocessor.json` list steps; statistics lie in safetensors files
beside them, and newer checkpoints also hold the tokenizer. A step that we do not know is an error: leaving it
out would feed the policy something it was not trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlafit.checkpoints.codecs import GIVE_TOKENIZER
from vlafit.checkpoints.declaration import InputForm, Overruled
from vlafit.checkpoints.formats.lerobot import action_tokens, families, features, xvla_steps
from vlafit.checkpoints.formats.lerobot import stored_statistics as stored
from vlafit.checkpoints.formats.lerobot.processor_steps import (
    ACTION_TOKENS,
    FAST_PROMPT,
    NEWLINES,
    POST,
    PRE,
    STATE_PROMPT,
    Step,
    read_steps,
    require_known,
    require_repeated,
)
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, read_config
from vlafit.checkpoints.formats.lerobot.relative_actions import labels, relative_of
from vlafit.checkpoints.formats.lerobot.stored_statistics import ACTION, STATE, Sets
from vlafit.checkpoints.tensor_files import beside, open_tensors
from vlafit.codec import Codec, CodecConfig, Statistics, Tokenizer
from vlafit.codec import tokenizer as tokenizers
from vlafit.codec.images import Framing
from vlafit.codec.normaliser import LEROBOT_EPSILON, NEEDED, Normalisation
from vlafit.codec.prompts import Prompt, holds_state
from vlafit.errors import WeightsError, brief
from vlafit.nn.policy import Needs
from vlafit.types import Embodiment, Feature

IMAGES = "observation.images."
EMPTY = f"{IMAGES}empty_camera_"
MODES: dict[str, Normalisation] = {
    "MEAN_STD": "lerobot_mean_std",
    "QUANTILES": "lerobot_quantile",
    "MIN_MAX": "lerobot_min_max",
    "IDENTITY": "identity",
}
NO_STATISTICS = (
    f"its processors hold no statistics of {STATE} and {ACTION}, like those of base models: fine-tuning"
    " fits them to the data"
)
FRAMINGS: dict[str, Framing] = {
    "pi0": "lerobot",
    "pi05": "lerobot",
    "pi0_fast": "lerobot",
    "smolvla": "smolvla",
    "xvla": "xvla",
}
PROMPTS: dict[str, Prompt] = {
    "pi0": "line",
    "pi05": "pi05",
    "pi0_fast": "pi0_fast_lerobot",
    "smolvla": "line",
    "xvla": "text",
}
TOKENIZERS = {
    "pi0": "google/paligemma-3b-pt-224",
    "pi05": "google/paligemma-3b-pt-224",
    "pi0_fast": "google/paligemma-3b-pt-224",
    "xvla": "facebook/bart-large",
}
"""Tokenizers that LeRobot's code loads where no file names one; SmolVLA's is that of its vlm_model_name."""


def read(
    folder: Path, needs: Needs, tokenizer: Tokenizer | None = None, asset: str | Path | None = None
) -> tuple[Codec | None, str]:
    """Return the codec that config.json and the processors in `folder` amount to, or None and why there is
    none.

    `needs` is what the policy takes; `tokenizer` is used where the checkpoint does not hold its own, and
    `asset` names the statistics to use where they are those of several datasets. Raises WeightsError naming
    the step or feature that we cannot repeat.
    """
    lerobot = read_config(folder)
    absent = [name for name in (PRE, POST) if not (folder / name).is_file()]
    if lerobot is None or absent:
        return None, f"there is no {', nor '.join(['config.json of LeRobot'] * (lerobot is None) + absent)}"
    pre, post = read_steps(folder / PRE), read_steps(folder / POST)
    families.require_steps(lerobot, [*pre, *post])
    require_known(pre, post)
    require_repeated([*pre, *post], lerobot)
    xvla_steps.require_steps(lerobot, pre)
    is_xvla = lerobot.values["type"] == "xvla"
    inner, outer = _only_step(pre, "normalizer_processor"), _only_step(post, "unnormalizer_processor")
    asking = _only_step(pre, "tokenizer_processor")
    prompt = _prompt(pre)
    if holds_state(prompt) != holds_state(needs.prompt):
        raise WeightsError(
            f"{folder / PRE}: its steps make a {prompt} prompt, the weights want {needs.prompt}"
        )
    cameras, embodiment = robot_of(lerobot, pre)
    kinds: dict[str, Normalisation] = {"state": _mode(inner, "STATE"), "action": _mode(inner, "ACTION")}
    before, after = sets_of(inner), sets_of(outer)
    name, reason = stored.choose({**after, **before}, asset, str(folder / PRE))
    if not before and not after and all(kind in NEEDED for kind in kinds.values()):
        return None, NO_STATISTICS
    if name is None:
        return None, reason
    features.require_same(lerobot, [*pre, *post])
    chosen, undone = before.get(name, {}), after.get(name, {})
    if lacking := stored.lacking(chosen, kinds, name, asset, str(folder / PRE)):
        return None, lacking
    where = f" of {name!r}" if name else ""
    statistics = stored.read_both(chosen, kinds, embodiment, inner.where + where)
    _require_same_output(outer, undone, kinds["action"], statistics["action"], embodiment.action.shape[0])
    config = CodecConfig(
        cameras=cameras,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=kinds["state"],
        action_normalisation=kinds["action"],
        relative=relative_of(lerobot, pre, post, embodiment.action.shape[0]),
        prompt=prompt,
        max_tokens=needs.max_tokens,
        mask_padding=not is_xvla,  # whose loss counts steps past an episode's end
        framing=framing_of(lerobot),
        special_tokens="tokenizer",
    )
    words = _tokenizer(folder, asking, tokenizer)
    if words is None:
        wanted = asking.config.get("tokenizer_name")
        return None, f"its tokenizer {wanted!r} is not in the folder; give its folder: {GIVE_TOKENIZER}"
    actions = None
    if needs.answers is not None:
        _only_step(pre, ACTION_TOKENS)
        action_tokens.require_special(words, needs, str(folder))
        actions, reason = action_tokens.find(folder, lerobot, pre)
        if actions is None:
            return None, reason
        config = replace(config, action_tokens=action_tokens.settings(needs, words))
    return Codec(config, embodiment, statistics, words, None, actions), ""


def lacks_tokenizer(folder: Path) -> bool:
    """Whether the processors in `folder` are there with statistics, and only their tokenizer is not."""
    if not all((folder / name).is_file() for name in (PRE, POST)):
        return False
    sets = statistics_in(folder)
    inner = _only_step(read_steps(folder / PRE), "normalizer_processor")
    kinds: dict[str, Normalisation] = {"state": _mode(inner, "STATE"), "action": _mode(inner, "ACTION")}
    if any(kind in NEEDED for kind in kinds.values()) and (
        not sets or ("" in sets and stored.lacking(sets[""], kinds, "", None, str(folder / PRE)))
    ):
        return False
    return _tokenizer(folder, _only_step(read_steps(folder / PRE), "tokenizer_processor"), None) is None


def statistics_in(folder: Path) -> Sets:
    """Return the sets of statistics of state and action in the processors of `folder`."""
    pre, post = read_steps(folder / PRE), read_steps(folder / POST)
    inner, outer = _only_step(pre, "normalizer_processor"), _only_step(post, "unnormalizer_processor")
    return {**sets_of(outer), **sets_of(inner)}


def sets_of(step: Step) -> Sets:
    """Return the sets of statistics of state and action that a step holds."""
    return stored.in_processors(open_tensors([step.state_file])) if step.state_file is not None else {}


def framing_of(lerobot: LeRobotConfig) -> Framing:
    """Return how LeRobot gives frames the policy's size; pi0 up to LeRobot 0.3 did it as SmolVLA does."""
    old_pi0 = "resize_imgs_with_padding" in lerobot.values and "image_resolution" not in lerobot.values
    if old_pi0 and lerobot.values["type"] != "xvla":
        return "smolvla"
    return FRAMINGS[lerobot.values["type"]]


def form_of(lerobot: LeRobotConfig, steps: Sequence[Step]) -> InputForm | None:
    """Return how prompts and frames are made: by the processor's `steps`, without any by LeRobot's code.

    States and actions are normalised as the steps say, without them as config.json does.
    """
    if lerobot.values["type"] not in FRAMINGS:
        return None
    asking = [step for step in steps if step.name == "tokenizer_processor"]
    prompt = _prompt(steps) if asking else PROMPTS[lerobot.values["type"]]
    kinds: dict[str, Normalisation] = {
        kind: normalisation(dict(step.config.get("norm_map", {})), kind, step.where)
        for step in steps
        if step.name == "normalizer_processor"
        for kind in ("STATE", "ACTION")
    }
    if not kinds and (stated := lerobot.get("normalization_mapping", dict)):
        where = f"{lerobot.path}: normalization_mapping"
        kinds = {kind: normalisation(stated, kind, where) for kind in ("STATE", "ACTION") if kind in stated}
    return InputForm(
        prompt,
        framing_of(lerobot),
        "tokenizer",
        normalisation=kinds.get("STATE"),
        action_normalisation=kinds.get("ACTION"),
    )


def overruled(lerobot: LeRobotConfig, pre: Sequence[Step]) -> tuple[Overruled, ...]:
    """Return the normalisations of config.json that the processors do not repeat; LeRobot follows these."""
    stated = lerobot.get("normalization_mapping", dict) or {}
    inner = _only_step(pre, "normalizer_processor")
    used = dict(inner.config.get("norm_map", {}))
    return tuple(
        Overruled(f"{kind.lower()} normalisation", f"{lerobot.path.name}: {stated[kind]}", f"{PRE}: {mode}")
        for kind in ("STATE", "ACTION")
        if kind in stated and stated[kind] != (mode := used.get(kind, "IDENTITY"))
    )


def _only_step(steps: Sequence[Step], name: str) -> Step:
    matching = [step for step in steps if step.name == name]
    if len(matching) != 1:
        where = steps[0].where.partition(": step")[0] if steps else "the pipeline"
        raise WeightsError(f"{where}: {len(matching)} steps are {name}; one is needed")
    return matching[0]


def _prompt(steps: Sequence[Step]) -> Prompt:
    names = {step.name for step in steps}
    if FAST_PROMPT in names:
        return "pi0_fast_lerobot"
    if STATE_PROMPT in names:
        return "pi05"
    return "line" if names & set(NEWLINES) else "text"


def _old_names(steps: Sequence[Step]) -> dict[str, str]:
    """Return new name -> old name of the features that the steps rename."""
    renamed: dict[str, str] = {}
    for step in steps:
        if step.name != "rename_observations_processor":
            continue
        names = step.config.get("rename_map", {})
        if not isinstance(names, Mapping) or not all(isinstance(new, str) for new in names.values()):
            raise WeightsError(f"{step.where}: rename_map is {names!r}; it must be a table of names")
        renamed |= {new: old for old, new in names.items()}
    return renamed


def robot_of(lerobot: LeRobotConfig, steps: Sequence[Step]) -> tuple[tuple[str, ...], Embodiment]:
    """Return the camera slots, and what config.json tells of the robot; no rate and no control mode."""
    renamed = _old_names(steps)
    slots: list[str] = []
    cameras: list[Feature] = []
    features.require_inputs(lerobot)
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
    return tuple(slots), Embodiment(
        name="lerobot",
        cameras=tuple(cameras),
        state=Feature("state", state[1]),
        action=Feature("action", action[1], labels=labels(lerobot, steps, action[1][0])),
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
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise WeightsError(
            f"{lerobot.path}: {key} is not what LeRobot writes there ({brief(error)})"
        ) from error


def _mode(step: Step, kind: str) -> Normalisation:
    mode = normalisation(dict(step.config.get("norm_map", {})), kind, step.where)
    if step.config.get("eps", LEROBOT_EPSILON) != LEROBOT_EPSILON:
        raise WeightsError(
            f"{step.where}: eps is {step.config['eps']}; only {LEROBOT_EPSILON} is supported here"
        )
    return mode


def normalisation(modes: Mapping[str, Any], kind: str, where: str) -> Normalisation:
    """Return how LeRobot's table of modes normalises STATE or ACTION. Raises WeightsError for another way."""
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise WeightsError(
            f"{where}: images are normalised ({modes['VISUAL']}); no policy here expects that. LeRobot's "
            "pi0, pi0.5 and SmolVLA learn from images as they are (IDENTITY): correct it in a copy if it was "
            "set by mistake"
        )
    mode = modes.get(kind, "IDENTITY")
    if not isinstance(mode, str) or mode not in MODES:
        raise WeightsError(
            f"{where}: {kind} is normalised by {mode}; supported are {', '.join(MODES)}. To train on, "
            "write MEAN_STD in a copy of the processors and config.json, and fit new statistics: "
            'data.statistics = "data"'
        )
    return MODES[mode]


def _require_same_output(
    outer: Step, undone: Mapping[str, Tensor], kind: Normalisation, pre: Statistics, dimensions: int
) -> None:
    post = _mode(outer, "ACTION")
    if post == kind:
        there = stored.read(undone, ACTION, post, dimensions, outer.where)
        if all(np.array_equal(pre.array(n), there.array(n)) for n in NEEDED.get(kind, ())):
            return
    raise WeightsError(
        f"{outer.where}: it does not undo how {PRE} normalises actions; one of the two was exchanged"
    )


def own_tokenizer(folder: Path, asking: Step) -> Path | None:
    """Return the folder of the checkpoint's own tokenizer, which may be lost; None where it names another.

    Where the step only names one, it is the folder with the last part of that name, if there is one.
    """
    if inside := asking.artifacts.get("tokenizer_name", ""):
        return beside(folder / PRE, inside)
    last = Path(str(asking.config.get("tokenizer_name") or "")).name
    if last in ("", "..") or not (folder / last / "tokenizer.json").is_file():
        return None
    return beside(folder / PRE, last)


def _tokenizer(folder: Path, asking: Step, given: Tokenizer | None) -> Tokenizer | None:
    own = own_tokenizer(folder, asking)
    if own is not None and own.is_dir():
        if given is not None:
            raise WeightsError(f"{folder}: has a tokenizer of its own ({own.name}/); it takes no tokenizer")
        return tokenizers.load(own)
    return given
