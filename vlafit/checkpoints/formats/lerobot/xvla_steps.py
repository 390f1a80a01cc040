"""Check the processor steps of X-VLA, and read the domain that they name."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.checkpoints.formats.lerobot.processor_steps import (
    DOMAIN,
    IMAGENET,
    PRE,
    TO_FLOAT,
    XVLA,
    Step,
    read_steps,
)
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.errors import WeightsError


def require_steps(lerobot: LeRobotConfig, pre: Sequence[Step]) -> None:
    """Raise WeightsError where the steps before the policy are not those that X-VLA's codec repeats."""
    own = [step for step in pre if step.name in XVLA]
    if lerobot.values["type"] != "xvla":
        return
    for name in (TO_FLOAT, IMAGENET):
        if sum(step.name == name for step in own) != 1:
            where = pre[0].where.partition(": step")[0] if pre else str(lerobot.path)
            raise WeightsError(
                f"{where}: {sum(step.name == name for step in own)} steps are {name}; this policy always "
                "sees images normalised by ImageNet's statistics, so one is needed"
            )
    for step in pre:
        if step.name == "tokenizer_processor" and step.config.get("padding", "max_length") != "max_length":
            raise WeightsError(
                f"{step.where}: padding is {step.config['padding']!r}; X-VLA reads the padding, and only "
                "'max_length' is supported here"
            )
    if lerobot.values.get("domain_feature_key") is not None:
        raise WeightsError(
            f"{lerobot.path}: domain_feature_key is {lerobot.values['domain_feature_key']!r}: the domain is "
            "in the dataset, which is not supported here; set it to null and give a domain"
        )


def domain_in(folder: Path, domains: int) -> int | None:
    """Return the domain that the processors in `folder` name, as `domain_of` does."""
    return domain_of(read_steps(folder / PRE) if (folder / PRE).is_file() else [], domains)


def domain_of(pre: Sequence[Step], domains: int) -> int | None:
    """Return the domain that the processors name; None where they name none, for which LeRobot takes 0.

    Raises WeightsError where the policy, which has `domains`, does not have it.
    """
    found = [step for step in pre if step.name == DOMAIN]
    if not found:
        return None
    domain = found[-1].config.get("domain_id", 0)
    if not isinstance(domain, int) or isinstance(domain, bool) or not 0 <= domain < domains:
        raise WeightsError(
            f"{found[-1].where}: domain_id is {domain!r}, and the policy's domains are 0 to {domains - 1}; "
            "correct it, or give another one: config domain=N"
        )
    return domain
