"""A study: which fields of a recipe, or keys of its strategy's rules, are searched, and in which ranges.

    trials = 20

    [search]
    "optim.lr" = { low = 1e-5, high = 1e-3, log = true }
    "rule.rank" = { choices = [4, 8, 16] }
    "rule.select.kind" = { choices = ["attention", ["attention", "mlp"]] }

A name is any field of a recipe, or `rule.KEY`: that key of every rule of the strategy that has it, or whose
adapter has it and is left at its default. This file knows values, not Optuna.
"""

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlafit import config, files, shipped
from vlafit.errors import ConfigError, VlafitError, did_you_mean
from vlafit.recipe import Recipe
from vlafit.tuning import Strategy, load_strategy, parse
from vlafit.tuning.adapters import METHODS, OPTIONS

RULE = "rule."


@dataclass(frozen=True)
class Dimension:
    """What a name may be: a range of numbers, or one of some values."""

    low: int | float | None = None
    """Lowest value; whole numbers on both ends make a range of whole numbers."""
    high: int | float | None = None
    """Highest value, included."""
    log: bool = False
    """Search on a logarithmic scale."""
    choices: tuple[object, ...] = ()
    """The values, of any kind that TOML has, instead of a range."""

    def __post_init__(self) -> None:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ConfigError("give either `choices` or `low` and `high`")
        elif self.low is None or self.high is None:
            raise ConfigError("give `low` and `high`, or `choices`")
        elif not self.low < self.high:
            raise ConfigError(f"low {self.low} must be below high {self.high}")
        elif self.log and not self.low > 0:
            raise ConfigError(f"a logarithmic range begins above 0, not at {self.low}")

    def ends(self) -> tuple[object, ...]:
        """Return the values that stand for the whole: the ends of the range, or every choice."""
        return self.choices or (self.low, self.high)

    def at_edge(self, value: object) -> bool:
        """Whether a number lies at an end of its range (within a twentieth), or is an end of the choices."""
        numbers = [v for v in self.ends() if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) != len(self.ends()) or not isinstance(value, int | float) or len(set(numbers)) < 2:
            return False
        if self.choices:
            return len(numbers) > 2 and value in (min(numbers), max(numbers))
        if all(isinstance(v, int) for v in numbers) and numbers[1] - numbers[0] < 2:
            return False  # of two values each is an end
        low, high, at = (math.log(v) if self.log else v for v in (*numbers, value))
        return min(at - low, high - at) < 0.05 * (high - low)


