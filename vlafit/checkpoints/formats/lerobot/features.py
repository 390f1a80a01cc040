"""Compare the features that LeRobot's config.json lists with those that its processors list."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlafit.checkpoints.formats.lerobot.processor_steps import Step
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.errors import WeightsError

EMPTY_CAMERA = "observation.images.empty_camera_"
CONTRADICT = "two files of one checkpoint contradict each other; correct the one that is wrong"


def require_same(lerobot: LeRobotConfig, steps: Sequence[Step]) -> None:
    """Raise WeightsError for a feature that config.json and a normaliser describe differently.

    LeRobot writes both from one table. It fills the policy's cameras by config.json and normalises the state
    only where the step lists it, so that neither file can be followed without guessing. Cameras that are
    always empty may be missing from either.
    """
    inputs, outputs = (lerobot.values.get(key) for key in ("input_features", "output_features"))
    if not isinstance(inputs, Mapping) or not isinstance(outputs, Mapping):
        return
    for step in steps:
        listed = step.config.get("features")
        if not isinstance(listed, Mapping) or not listed:
            continue
        stated = {**outputs} if step.name == "unnormalizer_processor" else {**inputs, **outputs}
        _compare(stated, listed, str(lerobot.path), f"{step.where}: features")


def _compare(stated: Mapping[str, Any], listed: Mapping[str, Any], here: str, there: str) -> None:
    for key in stated:
        if key not in listed and not key.startswith(EMPTY_CAMERA):
            have = ", ".join(name for name in listed if name not in stated) or "nothing in its place"
            raise WeightsError(f"{here}: has the feature {key}; {there} lacks it ({have}): {CONTRADICT}")
        for part in ("type", "shape"):
            mine, other = (_part(table.get(key), part) for table in (stated, listed))
            if key in listed and mine is not None and other is not None and mine != other:
                raise WeightsError(f"{here}: {key} has {part} {mine}; {there}: {other}: {CONTRADICT}")
    for key in listed:
        if key not in stated and not key.startswith(EMPTY_CAMERA):
            raise WeightsError(f"{there} has {key}; {here} has no such feature: {CONTRADICT}")


def _part(feature: Any, part: str) -> Any:
    value = feature.get(part) if isinstance(feature, Mapping) else None
    return list(value) if isinstance(value, list | tuple) else value
