"""Read a study: the fields of a recipe, or keys of its strategy's rules, to search, with their ranges.

    trials = 20

    [search]
    "optim.lr" = { low = 1e-5, high = 1e-3, log = true }
    "rule.rank" = { choices = [4, 8, 16] }
    "rule.select.kind" = { choices = ["attention", ["attention", "mlp"]] }

A name is any field of a recipe, or `rule.KEY`: that key of every rule of the strategy that has it, or whose
adapter has it as an option. This module does not use Optuna.
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

MOST_TRIALS = 10**5


@dataclass(frozen=True)
class Dimension:
    """The values of one searched name: a range of numbers, or a list of choices."""

    low: int | float | None = None
    """Lowest value; if both ends are integers, only integers are tried."""
    high: int | float | None = None
    """Highest value, included."""
    log: bool = False
    """Search on a logarithmic scale."""
    choices: tuple[object, ...] = ()
    """Values of any TOML type, instead of a range."""

    def __post_init__(self) -> None:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ConfigError("set either `choices` or `low` and `high`, not both")
        elif self.low is None or self.high is None:
            raise ConfigError("set `low` and `high`, or `choices`")
        elif not self.low < self.high:
            raise ConfigError(f"low {self.low} must be below high {self.high}")
        elif self.log and not self.low > 0:
            raise ConfigError(f"a logarithmic range must start above 0, not at {self.low}")

    def ends(self) -> tuple[object, ...]:
        """Return the values to check: both ends of the range, or every choice."""
        return self.choices or (self.low, self.high)

    def at_edge(self, value: object) -> bool:
        """Return whether a number is within 5 % of an end of its range, or the lowest or highest choice."""
        numbers = [v for v in self.ends() if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) != len(self.ends()) or not isinstance(value, int | float) or len(set(numbers)) < 2:
            return False
        if self.choices:
            return len(numbers) > 2 and value in (min(numbers), max(numbers))
        if all(isinstance(v, int) for v in numbers) and numbers[1] - numbers[0] < 2:
            return False  # both of two values are ends
        low, high, position = (math.log(v) if self.log else v for v in (*numbers, value))
        return min(position - low, high - position) < 0.05 * (high - low)


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    search: dict[str, Dimension]
    """Name -> range or choices."""
    purpose: str = ""
    """One sentence for the report."""
    trials: int = 20
    """Total number of trials, including pruned and failed ones."""
    seed: int = 0
    """Seed of the sampler."""
    startup: int = 5
    """Random trials before the sampler uses their results, and complete trials before any is pruned."""
    prune: bool = True
    """Stop a trial whose validation loss is above the median of the others at the same step."""
    warmup: float = 0.25
    """Share of the steps before which no trial is pruned."""

    def __post_init__(self) -> None:
        if not self.search:
            raise ConfigError("[search] is empty; add at least one field of the recipe with its range")
        for name, least in (("trials", 1), ("seed", 0), ("startup", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, is {getattr(self, name)}")
        if self.trials > MOST_TRIALS:
            raise ConfigError(f"trials must be at most {MOST_TRIALS}, is {self.trials}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup must be from 0 to 1 (a share of the steps), is {self.warmup}")


def load_study(name_or_path: str | Path) -> Study:
    """Read a study: a path, or the name of a shipped one. Raises ConfigError naming file, key and fix."""
    return config.read(Study, shipped.find("study", name_or_path), "study")


def check(
    study: Study, recipe: Recipe, where: str, could_train: Callable[[Recipe, Strategy], None] | None = None
) -> None:
    """Raise ConfigError listing all invalid names and values of the search.

    The ends of each range, and every choice, must be valid with all other names at their lowest or all at
    their highest value. `could_train` raises a VlafitError for a recipe and strategy that cannot train.
    """
    corners = [{name: dim.ends()[end] for name, dim in study.search.items()} for end in (0, -1)]
    faults: dict[str, str] = {}
    texts: list[str] = []
    for name, dimension in study.search.items():
        for value in dimension.ends():
            errors = []
            for corner in corners:
                try:
                    changed, strategy = trial(recipe, {**corner, name: value})
                    if could_train is not None:
                        could_train(changed, strategy)
                except VlafitError as error:
                    errors.append(str(error))
            texts += [*errors, *[""] * (len(corners) - len(errors))]
            if len(errors) == len(corners):
                # The fault of a value itself also occurs with all other names at their opposite ends.
                faults.setdefault(errors[-1 if value == dimension.ends()[0] else 0], f"{name} = {value!r}")
    if faults:
        own = _own_fault(recipe, could_train)
        if own is not None and set(texts) == {str(own)}:
            raise own
        listed = "\n".join(f"- {at}: {fault}".replace("\n", "\n  ") for fault, at in faults.items())
        raise ConfigError(f"{where}: invalid values in [search]:\n{listed}")


def _own_fault(recipe: Recipe, could_train: Callable[[Recipe, Strategy], None] | None) -> VlafitError | None:
    """Return the error of the recipe with its own values; None if it could train."""
    try:
        strategy = load_strategy(recipe.strategy)
        if could_train is not None:
            could_train(recipe, strategy)
    except VlafitError as error:
        return error
    return None


# --------------------------------------------------------------------------------------------- trials


def recipe_with(recipe: Recipe, values: Mapping[str, object], where: str) -> Recipe:
    """Return the recipe with fields replaced; names starting with `rule.` are skipped."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith(RULE):
            continue
        *sections, last = name.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return config.build(Recipe, config.merge_tables(asdict(recipe), nested), where)


