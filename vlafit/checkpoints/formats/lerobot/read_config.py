"""Read LeRobot's config.json, and what it says of pi0 and pi0.5."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.openpi.variants import stated_by_variants
from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.checkpoints.voting import Stated
from vlafit.errors import WeightsError
from vlafit.nn.flow import BETA_A, MAX_PERIOD, MIN_PERIOD, TIME_OFFSET, TIME_SCALE
from vlafit.nn.policy import MOST_SAMPLING_STEPS, is_sampling_steps

TYPES = ("pi0_fast", "pi05", "pi0", "smolvla", "xvla", "groot")  # no name begins with an earlier one
CONVERT = (
    "; to train on: convert the dataset's states and actions as that program does, set it to false in a copy "
    'of the checkpoint\'s folder, and fit statistics: data.statistics = "data"'
)
ALWAYS: dict[str, object] = {  # of the time embedding, and of the times drawn in training
    "min_period": MIN_PERIOD,
    "max_period": MAX_PERIOD,
    "time_sampling_beta_alpha": BETA_A,
    "time_sampling_beta_beta": 1.0,
    "time_sampling_scale": TIME_SCALE,
    "time_sampling_offset": TIME_OFFSET,
}
STEPS = {
    "smolvla": ("num_steps",),
    "xvla": ("num_denoising_steps",),
    "groot": ("num_inference_timesteps",),
    "pi0": ("num_inference_steps", "num_steps"),
}
"""Keys of the steps in which actions are sampled, pi0's second up to LeRobot 0.3; pi0.5's are pi0's."""

FEATURES = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")
NORMALISATIONS = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
"""What LeRobot's normalization_mapping can hold, whether vlafit computes it or not."""


@dataclass(frozen=True)
class LeRobotConfig:
    """config.json of a LeRobot checkpoint."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value of `key`, or None where there is none. Raises WeightsError for another type."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise WeightsError(f"{self.path}: {key} is {value!r}, which is not what LeRobot writes there")
        return value

    def state(self, keys: Mapping[str, str]) -> list[Stated]:
        """Return the sizes that the file states; `keys` maps its keys to the fields of vlafit."""
        values = {key: self.get(key, int) for key in keys}
        return [
            Stated(keys[key], value, f"{self.path.name} ({key})")
            for key, value in values.items()
            if value is not None
        ]


def read_config(folder: Path) -> LeRobotConfig | None:
    """Return config.json in `folder` if LeRobot wrote it, whatever the policy.

    Raises WeightsError where it cannot be read: what it says would be missed without a word.
    """
    path = folder / "config.json"
    values = read_json_if_present(path)
    if values is not None and "type" in values and {"input_features", "chunk_size"} & set(values):
        config = LeRobotConfig(path, values)
        _require_known_modes(config)
        return config
    return None


def _require_known_modes(config: LeRobotConfig) -> None:
    """Raise WeightsError for an entry of normalization_mapping that LeRobot does not know.

    Where there are processors, they hold; but what nobody knows may be a slip that changes every number.
    """
    for kind, mode in (config.get("normalization_mapping", dict) or {}).items():
        for text, known in ((kind, FEATURES), (mode, NORMALISATIONS)):
            if text not in known:
                raise WeightsError(
                    f"{config.path}: normalization_mapping: {kind} is {mode!r}: {text!r} is not one of "
                    f"LeRobot's {', '.join(known)}"
                )


def require_supported(config: LeRobotConfig) -> None:
    """Raise WeightsError for a type of policy, a time embedding or a draw of times that is not vlafit's."""
    for key, value in ALWAYS.items():
        if config.values.get(key, value) != value:
            raise WeightsError(
                f"{config.path}: {key} is {config.values[key]!r}; only {value!r} is supported here"
            )
    if config.values["type"] not in TYPES:
        raise WeightsError(
            f"{config.path}: type {config.values['type']!r} is not one that is supported here "
            f"({', '.join(TYPES)})"
        )


def sampling_steps(config: LeRobotConfig | None) -> int | None:
    """Return the steps in which LeRobot samples actions; None where config.json does not say.

    Raises WeightsError for a number of steps in which nothing can be sampled.
    """
    if config is None:
        return None
    for key in STEPS.get(config.values["type"], STEPS["pi0"]):
        steps = config.get(key, int)
        if steps is None:
            continue
        if not is_sampling_steps(steps):
            raise WeightsError(
                f"{config.path}: {key} is {steps}; a policy samples in 1 to {MOST_SAMPLING_STEPS} steps"
            )
        return steps
    return None


def executed_steps(config: LeRobotConfig) -> int:
    """Return how many steps of a chunk LeRobot executes before it asks again; 0: not said."""
    return max(config.get("n_action_steps", int) or 0, 0)


def execution_notes(config: LeRobotConfig | None) -> tuple[str, ...]:
    """Return a note where LeRobot executes fewer steps of a chunk than it has, which nothing here repeats, or
    does not read what is said of observations.
    """
    if config is None:
        return ()
    lines = _unread(config)
    steps, chunk = config.get("n_action_steps", int), config.get("chunk_size", int)
    if not steps or not chunk or steps >= chunk:
        return lines
    return (
        *lines,
        f"LeRobot executes {steps} of the {chunk} steps of a chunk before it asks again (n_action_steps in "
        f"{config.path.name}); here the protocol says how many, or --replan {steps}; an export has {chunk}",
    )


def _unread(config: LeRobotConfig) -> tuple[str, ...]:
    count = config.get("n_obs_steps", int)
    if count in (None, 1):
        return ()
    return (
        f"{config.path}: n_obs_steps is {count}; LeRobot's {config.values['type']} does not read it and sees "
        "the present observation only, and so does vlafit",
    )


def pi0_evidence(config: LeRobotConfig | None, kind: str) -> tuple[dict[str, object], list[Stated]]:
    """Return the config values that no shape has, and the stated sizes of those that do."""
    if config is None:
        return {}, []
    values: dict[str, object] = {
        "chunk": config.get("chunk_size", int),
        "max_tokens": config.get("tokenizer_max_length", int),
        "state_dim": config.get("max_state_dim", int) if kind == "pi05" else None,
    }
    stated = config.state({"max_action_dim": "action_dim"})
    stated += config.state({"max_state_dim": "state_dim"}) if kind == "pi0" else []
    stated += stated_images(config)
    stated += config.state({"proj_width": "expert.width"})  # up to LeRobot 0.3
    stated += stated_by_variants(config.values, config.path.name)
    return {key: value for key, value in values.items() if value is not None}, stated


def stated_images(config: LeRobotConfig) -> list[Stated]:
    """Return the side of an image that the file states. Raises WeightsError where it is no square."""
    stated = []
    for key in ("image_resolution", "resize_imgs_with_padding"):  # the second up to LeRobot 0.3
        sides = config.get(key, list)
        if sides is None:
            continue
        if len(sides) != 2 or sides[0] != sides[1]:
            raise WeightsError(f"{config.path}: {key} is {sides}; only squares are supported here")
        stated.append(Stated("vision.image_size", sides[0], f"{config.path.name} ({key})"))
    return stated
