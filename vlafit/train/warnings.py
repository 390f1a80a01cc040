"""What a recipe asks for that cannot be had in this run, though it trains without: said, and not refused."""

from collections import Counter
from collections.abc import Iterator

from vlafit.recipe import Recipe
from vlafit.train import stages
from vlafit.train.experiment import Data
from vlafit.train.stages import Place
from vlafit.tuning import Plan


def notices(recipe: Recipe, plan: Plan, data: Data, processes: int) -> tuple[str, ...]:
    """Return a sentence for each field of the recipe, or stage of its strategy, that does less than it says.

    `plan` and `data` are the recipe's, made; `processes` is how many train together.
    """
    return (*_few_episodes(recipe, data), *_long_warmups(recipe, plan), *_nothing_to_shard(recipe, processes))


def never_began(plan: Plan, reached: int, steps: int) -> str:
    """Return a sentence about the stages after `reached`, in which a run of `steps` ended; "" for none."""
    names = [stages.title(plan.at(n)) for n in range(reached + 1, len(plan.strategy.stages))]
    if not names:
        return ""
    return (
        f"strategy {plan.strategy.name!r}: training ended after step {steps} in "
        f"{stages.title(plan.at(reached))}, so that {'; '.join(names)} never began"
    )


def _few_episodes(recipe: Recipe, data: Data) -> Iterator[str]:
    wanted = recipe.data.episodes_per_task
    if not wanted:
        return
    for store, ids in zip(data.stores, data.training, strict=True):
        found = Counter(store.episodes[store.index(i)].task for i in ids)
        few = [f"{task} {count}" for task, count in found.items() if count < wanted]
        if few:
            more = f" and {len(few) - 3} more tasks" if len(few) > 3 else ""
            yield (
                f"data.episodes_per_task is {wanted}, but dataset {store.card.name!r} has fewer training "
                f"episodes of {len(few)} of its {len(found)} tasks ({', '.join(few[:3])}{more}): all are used"
            )


def _long_warmups(recipe: Recipe, plan: Plan) -> Iterator[str]:
    steps, asked = recipe.train.steps, recipe.optim.warmup_steps
    if asked >= steps:
        highest = recipe.optim.lr * steps / (asked + 1)
        yield (
            f"optim.warmup_steps {asked} is as long as the run of {steps} steps: the learning rate rises to "
            f"{highest:.3g} alone, and never reaches optim.lr {recipe.optim.lr:g}"
        )
    strategy = plan.strategy
    for number, stage in enumerate(strategy.stages[1:], 1):
        began = stage.begin.at_step(steps) if stage.begin else 0
        if began is None:
            continue
        lasts = stages.length(strategy.stages, steps, Place(number, began))
        if stage.warmup_steps >= lasts:
            yield (
                f"strategy {strategy.name!r}: the warm-up of {stages.title(plan.at(number))} takes "
                f"{stage.warmup_steps} steps, but the stage lasts {lasts}: it never has its full rate"
            )


def _nothing_to_shard(recipe: Recipe, processes: int) -> Iterator[str]:
    if recipe.train.sharding == "full" and processes == 1:
        yield "train.sharding = 'full' has no effect on one process: nothing is sharded"
