"""Arms of a comparison (one strategy, one learning rate, one seed) and the identity they share.

The identity is all that arms share: recipe, budget, data, base checkpoint and protocol. A folder holds arms
of one identity only.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlafit import checkpoints, config, rollout, shipped
from vlafit.compare.identity import digest, flat
from vlafit.datasets import episodes_hash
from vlafit.errors import ConfigError, VlafitError
from vlafit.recipe import Recipe
from vlafit.rollout import load_protocol
from vlafit.train.data import Data, open_validation_sets
from vlafit.train.preflight import check, meta_policy, plan_of
from vlafit.tuning import load_strategy

FORMAT = 1
UNLIMITED_STEPS = 999_999  # steps of an arm whose budget is time
# Fields that differ between arms, or do not change the result of a finished arm.
NOT_SHARED = ("name", "purpose", "strategy", "optim.lr", "train.seed", "train.threads", "train.trackers",
              "train.report", "train.keep", "train.save_every", "train.log_every", "data.workers",
              "eval.before", "eval.every", "eval.every_trials", "eval.workers", "eval.videos",
              "eval.samples")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of a comparison."""

    strategies: tuple[str, ...]
    """Names of shipped strategies, or paths."""
    seeds: tuple[int, ...] = (0, 1, 2)
    lr_grid: tuple[float, ...] = ()
    """Learning rates from which each strategy takes its best. Empty: the recipe's, for all."""
    grid_seeds: int = 1
    """Number of seeds that try all learning rates; the others run only at the chosen one."""
    jobs: int = 1
    """Arms that run at once; each gets its share of the CPU cores."""


@dataclass(frozen=True)
class Candidate:
    """A strategy to compare: its label, its name or path, and a hash of its file's content."""

    label: str
    strategy: str
    sha256: str
    adapts: bool = False
    """Whether any rule of any stage adds an adapter."""


@dataclass(frozen=True)
class Arm:
    """One training run."""

    candidate: Candidate
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder in arms/."""
        return f"{self.candidate.label}-lr{rate(self.lr)}-seed{self.seed}"


def rate(lr: float) -> str:
    """Return a learning rate as text, in the fewest digits that are exact."""
    short = f"{lr:g}"
    return short if float(short) == lr else repr(float(lr))


def candidates(names: Iterable[str]) -> tuple[Candidate, ...]:
    """Read the strategies and label each by its file name.

    Raises ConfigError for two files of the same name, and the errors of reading them.
    """
    by_label: dict[str, Candidate] = {}
    for name in names:
        strategy = load_strategy(name)
        adapts = any(rule.adapter is not None for stage in strategy.stages for rule in stage.rules)
        path = shipped.find("strategy", name)
        label = re.sub(r"[^\w.-]", "_", path.stem)
        if label in by_label:
            raise ConfigError(f"--strategies: {label!r} is named twice; give each file its own name")
        by_label[label] = Candidate(label, name, digest(config.load_toml(path, "strategy")), adapts)
    if not by_label:
        raise ConfigError("--strategies is empty; name at least two to compare")
    return tuple(by_label.values())


def with_budget(
    recipe: Recipe, *, steps: int | None = None, samples: int | None = None, seconds: float | None = None
) -> Recipe:
    """Return the recipe with its budget replaced; without a budget it keeps its own steps.

    Samples become steps, rounded up; seconds make the steps unlimited. Raises ConfigError for two budgets.
    """
    budgets = {"steps": steps, "samples": samples, "seconds": seconds}
    chosen = [name for name, value in budgets.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(f"--budget-{chosen[0]} and --budget-{chosen[1]}: give only one budget")
    for name, value in budgets.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--budget-{name} must be above 0, is {value}")
    train = recipe.train
    if train.batch_size == "auto":
        raise ConfigError('train.batch_size = "auto" could differ between arms: give it a number')
    if steps is not None:
        train = replace(train, steps=steps)
    elif samples is not None:
        train = replace(train, steps=-(-samples // train.batch_size))
    elif seconds is not None:
        train = replace(train, steps=UNLIMITED_STEPS, max_seconds=seconds)
    return replace(recipe, train=train)


def recipe_of(arm: Arm, recipe: Recipe, *, rollouts: bool) -> Recipe:
    """Return the arm's recipe. With `rollouts` it is evaluated after training, if the recipe asks for that.

    No arm is evaluated before training, because all arms start from the same policy, nor during training.
    """
    spec = recipe.eval
    evaluated = rollouts and bool(spec.protocol)
    return replace(
        recipe,
        name=arm.name,
        strategy=arm.candidate.strategy,
        optim=replace(recipe.optim, lr=arm.lr),
        train=replace(recipe.train, seed=arm.seed),
        eval=replace(
            spec,
            before=False,
            every=0,
            after=evaluated and spec.after,
            wrong_instruction=evaluated and spec.controls,
        ),
    )


def asks_for_rollouts(recipe: Recipe) -> bool:
    """Return whether arms are evaluated in closed loop after training."""
    return bool(recipe.eval.protocol) and recipe.eval.after


def require_possible(
    recipe: Recipe,
    strategies: Sequence[Candidate],
    learning_rates: Sequence[float],
    data: Data,
    *,
    play: bool,
) -> None:
    """Raise ConfigError, naming all faults, if an arm could not train or (with `play`) be evaluated.

    Every strategy is resolved against the policy on the meta device: no weights are read.
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
        for candidate in strategies:
            try:
                plan_of(recipe, load_strategy(candidate.strategy), policy, held_out=any(data.validation))
            except VlafitError as error:
                faults.append(f"--strategies {candidate.label}: {error}")
    if play and asks_for_rollouts(recipe):
        try:
            _check_protocol(recipe, data)
        except VlafitError as error:
            faults.append(str(error))
    if faults:
        listed = "\n".join(f"- {fault}".replace("\n", "\n  ") for fault in dict.fromkeys(faults))
        raise ConfigError(f"comparison not started; fix:\n{listed}")


def _check_protocol(recipe: Recipe, data: Data) -> None:
    base = recipe.policy.checkpoint
    past = checkpoints.read_lineage(checkpoints.place(base).path) if base else checkpoints.Lineage()
    rollout.preflight(
        recipe.eval.protocol,
        data.of(recipe.eval.embodiment).embodiment,
        wrong_instruction=recipe.eval.wrong_instruction,
        seeds=checkpoints.join_seeds(past.seeds, data.seeds()),
    )


# ------------------------------------------------------------------------------------------ identity


def identity(recipe: Recipe, seeds: Sequence[int], data: Data) -> dict[str, Any]:
    """Return everything that arms share and that decides their results, as plain values.

    `data` is the recipe's, split by the first seed. The validation sets are opened, so that a card without
    its dataset fails now.
    """
    sets = open_validation_sets(recipe.data, data)
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