@dataclass(frozen=True)
class Study:
    """What a study file says."""

    search: dict[str, Dimension]
    """Name -> what it may be."""
    purpose: str = ""
    """One sentence for the report."""
    trials: int = 20
    """Trials in all, pruned and broken ones among them."""
    seed: int = 0
    """Decides what is tried."""
    startup: int = 5
    """Trials drawn at random before the search learns from them, and whole trials before any is pruned."""
    prune: bool = True
    """End a trial whose validation loss is above the median of the others at the same step."""
    warmup: float = 0.25
    """Share of the steps before which no trial is pruned."""

    def __post_init__(self) -> None:
        if not self.search:
            raise ConfigError("[search] is empty: name at least one field of the recipe and its range")
        for name, least in (("trials", 1), ("seed", 0), ("startup", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, is {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is a share of the steps, from 0 to 1, is {self.warmup}")


def load_study(name_or_path: str | Path) -> Study:
    """Read a study: a path, or the name of one that ships. Raises ConfigError naming file, key and remedy."""
    return config.read(Study, shipped.find("study", name_or_path), "study")


def check(
    study: Study, recipe: Recipe, where: str, could_train: Callable[[Recipe, Strategy], None] | None = None
) -> None:
    """Raise ConfigError, naming all of them, for names and values of which no trial could be made.

    The ends of each range, and every choice, must be possible with all others at their lowest, or with all
    at their highest. `could_train` raises a VlafitError for a recipe, and its strategy, that cannot train.
    """
    corners = [{name: one.ends()[end] for name, one in study.search.items()} for end in (0, -1)]
    faults: dict[str, str] = {}
    for name, dimension in study.search.items():
        for value in dimension.ends():
            found = []
            for corner in corners:
                try:
                    made, strategy = trial(recipe, {**corner, name: value})
                    if could_train is not None:
                        could_train(made, strategy)
                except VlafitError as error:
                    found.append(str(error))
            if len(found) == len(corners):
                # An end's own fault is the one that it has with all others at their opposite ends.
                faults.setdefault(found[-1 if value == dimension.ends()[0] else 0], f"{name} = {value!r}")
    if faults:
        listed = "\n".join(f"- {at}: {fault}".replace("\n", "\n  ") for fault, at in faults.items())
        raise ConfigError(f"{where}: [search] asks for what no trial could be:\n{listed}")


# ------------------------------------------------------------------------------------------- what a trial is


def recipe_with(recipe: Recipe, values: Mapping[str, object], where: str) -> Recipe:
    """Return the recipe with fields replaced; `rule.*` are left alone."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith(RULE):
            continue
        *sections, last = name.split(".")
        inside = nested
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return config.build(Recipe, config.merge(asdict(recipe), nested), where)


def strategy_with(given: str, values: Mapping[str, object], where: str) -> str | None:
    """Return the TOML text of a strategy with the `rule.*` of `values` set; None where there are none.

    Raises ConfigError for a key that no rule of the strategy has.
    """
    wanted = {name.removeprefix(RULE): value for name, value in values.items() if name.startswith(RULE)}
    wanted = dict(sorted(wanted.items(), key=lambda item: item[0] != "mode"))  # it decides which others are
    if not wanted:
        return None
    content = config.load_toml(shipped.find("strategy", given), "strategy")
    for key, value in wanted.items():
        *sections, last = key.split(".")
        rules = [rule for rule in _rules(content) if not sections and last in _options(rule)]
        rules += [
            inside for rule in _rules(content) if (inside := _inside(rule, sections)) and last in inside
        ]
        if not rules:
            known = dict.fromkeys(n for rule in _rules(content) for n in (*_keys(rule), *_options(rule)))
            raise ConfigError(
                f"{where}: no rule of strategy {given!r} has the key {key!r}{did_you_mean(key, known)}"
            )
        for rule in rules:
            rule[last] = value
    return config.dump(content)


def _rules(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every table of every list called `rule`, those inside stages among them."""
    for name, value in content.items():
        tables = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
        if name == "rule":
            yield from tables
        else:
            for one in tables:
                yield from _rules(one)


def _options(rule: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of a rule's adapter, those that the rule leaves at their defaults among them."""
    return OPTIONS[rule["mode"]] if rule.get("mode") in METHODS else ()


def _inside(rule: dict[str, Any], sections: list[str]) -> dict[str, Any] | None:
    inside: Any = rule
    for section in sections:
        inside = inside.get(section) if isinstance(inside, dict) else None
    return inside if isinstance(inside, dict) else None


def _keys(rule: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for name, value in rule.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def trial(recipe: Recipe, values: Mapping[str, object]) -> tuple[Recipe, Strategy]:
    """Return the recipe and the strategy of a trial of these values, without writing them.

    Raises ConfigError or StrategyError for a name or a value that cannot be.
    """
    made = recipe_with(recipe, values, "recipe")
    where = f"strategy {made.strategy!r}"
    text = strategy_with(made.strategy, values, where)
    if text is None:
        return made, load_strategy(made.strategy)
    return made, parse(tomllib.loads(text), name=Path(made.strategy).stem, where=where)


def prepare(recipe: Recipe, values: Mapping[str, object], folder: Path) -> Recipe:
    """Write a trial's strategy.toml (where rules are searched) and recipe.toml, and return its recipe."""
    made = replace(recipe_with(recipe, values, str(folder)), name=f"{recipe.name}-{folder.name}")
    text = strategy_with(made.strategy, values, str(folder))
    if text is not None:
        files.write_atomic(folder / "strategy.toml", text)
        load_strategy(str(folder / "strategy.toml"))
        made = replace(made, strategy=str(folder / "strategy.toml"))
    files.write_atomic(folder / "recipe.toml", config.dump(made))
    return made