def strategy_with(strategy: str, values: Mapping[str, object], where: str) -> str | None:
    """Return the TOML text of a strategy with the `rule.*` of `values` set; None if there are none.

    Raises ConfigError for a key that no rule of the strategy has.
    """
    wanted = {name.removeprefix(RULE): value for name, value in values.items() if name.startswith(RULE)}
    wanted = dict(sorted(wanted.items(), key=lambda item: item[0] != "mode"))  # `mode` decides the other keys
    if not wanted:
        return None
    content = config.load_toml(shipped.find("strategy", strategy), "strategy")
    for key, value in wanted.items():
        *sections, last = key.split(".")
        tables = [rule for rule in _rules(content) if not sections and last in _options(rule)]
        tables += [
            table for rule in _rules(content) if (table := _subtable(rule, sections)) and last in table
        ]
        if not tables:
            known = dict.fromkeys(n for rule in _rules(content) for n in (*_keys(rule), *_options(rule)))
            raise ConfigError(
                f"{where}: no rule of strategy {strategy!r} has the key {key!r}{did_you_mean(key, known)}"
            )
        for table in tables:
            table[last] = value
    return config.dump(content)


def _rules(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every table of every list called `rule`, including those of stages."""
    for name, value in content.items():
        tables = [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []
        if name == "rule":
            yield from tables
        else:
            for table in tables:
                yield from _rules(table)


def _options(rule: Mapping[str, Any]) -> tuple[str, ...]:
    """Return all options of a rule's adapter, including those left at their defaults."""
    return OPTIONS[rule["mode"]] if rule.get("mode") in METHODS else ()


def _subtable(rule: dict[str, Any], sections: list[str]) -> dict[str, Any] | None:
    table: Any = rule
    for section in sections:
        table = table.get(section) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else None


def _keys(rule: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in rule.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def trial(recipe: Recipe, values: Mapping[str, object]) -> tuple[Recipe, Strategy]:
    """Return the recipe and the strategy of a trial with these values, without writing them.

    Raises ConfigError or StrategyError for an invalid name or value.
    """
    changed = recipe_with(recipe, values, "recipe")
    where = f"strategy {changed.strategy!r}"
    text = strategy_with(changed.strategy, values, where)
    if text is None:
        return changed, load_strategy(changed.strategy)
    return changed, parse(tomllib.loads(text), name=Path(changed.strategy).stem, where=where)


def prepare(recipe: Recipe, values: Mapping[str, object], folder: Path) -> Recipe:
    """Write a trial's strategy.toml (if rules are searched) and recipe.toml, and return its recipe."""
    changed = replace(recipe_with(recipe, values, str(folder)), name=f"{recipe.name}-{folder.name}")
    text = strategy_with(changed.strategy, values, str(folder))
    if text is not None:
        files.write_atomic(folder / "strategy.toml", text)
        load_strategy(str(folder / "strategy.toml"))
        changed = replace(changed, strategy=str(folder / "strategy.toml"))
    files.write_atomic(folder / "recipe.toml", config.dump(changed))
    return changed
