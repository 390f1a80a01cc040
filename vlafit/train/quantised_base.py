"""Save a quantised run's full-precision starting weights when no checkpoint holds them.

A quantised weight cannot be saved in full precision, so the checkpoints of a quantised run refer to a base
checkpoint. Fresh weights, and weights that adapters were merged into, are in no checkpoint: they are then
written to the run's folder once, before the first step, as a checkpoint like any other.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from vlafit import checkpoints
from vlafit.codec import CodecSet
from vlafit.nn.policy import Policy
from vlafit.policies import family, family_name
from vlafit.tuning import Strategy, preview
from vlafit.tuning.inject import adapter_tensors, base_name

FOLDER = "base"  # in the run's folder
FROM_CHECKPOINT = "../../base"  # relative to checkpoints/step_000100, because the run's folder may be moved
WARNING = (
    "no checkpoint holds the full-precision values of the quantised weights, so they are saved in "
    f"{FOLDER}/, the base of the run's checkpoints"
)


def weights_to_keep(
    policy: Policy, strategy: Strategy, base: checkpoints.Base | None, changed: Collection[str]
) -> dict[str, Tensor]:
    """Return copies of the weights that applying `strategy` changes, on the CPU, by name.

    Empty if it quantises nothing, or only weights that `base` holds (it does not hold those in `changed`).
    Raises StrategyError as `preview` does.
    """
    if not any(rule.quantise for stage in strategy.stages for rule in stage.rules):
        return {}
    plan = preview(policy, strategy)
    quantised = {f"{layer}.weight" for layer in plan.quantised}
    if base is not None and not quantised & set(changed):
        return {}
    split = {f"{layer}.weight" for layer, adapter in plan.adapted.items() if adapter.init == "pissa"}
    return {name: policy.get_parameter(name).detach().cpu().clone() for name in quantised | split}


def write(
    out: Path, policy: Policy, codecs: CodecSet, history: checkpoints.Lineage, kept: Mapping[str, Tensor]
) -> None:
    """Write the base of the run in `out`: the policy's weights, with those in `kept` in their place."""
    adapters = adapter_tensors(policy)
    weights = {base_name(name): p for name, p in policy.named_parameters() if name not in adapters}
    bare = family(family_name(policy)).build(policy.config, "meta")
    checkpoints.save(bare, out / FOLDER, codecs, history=history, weights={**weights, **kept})


def at(out: Path) -> checkpoints.Base:
    """Return the base of the checkpoints of the run in `out`."""
    return checkpoints.Base(FROM_CHECKPOINT, checkpoints.digest(out / FOLDER))
