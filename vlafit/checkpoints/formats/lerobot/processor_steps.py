"""Read the steps of LeRobot's processor pipelines; a setting that vlafit does not repeat is an error."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.lerobot.read_config import CONVERT, LeRobotConfig
from vlafit.checkpoints.tensor_files import beside, read_json_object
from vlafit.errors import WeightsError, brief

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
PARTS = {"registry_name", "config", "state_file", "artifacts"}  # of a step, in the file
RENAME, NORMALISE, UNNORMALISE = (
    "rename_observations_processor",
    "normalizer_processor",
    "unnormalizer_processor",
)
RELATIVE_STEP, ABSOLUTE_STEP = "relative_actions_processor", "absolute_actions_processor"
RENAMED = {"delta_actions_processor": RELATIVE_STEP}  # LeRobot 0.5.1's name of the same step, line by line
TOKENIZE, STATE_PROMPT = "tokenizer_processor", "pi05_prepare_state_tokenizer_processor_step"
FAST_PROMPT, ACTION_TOKENS = "pi0_fast_prepare_state_tokenizer_processor_step", "action_tokenizer_processor"
NEWLINES = ("pi0_new_line_processor", "smolvla_new_line_processor")
NEUTRAL = ("to_batch_processor", "device_processor")  # they change no value
TO_FLOAT, IMAGENET, DOMAIN = "xvla_image_to_float", "xvla_imagenet_normalize", "xvla_add_domain_id"
XVLA = (TO_FLOAT, IMAGENET, DOMAIN)
PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"
UNPACK, GROUPED = "groot_action_unpack_unnormalize_v2", "groot_n1_7_action_decode_v1"
STATE_PROMPTS = (STATE_PROMPT, FAST_PROMPT)
BEFORE_POLICY = {
    *(RENAME, TOKENIZE, NORMALISE, RELATIVE_STEP, ACTION_TOKENS),
    *(*STATE_PROMPTS, *NEWLINES, *NEUTRAL, *XVLA),
}
AFTER_POLICY = {UNNORMALISE, ABSOLUTE_STEP, *NEUTRAL}
ORDER = (  # (first, second, what LeRobot computes when they run the other way round)
    *((newline, TOKENIZE, "the prompt's tokens then lack the line's end") for newline in NEWLINES),
    *((prompt, TOKENIZE, "the prompt's tokens then lack the state") for prompt in STATE_PROMPTS),
    *(
        (NORMALISE, prompt, "the state then enters the prompt before it is normalised")
        for prompt in STATE_PROMPTS
    ),
    (NORMALISE, ACTION_TOKENS, "the tokens are then those of actions that are not normalised"),
    (RELATIVE_STEP, NORMALISE, "a normalised state is then subtracted from a normalised action"),
    *(
        (RENAME, second, "it then finds features by their names before they are renamed")
        for second in (RELATIVE_STEP, NORMALISE, *STATE_PROMPTS)
    ),
    (TO_FLOAT, IMAGENET, "images from 0 to 255 are then normalised as if they reached from 0 to 1"),
    (UNNORMALISE, ABSOLUTE_STEP, "the state is then added to an action that is still normalised"),
)
"""Steps whose order decides what the policy sees; the codec computes them in this one."""
NEVER = {  # keys of config.json: what they do inside the policy, when true
    "adapt_to_pi_aloha": "it converts Aloha's joints inside the policy",
    "use_delta_joint_actions_aloha": "it makes Aloha's joints relative inside the policy",
}


@dataclass(frozen=True)
class Step:
    """One step of a pipeline, and the file that it is in."""

    where: str
    name: str
    config: Mapping[str, Any]
    state_file: Path | None
    artifacts: Mapping[str, str]


def anything(value: Any) -> bool:
    """Return True: any value of the setting will do."""
    return True


def only(*values: Any) -> Callable[[Any], bool]:
    """Return a check that a setting has one of `values`, of the same type."""
    return lambda value: any(value is v or (type(value) is type(v) and value == v) for v in values)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


_NORMAL: dict[str, Callable[[Any], bool]] = {
    "eps": anything,  # compared where the mode is read
    "features": _is_table,  # their kinds are looked at below
    "norm_map": _is_table,
    "normalize_observation_keys": lambda value: value is None or "observation.state" in value,
}
_STATE: dict[str, Callable[[Any], bool]] = {
    "max_state_dim": anything,  # the state is padded after it was written into the prompt
    "task_key": anything,  # where LeRobot finds the instruction; an observation has it
}
REPEATED: dict[str, dict[str, Callable[[Any], bool]]] = {
    RENAME: {"rename_map": _is_table},
    "to_batch_processor": {},
    "device_processor": {
        "device": anything,  # where it runs, not what it computes
        "float_dtype": only(None, "float32"),
    },
    "pi0_new_line_processor": {},
    "smolvla_new_line_processor": {},
    STATE_PROMPT: _STATE,
    FAST_PROMPT: _STATE,
    ACTION_TOKENS: {
        "action_tokenizer_name": anything,  # looked for in the folder; compared with config.json
        "max_action_tokens": anything,  # compared with config.json
        "trust_remote_code": anything,  # none is run here
        "fast_skip_tokens": only(128),
        "paligemma_tokenizer_name": anything,  # the prompt's
    },
    TOKENIZE: {
        "max_length": anything,  # compared with config.json below
        "task_key": anything,  # as above
        "padding_side": only("right"),
        "padding": only("max_length", "longest"),  # padding is masked, however long
        "truncation": only(True),
        "tokenizer_name": anything,  # looked for in the folder
    },
    NORMALISE: _NORMAL,
    UNNORMALISE: _NORMAL,
    RELATIVE_STEP: {
        "enabled": only(True, False),
        "exclude_joints": anything,  # read
        "action_names": anything,  # read
    },
    ABSOLUTE_STEP: {"enabled": only(True, False)},
    TO_FLOAT: {
        "image_keys": only(None),
        "validate_range": only(True, False),
    },  # frames are always uint8 here
    IMAGENET: {"image_keys": only(None)},
    DOMAIN: {"domain_id": anything},  # read
}
"""Settings of each step, and which of their values we repeat; a comment says why any will do."""


def _present_name(name: str) -> str:
    return RENAMED.get(name, name)


def read_steps(path: Path) -> list[Step]:
    """Read a pipeline. Raises WeightsError where it is none, or has parts that LeRobot does not write."""
    try:
        content = read_json_object(path)
        listed = content["steps"]
        unknown = sorted({*content} - {"name", "steps"})
        unknown += sorted(
            {key for one in listed for key in one} - {"registry_name", "config", "state_file", "artifacts"}
        )
        if unknown:
            raise WeightsError(
                f"{path}: {unknown[0]!r} is not known here, and leaving it out would be a guess"
            )
        return [
            Step(
                where=f"{path}: step {i} ({one['registry_name']})",
                name=_present_name(one["registry_name"]),
                config=dict(one["config"]),
                state_file=beside(path, one["state_file"]) if "state_file" in one else None,
                artifacts=dict(one.get("artifacts", {})),
            )
            for i, one in enumerate(listed)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a pipeline as LeRobot writes it ({brief(error)})") from error


def require_known(pre: Sequence[Step], post: Sequence[Step]) -> None:
    """Raise WeightsError for a step that the codec does not have, or steps in another order than its own."""
    for steps, known in ((pre, BEFORE_POLICY), (post, AFTER_POLICY)):
        for step in steps:
            if step.name not in known:
                raise WeightsError(
                    f"{step.where}: this step is not known here, and leaving it out would be a guess"
                )
        _require_order([step for step in steps if _acts(step)])


def _require_order(steps: Sequence[Step]) -> None:
    for first, second, effect in ORDER:
        early = next((i for i, step in enumerate(steps) if step.name == second), len(steps))
        for step in steps[early:]:
            if step.name == first:
                before = steps[early].where.rpartition(": ")[2]
                raise WeightsError(
                    f"{step.where} runs after {before}: {effect}. Only the other order is supported here: "
                    f"{first}, then {second}; if the weights were trained in that order, correct the file"
                )
    prompts = [step for step in steps if step.name in (*STATE_PROMPTS, *NEWLINES)]
    if len({step.name for step in prompts}) > 1:
        listed = " and ".join(step.where.rpartition(": ")[2] for step in prompts)
        raise WeightsError(
            f"{prompts[0].where.rpartition(': ')[0]}: {listed} both write the prompt; only one of them is "
            "supported here"
        )


def _acts(step: Step) -> bool:
    """Whether the step changes anything."""
    if step.name == RENAME:
        return bool(step.config.get("rename_map"))
    return step.name not in (RELATIVE_STEP, ABSOLUTE_STEP) or bool(step.config.get("enabled"))


def require_repeated(steps: Sequence[Step], lerobot: LeRobotConfig) -> None:
    """Raise WeightsError naming the first setting of a step, or of config.json, that we do not repeat."""
    for key, why in NEVER.items():
        if lerobot.get(key, bool):
            raise WeightsError(f"{lerobot.path}: {key} is true: {why}, which is not supported here{CONVERT}")
    for step in steps:
        known = REPEATED.get(step.name, {})
        for key, value in step.config.items():
            if key not in known:
                raise WeightsError(
                    f"{step.where}: {key} is {value!r}; it is not known here, so that to ignore it is a guess"
                )
            if not known[key](value):
                raise WeightsError(f"{step.where}: {key} is {value!r}, which is not supported here")
        length, stated = step.config.get("max_length"), lerobot.values.get("tokenizer_max_length")
        if length is not None and stated is not None and length != stated:
            raise WeightsError(
                f"{step.where}: max_length is {length}, and tokenizer_max_length is {stated} in "
                f"{lerobot.path}"
            )
        features = step.config.get("features")
        if features is not None:
            require_kinds(features, f"{step.where}: features")


def require_kinds(features: Any, where: str) -> None:
    """Raise WeightsError for a feature of a kind that no policy here takes, such as environment_state."""
    if features is not None and not isinstance(features, Mapping):
        raise WeightsError(f"{where} is {features!r}, and must be a table of features")
    for name, feature in (features or {}).items():
        kind = feature.get("type") if isinstance(feature, Mapping) else None
        if kind not in ("VISUAL", "STATE", "ACTION"):
            raise WeightsError(f"{where}: {name} is of type {kind!r}, which no policy here takes")
