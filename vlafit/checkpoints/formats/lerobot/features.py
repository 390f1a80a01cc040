"""Check the features that LeRobot's config.json lists: kinds, channels, and what its processors list."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlafit.checkpoints.declaration import Overruled
from vlafit.checkpoints.formats.lerobot.processor_steps import Step, require_kinds
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, execution_notes
from vlafit.errors import WeightsError

EMPTY_CAMERA = "observation.images.empty_camera_"


def require_inputs(lerobot: LeRobotConfig) -> None:
    """Raise WeightsError for an input that no policy here takes: of another kind, or not of 3 channels.

    LeRobot writes cameras as [3, height, width]; [height, width, 3] is read, too.
    """
    inputs, where = lerobot.values.get("input_features"), f"{lerobot.path}: input_features"
    require_kinds(inputs, where)
    for key, feature in (inputs or {}).items():
        shape = _part(feature, "shape")
        if feature.get("type") != "VISUAL" or key.startswith(EMPTY_CAMERA) or not isinstance(shape, list):
            continue
        if len(shape) == 3 and 3 not in (shape[0], shape[2]):
            raise WeightsError(
                f"{where}: {key} has shape {shape}, not 3 channels ([3, height, width]): no "
                "policy here takes depth or grey frames, and colour frames are not what it learned from"
            )


def unread(lerobot: LeRobotConfig) -> tuple[Overruled, ...]:
    """Return the states beside observation.state, and the actions beside action, that config.json lists.

    LeRobot lists every observation of a dataset that is no camera as STATE, every column whose name begins
    with "action" as ACTION; its policies read and write these two only.
    """
    found = []
    for table, kind, read in (
        ("input_features", "STATE", "observation.state"),
        ("output_features", "ACTION", "action"),
    ):
        listed = lerobot.values.get(table)
        for key, feature in (listed if isinstance(listed, Mapping) else {}).items():
            if key != read and _part(feature, "type") == kind:
                found.append(
                    Overruled(
                        f"feature {key}",
                        f"{lerobot.path.name}: {table}: {kind} {_part(feature, 'shape')}",
                        "neither read nor written",
                        f"of {kind}, LeRobot's policies only have {read}",
                    )
                )
    return tuple(found)


def notes(lerobot: LeRobotConfig | None) -> tuple[str, ...]:
    """Return the notes of a load report about what config.json says and the policy does not do."""
    if lerobot is None:
        return ()
    return (
        *execution_notes(lerobot),
        *(f"{one.name} ({one.stated}) is {one.used}: {one.reason}" for one in unread(lerobot)),
    )


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
