"""The base that a quantised run keeps for itself, where what it began from lies in no checkpoint.

A quantised weight cannot be saved as what it was; so the run's checkpoints sit on the one it began from.
Fresh weights, and those that adapters were merged into, are in no file: the whole start, not rounded, is then
written into the run's folder once, before the first step, as a checkpoint like any other.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from vlafit import checkpoints
from vlafit.codec import Codec
from vlafit.nn.policy import Policy
from vlafit.policies import family, family_name
from vlafit.tuning import Strategy, preview
from vlafit.tuning.inject import adapter_tensors, base_name

FOLDER = "base"  # in the run's
FROM_CHECKPOINT = "../../base"  # as checkpoints/step_000100/base.json says it: the run's folder may move
NOTICE = (
    f"what the quantised weights were lies in no checkpoint, so the start is kept in {FOLDER}/, on which the "
    "run's checkpoints sit"
)


def weights_to_keep(
    policy: Policy, strategy: Strategy, base: checkpoints.Base | None, anew: Collection[str]
) -> dict[str, Tensor]:
    """Return the weights that `strategy` will change when it is applied, on the CPU, by name.

    None where it rounds nothing, or only what lies in the checkpoint `base` (`anew` are weights that do not).
    Raises StrategyError as `preview` does.
    """
    if not any(rule.quantise for stage in strategy.stages for rule in stage.rules):
        return {}
    plan = preview(policy, strategy)
    rounded = {f"{layer}.weight" for layer in plan.quantised}
    if base is not None and not rounded & set(anew):
        return {}
    moved = {f"{layer}.weight" for layer, adapter in plan.adapted.items() if adapter.init == "pissa"}
    return {name: policy.get_parameter(name).detach().cpu().clone() for name in rounded | moved}


def write(
    out: Path, policy: Policy, codec: Codec, history: checkpoints.Lineage, kept: Mapping[str, Tensor]
) -> None:
    """Write what the run in `out` began from: the policy's weights, those in `kept` as they were."""
    adapters = adapter_tensors(policy)
    own = {base_name(name): p for name, p in policy.named_parameters() if name not in adapters}
    bare = family(family_name(policy)).build(policy.config, "meta")
    checkpoints.save(bare, out / FOLDER, codec, history=history, weights={**own, **kept})


def at(out: Path) -> checkpoints.Base:
    """Return what the checkpoints of the run in `out` sit on."""
    return checkpoints.Base(FROM_CHECKPOINT, checkpoints.digest(out / FOLDER))
