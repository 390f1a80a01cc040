"""Load the actor of `vlafit eval` and `vlafit serve`, and give their parsers the options that say how."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit import config, shipped
from vlafit.cli.console import differences_table
from vlafit.cli.parser import add_base, add_config, add_embodiment, add_trust, settings, within
from vlafit.cli.places import base_folder
from vlafit.cli.recipes import load_values
from vlafit.errors import ConfigError

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
    add_config(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="of a checkpoint that holds none: a folder, a file, or an id of the Hub",
    )
    parser.add_argument("--assets", metavar="NAME", help="which of the checkpoint's statistics")
    parser.add_argument(
        "--cameras",
        metavar="NAME=CAMERA",
        nargs="+",
        default=[],
        help="the robot's camera for each of the policy's, as in image=agentview image2=wrist; NAME= leaves "
        "its place empty",
    )
    parser.add_argument(
        "--frame-size",
        metavar="N",
        type=within(1, 2**13),
        default=0,
        help="width and height of the robot's frames in pixels [those that the checkpoint names]",
    )
    add_embodiment(parser)
    add_base(parser)
    add_trust(parser)


def cameras(pairs: Sequence[str]) -> dict[str, str]:
    """Return the values of the option `--cameras`. Raises ConfigError for what is no pair, or given twice."""
    named: dict[str, str] = {}
    for pair in pairs:
        slot, equals, name = pair.partition("=")
        if not slot or not equals:
            raise ConfigError(f"--cameras {pair!r} is not NAME=CAMERA, as in image=agentview")
        if slot in named:
            raise ConfigError(f"--cameras names {slot!r} twice")
        named[slot] = name
    return named


ADAPTING = ("config", "tokenizer", "assets", "cameras", "frame_size")
"""Options that say what the files of a checkpoint lack."""


def adapting(options: Namespace) -> list[str]:
    """Return the options of `ADAPTING` that are given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in ADAPTING if getattr(options, name)]


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
            config=settings(options.config),
            tokenizer=options.tokenizer,
            assets=options.assets,
            cameras=cameras(options.cameras),
            frame_size=options.frame_size,
        )
        return _require_one(actor, checkpoint, options.embodiment)
    if given := adapting(options):
        raise ConfigError(f"{', '.join(given)}: the recipe of --recipe says it; write it there")
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
