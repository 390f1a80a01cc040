"""`vlafit train RECIPE`: run a recipe, with any of its fields overridden."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlafit.cli import launcher
from vlafit.cli.parser import MOST_STEPS, Parser, within
from vlafit.cli.recipes import read_recipe
from vlafit.recipe import Recipe

ABOUT = """\
Fine-tune a policy from a recipe. Every field of the recipe is also an option; values in brackets are those of
RECIPE. Fields of the model's config: --policy.config.KEY VALUE.

On several processes: accelerate launch --config_file FILE -m vlafit train RECIPE
(vlafit list launcher shows files for that)."""


def run(arguments: Sequence[str]) -> int:
    """Read recipe and options, and train."""
    recipe, options = read(arguments)
    out = Path(options.out) if options.out else Path("runs") / recipe.name
    command = shlex.join([*launcher.words(), "vlafit", "train", *arguments])
    from vlafit.cli.train_view import train

    return train(recipe, out, resume=options.resume, resume_from=options.resume_from, command=command)


def read(arguments: Sequence[str]) -> tuple[Recipe, Any]:
    """Return the recipe with the command line's overrides, and the verb's own options."""
    return read_recipe("train", ABOUT, "[--out DIR] [--resume]", arguments, _options)


def _options(parser: Parser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder of the run [runs/NAME]")
    parser.add_argument("--resume", action="store_true", help="resume a run that was stopped or killed")
    parser.add_argument(
        "--resume-from",
        metavar="STEP",
        type=within(0, MOST_STEPS),
        help="resume from the state of an earlier step instead, and remove what was saved after it",
    )
