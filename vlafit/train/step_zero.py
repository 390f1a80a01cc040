"""Load a checkpoint as a run of a recipe would begin with it, to evaluate a base model before fine-tuning.

A foreign checkpoint often has no codec: its files do not say which statistics, cameras or tokenizer it needs.
The recipe of its fine-tuning does, and all that training would refuse is refused here.
"""

import hashlib
from dataclasses import replace

import torch

from vlafit import checkpoints, config
from vlafit.actor import PolicyActor
from vlafit.checkpoints.options import parse_dtype
from vlafit.inference import accelerated, require_device, with_steps
from vlafit.recipe import Recipe
from vlafit.train.data import open_data
from vlafit.train.frozen import FrozenWeights
from vlafit.train.initial_policy import initialise
from vlafit.train.preflight import check
from vlafit.tuning import load_strategy


def load_untrained(
    recipe: Recipe,
    checkpoint: str,
    *,
    steps: int = 0,
    width: int = 1,
    seed: int = 0,
    device: str = "",
    embodiment: str = "",
    dtype: str = "float32",
    compile: bool = False,
    quantise: str = "",
) -> PolicyActor:
    """Return `checkpoint`, in place of the recipe's, as an actor with the codec of a run's first step.

    The other arguments are those of `actor.load_actor`. Raises what training raises before its first step.
    """
    recipe = replace(recipe, policy=replace(recipe.policy, checkpoint=checkpoint))
    check(recipe, 1)
    place = torch.device(require_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    data = open_data(recipe.data, recipe.train.seed)
    initial = initialise(recipe, data, FrozenWeights(load_strategy(recipe.strategy), wanted=False))
    path = checkpoints.place(checkpoint).path
    inputs = "\n".join([config.dump(recipe.policy), config.dump(recipe.data), config.dump(recipe.adapt)])
    inputs += f"\n{data.fingerprint}"
    policy = with_steps(initial.policy, steps)
    checkpoints.keep_in(policy, parse_dtype(dtype))
    return PolicyActor(
        accelerated(policy.to(place), compile, quantise),
        initial.codecs,
        width=width,
        seed=seed,
        identity=(
            f"checkpoint sha256:{checkpoints.digest(path)} "
            f"as recipe sha256:{hashlib.sha256(inputs.encode()).hexdigest()}"
        ),
        seeds=checkpoints.read_lineage(path).seeds,
        embodiment=embodiment,
        agreement=initial.agreement,
    )
