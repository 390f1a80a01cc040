"""`vlafit train RECIPE`: a recipe, with any of its fields overridden, carried out."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlafit import config, shipped
from vlafit.cli import launcher
from vlafit.cli.parser import Parser, add_fields, overrides, split_tables
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe

ABOUT = """\
Fine-tune a policy as a recipe says. Every field of the recipe is an option, too: values in brackets are
those of RECIPE. Fields of the model's config: --policy.config.KEY VALUE.

On several processes: accelerate launch --config_file FILE -m vlafit train RECIPE
(vlafit list launcher shows files for that)."""


def run(arguments: Sequence[str]) -> int:
    """Read recipe and options, and train."""
    recipe, options = read(arguments)
    out = Path(options.out) if options.out else Path("runs") / recipe.name
    command = shlex.join([*launcher.words(), "vlafit", "train", *arguments])
    from vlafit.cli.train_view import train

    return train(recipe, out, resume=options.resume, command=command)


def read(arguments: Sequence[str]) -> tuple[Recipe, Any]:
    """Return the recipe with the command line's overrides in it, and the other options (`out`, `resume`)."""
    words = list(arguments)
    named = next((word for word in words if not word.startswith("-")), "")
    wants_help = "-h" in words or "--help" in words
    values: dict[str, Any] = {}
    path: Path | None = None
    if named and words[0] == named:
        path = shipped.find("recipe", named)
        values = config.load_toml(path, "recipe")
    elif words and not wants_help:
        raise ConfigError("the recipe comes first: vlafit train RECIPE [options]")
    elif not wants_help:
        names = ", ".join(shipped.names("recipe"))
        raise ConfigError(f"which recipe? vlafit train RECIPE, a TOML file or one that ships: {names}")
    original = config.build(Recipe, values, str(path))

    parser = Parser("vlafit train", ABOUT, "vlafit train RECIPE [--out DIR] [--resume] [--FIELD VALUE ...]")
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of a recipe that ships")
    parser.add_argument("--out", metavar="DIR", help="folder of the run [runs/NAME]")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped or killed")
    add_fields(parser, Recipe, original)
    rest, given = split_tables(Recipe, original, words)
    options = parser.read(rest)
    given = config.merge(given, overrides(Recipe, original, options))
    config.build(Recipe, given, "command line")  # so that its errors name the command line, not the file
    return config.build(Recipe, config.merge(values, given), str(path)), options
