"""Load the actor of `vlafit eval` and `vlafit serve`, and give their parsers the options that say how."""

import argparse
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit import config, shipped
from vlafit.cli.console import differences_table
from vlafit.cli.parser import add_base, add_embodiment, add_trust
from vlafit.cli.places import base_folder
from vlafit.cli.recipes import load_values

if TYPE_CHECKING:
    from vlafit.actor import PolicyActor
    from vlafit.recipe import Recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of how a checkpoint is opened, and how it computes."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the policy's matrices; bfloat16 takes half the memory and suits a GPU [float32]",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the policy's blocks by torch.compile: faster after the first minute, other last bits",
    )
    parser.add_argument(
        "--quantise",
        choices=("int8", "fp8"),
        default="",
        help="keep matrices in 8 bits, integers or floats (pip install 'vlafit[quantise]'): a quarter of "
        "float32's memory, and other actions; the difference is measured and shown",
    )
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="for a base model of another program: the recipe that would fine-tune it, which gives the "
        "statistics, tokenizer and cameras that its files lack",
    )
    add_embodiment(parser)
    add_base(parser)
    add_trust(parser)


def load(
    checkpoint: Path | str, options: Namespace, *, steps: int, width: int, seed: int, device: str
) -> "PolicyActor":
    """Load `checkpoint` as the options say. Raises as `load_actor`, and with a recipe as `load_untrained`."""
    base = base_folder(options.base) if options.base else None
    if options.recipe is None:
        from vlafit.actor import load_actor

        actor = load_actor(
            checkpoint,
            steps=steps,
            width=width,
            seed=seed,
            device=device,
            trust=options.trust,
            base=base,
            embodiment=options.embodiment,
            dtype=options.dtype,
            compile=options.compile,
            quantise=options.quantise,
        )
        return _require_one(actor, checkpoint, options.embodiment)
    from vlafit.train.step_zero import load_untrained

    recipe = recipe_of(options)
    policy = recipe.policy
    policy = replace(policy, base=str(base or policy.base), trust=(*policy.trust, *options.trust))
    recipe = replace(recipe, policy=policy)
    actor = load_untrained(
        recipe,
        str(checkpoint),
        steps=steps,
        width=width,
        seed=seed,
        device=device,
        embodiment=options.embodiment,
        dtype=options.dtype,
        compile=options.compile,
        quantise=options.quantise,
    )
    if actor.agreement is not None:
        print(f"{checkpoint} as a run of {options.recipe} begins with it:")
        print(differences_table(actor.agreement))
    return _require_one(actor, checkpoint, options.embodiment)


def recipe_of(options: Namespace) -> "Recipe":
    """Return the recipe of `--recipe`."""
    from vlafit.recipe import Recipe

    path = shipped.find("recipe", options.recipe)
    return config.build(Recipe, load_values(path), str(path))


def _require_one(actor: "PolicyActor", checkpoint: Path | str, embodiment: str) -> "PolicyActor":
    """Return the actor. Raises ConfigError where it has several embodiments, and none is named."""
    actor.codecs.choose(embodiment, where=str(checkpoint), option="--embodiment NAME")
    return actor
