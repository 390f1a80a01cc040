"""What a comparison consists of: arms (one strategy, one learning rate, one seed), and what they share.

All that arms share (recipe, budget, data, base checkpoint, protocol) is the comparison's identity; a folder
holds arms of one identity alone.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlafit import checkpoints, config, rollout, shipped
from vlafit.compare.identity import digest, flat
from vlafit.errors import ConfigError, VlafitError
from vlafit.recipe import Recipe
from vlafit.rollout import load_protocol
from vlafit.train.data import Data, episodes_hash, open_validation_sets
from vlafit.train.preflight import check, meta_policy, plan_of
from vlafit.tuning import load_strategy

FORMAT = 1
ENDLESS = 999_999  # steps of an arm whose budget is time
# What differs between arms, or changes no result of an arm that has finished.
NOT_SHARED = ("name", "purpose", "strategy", "optim.lr", "train.seed", "train.threads", "train.trackers",
              "train.keep", "train.save_every", "train.log_every", "data.workers", "eval.before",
              "eval.every", "eval.every_trials", "eval.workers", "eval.videos")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to compare, and how."""

    strategies: tuple[str, ...]
    """Names of strategies that ship, or paths."""
    seeds: tuple[int, ...] = (0, 1, 2)
    lr_grid: tuple[float, ...] = ()
    """Learning rates of which every strategy takes its best. Empty: the recipe's, for all."""
    grid_seeds: int = 1
    """So many of the seeds try the learning rates; the others run at the chosen one."""
    jobs: int = 1
    """Arms that run at once; each gets its share of the CPU cores."""


@dataclass(frozen=True)
class Candidate:
    """A strategy to compare: its label, what `recipe.strategy` takes, and a hash of what its file says."""

    label: str
    given: str
    sha256: str
    adapts: bool = False
    """Whether one of its rules, in any stage, adds an adapter."""


@dataclass(frozen=True)
class Arm:
    """One training run."""

    candidate: Candidate
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The folder's name below arms/."""
        return f"{self.candidate.label}-lr{rate(self.lr)}-seed{self.seed}"


def rate(lr: float) -> str:
    """Write a learning rate in the fewest digits that tell it from every other."""
    short = f"{lr:g}"
    return short if float(short) == lr else repr(float(lr))


def candidates(given: Iterable[str]) -> tuple[Candidate, ...]:
    """Read the strategies, and label each by its file's name.

    Raises ConfigError for a label that occurs twice, and whatever reading them raises.
    """
    found: dict[str, Candidate] = {}
    for text in given:
        strategy = load_strategy(text)
        adapts = any(rule.adapter is not None for stage in strategy.stages for rule in stage.rules)
        path = shipped.find("strategy", text)
        label = re.sub(r"[^\w.-]", "_", path.stem)
        if label in found:
            raise ConfigError(f"--strategies: {label!r} is named twice; give each file a name of its own")
        found[label] = Candidate(label, text, digest(config.load_toml(path, "strategy")), adapts)
    if not found:
        raise ConfigError("--strategies is empty; name at least one, or two to compare")
    return tuple(found.values())


def with_budget(
    recipe: Recipe, *, steps: int | None = None, samples: int | None = None, seconds: float | None = None
) -> Recipe:
    """Return the recipe with its budget replaced; with none of the three it is the recipe's own steps.

    Samples become steps, rounded up; with seconds the steps have no end. Raises ConfigError for two budgets.
    """
    given = [
        name for name, v in (("steps", steps), ("samples", samples), ("seconds", seconds)) if v is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"--budget-{given[0]} and --budget-{given[1]}: give one budget")
    for name, value in (("steps", steps), ("samples", samples), ("seconds", seconds)):
        if value is not None and not value > 0:
            raise ConfigError(f"--budget-{name} must be above 0, is {value}")
    train = recipe.train
    if steps is not None:
        train = replace(train, steps=steps)
    elif samples is not None:
        train = replace(train, steps=-(-samples // train.batch_size))
    elif seconds is not None:
        train = replace(train, steps=ENDLESS, max_seconds=seconds)
    return replace(recipe, train=train)


def recipe_of(arm: Arm, recipe: Recipe, *, rollouts: bool) -> Recipe:
    """Return the arm's recipe. `rollouts` says whether it is judged at its end, as the recipe asks.

    No arm is evaluated before or while it trains: before, they are all the same policy.
    """
    spec = recipe.eval
    judged = rollouts and bool(spec.protocol)
    return replace(
        recipe,
        name=arm.name,
        strategy=arm.candidate.given,
        optim=replace(recipe.optim, lr=arm.lr),
        train=replace(recipe.train, seed=arm.seed),
        eval=replace(
            spec,
            before=False,
            every=0,
            after=judged and spec.after,
            wrong_instruction=judged and spec.wrong_instruction,
        ),
    )


def asks_for_rollouts(recipe: Recipe) -> bool:
    """Whether an arm that is trained is to be rolled out, too."""
    return bool(recipe.eval.protocol) and (recipe.eval.after or recipe.eval.wrong_instruction)


def require_possible(
    recipe: Recipe, found: Sequence[Candidate], learning_rates: Sequence[float], data: Data, *, play: bool
) -> None:
    """Raise ConfigError, naming all faults, where an arm could not train, or (with `play`) not be judged.

    Every strategy is resolved against the policy on the meta device: no weight is read.
    """
    faults = []
    for lr in learning_rates:
        try:
            check(replace(recipe, optim=replace(recipe.optim, lr=lr)), 1)
        except VlafitError as error:
            faults.append(str(error))
    try:
        policy = meta_policy(recipe, data)
    except VlafitError as error:
        faults.append(str(error))
    else:
        for one in found:
            try:
                plan_of(recipe, load_strategy(one.given), policy, held_out=any(data.validation))
            except VlafitError as error:
                faults.append(f"--strategies {one.label}: {error}")
    if play and asks_for_rollouts(recipe):
        try:
            _try_protocol(recipe, data)
        except VlafitError as error:
            faults.append(str(error))
    if faults:
        listed = "\n".join(f"- {fault}".replace("\n", "\n  ") for fault in dict.fromkeys(faults))
        raise ConfigError(f"nothing was begun, for this cannot be:\n{listed}")


def _try_protocol(recipe: Recipe, data: Data) -> None:
    base = recipe.policy.checkpoint
    past = checkpoints.read_lineage(checkpoints.place(base).path) if base else checkpoints.Lineage()
    rollout.preflight(
        recipe.eval.protocol,
        data.embodiment,
        wrong_instruction=recipe.eval.wrong_instruction,
        seeds=past.followed_by("", data.learned, data.seeds()).seeds,
    )


# ------------------------------------------------------------------------------------------ identity


def identity(recipe: Recipe, seeds: Sequence[int], data: Data) -> dict[str, Any]:
    """Return everything that arms share and that decides their results, as plain values.

    `data` is the recipe's, split by the first seed. Opens the validation sets, so that a card that leads
    nowhere is found now.
    """
    sets = open_validation_sets(recipe.data, data.embodiment, data.cards[0].robot.relative)
    base = recipe.policy.checkpoint
    return {
        "format": FORMAT,
        "recipe": flat(asdict(recipe), NOT_SHARED),
        "data": data.fingerprint,
        "data_seed": seeds[0],
        "validation_sets": {
            name: [episodes_hash(store, [], [e.id for e in store.episodes]) for store in stores]
            for name, stores in sets.items()
        },
        "base": checkpoints.digest(checkpoints.place(base).path) if base else "",
        "protocol": load_protocol(recipe.eval.protocol).sha256() if recipe.eval.protocol else "",
    }
