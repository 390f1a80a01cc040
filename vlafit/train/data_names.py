"""Check the names by which a recipe's tables speak of its cards and its sets of vision-language data."""

from collections.abc import Sequence

from vlafit.datasets.order import shares
from vlafit.errors import ConfigError, DataError, did_you_mean
from vlafit.recipe import DataRecipe


def require_named(recipe: DataRecipe, names: Sequence[str]) -> None:
    """Raise ConfigError unless `weights` and `embodiments`, where there are any, name every card.

    `weights` also name every set of vision-language data, which needs them.
    """
    cards, sets = list(names), list(recipe.vision_language)
    if sets and not recipe.weights:
        table = ", ".join(f'"{name}" = 1.0' for name in (*cards, *sets))
        raise ConfigError(
            "data.vision_language has no share of the samples: name every card and set in data.weights = "
            f"{{ {table} }}"
        )
    for name in sets:
        if not name or "/" in name:
            raise ConfigError(
                f"data.vision_language: {name!r} cannot be part of a metric's name; use a word without '/'"
            )
        if name in (*cards, *recipe.validation_sets, *recipe.embodiments.values()):
            raise ConfigError(
                f"data.vision_language: {name!r} is also the name of a card, a validation set or an "
                "embodiment; choose another"
            )
    for field_name, table in (("weights", recipe.weights), ("embodiments", recipe.embodiments)):
        if not table:
            continue
        names = [*cards, *sets] if field_name == "weights" else cards
        missing = [name for name in names if name not in table]
        if missing:
            raise ConfigError(
                f"data.{field_name} does not name card {missing[0]!r}; name every card: {', '.join(names)}"
            )
        if field_name == "embodiments" and recipe.validation_sets:
            continue  # cards of those sets may be named, too
        for name in table:
            if name not in names:
                raise ConfigError(
                    f"data.{field_name}: there is no card {name!r}{did_you_mean(name, names)}; "
                    f"there are: {', '.join(names)}"
                )
    if any(not name or "/" in name for name in recipe.embodiments.values()):
        raise ConfigError("data.embodiments: a name must be a word without '/', as a part of metrics' names")
    if recipe.weights:
        try:
            shares([recipe.weights[name] for name in (*cards, *sets)])
        except DataError as error:
            raise ConfigError(f"data.weights: {error}") from error
