"""Compare the features that LeRobot's config.json lists with those that its processors list."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlafit.checkpoints.formats.lerobot.processor_steps import Step
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.errors import WeightsError

EMPTY_CAMERA = "observation.images.empty_camera_"


def require_same(lerobot: LeRobotConfig, steps: Sequence[Step]) -> None:
    """Raise WeightsError for a feature that config.json and a normaliser describe differently."""
    for here, there in differences(lerobot, steps):
        raise WeightsError(
            f"{here}; {there}: two files of one checkpoint contradict each other; correct the one that is "
            "wrong"
        )


def differences(lerobot: LeRobotConfig, steps: Sequence[Step]) -> Iterator[tuple[str, str]]:
    """Yield what config.json and a step say of a feature that they describe differently.

    LeRobot writes both from one table. It fills the policy's cameras by config.json and normalises the state
    only where the step lists it, so that neither file can be followed without guessing. Cameras that are
    always empty may be missing from either, and of any size, because LeRobot gives config.json its own when
    it saves a checkpoint that it has loaded. A step may list nothing.
    """
    inputs, outputs = (lerobot.values.get(key) for key in ("input_features", "output_features"))
    if not isinstance(inputs, Mapping) or not isinstance(outputs, Mapping):
        return
    for step in steps:
        listed = step.config.get("features")
        if isinstance(listed, Mapping) and listed:
            stated = {**outputs} if step.name == "unnormalizer_processor" else {**inputs, **outputs}
            yield from _compare(stated, listed, str(lerobot.path), f"{step.where}: features")


def _compare(
    stated: Mapping[str, Any], listed: Mapping[str, Any], here: str, there: str
) -> Iterator[tuple[str, str]]:
    for key in stated:
        if key not in listed and not key.startswith(EMPTY_CAMERA):
            have = ", ".join(name for name in listed if name not in stated) or "nothing in its place"
            yield f"{here} has the feature {key}", f"{there} lacks it ({have})"
        for part in ("type", "shape"):
            if part == "shape" and key.startswith(EMPTY_CAMERA):
                continue
            mine, other = (_part(table.get(key), part) for table in (stated, listed))
            if key in listed and mine is not None and other is not None and mine != other:
                yield f"{here}: {key} has {part} {mine}", f"{there}: {other}"
    for key in listed:
        if key not in stated and not key.startswith(EMPTY_CAMERA):
            yield f"{here} has no feature {key}", f"{there} has it"


def _part(feature: Any, part: str) -> Any:
    value = feature.get(part) if isinstance(feature, Mapping) else None
    return list(value) if isinstance(value, list | tuple) else value
