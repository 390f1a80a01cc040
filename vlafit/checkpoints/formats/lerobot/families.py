"""Compare the policy that config.json names with that of the tensors, and with that of the processors."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.checkpoints.formats import stated_type
from vlafit.checkpoints.formats.lerobot.processor_steps import POST, PRE, Step, read_steps
from vlafit.checkpoints.formats.lerobot.read_config import TYPES, LeRobotConfig
from vlafit.errors import WeightsError


def require_type(lerobot: LeRobotConfig | None, own: str, folder: Path, where: str, reason: str = "") -> None:
    """Raise WeightsError where config.json in `folder`, LeRobot's or not, or processors are not of `own`.

    That is the policy of the tensors; `reason` tells how they are known.
    """
    words = f"{own}{reason and f' ({reason})'}"
    if lerobot is not None and lerobot.values["type"] != own:
        raise stated_type.mismatch(where, "type", lerobot.values["type"], words)
    stated_type.require(folder, where, words, own)
    for path in (folder / PRE, folder / POST):
        if lerobot is not None and path.is_file():
            require_steps(lerobot, read_steps(path))


def require_steps(lerobot: LeRobotConfig, steps: Sequence[Step]) -> None:
    """Raise WeightsError naming the first step that LeRobot makes for another policy than config.json's."""
    own = str(lerobot.values["type"])
    for step in steps:
        other = next((kind for kind in TYPES if step.name.startswith(f"{kind}_")), own)
        if other != own:
            raise WeightsError(
                f"{step.where}: this step is that of {other}, and {lerobot.path} says type {own!r}: the "
                "processors belong to another checkpoint; copy those of these weights, or remove both files "
                'and let fine-tuning fit a codec: data.statistics = "data"'
            )
