"""A recipe from the command line: the file that is named first, and every field of it as an option."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlafit import config, shipped
from vlafit.cli.parser import Parser, add_fields, overrides, split_tables
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe


def read_recipe(
    verb: str, about: str, usage: str, arguments: Sequence[str], add_options: Callable[[Parser], None]
) -> tuple[Recipe, Any]:
    """Return the recipe with the command line's overrides in it, and the verb's own options.

    `usage` is what stands behind RECIPE; `add_options` adds those options to the parser.
    """
    words = list(arguments)
    named = next((word for word in words if not word.startswith("-")), "")
    wants_help = "-h" in words or "--help" in words
    values: dict[str, Any] = {}
    path: Path | None = None
    if named and words[0] == named:
        path = shipped.find("recipe", named)
        values = config.load_toml(path, "recipe")
    elif words and not wants_help:
        raise ConfigError(f"the recipe comes first: vlafit {verb} RECIPE [options]")
    elif not wants_help:
        names = ", ".join(shipped.names("recipe"))
        raise ConfigError(f"which recipe? vlafit {verb} RECIPE, a TOML file or one that ships: {names}")
    original = config.build(Recipe, values, str(path))

    parser = Parser(f"vlafit {verb}", about, f"vlafit {verb} RECIPE {usage} [--FIELD VALUE ...]")
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of a recipe that ships")
    add_options(parser)
    add_fields(parser, Recipe, original)
    rest, given = split_tables(Recipe, original, words)
    options = parser.read(rest)
    given = config.merge(given, overrides(Recipe, original, options))
    config.build(Recipe, given, "command line")  # so that its errors name the command line, not the file
    return config.build(Recipe, config.merge(values, given), str(path)), options


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Return the numbers of a list with commas. Raises ConfigError for anything else."""
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise ConfigError(
            f"{option}: {error}; write numbers with commas between, such as 1e-4,3e-4"
        ) from error


def given(arguments: Sequence[str], option: str) -> bool:
    """Whether an option stands on the command line."""
    return any(word == option or word.startswith(option + "=") for word in arguments)


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Return a command line without an option and its value."""
    words, left = iter(arguments), []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            left.append(word)
    return left
