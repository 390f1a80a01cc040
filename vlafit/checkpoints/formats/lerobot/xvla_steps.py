"""Check the processor steps of X-VLA, and read the domain that they name."""

from collections.abc import Sequence

from vlafit.checkpoints.formats.lerobot.processor_steps import DOMAIN, IMAGENET, TO_FLOAT, XVLA, Step
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.errors import WeightsError


def require_steps(lerobot: LeRobotConfig, pre: Sequence[Step]) -> None:
    """Raise WeightsError where the steps before the policy are not those that X-VLA's codec repeats."""
    own = [step for step in pre if step.name in XVLA]
    if lerobot.values["type"] != "xvla":
        for step in own:
            raise WeightsError(f"{step.where}: this step is X-VLA's, and {lerobot.path} is of another policy")
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


def domain_of(pre: Sequence[Step]) -> int:
    """Return the domain that the processors name; LeRobot takes 0 where they name none."""
    found = [step for step in pre if step.name == DOMAIN]
    domain = found[-1].config.get("domain_id", 0) if found else 0
    if not isinstance(domain, int) or isinstance(domain, bool) or domain < 0:
        raise WeightsError(f"{found[-1].where}: domain_id is {domain!r}; it must be a whole number from 0")
    return domain
