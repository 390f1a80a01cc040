"""A recipe without its weights: its policy on the meta device, where strategies that do not fit show at once.

Only headers of checkpoints are read. What needs the numbers themselves (damage, a codec that is fitted) shows
when a run begins.
"""

from importlib.util import find_spec

from vlafit import checkpoints
from vlafit.errors import ConfigError, StrategyError
from vlafit.nn.policy import Policy
from vlafit.policies import build_family
from vlafit.recipe import Recipe
from vlafit.train import stages
from vlafit.train.experiment import Data
from vlafit.tuning import Plan, Strategy, preview
from vlafit.types import require_same

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao"}


def outline(recipe: Recipe, data: Data) -> Policy:
    """Return the recipe's policy on the meta device.

    Raises what `checkpoints.inspect` does, EmbodimentError where the checkpoint knows another robot than the
    data's, and ConfigError for fields that mean nothing together.
    """
    spec = recipe.policy
    if not spec.checkpoint:
        if not spec.family:
            raise ConfigError("policy: give either `checkpoint` or `family` (with `size` or `config`)")
        return build_family(spec.family, spec.size, spec.config, device="meta")
    path = checkpoints.place(spec.checkpoint).path
    # Headers make no codec, so what is said of one is not for them.
    said = {key: value for key, value in spec.config.items() if key.partition(".")[0] != "codec"}
    found = checkpoints.inspect(path, said or None, fresh=spec.fresh, resize=spec.resize)
    if found.codec is not None and found.codec.embodiment.hz and recipe.data.statistics == "checkpoint":
        name = data.cards[0].name
        require_same(data.embodiment, f"card {name!r}", found.codec.embodiment, f"checkpoint {path}")
    return found.policy


def plan_of(recipe: Recipe, strategy: Strategy, policy: Policy, *, held_out: bool) -> Plan:
    """Return the plan of a strategy in the recipe's run, `policy` being its outline.

    `held_out` tells whether there is anything to validate on. Raises StrategyError where the strategy does
    not fit policy or run, or a library that it needs is not installed.
    """
    plan = preview(policy, strategy)
    stages.require_reachable(plan, recipe.train, held_out=held_out)
    for how in dict.fromkeys(plan.quantised.values()):
        if find_spec(LIBRARIES[how]) is None:
            raise StrategyError(f'quantise = "{how}" needs {LIBRARIES[how]}: pip install "vlafit[quantise]"')
    return plan
